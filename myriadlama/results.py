"""Results of flex_generate.py: answers kept while it runs, a feather file per method, a table.

A record is what one method answered to one question: {"uuid", "method", "templates", "answers",
"generation", "confidence", "seconds", "tokens"}. Generation and confidence are a text and a number,
or with per_prompt lists with one for each template. Tokens are those of the question's own rows;
seconds are those of its batch, in proportion to the tokens. A key is what results depend on:
settings and SHA-256 of files.

Results of one number of templates share a key, progress files and a table. Those of another number
lie beside them under other names.
"""

import contextlib
import hashlib
import json
import os
import re
from types import SimpleNamespace

import numpy as np

from myriadlama import facts as builtin_facts
from myriadlama import loading, metrics, prompts
from myriadlama.file_checks import require_package
from nanorecall.files import atomic_write, dataset_sha256, only_writer, sha256_file
from nanorecall.metrics import print_table
from nanorecall.plots import errorbars, figure, write_figure
from nanorecall.records import check_kinds, read_lines, read_record, write_json
from nanorecall.settings import ConfigError, require, say
from nanorecall.stats import clustered_proportion, format_ci, holm, mcnemar, proportion

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Source files that decide what is generated.
PROGRAM = (
    "flex_generate.py",
    "myriadlama/batch.py",
    "myriadlama/decoding.py",
    "myriadlama/methods.py",
    "myriadlama/fusion.py",
    "myriadlama/questions.py",
    "myriadlama/prompts.py",
    "myriadlama/chat.py",
    "myriadlama/fact_files.py",
    "myriadlama/llama.py",
    "myriadlama/loading.py",
    "myriadlama/hugging_face.py",
    "myriadlama/gguf_files.py",
    "nanorecall/attention.py",
    "nanorecall/ops.py",
)
# Settings that do not change an answer, or whose results lie beside each other.
NOT_IN_KEY = (
    "method",
    "allow_manual_cross_attention",  # chooses a method
    "out_dir",
    "max_samples",
    "batch_size",
    "generation_config",  # allows a model, changes no answer
    "device",
    "num_threads",
    "lemmaize",
    "draw_table",
    "draw_mask",
)


# ---- names ---------------------------------------------------------------------------------------


def results_folder(config):
    """<out_dir>/<name of the model>"""
    return os.path.join(config.out_dir, model_name(config))


def model_name(config):
    """The last part of its path, however that is written."""
    return os.path.basename(os.path.abspath(config.model))


def templates_label(config):
    """The templates of a question in file names: all_a5, m3_a2, ..."""
    manual = "all" if config.num_manual < 0 else f"m{config.num_manual}"
    auto = "all" if config.num_auto < 0 else f"a{config.num_auto}"
    return f"{manual}_{auto}"


def file_name(config, method):
    """The name of a method's feather file, such as myriadlama_flex_m3_a5_xattn.feather."""
    templates = templates_label(config)
    if method == "flex_myriadlama":
        return f"myriadlama_flex_{templates}.feather"
    if method == "flex_myriadlama_xattn":
        return f"myriadlama_flex_{templates}_xattn.feather"
    return f"{method}_{templates}.feather"


# ---- answers on disk -----------------------------------------------------------------------------


def result_key(config, dtype):
    """Settings and hashes that results depend on."""
    key = {name: value for name, value in vars(config).items() if name not in NOT_IN_KEY}
    key["path"] = dataset_sha256(config.path or builtin_facts.__file__)
    key["shots_path"] = dataset_sha256(config.shots_path) if config.shots_path else ""
    key["model"] = model_name(config)  # with the fingerprint of its files
    key["dtype"] = str(dtype).removeprefix("torch.")
    hashes = [sha256_file(os.path.join(ROOT, name)) for name in PROGRAM]
    key["program"] = hashlib.sha256("".join(hashes).encode()).hexdigest()
    return key | loading.fingerprint(config.model)


def progress_file(folder, templates, rank):
    """The answers of one rank. templates: see templates_label."""
    return os.path.join(folder, f"progress_{templates}.{rank}.jsonl")


def start_progress(file, key):
    """Write the key of the records that follow."""
    # The last line may have been cut off by a crash, so begin a new one.
    file.write("\n" + json.dumps({"settings": key}) + "\n")


def append_records(file, records):
    """Append records to a progress file and flush them to disk."""
    for record in records:
        file.write(json.dumps(record) + "\n")
    file.flush()
    os.fsync(file.fileno())


def read_progress(folder, templates, key):
    """-> records that earlier runs with these templates left here, number of other lines.

    Other lines were cut off by a crash, are damaged, or belong to another tool. Raises ConfigError
    if an earlier run had another key.
    """
    records, n_other_lines = [], 0
    names = os.listdir(folder) if os.path.isdir(folder) else []
    for name in sorted(names):
        if not re.fullmatch(rf"progress_{templates}\.\d+\.jsonl", name):
            continue
        lines, n_unreadable = read_lines(os.path.join(folder, name), "dict")
        n_other_lines += n_unreadable
        has_key = False  # records before the first key could be anybody's
        for line in lines:
            if isinstance(line.get("settings"), dict):
                check_same_key(line["settings"], key, folder, templates)
                has_key = True
            elif has_key and is_record(line):
                records.append(line)
            else:
                n_other_lines += 1
    return records, n_other_lines


def check_same_key(found, key, folder, templates):
    names = [*key, *(name for name in found if name not in key)]
    different = [name for name in names if found.get(name) != key.get(name)]
    message = f"{folder} holds results with another {', '.join(different)}"
    advice = f"give another --out_dir, or delete progress_{templates}.* there"
    require(not different, f"{message}; {advice}", "out_dir")


def is_record(line):
    per_template = line.get("method") == "per_prompt"
    kinds = {
        "uuid": "text",
        "method": "text",
        "templates": ["text"],
        "answers": ["text"],
        "seconds": "number",
        "tokens": "number",
        "generation": ["text"] if per_template else "text",
        "confidence": ["number"] if per_template else "number",
    }
    try:
        check_kinds(line, kinds, "")
        json.dumps(line, ensure_ascii=False).encode()
    except (ConfigError, UnicodeEncodeError):  # half a character fits into no feather file
        return False
    # A product of probabilities may be rounded to a little more than 1.
    if not all(0 <= value < 1.01 for value in np.atleast_1d(line["confidence"])):
        return False
    n = len(line["templates"])
    return not per_template or len(line["generation"]) == len(line["confidence"]) == n


# ---- tables --------------------------------------------------------------------------------------

MEASURED = {"value": "number", "ci95": ["number"], "n": "size"}  # a proportion in table_*.json


def write_results(config, folder, asked, facts, pool, key, chosen, methods):
    """Write a feather file for each chosen method, and a table of all methods with these templates.

    methods: {name: Method}, in the order of the table. The table is of the facts asked; a file
    has all answers, so that a run of a few questions does not shorten it. pool: facts that examples
    are taken from.
    """
    templates = templates_label(config)
    fact_of = {fact["uuid"]: fact for fact in facts}
    latest = {}  # a question may have been answered twice, by runs that were killed
    for record in read_progress(folder, templates, key)[0]:
        if record["uuid"] in fact_of:
            latest[record["method"], record["uuid"]] = record
    table, reliability = f"table_{templates}", f"reliability_{templates}.png"
    # A run that is killed now must not leave the table of older files beside new ones.
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(folder, f"{table}.json"))
    columns, summaries = {}, {}
    for name, method in methods.items():
        if name in chosen:
            answered = records_of(latest, name, facts)
            path = os.path.join(folder, file_name(config, name))
            update_feather(path, to_columns(answered, fact_of))
        records = records_of(latest, name, asked)
        if len(records) == len(asked):
            columns[name] = to_columns(records, fact_of)
            summaries[name] = summarize(method, records, columns[name])
    correct = prompts.majority_baseline(pool, asked)
    baseline = proportion(sum(correct), len(correct))
    add_p_values(summaries, columns)
    alone = records_of(latest, "per_prompt", asked)
    template_metrics = compare_templates(alone, fact_of) if len(alone) == len(asked) else None
    print(findings(summaries, baseline))
    print_results(summaries, baseline, methods)
    metrics.print_confidence(summaries)
    if template_metrics:
        metrics.print_templates(template_metrics)
    result = {
        "config": {**key, "lemmas": prompts.has_lemmas()},
        "metrics": {"majority": baseline, **summaries},
        "templates": template_metrics,
        "by_slice": {},
        "examples": [],
    }
    write_json(os.path.join(folder, f"{table}.json"), result)
    written = [file_name(config, name) for name in chosen] + [f"{table}.json", reliability]
    title = table_title(key["model"], len(asked), templates)
    metrics.plot_reliability(os.path.join(folder, reliability), summaries, title)
    # Of one method a sentence says as much as a figure.
    if len(summaries) > 1:
        plot_table(os.path.join(folder, f"{table}.png"), summaries, baseline, title)
        written.append(f"{table}.png")
    say(f"wrote into {folder}: {', '.join(written)}")


def records_of(latest, method, facts):
    """The records of a method, in the order of the facts. latest: {(method, uuid): record}."""
    keys = [(method, fact["uuid"]) for fact in facts]
    return [latest[key] for key in keys if key in latest]


def to_columns(records, fact_of):
    """Records -> columns with a row for each generation. fact_of: {uuid: fact}."""
    columns = {"uuid": [], "templates": [], "answers": [], "prediction": [], "generation": []}
    for record in records:
        if isinstance(record["generation"], list):
            generations = record["generation"]
            templates = [[template] for template in record["templates"]]
        else:
            generations, templates = [record["generation"]], [record["templates"]]
        for text, used_templates in zip(generations, templates):
            columns["uuid"].append(record["uuid"])
            columns["templates"].append(used_templates)
            columns["answers"].append(record["answers"])
            columns["prediction"].append(prompts.prediction(fact_of[record["uuid"]], text))
            columns["generation"].append(text)
    return columns


def correctness(columns):
    return list(map(prompts.is_correct, columns["prediction"], columns["answers"]))


def summarize(method, records, columns):
    """Accuracy with its interval, number of templates, seconds and tokens per question, confidence.

    Answers to the same question are correlated, so they form one cluster.
    """
    correct, confidence = correctness(columns), []
    for record in records:
        confidence += np.atleast_1d(record["confidence"]).tolist()
    counts = [len(record["templates"]) for record in records]
    n = str(min(counts))
    if max(counts) > min(counts):
        n += f"-{max(counts)}"
    return {
        "accuracy": clustered_proportion(correct, columns["uuid"]),
        "templates": {"one": "1", "half": f"half of {n}", "all": n}[method.templates],
        "seconds": float(np.mean([record["seconds"] for record in records])),
        "tokens": float(np.mean([record["tokens"] for record in records])),
        **metrics.measure_confidence(confidence, correct, columns["uuid"]),
    }


def compare_templates(records, fact_of):
    """metrics.compare_templates of per_prompt's records; None if a question has one template."""
    correct, answers = [], []
    for record in records:
        fact, texts = fact_of[record["uuid"]], record["generation"]
        predictions = [prompts.prediction(fact, text) for text in texts]
        correct.append([prompts.is_correct(text, record["answers"]) for text in predictions])
        answers.append([prompts.scored_words(fact, text) for text in texts])
    if min(map(len, answers)) < 2:
        say("a question has one template only, so templates are not compared with each other")
        return None
    return metrics.compare_templates(correct, answers)


def add_p_values(summaries, columns):
    """Add the p value of McNemar's test against origin, the first template alone."""
    if "origin" not in summaries:
        return
    origin = correctness(columns["origin"])
    for name, summary in summaries.items():
        if name not in ("origin", "per_prompt"):  # per_prompt has several answers to a question
            summary["p"] = mcnemar(correctness(columns[name]), origin)["p"]


def findings(summaries, baseline):
    """What the table says, in sentences."""
    values = {name: summary["accuracy"]["value"] for name, summary in summaries.items()}
    best = [name for name in values if values[name] == max(values.values())]
    n, accuracy, interval = format_ci(summaries[best[0]]["accuracy"])
    text = f"{', '.join(best)}: accuracy {accuracy} (95% interval {interval}) of {n} answers"
    if len(summaries) > 1:
        text = f"Highest of {len(summaries)} methods: {text}"
    text += f"; the majority answer of the relation reaches {baseline['value']:.4f}."
    compared = [name for name in summaries if "p" in summaries[name]]
    if not compared:
        return text
    adjusted = holm([summaries[name]["p"] for name in compared])
    different = [name for name, p in zip(compared, adjusted) if p < 0.05]
    origin = values["origin"]
    text += f"\nThe first template alone (origin) reaches {origin:.4f}; different from it (McNemar,"
    return f"{text} Holm's correction, p < 0.05): {', '.join(different) or 'none'}."


def print_results(summaries, baseline, methods):
    rows = []
    for name, summary in summaries.items():
        cost = f"{summary['seconds']:.3f}", f"{summary['tokens']:.0f}"
        accuracy = format_ci(summary["accuracy"])
        p = f"{summary['p']:.2g}" if "p" in summary else ""
        label = name, summary["templates"], methods[name].fused_by
        rows.append((*label, *accuracy, p, *cost))
    label = "majority of the relation", "", "no model"
    rows.append((*label, *format_ci(baseline), "", "", ""))
    head = ("method", "templates", "fused by", "answers", "accuracy", "95% interval")
    print_table((*head, "p against origin", "seconds a question", "tokens a question"), rows)
    if prompts.has_lemmas():
        print("words are compared as lemmas")
    else:
        print("words are compared as they are: pip install simplemma")


def draw_table(path):
    """Draw a table_*.json again, as the .png beside it, without a model."""
    settings = {"model": "text", "num_manual": "number", "num_auto": "number"}
    table = read_record(path, {"config": settings, "metrics": {"majority": MEASURED}})
    summaries = dict(table["metrics"])
    baseline = summaries.pop("majority")
    check_kinds(summaries, {"*": {"accuracy": MEASURED}}, f"{path}: 'metrics'")
    require(summaries, f"{path} has no method to draw", "draw_table")
    for cell in (baseline, *(summary["accuracy"] for summary in summaries.values())):
        require(len(cell["ci95"]) == 2, f"{path}: 'ci95' must be two numbers", "draw_table")
    label = templates_label(SimpleNamespace(**table["config"]))
    title = table_title(table["config"]["model"], baseline["n"], label)
    figure_path = os.path.splitext(path)[0] + ".png"
    plot_table(figure_path, summaries, baseline, title)
    say(f"wrote {figure_path}")


def table_title(model, n_questions, templates):
    return f"{model}: {n_questions} questions, templates {templates}"


def plot_table(path, summaries, baseline, title):
    plt, fig, (axis,) = figure(1, 1, width=6)
    fig.set_size_inches(6.4, 1.6 + 0.28 * len(summaries))
    accuracies = [summary["accuracy"] for summary in summaries.values()]
    height = np.arange(len(summaries))[::-1]
    errorbars(axis, height, accuracies, horizontal=True, ls="none")
    label = "majority answer of the relation"
    axis.axvline(baseline["value"], ls="--", color="gray", lw=1, label=label)
    names = []
    for name, accuracy in zip(summaries, accuracies):
        names.append(f"{name}, n = {accuracy['n']}")
    axis.set_yticks(height, names)
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.set(xlabel="accuracy of the first word (95% interval)", xlim=(-0.02, 1.02), title=title)
    # Below the axis: inside, it would cover points near 0.
    fig.legend(loc="outside lower right")
    write_figure(fig, plt, path)


# ---- feather files -------------------------------------------------------------------------------


def write_feather(path, columns):
    import pyarrow as pa
    import pyarrow.feather as feather

    atomic_write(path, lambda f: feather.write_feather(pa.table(columns), f))


def update_feather(path, columns):
    """Write columns, unless the file has them already, and perhaps lemmas."""
    if os.path.exists(path):
        found = read_feather(path)
        if all(found.get(name) == values for name, values in columns.items()):
            return
    write_feather(path, columns)


def read_feather(path):
    import pyarrow as pa
    import pyarrow.feather as feather

    try:
        return feather.read_table(path).to_pydict()
    except (pa.ArrowException, OSError) as e:
        reason = " ".join(str(e).split())[:80]
        message = f"{path} cannot be read ({reason}); delete it and run again"
        raise ConfigError(message) from None


def add_lemmas(config, methods):
    """Add the columns predict_lemma and answer_lemmas to the feather files of these methods."""
    require_package("simplemma", "--lemmaize needs a package: pip install simplemma")
    folder = results_folder(config)
    names = [file_name(config, method) for method in methods]
    with only_writer(folder, "results there"):
        paths = [os.path.join(folder, name) for name in names]
        paths = list(filter(os.path.exists, paths))
        message = f"{folder} has none of {', '.join(names)}; generate first"
        require(paths, message, "out_dir")
        for path in paths:
            columns = read_feather(path)
            kinds = {"uuid": ["text"], "prediction": ["text"], "answers": [["text"]]}
            check_kinds(columns, kinds, path)
            columns["predict_lemma"] = list(map(prompts.normalise, columns["prediction"]))
            columns["answer_lemmas"] = []
            for answers in columns["answers"]:
                columns["answer_lemmas"].append(list(map(prompts.normalise, answers)))
            write_feather(path, columns)
            say(f"{path}: lemmas of {len(columns['uuid'])} predictions")
