"""fact_files.py and prompts.py: facts as users bring them, templates, shots, what is correct."""

import json
import os

import numpy as np
import pytest

import flex_generate
from myriadlama import fact_files, prompts, questions
from nanorecall.settings import ConfigError


def read(tmp_path, rows, name="facts.jsonl"):
    """Facts of a file with these rows, or with this text."""
    text = rows
    if not isinstance(rows, str):
        text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text(text, encoding="utf-8")
    return fact_files.read_facts(str(tmp_path / name))


# A row in each of the three formats.


def question(text="Who?", **changes):
    return {"question": text, "answers": ["Me"], **changes}


def fact(**changes):
    return {"subject": "S", "answers": ["A"], "manual_templates": ["[X] [Y]"], **changes}


def template(text="[X] [Y]", **changes):
    row = {"uuid": "a", "rel_uri": "P", "sub_ent": "S", "obj_aliases": ["A"], "is_manual": True}
    return {**row, "template": text, **changes}


# ---- the facts of the repo -----------------------------------------------------------------------


def test_the_facts_that_come_with_the_repo():
    facts = fact_files.read_facts("")
    relations = [f["relation"] for f in facts]
    assert len(set(relations)) >= 12
    assert min(relations.count(r) for r in set(relations)) >= 25
    for f in facts:
        assert len(f["manual"]) == len(f["auto"]) == 5
        assert len(set(f["manual"] + f["auto"])) == 10
    assert len({f["uuid"] for f in facts}) == len(facts)
    assert len({(f["relation"], f["subject"]) for f in facts}) == len(facts)


# ---- fact files ----------------------------------------------------------------------------------


def test_fact_files_in_three_formats(tmp_path):
    csv = (
        "uuid,rel_uri,sub_ent,obj_aliases,template,is_manual\n"
        'a,P1,Paris,"[""France"", ""FR""]",[X] is in [Y].,True\n'
        'a,P1,Paris,"[""France""]",Where is [X]? [Y].,False\n'
        'b,P1,Rome,"[""Italy""]",[X] is in [Y].,True\n'
    )
    paris, rome = read(tmp_path, csv, "own.csv")
    assert (paris["uuid"], rome["uuid"]) == ("a", "b")
    assert (paris["answers"], rome["answers"]) == (["France", "FR"], ["Italy"])
    assert (paris["manual"], paris["auto"]) == (["[X] is in [Y]."], ["Where is [X]? [Y]."])
    assert (len(rome["manual"]), len(rome["auto"])) == (1, 0)
    (found,) = read(tmp_path, [question("Who?", paraphrases=["Who is it?"])], "web.jsonl")
    assert found["manual"] == ["Who?", "Who is it?"] and found["answers"] == ["Me"]
    (found,) = read(tmp_path, [fact(subject="Rome")], "facts.jsonl")
    assert found["subject"] == "Rome" and found["manual"] == ["[X] [Y]"]


def test_the_facts_of_the_guide_can_be_read(tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with open(os.path.join(root, "GUIDE.md"), encoding="utf-8") as f:
        lines = [line for line in f if '"manual_templates": [' in line]
    lines += [line for line in flex_generate.__doc__.splitlines() if "manual_templates" in line]
    assert len(lines) == 2
    for line in lines:
        (found,) = read(tmp_path, [json.loads(line)])
        assert prompts.fill(found["manual"][0], "Peru") == "The capital of Peru is [MASK]."


@pytest.mark.parametrize(
    "row, message",
    [
        (fact(uuid="a", answers=[]), '"answers" is missing or empty'),
        (fact(uuid="a", manual_templates=["[X] is"]), r"needs \[X\] and \[Y\]"),
        (fact(uuid="a", manual_templates=[]), "has no template"),
        (fact(uuid="a", answers=[" "]), "none of them empty"),
        (
            {"uuid": "a", "sub_ent": "S", "template": "[X] [Y]", "is_manual": True},
            '"obj_aliases" is missing or empty',
        ),
        ({"foo": 1}, 'needs "template", "manual_templates" or "question"'),
    ],
)
def test_bad_rows_are_one_sentence(tmp_path, row, message):
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path, [row])
    assert "\n" not in str(error.value)


def test_facts_are_a_file(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="a.jsonl is no file"):
        fact_files.read_facts(str(tmp_path / "a.jsonl"))


def test_csv_files_of_other_programs(tmp_path):
    head = "subject,answers,manual_templates\n"
    (found,) = read(tmp_path, "\ufeff" + head + "S,A,[X] [Y]\n", "facts.csv")
    assert found["subject"] == "S"
    with pytest.raises(ConfigError, match="facts.csv:2: more cells than the 3 names of the first"):
        read(tmp_path, head + "S,A,[X] is, [Y]\n", "facts.csv")
    with pytest.raises(ConfigError, match="two columns have the same name"):
        read(tmp_path, "subject,subject,answers\n", "facts.csv")


def test_questions_without_a_uuid_are_numbered(tmp_path):
    uuids = (None, "", " ", 7, "x", None)
    rows = [question(f"Who {i}?", uuid=uuid) for i, uuid in enumerate(uuids)]
    assert [f["uuid"] for f in read(tmp_path, rows)] == ["0", "1", "2", "7", "x", "5"]
    found = read(tmp_path, [fact(), fact(uuid=None, subject="T")])
    assert [f["uuid"] for f in found] == ["0", "1"]  # the templates drawn depend on no path
    (found,) = read(tmp_path, [fact(uuid=0)])
    assert found["uuid"] == "0"


SAME_UUID = [
    ([fact(uuid="a"), fact(uuid="a", subject="T")], ":2: uuid 'a' is that of the fact at .*:1"),
    ([fact(uuid=1), fact(uuid="1", subject="T")], ":2: uuid '1' is that of the fact at .*:1, too"),
    ([fact(uuid="a"), fact(uuid="a ", subject="T")], "uuid 'a' is that of the fact at"),
    ([fact(uuid=1), fact(uuid=1.0, subject="T")], "uuid '1' is that of the fact at"),
    ([question("A?"), question("B?", uuid="0")], ":2: uuid '0' is that of the fact at .*:1"),
    (
        [template(), template("[Y] [X]", sub_ent="T")],
        ":2: uuid 'a' is that of another fact, at .*:1",
    ),
    ([template(), template("[Y] [X]", obj_aliases=["B"])], ":2: uuid 'a' is that of another fact"),
    ([template(), template("[Y] [X]", rel_uri="Q")], ":2: uuid 'a' is that of another fact"),
]
SAME_FACT = [
    ([fact(uuid="a"), fact(uuid="b")], ":2: the same fact as at .*:1; delete one of them"),
    ([question(), question("who? ")], ":2: the same fact as at .*:1"),
    ([template(), template()], ":2: the fact of .*:1 has this template already"),
]
IMPOSSIBLE_VALUES = [
    ([template(is_manual="maybe")], ":1: \"is_manual\" must be true or false, not 'maybe'"),
    ([template(is_manual=2)], ":1: \"is_manual\" must be true or false, not '2'"),
    ([fact(auto_templates=["[X] [MASK]"])], "the template 'S .MASK.' is there 2 times; delete the"),
    ([question("Who?") | {"paraphrases": ["Who was?", "Who?"]}], "template 'Who.' is there 2 tim"),
    ([fact(subject="\u200b ")], '"subject" holds nothing that can be read'),
    ([template(sub_ent=" ")], '"sub_ent" holds nothing that can be read'),
    ([fact(uuid=True)], "\"uuid\" must be text or a whole number, not 'True'"),
    ([fact(uuid=[1])], '"uuid" must be text or a whole number'),
    ([fact(subject=["S"])], '"subject" must be text'),
    ([fact(uuid="\ud800")], '"uuid" holds half a character'),
    ([fact(answers=["\u200b"])], "in which there is nothing to read"),
    ([fact(answers=[1945])], '"answers" must be a list of texts'),
    ([fact(answers="['sax' 'phone")], '"answers" is no list that can be read'),
    ([fact(answers="{'sax'}")], '"answers" is no list that can be read'),
]


@pytest.mark.parametrize("rows, message", SAME_UUID + SAME_FACT + IMPOSSIBLE_VALUES)
def test_repeated_facts_and_impossible_values_are_refused(tmp_path, rows, message):
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path, rows)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [True, "yes", "True", 1, "1.0", 1.0, " true "])
def test_templates_that_are_manual(tmp_path, value):
    (found,) = read(tmp_path, [template(is_manual=value)])
    assert (len(found["manual"]), len(found["auto"])) == (1, 0)


@pytest.mark.parametrize("value", [False, "no", "FALSE", 0, "0", 0.0])
def test_templates_that_are_automatic(tmp_path, value):
    (found,) = read(tmp_path, [template(is_manual=value)])
    assert (len(found["manual"]), len(found["auto"])) == (0, 1)


@pytest.mark.parametrize(
    "text, answers",
    [
        ("1945", ["1945"]),
        ("true", ["true"]),
        ('["a", "b"]', ["a", "b"]),
        ("('a',)", ["a"]),
        ("['sax' 'saxophone']", ["sax", "saxophone"]),
        ("['sax'\n 'saxophone']", ["sax", "saxophone"]),
        ("['sax', 'saxophone']", ["sax", "saxophone"]),
        ("['O\\'Neill' \"D'Arcy\"]", ["O'Neill", "D'Arcy"]),
        ("(I Can't Get No) Satisfaction", ["(I Can't Get No) Satisfaction"]),
        ("O'Neill", ["O'Neill"]),
    ],
)
def test_answers_may_be_json_python_or_plain_text(text, answers):
    assert fact_files.parse_list(text, "f.csv:2", "answers") == answers


# ---- templates and shots -------------------------------------------------------------------------


def test_templates_are_filled_with_the_subject_or_with_nothing():
    assert prompts.fill("[X] is [Y].", "[Y]") == "[Y] is [MASK]."
    paris = {"uuid": "u", "relation": "r", "subject": "Paris"}
    paris |= {"manual": ["[X] is in [Y]."], "auto": ["Where is [X]? [Y]."]}
    config = flex_generate.Config(num_manual=1)
    ((asked,),) = questions.make_batches([paris], config)
    assert asked.texts == ["Paris is in [MASK].", "Where is Paris? [MASK]."]
    assert asked.priors == ["is in [MASK].", "Where is ? [MASK]."]
    assert asked.is_manual.tolist() == [True, False]
    ((whole,),) = questions.make_batches([{**paris, "subject": ""}], config)
    assert whole.priors == ["", ""]


def test_questions_with_the_same_prefix_share_a_batch():
    """However many templates they have. Manual ones are told apart for each question."""
    asked = []
    for uuid, n_manual, n_auto in (("a", 1, 2), ("b", 1, 1), ("q", 1, 0), ("c", 2, 5), ("d", 3, 0)):
        # The instruction before a whole question is another one.
        fact = {"uuid": uuid, "relation": "r", "subject": "" if uuid == "q" else "S"}
        fact["manual"] = [f"m{i} [X] [Y]" for i in range(n_manual)]
        fact["auto"] = [f"a{i} [X] [Y]" for i in range(n_auto)]
        asked.append(fact)
    batches = questions.make_batches(asked, flex_generate.Config(batch_size=2))
    uuids = [[prompted.fact["uuid"] for prompted in batch] for batch in batches]
    assert uuids == [["a", "b"], ["c", "d"], ["q"]]
    assert [prompted.is_manual.tolist() for prompted in batches[1]] == [
        [True, True, False, False, False, False, False],
        [True, True, True],
    ]


def test_manual_templates_never_fill_up_automatic_ones():
    """Upstream's slip: with 3 manual ones asked for, the other two counted as automatic."""
    manual = [f"m{i} [X] [Y]" for i in range(5)]
    auto = [f"a{i} [X] [Y]" for i in range(5)]
    asked = {"subject": "S", "manual": manual, "auto": auto}
    templates, is_manual = prompts.select_templates(asked, 3, 2, np.random.default_rng(0))
    assert [template[0] for template in templates] == ["m", "m", "m", "a", "a"]
    assert is_manual.tolist() == [True, True, True, False, False]


def test_the_prefix_of_questions_begins_with_an_instruction():
    assert prompts.few_shot_prefix([], True).startswith("Answer the question")


def test_no_question_is_among_its_own_shots():
    pool = []
    for i, subject in enumerate("abc"):
        shot = {"uuid": f"p{i}", "relation": "r", "subject": subject}
        pool.append({**shot, "manual": ["[X] [Y]"], "auto": [], "answers": [subject]})
    left = prompts.exclude(pool, [{**pool[1], "uuid": "other"}])
    assert [f["subject"] for f in left] == ["a", "c"]
    message = "the pool has 2 facts that are not asked, too few for 3 shots"
    with pytest.raises(ConfigError, match=message):
        prompts.sample_few_shot(left, {"r"}, 3, np.random.default_rng(0))


@pytest.mark.parametrize("has_pool", [False, True])
def test_mixed_shots_are_the_same_for_all_and_ask_the_same_questions(tmp_path, has_pool):
    """Of any relation, from the facts that are not asked, or from the whole pool."""

    def write(name, relations, size):
        rows = []
        for relation in relations:
            for i in range(size):
                rows.append(fact(relation=relation, subject=f"{name} {relation} {i}"))
        read(tmp_path, rows, name)
        return str(tmp_path / name)

    settings = {"path": write("asked.jsonl", "abcde", 8), "num_shots": 3, "max_samples": 9}
    if has_pool:
        settings["shots_path"] = write("pool.jsonl", "fgab", 4)
    asked, _, pool, own = questions.choose_facts(flex_generate.Config(**settings))
    config = flex_generate.Config(**settings, shots="mixed")
    mixed_asked, _, mixed_pool, mixed = questions.choose_facts(config)
    assert mixed_asked == asked and list(mixed) == list(own)
    # The majority of a relation is counted in the same facts.
    assert mixed_pool == pool and len(pool) == (16 if has_pool else 15)
    shots = mixed["a"]
    assert all(examples == shots for examples in mixed.values())
    assert len({shot["subject"] for shot in shots}) == 3
    assert all(shot["subject"].startswith("pool" if has_pool else "asked") for shot in shots)
    relations, most = set(), 0
    for seed in range(20):
        config = flex_generate.Config(**settings, shots="mixed", seed=seed)
        drawn = {shot["relation"] for shot in questions.choose_facts(config)[3]["a"]}
        relations |= drawn
        most = max(most, len(drawn))
    assert relations == set("fgab" if has_pool else "abcde") and most == 3


def test_a_shot_in_other_templates_or_letters_gives_the_answer_away(tmp_path):
    asked = read(tmp_path, [fact(subject="New York", manual_templates=["[X] is [Y]"])])
    pool = read(tmp_path, [fact(subject="new  york"), fact(subject="Rome")], "pool.jsonl")
    assert [f["subject"] for f in prompts.exclude(pool, asked)] == ["Rome"]
    asked = read(tmp_path, [question("Who?")])
    pool = read(tmp_path, [question("who? "), question("Where?")], "pool.jsonl")
    assert [f["manual"] for f in prompts.exclude(pool, asked)] == [["Where?"]]


def test_a_shot_under_another_name_of_the_relation_gives_the_answer_away(tmp_path):
    asked = read(tmp_path, [fact(subject="Japan", relation="capital", answers=["Tokyo"])])
    pool = [fact(subject="Japan", relation="P36", answers=["Kyoto", "tokyo"])]
    pool.append(fact(subject="Japan", relation="P38", answers=["yen"]))
    left = prompts.exclude(read(tmp_path, pool, "pool.jsonl"), asked)
    assert [f["answers"] for f in left] == [["yen"]]


def test_others_fill_up_where_a_pool_has_too_few_of_a_relation(tmp_path, capsys):
    pool = [fact(subject=f"s{i}", relation="a", answers=[str(i)]) for i in range(5)]
    pool.append(fact(subject="t", relation="b", answers=["t"]))
    pool = read(tmp_path, pool, "pool.jsonl")
    examples = prompts.sample_few_shot(pool, ["a", "b", "c"], 3, np.random.default_rng(0))
    relations = {name: [f["relation"] for f in shots] for name, shots in examples.items()}
    assert relations == {"a": ["a"] * 3, "b": ["b", "a", "a"], "c": relations["c"]}
    assert len({f["subject"] for f in examples["c"]}) == 3
    assert "fewer than 3 facts of 'b', 'c'; others fill up" in capsys.readouterr().out


def test_a_fact_in_several_rows_is_no_example_of_itself(tmp_path):
    """One row for each template. Facts without a relation are the same if they share an answer."""
    rows = []
    for subject, answer in (("Japan", "Tokyo"), ("France", "Paris"), ("Italy", "Rome")):
        for text in ("[X] has the capital [Y]", "[X]'s capital is [Y]", "[X] is ruled from [Y]"):
            rows.append(fact(subject=subject, answers=[answer], manual_templates=[text]))
    rows.append(fact(subject="Japan", answers=["yen"], manual_templates=["[X] pays in [Y]"]))
    facts = read(tmp_path, rows)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        examples, asked = prompts.split_few_shot(facts, 2, rng)
        shown = {(f["subject"], *f["answers"]) for f in examples[""]}
        left = {(f["subject"], *f["answers"]) for f in asked}
        assert len(shown) == 2 and len(left) == 2 and not shown & left
    with pytest.raises(ConfigError, match="'' has 4 different facts, too few for 4 shots and a q"):
        prompts.split_few_shot(facts, 4, np.random.default_rng(0))


def test_a_paraphrase_of_a_question_is_no_example_of_it(tmp_path):
    asked = read(tmp_path, [question("Who wrote Hamlet?")])
    other = question("Who is the author of Hamlet?", paraphrases=["who wrote  Hamlet?"])
    pool = read(tmp_path, [other, question("Where?")], "pool.jsonl")
    assert [f["manual"] for f in prompts.exclude(pool, asked)] == [["Where?"]]
    assert prompts.answered_identities(other | asked[0]) == {("", "who wrote hamlet?", "")}


# ---- what is correct -----------------------------------------------------------------------------


def test_is_correct_matches_whole_words():
    assert prompts.is_correct("Paris,", ["Paris"])
    assert prompts.is_correct("New York", ["York"])
    assert not prompts.is_correct("New", ["New York"])
    assert not prompts.is_correct("Parisian", ["Paris"])
    assert not prompts.is_correct("word", [" "])
    assert not prompts.is_correct("", ["no"])


def test_is_correct_is_symmetric_in_word_forms():
    """Both are correct with simplemma, which has lemmas, and neither without it."""
    singular = prompts.is_correct("cities", ["city"])
    assert singular == prompts.is_correct("city", ["cities"])


@pytest.mark.parametrize(
    "said, answer",
    [
        ("Caf\u00e9", "Cafe\u0301"),
        ("O\u2019Neill", "O'Neill"),
        ("O'Neill", "O\u2019Neill"),
        ("Jean\u2011Paul", "Jean-Paul"),
        ("STRASSE", "Stra\u00dfe"),
        ("LEAVES", "leaves"),
        ("sax", "sax."),
        ("sax", '"sax"'),
        ("Yahoo", "Yahoo!"),
        ("U.S.", "U.S."),
        ("Par\u00adis", "Paris"),
        ("C++", "C++"),
    ],
)
def test_one_answer_in_two_spellings(said, answer):
    assert prompts.is_correct(said, [answer])


def test_punctuation_that_makes_another_answer():
    assert not prompts.is_correct("C", ["C++"]) and not prompts.is_correct("C", ["C#"])
    assert not prompts.is_correct("...", ["Paris..."]) and prompts.is_correct("...", ["..."])


@pytest.mark.parametrize(
    "subject, answers, prediction, is_correct",
    [
        ("S", ["New York", "NYC"], "New", False),  # the shortest answer has one word
        ("S", ["New York", "State of New York"], "New York", True),  # two words
        ("", ["New York", "NYC"], "New York City", True),  # a whole question: all words
    ],
)
def test_how_many_words_of_a_text_count(subject, answers, prediction, is_correct):
    asked = {"subject": subject, "answers": answers}
    assert prompts.prediction(asked, "New York City") == prediction
    assert prompts.is_correct(prediction, answers) == is_correct


# ---- the majority of a relation ------------------------------------------------------------------


def facts_of(answers):
    """Facts of one relation with these answers."""
    return [{"uuid": i, "relation": "r", "answers": [a]} for i, a in enumerate(answers)]


def test_the_majority_is_the_most_frequent_answer():
    assert prompts.majority_baseline([], facts_of("xxy")) == [True, True, False]


def test_the_majority_of_a_pool():
    """Of the two facts of the relation."""
    others = [{"uuid": i, "relation": "s", "answers": ["x"]} for i in range(3)]
    assert prompts.majority_baseline([*facts_of("yy"), *others], facts_of("xxy")) == [
        False,
        False,
        True,
    ]


def test_a_question_has_no_vote_in_its_majority():
    """Of two facts with different answers, each one's only other fact answers otherwise."""
    assert prompts.majority_baseline([], facts_of("xy")) == [False, False]
    assert prompts.majority_baseline([], facts_of("xyx")) == [True, False, True]
    alone = {"uuid": 9, "relation": "s", "answers": ["x"]}
    assert prompts.majority_baseline([], [*facts_of("xyx"), alone])[3] is False


def test_the_majority_of_two_files_that_number_their_rows():
    """Question 0 of the file of shots is not question 0 of the file of questions."""

    def numbered(uuid, answer):
        return {"uuid": uuid, "relation": "", "subject": "", "answers": [answer]}

    facts = [numbered("0", "New York"), numbered("1", "x")]
    pool = [numbered("0", "New York")]
    assert prompts.majority_baseline(pool, facts) == [True, False]
