"""choices.py and candidates.py: what a choice for each relation reaches, and that it has not seen
the fact that it answers."""

import json
import os

import numpy as np
import pytest

import eval as eval_script
import flex_generate as flex
from myriadlama import candidates, choices, fact_files, prompts, results
from nanorecall.files import sha256_file
from nanorecall.settings import ConfigError
from nanorecall.stats import mcnemar
from toy_facts import write_jsonl

GLOBAL, TIES = choices.GLOBAL, choices.TIES


def table_of(*rows):
    """Rows of words of 0 and 1, a word for each relation -> correct (C, N), relation (N,)"""
    correct = np.array([[int(digit) for digit in row.replace(" ", "")] for row in rows], float)
    relation = [np.full(len(word), number) for number, word in enumerate(rows[0].split())]
    return correct, np.concatenate(relation)


def accuracy(correct, relation, strengths):
    """By leave-one-out."""
    picked = [choices.choose(correct, relation, i, strengths) for i in range(len(relation))]
    return correct[picked, np.arange(len(relation))].mean()


# ---- choosing ------------------------------------------------------------------------------------


def test_a_candidate_that_is_always_right_in_a_relation_is_chosen_there():
    """The second one in the second relation. In all, the first one is best."""
    correct, relation = table_of("1111111 0000", "0000000 1111")
    assert choices.leave_one_out(correct, relation, GLOBAL).tolist() == [0] * 11
    assert choices.leave_one_out(correct, relation, TIES).tolist() == [0] * 7 + [1] * 4
    assert accuracy(correct, relation, choices.RULES["global"]) == 7 / 11
    assert accuracy(correct, relation, choices.RULES["relation"]) == 1
    assert accuracy(correct, relation, choices.RULES["nested"]) == 1


def test_a_candidate_that_is_right_on_the_fact_in_question_only_is_not_chosen_by_it():
    """Each of three candidates knows one fact, so that the other facts never choose it."""
    correct, relation = table_of("100", "010", "001")
    for strengths in choices.RULES.values():
        assert accuracy(correct, relation, strengths) == 0
    assert choices.hindsight(correct, relation).tolist() == [True, False, False]


def test_of_equals_in_the_relation_the_one_that_is_best_in_all_others_is_chosen():
    correct, relation = table_of("10 00000 1", "01 11111 0", "11 00000 0")
    picked = choices.leave_one_out(correct, relation, TIES)
    assert picked[7] == 1  # no other fact of its relation: the second has 6 right, the others 1, 2
    assert picked[0] == 1  # the second and the third know fact 1; in all, the second knows more
    assert picked[1] == 0  # the first and the third know fact 0, so that the second is out


def nested_by_hand(correct, relation, i, strengths):
    """choose() without a table of sums."""

    def best(known, j, prior_facts):
        scores = []
        for row in correct:
            in_all = sum(row[k] for k in known) / len(known)
            in_relation = sum(row[k] for k in known if relation[k] == relation[j])
            is_global = prior_facts == GLOBAL
            scores.append(in_all if is_global else in_relation + prior_facts * in_all)
        return int(np.argmax(scores))

    others = [j for j in range(len(relation)) if j != i]
    n_correct = []
    for prior_facts in strengths:
        n = 0
        for j in others:
            n += correct[best([k for k in others if k != j], j, prior_facts), j]
        n_correct.append(n)
    return best(others, i, strengths[int(np.argmax(n_correct))])


def random_table(seed):
    """Five candidates, some of them better in some of four relations."""
    rng = np.random.default_rng(seed)
    relation = np.sort(rng.integers(4, size=18))
    skill = rng.random((5, 4))
    return (rng.random((5, 18)) < skill[:, relation]).astype(float), relation


@pytest.mark.parametrize("seed", range(3))
def test_nested_leave_one_out_equals_one_by_hand(seed):
    correct, relation = random_table(seed)
    for strengths in choices.RULES.values():
        for i in range(len(relation)):
            found = choices.choose(correct, relation, i, strengths)
            assert found == nested_by_hand(correct, relation, i, strengths)


@pytest.mark.parametrize("seed", range(3))
def test_the_nested_rule_listens_to_other_relations_where_that_pays(seed):
    """The first candidate is best everywhere, but one other fact of a relation cannot show it."""
    rng = np.random.default_rng(seed)
    relation = np.repeat(np.arange(40), 2)
    skill = np.array([[0.9], *[[0.6]] * 5])
    correct = (rng.random((6, 80)) < skill).astype(float)
    reached = {rule: accuracy(correct, relation, s) for rule, s in choices.RULES.items()}
    assert reached["nested"] == reached["global"] > reached["relation"]


# ---- templates -----------------------------------------------------------------------------------


def asked_alone(answers, templates=None):
    """answers: for each fact a word, one letter for each template, upper case if it is correct.

    templates: for each fact their numbers; without it 0, 1, 2, ...
    """
    templates = templates or [list(range(len(word))) for word in answers]
    asked = np.zeros((len(answers), 1 + max(map(max, templates))), bool)
    correct = np.zeros_like(asked)
    for j, (word, numbers) in enumerate(zip(answers, templates)):
        asked[j, numbers] = True
        correct[j, numbers] = [letter.isupper() for letter in word]
    words = [[(letter,) for letter in word] for word in answers]
    return candidates.Alone(templates, words, asked, correct)


def votes(alone, j, known, n_votes=4):
    """As a word of 0 and 1."""
    found = candidates.votes_of_best(alone, j, known, n_votes)
    return "".join(str(int(vote)) for vote in found)


def test_votes_of_the_best_templates_by_hand():
    # Facts 1 to 3 know template 2 three times, template 0 twice, template 1 once.
    alone = asked_alone(["aBCa", "AbCx", "AxCx", "xBCx"])
    # In the order 2, 0, 1, 3: C; C a, a tie that the better template wins; C a B; C a B a.
    assert votes(alone, 0, [1, 2, 3]) == "1110"
    # Nobody knows anything, so the order is that of the fact: a; a B; a B C; a B C a.
    assert votes(alone, 0, []) == "0000"
    assert votes(asked_alone(["Ab"]), 0, []) == "1111"  # of two templates, two vote at most


def test_of_equal_answers_the_text_of_the_better_template_counts():
    """A lemma may know Polish, but not polish."""
    alone = asked_alone(["aB", "Xy", "Xy"], [[1, 0], [0, 1], [0, 1]])
    alone = alone._replace(words=[["polish", "polish"], *alone.words[1:]])
    assert votes(alone, 0, [1, 2], 2) == "11"


def test_a_template_that_no_other_fact_was_asked_in_counts_as_an_average_one():
    """Template 7 votes third: after 0 and 2, always right, and before 1, never right."""
    alone = asked_alone(["aDcD", "XyZ", "XyZ"], [[1, 7, 0, 2], [0, 1, 2], [0, 1, 2]])
    assert votes(alone, 0, [1, 2]) == "0011"  # c; c D; c D D; c D D a


def some_facts(relation):
    return [{"uuid": f"u{j}", "relation": f"r{r}"} for j, r in enumerate(relation)]


def test_no_choice_depends_on_the_fact_that_it_answers():
    """Of method, number of templates, which templates and strength. Fact by fact, its answers are
    replaced by random ones."""
    correct, relation = random_table(5)
    rng = np.random.default_rng(1)
    methods = {f"m{c}": row for c, row in enumerate(correct)}
    answers = ["".join(rng.choice(list("Abc"), 4)) for _ in relation]
    before = candidates.Candidates(some_facts(relation), methods, {"a": asked_alone(answers)})
    picked = choices.choose_all(before)
    n_changed = 0
    for i in range(len(relation)):
        changed = {label: row.copy() for label, row in methods.items()}
        for row in changed.values():
            row[i] = rng.integers(2)
        others = [*answers[:i], "".join(rng.choice(list("Abc"), 4)), *answers[i + 1 :]]
        after = candidates.Candidates(some_facts(relation), changed, {"a": asked_alone(others)})
        assert np.array_equal(
            np.delete(after.without(i), i, axis=1), np.delete(before.without(i), i, axis=1)
        )
        n_changed += (after.correct[:, i] != before.correct[:, i]).sum()
        found = choices.choose_all(after)
        for family in before.families:
            for rule in choices.RULES:
                assert found[family][rule][i] == picked[family][rule][i]
    assert n_changed > len(relation)


def test_the_templates_that_vote_on_a_fact_have_not_seen_it():
    """Template 0 is right on fact 0 only, template 1 on the others: fact 0 is lost."""
    alone = {"a": asked_alone(["Ab", "aB", "aB", "aB"])}
    table = candidates.Candidates(some_facts([0] * 4), {}, alone)
    assert table.correct[0].tolist() == [0, 1, 1, 1]
    # Without fact 1, too, nothing is known about fact 0, and its first template is taken.
    alone = {"a": asked_alone(["Ab", "aB", "xy"])}
    table = candidates.Candidates(some_facts([0] * 3), {}, alone)
    assert table.correct[0, 0] == 0 and table.without(1)[0, 0] == 1
    # Nor does a fact that helps to choose k choose its own templates.
    alone = {"a": asked_alone(["aB", "xy", "xy"])}
    table = candidates.Candidates(some_facts([0] * 3), {}, alone)
    assert table.without(2)[0, 0] == 0


# ---- results -------------------------------------------------------------------------------------


KEY = {"num_manual": -1, "num_auto": 5, "score_bias": -1.0, "chat": False, "shots": "relation"}
KEY |= {"model": "m", "file model.safetensors": "0", "program": "1", "seed": 0}
RELATIONS = {"tool": 6, "city": 4}


@pytest.fixture
def facts(tmp_path):
    """Ten facts of two relations with two templates each; "q" is always correct."""
    rows = []
    for relation, n in RELATIONS.items():
        for number in range(n):
            row = {"uuid": f"{relation}{number}", "relation": relation, "subject": f"s{number}"}
            row |= {"answers": ["q"], "manual_templates": ["[X] a [Y]."]}
            rows.append({**row, "auto_templates": [f"{relation} of [X]: [Y]."]})
    return write_jsonl(tmp_path / "facts.jsonl", rows)


def write_results(folder, facts, methods, **changes):
    """A folder as flex_generate.py leaves it. methods: {name: "110111 0010"}, right or wrong.

    Of per_prompt, 1: the first template alone is right; 2: the second one.
    """
    folder.mkdir(exist_ok=True)
    fact_of = {fact["uuid"]: fact for fact in fact_files.read_facts(facts)}
    texts = {"0": ["z", "z"], "1": ["q", "z"], "2": ["z", "q"]}
    for method, digits in methods.items():
        records = []
        for fact, digit in zip(fact_of.values(), digits.replace(" ", "")):
            templates = [prompts.fill(t, fact["subject"]) for t in fact["manual"] + fact["auto"]]
            text = texts[digit] if method == "per_prompt" else texts[digit][0]
            record = {"uuid": fact["uuid"], "templates": templates, "answers": ["q"]}
            records.append({**record, "generation": text})
        columns = results.to_columns(records, fact_of)
        name = results.file_name(flex.Config(), method)
        results.write_feather(str(folder / name), columns)
    key = {**KEY, "path": sha256_file(facts), **changes}
    table = {"config": key, "metrics": {"majority": {}, **{method: {} for method in methods}}}
    (folder / "table_all_a5.json").write_text(json.dumps(table))
    return str(folder)


def choose(*args):
    """python eval.py choices -> what it wrote."""
    eval_script.main(["choices", *map(str, args)])
    folders = [arg for arg in map(str, args) if not arg.startswith("--")]
    with open(os.path.join(folders[0], "choices.json")) as f:
        return json.load(f)


# All that flex knows in the second relation, avg knows in the first.
METHOD_ANSWERS = {"origin": "110000 1000", "avg": "111111 0000", "flex": "000000 1111"}


def test_the_command_says_what_a_choice_reaches(tmp_path, facts, capsys):
    folder = write_results(tmp_path / "m", facts, METHOD_ANSWERS)
    result = choose(folder, f"--path={facts}")
    methods = result["metrics"]["methods"]
    reached = {rule: cell["value"] for rule, cell in methods.items()}
    assert reached == {"global": 0.6, "relation": 1, "nested": 1, "hindsight": 1, "oracle": 1}
    assert result["metrics"]["origin"]["no choice"]["value"] == 0.3
    test = mcnemar([1] * 10, [1] * 3 + [0] * 7)  # of three tests, two are as this one
    assert methods["relation"]["against origin"] == {**test, "p_holm": 3 * test["p"]}
    assert result["metrics"]["origin"]["no choice"]["chosen"] == {"origin": 10}
    assert methods["relation"]["against global"]["only_a"] == 4
    assert methods["relation"]["against global"]["p_holm"] == 2 * 2 / 2**4  # of two tests
    assert methods["relation"]["chosen"] == {"avg": 6, "flex": 4}
    city = result["by_slice"]["relation"]["city"]["methods"]
    assert city["global"]["value"] == 0 and city["nested"]["chosen"] == {"flex": 4}
    assert result["metrics"]["candidates"]["flex"]["value"] == 0.4
    printed = capsys.readouterr().out
    assert "global) reaches 0.6000, one for each 1.0000, in between (nested) 1.0000" in printed
    assert "p < 0.05): none." in printed and "one relation" not in printed
    assert "templates" not in result["metrics"]


def test_the_best_templates_of_each_relation_vote(tmp_path, facts):
    """The first template knows the tools, the second one the cities, but for the last of them."""
    answers = {"per_prompt": "111111 2221", "avg": "000000 0001"}
    folder = write_results(tmp_path / "m", facts, answers)
    result = choose(folder, f"--path={facts}")
    reached = {rule: cell["value"] for rule, cell in result["metrics"]["templates"].items()}
    # One vote of the best: fact 9 is lost, and no other.
    assert reached["relation"] == reached["global"] == 0.9
    assert result["metrics"]["both"]["oracle"]["value"] == 1
    assert "against origin" not in result["metrics"]["templates"]["nested"]
    only = choose(folder, f"--path={facts}", "--methods=avg")
    assert list(only["metrics"]) == ["methods", "candidates"]


def test_paraphrases_of_whole_questions_are_ranked_by_position(tmp_path, capsys):
    """Their texts differ from question to question. The second paraphrase is always right."""
    rows = []
    for number in range(5):
        row = {"question": f"What is {number}?", "answers": ["q"]}
        rows.append({**row, "paraphrases": [f"Tell me what {number} is."]})
    facts = write_jsonl(tmp_path / "questions.jsonl", rows)
    folder = write_results(tmp_path / "m", facts, {"per_prompt": "22222"})
    metrics = choose(folder, f"--path={facts}")["metrics"]
    assert metrics["candidates"]["per_prompt, vote of the 1 best"]["value"] == 1
    note = "note: all facts are of one relation, so global, relation and nested choose alike"
    assert note in capsys.readouterr().out


def test_settings_of_several_folders_are_candidates(tmp_path, facts, capsys):
    """avg does not use the bias, so it counts once."""
    first = write_results(tmp_path / "m", facts, METHOD_ANSWERS)
    more = {"flex": "111111 0000", "avg": "000000 0000"}
    second = write_results(tmp_path / "bias", facts, more, score_bias=0.0, program="2")
    found = choose(first, second, f"--path={facts}")["metrics"]["candidates"]
    names = ["origin", "avg", "flex (score_bias=-1.0)", "flex (score_bias=0.0)"]
    assert list(found) == names and found["avg"]["value"] == 0.6
    assert "were made by 2 versions of flex_generate.py" in capsys.readouterr().out


def test_files_of_earlier_settings_are_left_out(tmp_path, facts, capsys):
    """flex_generate.py names in its table the methods that it has answers of with these settings.
    Files of other methods may be older than the table."""
    write_results(tmp_path / "m", facts, METHOD_ANSWERS)
    folder = write_results(tmp_path / "m", facts, {"flex": "000000 1111"}, score_bias=0.0)
    assert list(choose(folder, f"--path={facts}")["metrics"]["candidates"]) == ["flex"]
    note = "table_all_a5.json does not name origin, avg; their files there are left out"
    printed = capsys.readouterr().out
    assert note in printed and printed.count("note:") == 1
    refused("there is no result of avg in", folder, f"--path={facts}", "--methods=avg")


def test_of_several_origins_the_one_compared_with_is_named(tmp_path, facts, capsys):
    first = write_results(tmp_path / "m", facts, METHOD_ANSWERS)
    other = write_results(tmp_path / "mixed", facts, {"origin": "000000 0000"}, shots="mixed")
    origin = choose(first, other, f"--path={facts}")["metrics"]["origin"]["no choice"]
    assert origin["value"] == 0.3 and origin["chosen"] == {"origin (shots=relation)": 10}
    row = next(line for line in capsys.readouterr().out.splitlines() if "no choice" in line)
    assert row.rstrip().endswith("origin (shots=relation) (10 of 10)")


def test_facts_that_a_method_lacks_are_left_out(tmp_path, facts, capsys):
    folder = write_results(tmp_path / "m", facts, {**METHOD_ANSWERS, "max": "111111 1"})
    result = choose(folder, f"--path={facts}")
    assert result["metrics"]["methods"]["global"]["n"] == 7
    assert "note: 3 of 10 facts are left out: max lacks 3\n" in capsys.readouterr().out


def test_of_files_with_equal_settings_that_with_the_most_facts_counts(tmp_path, facts, capsys):
    first = write_results(tmp_path / "first", facts, {"flex": "111", "avg": "111111 0000"})
    second = write_results(tmp_path / "second", facts, {"flex": "000000 1111", "avg": "000000 000"})
    metrics = choose(first, second, f"--path={facts}")["metrics"]
    assert metrics["candidates"]["flex"]["n"] == 10
    assert metrics["candidates"]["flex"]["value"] == 0.4
    assert metrics["candidates"]["avg"]["value"] == 0.6
    assert "left out" not in capsys.readouterr().out
    # Of equals, the first one counts.
    third = write_results(tmp_path / "third", facts, {"flex": "111111 1111"})
    metrics = choose(second, third, f"--path={facts}", "--methods=flex")["metrics"]
    assert metrics["candidates"]["flex"]["value"] == 0.4


def test_results_of_flex_generate_are_read(tiny_llamas, tmp_path, facts, undrawn):
    """Its accuracies are those of its own table."""
    args = [f"--model={tiny_llamas / 'plain'}", f"--path={facts}", "--num_shots=1"]
    args += ["--max_new_tokens=2", "--device=cpu", f"--out_dir={tmp_path / 'out'}"]
    for method in ("origin", "avg", "per_prompt"):
        flex.main([*args, f"--method={method}"])
    folder = tmp_path / "out" / "plain"
    table = json.loads((folder / "table_all_a5.json").read_text())
    result = choose(folder, f"--path={facts}")
    found = result["metrics"]["candidates"]
    for method in ("origin", "avg"):
        assert found[method] == table["metrics"][method]["accuracy"]
    assert list(found)[2:] == [f"per_prompt, vote of the {k} best" for k in (1, 2)]


# ---- mistakes ------------------------------------------------------------------------------------


def refused(message, *args):
    with pytest.raises(ConfigError, match=message) as error:
        eval_script.main(["choices", *map(str, args)])
    assert "\n" not in str(error.value)


def test_mistakes_are_one_sentence(tmp_path, facts):
    folder = write_results(tmp_path / "m", facts, METHOD_ANSWERS)
    refused("name folders of results: python eval.py choices")
    refused("gone has no table_[*].json; name a folder of results", tmp_path / "gone", "--output=x")
    refused("m holds answers to other facts; name their file with --path", folder)
    refused("methods='flx' is unknown; did you mean flex", folder, "--methods=flex;flx")
    refused("there is no result of max in", folder, f"--path={facts}", "--methods=max")
    refused("there is no directory none; make it", folder, "--output=none/x")
    other = write_results(tmp_path / "other", facts, METHOD_ANSWERS, **{"file model": "1"}, seed=3)
    refused("differ in seed, file model; name folders of one model", folder, other)
    one = write_results(tmp_path / "one", facts, {"flex": "1"})
    refused("a choice needs two facts that all of these", one, f"--path={facts}")
    assert not os.path.exists(os.path.join(folder, "choices.json"))


def spoil_table(folder):
    (folder / "table_all_a5.json").write_text('{"config": {"path": 3}}')


def tear_table(folder):
    (folder / "table_all_a5.json").write_text('{"config": {"pa')


def tear_answers(folder):
    (folder / "flex_all_a5.feather").write_bytes(b"ARROW1")


def change_answers(change):
    def spoil(folder):
        path = str(folder / "flex_all_a5.feather")
        columns = results.read_feather(path)
        change(columns)
        results.write_feather(path, columns)

    return spoil


def rename_template(folder):
    path = str(folder / "per_prompt_all_a5.feather")
    columns = results.read_feather(path)
    columns["templates"][3] = []
    results.write_feather(path, columns)


SPOILT = {
    "'path' is 3, not a SHA-256": spoil_table,
    "table_all_a5.json .*": tear_table,
    "flex_all_a5.feather cannot be read": tear_answers,
    "has no 'prediction'": change_answers(lambda columns: columns.pop("prediction")),
    "'generation'.* is None, not text": change_answers(
        lambda columns: columns["generation"].__setitem__(3, None)
    ),
    "answers 'u', which is none of the facts": change_answers(
        lambda columns: columns["uuid"].__setitem__(0, "u")
    ),
    "answers a fact twice": change_answers(
        lambda columns: columns["uuid"].__setitem__(0, columns["uuid"][1])
    ),
    "'' is no template of fact 'tool1'": rename_template,
}


@pytest.mark.parametrize("message", SPOILT)
def test_damaged_results_are_refused_in_a_sentence(tmp_path, facts, message):
    answers = {**METHOD_ANSWERS, "per_prompt": "111111 2221"}
    folder = write_results(tmp_path / "m", facts, answers)
    SPOILT[message](tmp_path / "m")
    refused(message, folder, f"--path={facts}")
    assert not os.path.exists(os.path.join(folder, "choices.json"))
