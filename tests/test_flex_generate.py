"""flex_generate.py: its files, what is resumed and what is refused."""

import importlib.util
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pytest
import torch

import flex_generate as flex
from myriadlama import hugging_face, metrics, prompts, results
from myriadlama.methods import METHODS
from nanorecall.files import only_writer
from nanorecall.settings import ConfigError
from toys_llama import Q_PROJ, change_weights

# ---- whole runs ----------------------------------------------------------------------------------


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_results(folder):
    """{file name: columns} of every result table in a directory."""
    return {file.name: feather.read_table(file).to_pydict() for file in folder.glob("*.feather")}


def command_line(tiny_llamas, tmp_path, *more):
    """Six facts of two relations, four templates each, two of them manual; two facts are shots."""
    rows = []
    for i in range(6):
        row = {"uuid": f"u{i}", "relation": f"r{i % 2}", "subject": "abc"[i % 3] * 3}
        row |= {"answers": ["q"], "manual_templates": ["[X] a [Y].", "b [X] [Y]."]}
        row |= {"auto_templates": ["c [X] [Y].", "[X] d [Y]."]}
        rows.append(row)
    path = tmp_path / "facts.jsonl"
    write_jsonl(path, rows)
    return [
        f"--model={tiny_llamas / 'plain'}",
        f"--path={path}",
        f"--out_dir={tmp_path / 'out'}",
        "--num_shots=1",
        "--max_new_tokens=3",
        "--batch_size=2",
        "--device=cpu",
        *more,
    ]


def test_the_stored_figure_is_drawn_without_a_model(tmp_path):
    shutil.copy(os.path.join(results.ROOT, "figures", "methods.json"), tmp_path)
    flex.main(["--draw_table", str(tmp_path / "methods.json")])
    assert (tmp_path / "methods.png").stat().st_size > 5000


MEASURED = {"value": 0.5, "ci95": [0.4, 0.6], "n": 9}
HALF_AN_INTERVAL = {"accuracy": MEASURED | {"ci95": [0.4]}}


@pytest.mark.parametrize(
    "table, message",
    [
        (None, "table.json cannot be read"),
        ({"metrics": {}}, "table.json has no 'config'"),
        ({"metrics": {"majority": MEASURED, "flex": {}}}, "'flex' has no 'accuracy'"),
        ({"metrics": {"majority": MEASURED}}, "table.json has no method to draw"),
        ({"metrics": {"majority": MEASURED, "flex": HALF_AN_INTERVAL}}, "must be two numbers"),
    ],
)
def test_tables_that_cannot_be_drawn(tmp_path, table, message):
    path = tmp_path / "table.json"
    if table:
        if table["metrics"]:
            table["config"] = {"model": "a", "num_manual": 1, "num_auto": -1}
        path.write_text(json.dumps(table))
    with pytest.raises(ConfigError, match=message):
        flex.main([f"--draw_table={path}"])
    assert not (tmp_path / "table.png").exists()


def test_every_method_and_its_files(tiny_llamas, tmp_path, capsys):
    flex.main(command_line(tiny_llamas, tmp_path, "--method=all"))
    printed = capsys.readouterr().out
    assert all(method in printed for method in flex.METHODS)
    assert "majority of the relation" in printed
    folder = tmp_path / "out" / "plain"
    table = feather.read_table(folder / "myriadlama_flex_all_a5.feather").to_pydict()
    assert list(table) == ["uuid", "templates", "answers", "prediction", "generation"]
    assert len(table["uuid"]) == 4
    assert all(len(templates) == 4 for templates in table["templates"])
    assert not any(" " in prediction for prediction in table["prediction"])
    assert len(feather.read_table(folder / "per_prompt_all_a5.feather")["uuid"]) == 16
    drawn = (folder / "table_all_a5.png").read_bytes()
    assert len(drawn) > 5000
    table = json.loads((folder / "table_all_a5.json").read_text())
    (tmp_path / "methods.json").write_text(json.dumps(table))
    flex.main(["--draw_table", str(tmp_path / "methods.json")])
    assert (tmp_path / "methods.png").read_bytes() == drawn
    assert table["metrics"]["per_prompt"]["accuracy"]["n"] == 16
    assert "p" in table["metrics"]["flex"] and "p" not in table["metrics"]["origin"]
    counts = {name: cell.get("templates") for name, cell in table["metrics"].items()}
    assert (counts["origin"], counts["flex_adaptive"], counts["flex"]) == ("1", "half of 4", "4")
    assert table["templates"]["oracle"]["n"] == 4
    assert "pairs of templates that agree" in printed and "minus accuracy" in printed
    assert (folder / "reliability_all_a5.png").stat().st_size > 5000


def test_some_methods_in_one_run_answer_as_each_alone(tiny_llamas, tmp_path):
    some = command_line(tiny_llamas, tmp_path, "--method=avg, origin,avg")
    flex.main(some)
    together = read_results(tmp_path / "out" / "plain")
    assert together.keys() == {"avg_all_a5.feather", "origin_all_a5.feather"}
    for method in ("avg", "origin"):
        args = command_line(tiny_llamas, tmp_path, f"--method={method}")
        flex.main([*args, f"--out_dir={tmp_path / method}"])
        alone = read_results(tmp_path / method / "plain")
        assert alone == {f"{method}_all_a5.feather": together[f"{method}_all_a5.feather"]}


def test_questions_of_unequal_numbers_of_templates_in_one_batch(tiny_llamas, tmp_path, monkeypatch):
    """They are answered, and cost as many tokens, as in batches of one question."""
    args = command_line(tiny_llamas, tmp_path, "--method=all", "--num_auto=-1")
    path = tmp_path / "facts.jsonl"
    rows = read_jsonl(path)
    for i, row in enumerate(rows):
        row["auto_templates"] = [f"{letter} [X] [Y]." for letter in "defgh"[:i]]
    write_jsonl(path, rows)
    answer, n_questions, runs = flex.Run.answer, [], []

    def note_size(run, batch, *inputs):
        n_questions.append(len(batch))
        return answer(run, batch, *inputs)

    monkeypatch.setattr(flex.Run, "answer", note_size)
    for batch_size in (1, 8):
        out_dir = tmp_path / f"batches_of_{batch_size}"
        flex.main([*args, f"--batch_size={batch_size}", f"--out_dir={out_dir}"])
        lines = (out_dir / "plain" / "progress_all_all.0.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines if '"uuid"' in line]
        runs.append({(record["uuid"], record["method"]): record for record in records})
    assert n_questions == [1, 1, 1, 1, 2, 2]
    alone, together = runs
    assert alone.keys() == together.keys() and len(alone) == 4 * len(METHODS)
    for key, record in together.items():
        assert record["generation"] == alone[key]["generation"]
        assert record["confidence"] == pytest.approx(alone[key]["confidence"], rel=1e-3)
        assert record["tokens"] == pytest.approx(alone[key]["tokens"])
    rates = {}  # of each batch and method, what a token costs
    for (uuid, method), record in together.items():
        batch = int(uuid[1:]) % 2
        rates.setdefault((batch, method), []).append(record["seconds"] / record["tokens"])
    for first, second in rates.values():
        assert first == pytest.approx(second) and first > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method=avg,fex"], "method='fex' is unknown; did you mean flex"),
        (["--method=avg,"], "method='' is unknown; choose from origin"),
        (["--method=all,avg"], "method='all' is unknown"),
        (["--method=avg,origin", "--score_bias=0"], "method is avg,origin"),
        (["--method=flex,avg", "--prior_weight=0.5"], "method is flex,avg"),
        (["--method=flex,avg", "--allow_manual_cross_attention"], "it is method flex_m"),
    ],
)
def test_mistakes_in_a_list_of_methods(flags, message):
    with pytest.raises(ConfigError, match=message):
        flex.parse(flags)


def test_a_setting_of_one_of_the_methods_counts():
    assert flex.parse(["--method=avg,flex", "--score_bias=0"]).score_bias == 0


def test_lines_of_the_document_lie_side_by_side(tiny_llamas, tmp_path, capsys):
    """MyriadLAMA FlexAttention: one method, and a file for each choice of templates."""
    cross = "--allow_manual_cross_attention"
    lines = {
        "flex_all_a5": [],
        "flex_all_a5_xattn": [cross],
        "flex_m1_a1_xattn": ["--num_manual=1", "--num_auto=1", cross],
        "flex_m1_a5": ["--num_manual=1"],
    }
    for more in lines.values():
        flex.main(command_line(tiny_llamas, tmp_path, *more))
    folder = tmp_path / "out" / "plain"
    before = read_results(folder)
    assert set(before) == {f"myriadlama_{name}.feather" for name in lines}
    counts = [len(columns["templates"][0]) for columns in before.values()]
    assert sorted(counts) == [2, 3, 4, 4]
    # Of one method there is a sentence, and no figure.
    assert [file.name for file in folder.glob("table*.png")] == ["table_all_a5.png"]
    assert len(list(folder.glob("reliability*.png"))) == 3
    capsys.readouterr()
    flex.main(command_line(tiny_llamas, tmp_path, "--max_samples=2"))
    printed = capsys.readouterr().out
    assert "of 2 answers" in printed and "parameters" not in printed
    assert read_results(folder) == before


def test_a_table_says_what_it_finds():
    def cell(value):
        return {"value": value, "ci95": (value / 2, value), "n": 50}

    summaries = {
        "origin": {"accuracy": cell(0.5)},
        "avg": {"accuracy": cell(0.8), "p": 0.001},
        "max": {"accuracy": cell(0.4), "p": 0.03},
        "flex": {"accuracy": cell(0.4), "p": 0.04},
    }
    text = results.findings(summaries, cell(0.25))
    assert "Highest of 4 methods: avg: accuracy 0.8000 (95% interval 0.4000 - 0.8000)" in text
    assert text.endswith("p < 0.05): avg.")  # 0.03 * 2 is not below 0.05
    summaries["avg"]["p"] = 1.0
    assert results.findings(summaries, cell(0.25)).endswith("p < 0.05): none.")
    alone = results.findings({"flex": {"accuracy": cell(0.5)}}, cell(0.25))
    assert alone.startswith("flex: accuracy") and len(alone.splitlines()) == 1


def test_p_values_are_rounded_where_they_are_printed_only(capsys):
    """Seven questions that avg alone answers: p is 2 / 2**7."""

    def columns(words):
        return {"prediction": words, "answers": [["q"]] * len(words)}

    answers = {"origin": columns(["z"] * 7), "avg": columns(["q"] * 7)}
    cell = {"value": 0.5, "ci95": (0.4, 0.6), "n": 7}
    summaries = {}
    for name in answers:
        summaries[name] = {"accuracy": cell, "templates": "1", "seconds": 0.0, "tokens": 0.0}
    results.add_p_values(summaries, answers)
    assert summaries["avg"]["p"] == 2 / 2**7 and "p" not in summaries["origin"]
    results.print_results(summaries, cell, METHODS)
    printed = capsys.readouterr().out
    assert " 0.016 " in printed and "0.0156" not in printed


def test_metrics_of_templates_by_hand():
    """Four questions; the third template is left out where it is compared by number."""
    correct = [[True, False], [True, True], [False, False], [True, False, True]]
    answers = ["ab", "aa", "ab", "aba"]
    table = metrics.compare_templates(correct, [list(word) for word in answers])
    assert (table["best"]["template"], table["worst"]["template"]) == (1, 2)
    assert table["best"]["value"] == table["oracle"]["value"] == 0.75
    assert table["worst"]["value"] == 0.25 and table["range"] == 0.5
    assert table["std"] == pytest.approx(0.5 / 2**0.5)
    assert table["consistency"]["value"] == pytest.approx((0 + 1 + 0 + 1 / 3) / 4)
    # Each template knows another question.
    table = metrics.compare_templates([[True, False], [False, True], [False, False]], ["ab"] * 3)
    assert table["oracle"]["value"] == pytest.approx(2 / 3)
    assert table["best"]["value"] == table["worst"]["value"] == pytest.approx(1 / 3)
    assert metrics.agreement("aabb") == pytest.approx(2 / 6)


def test_a_template_alone_has_the_interval_of_the_table_of_methods():
    """Nine of ten questions. By hand, Wilson's interval with a sample size of 10 / (10 / 9) = 9:

    q = 1.959964^2 / 9 = 0.426829; middle (0.9 + 0.213415) / 1.426829 = 0.780342; half
    1.959964 * sqrt(0.09 / 9 + 0.426829 / 36) / 1.426829 = 0.203079.
    """
    table = metrics.compare_templates([[True, False]] * 9 + [[False, False]], [["a", "b"]] * 10)
    for key in ("best", "oracle"):
        assert table[key]["ci95"] == pytest.approx((0.577263, 0.983421), abs=2e-6)
    records = [{"templates": ["a"], "confidence": 1.0, "seconds": 0, "tokens": 0}] * 10
    columns = {"uuid": list(range(10)), "prediction": ["q"] * 9 + ["z"], "answers": [["q"]] * 10}
    of_methods = results.summarize(METHODS["origin"], records, columns)["accuracy"]
    assert {"template": 1, **of_methods} == table["best"]


@pytest.mark.parametrize("is_right", [True, False])
def test_metrics_of_templates_that_are_all_right_or_all_wrong(is_right):
    """Of equal templates, the first is named. Wilson's interval of two out of two by hand."""
    low = 2 / (2 + 1.959964**2)
    table = metrics.compare_templates([[is_right] * 3] * 2, [["a"] * 3, ["b"] * 3])
    for key in ("best", "worst", "oracle"):
        assert table[key]["value"] == is_right
        expected = [low, 1] if is_right else [0, 1 - low]
        assert table[key]["ci95"] == pytest.approx(expected, abs=1e-6)
    assert table["best"]["template"] == table["worst"]["template"] == 1
    assert (table["range"], table["std"], table["consistency"]["value"]) == (0, 0, 1)
    assert table["consistency"]["ci95"] == pytest.approx([low, 1], abs=1e-6)
    over = metrics.measure_confidence([1.0, 1.0], [is_right] * 2, ["u", "v"])
    assert over["overconfidence"]["value"] == over["calibration_error"] == 1 - is_right
    assert over["confidence"]["ci95"] == pytest.approx([low, 1], abs=1e-6)


def test_overconfidence_by_hand():
    """Two questions with two answers each: a question counts once, as one cluster."""
    table = metrics.measure_confidence([0.9, 0.7, 0.2, 0.6], [1, 0, 0, 1], ["u", "u", "v", "v"])
    assert table["confidence"]["value"] == pytest.approx(0.6)
    # 0.8 - 0.5 and 0.4 - 0.5
    assert table["overconfidence"]["value"] == pytest.approx(0.1)
    half = 1.959964 * np.std([0.3, -0.1], ddof=1) / 2**0.5
    assert table["overconfidence"]["ci95"] == pytest.approx([0.1 - half, 0.1 + half])
    assert table["calibration_error"] == pytest.approx((0.1 + 0.7 + 0.2 + 0.4) / 4)
    assert [cell["value"] for cell in table["calibration"]] == [0, 1, 0, 1]


def test_the_table_of_a_run_is_that_of_its_answers(tiny_llamas, tmp_path):
    """Two answers to one question and one to another one are made correct ones."""
    args = command_line(tiny_llamas, tmp_path, "--method=per_prompt")
    flex.main(args)
    folder = tmp_path / "out" / "plain"
    progress = folder / "progress_all_a5.0.jsonl"
    records = []
    for text in filter(None, progress.read_text().splitlines()):
        line = json.loads(text)
        if "uuid" in line:
            words = {"u4": ["q w", "Q.", "z q", "z"], "u5": ["z", "z", "z", "q"]}
            texts = words.get(line["uuid"], ["z"] * 4)
            line |= {"generation": texts, "confidence": [0.9, 0.8, 0.1, 0.4]}
        records.append(line)
    write_jsonl(progress, records)
    flex.main(args)
    table = json.loads((folder / "table_all_a5.json").read_text())
    n = table["templates"]["oracle"]["n"]
    assert table["templates"]["oracle"]["value"] == 2 / n
    assert table["templates"]["best"]["value"] == 1 / n
    assert table["templates"]["worst"]["template"] == 3
    assert table["templates"]["consistency"]["value"] == pytest.approx((n - 2 + 1 / 3 + 1 / 2) / n)
    expected = 0.55 - 3 / (4 * n)
    over = table["metrics"]["per_prompt"]["overconfidence"]["value"]
    assert over == pytest.approx(expected)


def test_one_question_has_no_interval(tiny_llamas, tmp_path, capsys):
    flex.main(command_line(tiny_llamas, tmp_path, "--method=per_prompt", "--max_samples=1"))
    printed = capsys.readouterr().out
    assert "minus accuracy" in printed and "inf" not in printed


def test_templates_that_cannot_be_compared_are_said_to_be(args, capsys):
    flex.main([*args, "--method=per_prompt", "--num_auto=0"])
    assert "a question has one template only, so templates are not" in capsys.readouterr().out


def test_mixed_shots_are_encoded_once(tiny_llamas, tmp_path, monkeypatch):
    """For both relations."""
    encode, n_tokens = flex.fusion.prefill_prefix, []

    def note_tokens(model, ids):
        n_tokens.append(len(ids))
        return encode(model, ids)

    monkeypatch.setattr(flex.fusion, "prefill_prefix", note_tokens)
    flex.main(command_line(tiny_llamas, tmp_path, "--method=origin", "--shots=mixed"))
    assert len(n_tokens) == 1


def test_long_answers_of_every_method_are_kept(tiny_llamas, tmp_path):
    """Their probability is 0 in float32."""
    flex.main(command_line(tiny_llamas, tmp_path, "--method=all", "--max_new_tokens=80"))
    table = json.loads((tmp_path / "out" / "plain" / "table_all_a5.json").read_text())
    assert set(flex.METHODS) < set(table["metrics"])


def test_a_model_that_computes_no_numbers_is_refused(args, plain_llama):
    change_weights(plain_llama, lambda weights: weights[Q_PROJ].mul_(np.nan))
    with pytest.raises(ConfigError, match="logits are not finite; check its files, or try --dtype"):
        flex.main(args)


def test_lemmas_are_added_to_the_tables(tiny_llamas, tmp_path, monkeypatch):
    args = command_line(tiny_llamas, tmp_path, "--method=all")
    flex.main(args)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--lemmaize needs a package: pip install simplemma"):
        flex.main([*args, "--lemmaize"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(prompts, "normalise", lambda text: [w.lower() for w in text.split()])
    flex.main([*args, "--lemmaize"])
    file = tmp_path / "out" / "plain" / "avg_all_a5.feather"
    table = feather.read_table(file).to_pydict()
    assert table["answer_lemmas"] == [[["q"]]] * 4
    flex.main(args)  # all is answered, so the lemmas stay
    assert feather.read_table(file).to_pydict() == table
    assert table["predict_lemma"] == [prompts.normalise(text) for text in table["prediction"]]
    feather.write_feather(pa.table({"uuid": ["a"], "answers": [["q"]]}), file)
    with pytest.raises(ConfigError, match="avg_all_a5.feather.*prediction"):
        flex.main([*args, "--lemmaize"])


def test_a_killed_run_continues_and_nothing_is_lost_or_doubled(tiny_llamas, tmp_path, capsys):
    args = command_line(tiny_llamas, tmp_path, "--method=all")
    flex.main(args)
    folder = tmp_path / "out" / "plain"
    progress = folder / "progress_all_a5.0.jsonl"
    whole = read_results(folder)
    lines = progress.read_text().splitlines()
    shutil.rmtree(folder)
    folder.mkdir()
    # Cut in the middle of a record.
    progress.write_text("\n".join(lines[:20]) + "\n" + lines[20][:30])
    flex.main(args)
    assert read_results(folder) == whole
    seen = []
    for line in progress.read_text().splitlines():
        record = json.loads(line) if line.endswith("}") else {}
        if "uuid" in record:
            seen.append((record["uuid"], record["method"]))
    assert len(seen) == len(set(seen)) == 4 * len(flex.METHODS)
    capsys.readouterr()
    flex.main(args)
    assert "parameters" not in capsys.readouterr().out  # all is there: no model is loaded
    message = "holds results with another max_new_tokens; give another --out_dir, or delete prog"
    with pytest.raises(ConfigError, match=message):
        flex.main([*args, "--max_new_tokens=2"])


def test_a_killed_run_leaves_no_table_of_older_files(tiny_llamas, tmp_path, monkeypatch):
    """It has written one file with other settings, and the table would speak of both."""
    args = command_line(tiny_llamas, tmp_path)
    folder = tmp_path / "out" / "plain"
    for method in ("origin", "avg"):
        flex.main([*args, f"--method={method}"])
    os.remove(folder / "progress_all_a5.0.jsonl")
    update_feather = results.update_feather

    def update_one(path, columns):
        if path.endswith("avg_all_a5.feather"):
            raise KeyboardInterrupt
        update_feather(path, columns)

    monkeypatch.setattr(results, "update_feather", update_one)
    with pytest.raises(KeyboardInterrupt):
        flex.main([*args, "--method=all", "--max_new_tokens=2"])
    assert not (folder / "table_all_a5.json").exists()
    monkeypatch.undo()
    flex.main([*args, "--method=all", "--max_new_tokens=2"])
    table = json.loads((folder / "table_all_a5.json").read_text())
    assert set(table["metrics"]) == {"majority", *METHODS}


def test_two_processes_never_answer_in_one_directory(tiny_llamas, tmp_path):
    args = command_line(tiny_llamas, tmp_path)
    folder = tmp_path / "out" / "plain"
    with only_writer(str(folder), "results there"):
        for more in ([], ["--lemmaize"] if prompts.has_lemmas() else []):
            with pytest.raises(ConfigError, match="another process is writing results there; wait"):
                flex.main([*args, *more])
        assert not os.listdir(folder)
    assert not (tmp_path / "out").exists()  # it stayed empty
    with pytest.raises(ConfigError, match="nowhere"):
        flex.main([*args, "--model=nowhere"])
    assert not (tmp_path / "out").exists()
    flex.main([*args, "--method=origin"])
    assert (folder / "table_all_a5.json").exists()


def test_a_method_that_is_there_is_not_run_again(tiny_llamas, tmp_path, monkeypatch):
    flex.main(command_line(tiny_llamas, tmp_path, "--method=origin"))

    def generate(batch):
        pytest.fail("origin was there")

    monkeypatch.setitem(flex.METHODS, "origin", flex.METHODS["origin"]._replace(generate=generate))
    flex.main(command_line(tiny_llamas, tmp_path, "--method=all"))
    tables = read_results(tmp_path / "out" / "plain")
    assert len(tables["hybrid_all_a5.feather"]["uuid"]) == 4


def test_ranks_share_the_questions(tiny_llamas, tmp_path, on_ranks):
    args = command_line(tiny_llamas, tmp_path, "--method=all")
    assert on_ranks(2, lambda rank: flex.main(args)) == [0, 0]
    two_ranks = read_results(tmp_path / "out" / "plain")
    shutil.rmtree(tmp_path / "out")
    flex.main(args)
    assert read_results(tmp_path / "out" / "plain") == two_ranks


def test_bfloat16_runs(tiny_llamas, tmp_path):
    flex.main(command_line(tiny_llamas, tmp_path, "--method=all", "--dtype=bfloat16"))


def test_a_model_with_a_penalty_answers_only_when_asked_to_do_without(
    args, plain_llama, tmp_path, capsys
):
    flex.main(args)
    expected = read_results(tmp_path / "out" / "plain")
    shutil.rmtree(tmp_path / "out")
    text = json.dumps({"repetition_penalty": 1.05, "temperature": 0.7})
    (plain_llama / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match="'repetition_penalty' 1.05 .* --generation_config plain"):
        flex.main(args)
    flex.main([*args, "--generation_config=plain"])
    note = "note: answers are decoded greedily, without the model's 'repetition_penalty' 1.05\n"
    assert note in capsys.readouterr().out
    assert read_results(tmp_path / "out" / "plain") == expected


def test_result_file_names():
    c = flex.Config(num_manual=3, num_auto=5)
    assert results.file_name(c, "flex_myriadlama_xattn") == "myriadlama_flex_m3_a5_xattn.feather"
    assert results.file_name(flex.Config(), "flex_myriadlama") == "myriadlama_flex_all_a5.feather"
    assert results.file_name(c, "flex") == "flex_m3_a5.feather"


def test_the_mask_draws_itself(tmp_path, capsys):
    sizes = ["--num_manual=3", "--num_auto=2", "--allow_manual_cross_attention"]
    flex.main(["--draw_mask", *sizes, f"--out_dir={tmp_path}"])
    printed = capsys.readouterr().out
    assert "M3 [ x  x  x  x  .  .  .  . ]" in printed
    assert "A2 [ x  .  .  .  .  x  .  . ]" in printed
    assert (tmp_path / "mask_manual_cross.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--draw_mask", "--model=m"], "model='m' has no effect: draw_mask asks no question"),
        (["--draw_mask", "--path=f.jsonl", "--num_shots=3"], "have no effect: draw_mask asks"),
        (["--draw_table=t.json", "--num_auto=2"], "num_auto=2 has no effect: draw_table asks no"),
    ],
)
def test_drawing_refuses_settings_of_questions(flags, message):
    with pytest.raises(ConfigError, match=message):
        flex.parse(flags)


def test_how_many_facts_are_examples(tiny_llamas, tmp_path, capsys):
    """Of six facts in two relations, num_shots=1 takes two; --shots_path takes none."""
    args = command_line(tiny_llamas, tmp_path, "--method=avg")
    flex.main(args)
    assert "\n2 of 6 facts are examples and are not asked; --shots_path " in capsys.readouterr().out
    rows = read_jsonl(tmp_path / "facts.jsonl")
    for row in rows:
        row["subject"] += " too"
    write_jsonl(tmp_path / "pool.jsonl", rows)
    flex.main([*args, f"--shots_path={tmp_path / 'pool.jsonl'}", f"--out_dir={tmp_path / 'b'}"])
    printed = capsys.readouterr().out
    assert "are examples" not in printed and "6 questions, 0 of them" in printed


def test_an_interrupted_run_says_how_to_go_on(tiny_llamas, tmp_path, monkeypatch, capsys):
    args = command_line(tiny_llamas, tmp_path, "--method=avg", "--batch_size=1")
    answer, n_batches = flex.Run.answer, []

    def interrupted(*inputs):
        n_batches.append(1)
        if len(n_batches) == 3:
            raise KeyboardInterrupt
        return answer(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(flex.Run, "answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            flex.main(args)
    assert "the same command goes on with what is answered so far" in capsys.readouterr().out
    flex.main(args)
    printed = capsys.readouterr().out
    assert "4 questions, 2 of them answered already" in printed and "goes on" not in printed


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, message",
    [
        (["--model=llama3.2_3b_it"], "download huggingface.co/meta-llama"),
        (["--model=nothing"], "is not here: give a directory, or one of smollm2"),
        (["--method=flexx"], "did you mean flex"),
        (["--num_shots=9"], "too few for 9 shots .*; lower num_shots, or .* --shots_path"),
        (["--num_manual=0", "--num_auto=0"], "leave no template"),
        (["--path=gone.jsonl"], "gone.jsonl does not exist"),
        (["--shots_path=gone.jsonl"], "shots_path=gone.jsonl does not exist"),
        (["--score=1"], "there is no setting 'score'"),
        (["facts.jsonl"], "'facts.jsonl' is not a flag"),
        (
            ["--method=avg", "--score_bias=0"],
            "score_bias=0.0 has no effect: method is avg",
        ),
        (
            ["--method=hybrid", "--template_positions=sequential"],
            "positions='sequential' has no effect",
        ),
        (["--method=flex", "--prior_weight=2"], "prior_weight=2.0 has no effect: method is flex"),
        (["--shots=mixed", "--num_shots=0"], "shots='mixed' has no effect: num_shots is 0"),
        (["--shots=any"], "shots='any' is unknown; choose from relation, mixed"),
        (
            ["--method=layer_output_avg", "--ensemble_layer=2"],
            "ensemble_layer=2, but the layers are 0 to 1",
        ),
        (["--method=ape", "--ape_temperature=0"], "temperature=0.0 must be between 0.01 and 100"),
        (["--method=ape", "--ape_scale=1e39"], "ape_scale=1e[+]39 must be between 0 and 100"),
        (["--method=flex", "--score_bias=1e39"], "score_bias=1e[+]39 must be between -100 and 100"),
        (["--method=contrast", "--prior_weight=1e39"], "prior_weight=1e[+]39 must be between 0"),
        (["--method=flex", "--allow_manual_cross_attention"], "has no effect: method is flex"),
        (["--method=all", "--allow_manual_cross_attention"], "it is method flex_myriadlama_xattn"),
    ],
)
def test_mistakes_are_one_sentence(tiny_llamas, tmp_path, more, message):
    with pytest.raises(ConfigError, match=message) as error:
        flex.main(command_line(tiny_llamas, tmp_path, *more))
    assert "\n" not in str(error.value)


def test_a_model_without_one_of_its_parts_is_refused(tiny_llamas, tmp_path):
    broken = shutil.copytree(tiny_llamas / "scaled", tmp_path / "broken")
    os.remove(sorted(broken.glob("*.safetensors"))[0])
    with pytest.raises(ConfigError, match="download all parts") as error:
        flex.main(command_line(tiny_llamas, tmp_path, f"--model={broken}"))
    assert "\n" not in str(error.value)


def test_a_damaged_result_is_refused(tiny_llamas, tmp_path, monkeypatch):
    args = command_line(tiny_llamas, tmp_path, "--method=avg", "--lemmaize")
    folder = tmp_path / "out" / "plain"
    folder.mkdir(parents=True)
    (folder / "avg_all_a5.feather").write_bytes(b"torn")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="cannot be read .*; delete it and run again"):
        flex.main(args)


# ---- results are bound to what they are made from ------------------------------------------------


def test_results_are_bound_to_their_fact_file(tiny_llamas, tmp_path):
    args = command_line(tiny_llamas, tmp_path, "--method=origin")
    flex.main(args)
    path = tmp_path / "facts.jsonl"
    path.write_text(path.read_text().replace('"q"', '"z"'))
    with pytest.raises(ConfigError, match="holds results with another path"):
        flex.main(args)


@pytest.fixture
def args(plain_llama, tmp_path):
    """The command line of a small run: one method, four facts of two templates."""
    rows = []
    for i in range(4):
        row = {"uuid": f"u{i}", "relation": "r", "subject": "abcd"[i], "answers": ["q"]}
        row |= {"manual_templates": ["[X] a [Y]."], "auto_templates": ["c [X] [Y]."]}
        rows.append(row)
    path = tmp_path / "facts.jsonl"
    write_jsonl(path, rows)
    options = ["--method=origin", "--num_shots=1", "--max_new_tokens=2", "--device=cpu"]
    return [f"--model={plain_llama}", f"--path={path}", f"--out_dir={tmp_path / 'out'}", *options]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "generation_config.json"]
)
def test_results_are_bound_to_the_files_of_the_model(plain_llama, args, name):
    flex.main(args)
    if name == "model.safetensors":
        change_weights(plain_llama, lambda weights: weights[Q_PROJ].mul_(1.01))
    elif name == "generation_config.json":
        os.remove(plain_llama / name)
    else:
        (plain_llama / name).write_text((plain_llama / name).read_text() + " ")
    with pytest.raises(ConfigError, match=f"holds results with another file {name}; give another"):
        flex.main(args)


def test_results_are_bound_to_dtype_and_program(args, monkeypatch):
    flex.main(args)
    with pytest.raises(ConfigError, match="holds results with another dtype"):
        flex.main([*args, "--dtype=bfloat16"])
    monkeypatch.setattr(results, "PROGRAM", results.PROGRAM[:-1])
    with pytest.raises(ConfigError, match="holds results with another program"):
        flex.main(args)


def test_the_key_of_a_result_has_all_files_of_a_sharded_model(plain_llama):
    """The facts that come with the repo are a part of the key, too."""
    (plain_llama / "model.safetensors").rename(plain_llama / "part.safetensors")
    index = {"metadata": {}, "weight_map": {Q_PROJ: "part.safetensors"}}
    (plain_llama / hugging_face.INDEX).write_text(json.dumps(index))
    key = results.result_key(flex.Config(model=str(plain_llama)), torch.float32)
    for name in ("part.safetensors", hugging_face.INDEX, "config.json"):
        assert f"file {name}" in key
    assert len(key["path"]) == 64


NO_RECORDS = {
    "seconds as text": lambda record: {**record, "seconds": "1"},
    "seconds that are no number": lambda record: {**record, "seconds": float("nan")},
    "a confidence above 1": lambda record: {**record, "confidence": 7.0},
    "a confidence below 0": lambda record: {**record, "confidence": -1},
    "half a character": lambda record: {**record, "generation": "\ud800"},
    "no generation": lambda record: {**record, "generation": None},
    "two generations": lambda record: {**record, "generation": ["q"]},
    "uuid a number": lambda record: {**record, "uuid": 3},
    "methods in a list": lambda record: {**record, "method": ["origin"]},
    "another method": lambda record: {**record, "method": "per_prompt"},
    "templates as text": lambda record: {**record, "templates": "x"},
    "templates a number": lambda record: {
        **record,
        "templates": 3,
        "method": "per_prompt",
        "generation": [],
    },
    "another tool's": lambda record: {"event": "of another tool"},
    "a list": lambda record: [record],
    "null": lambda record: None,
    "half a record": lambda record: json.dumps(record)[:40],
}


@pytest.mark.parametrize("spoil", NO_RECORDS.values(), ids=NO_RECORDS)
def test_lines_that_are_no_records_are_asked_again(args, tmp_path, capsys, spoil):
    flex.main(args)
    folder = tmp_path / "out" / "plain"
    progress = folder / "progress_all_a5.0.jsonl"

    def accuracy():
        table = json.loads((folder / "table_all_a5.json").read_text())
        return table["metrics"]["origin"]["accuracy"]

    before = accuracy()
    settings, first, *others = [line for line in progress.read_text().split("\n") if line]
    spoilt = json.dumps(spoil(json.loads(first)))
    progress.write_text("\n".join([settings, spoilt, *others]))
    (folder / "progress_all_a5.old.jsonl").write_text("no JSON")
    capsys.readouterr()
    flex.main(args)
    printed = capsys.readouterr().out
    assert "note: 1 lines of" in printed and "2 of them answered already" in printed
    assert accuracy() == before


def test_records_without_settings_are_asked_again(args, tmp_path, capsys):
    """Nobody knows which model made them."""
    flex.main(args)
    progress = tmp_path / "out" / "plain" / "progress_all_a5.0.jsonl"
    lines = [line for line in progress.read_text().split("\n") if line]
    for first in (b"", b'{"settings": 3}\n', b"\xff\xfe{\n"):
        progress.write_bytes(first + "\n".join(lines[1:]).encode())
        capsys.readouterr()
        flex.main(args)
        assert "0 of them answered already" in capsys.readouterr().out


@pytest.mark.parametrize("positions, letters", [("restart", 500), ("sequential", 250)])
def test_a_question_too_long_for_the_model_leaves_nothing(args, tmp_path, positions, letters):
    """Before the first is asked: a template, or all of them one after another, needs more."""
    path = tmp_path / "facts.jsonl"
    rows = read_jsonl(path)
    rows[3]["manual_templates"] = [f"[X] {a * letters} [Y]." for a in "ab"]
    write_jsonl(path, rows)
    more = ["--method=flex", f"--template_positions={positions}", "--num_shots=0", "--num_manual=2"]
    with pytest.raises(ConfigError, match="is longer than the 512 positions of this model"):
        flex.main([*args, *more])
    assert not (tmp_path / "out").exists()
