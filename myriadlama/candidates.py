"""Ways to answer all questions, from finished results of flex_generate.py; no model is needed.

A candidate is a method with its settings, or the vote of the k templates that are best in the
relation, each asked alone. choices.py chooses among them.

Letters: C candidates, N facts, T templates of all relations.
"""

import glob
import os
from collections import Counter
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from myriadlama import fact_files, prompts, results
from myriadlama import facts as builtin_facts
from myriadlama.methods import METHODS
from nanorecall.files import dataset_sha256
from nanorecall.records import check_kinds, read_record
from nanorecall.settings import one_of, require, say

# ---- files ---------------------------------------------------------------------------------------

# Settings of all methods in which results may differ.
COMMON = ("num_manual", "num_auto", "chat", "shots")
KEY = {"path": "hash", "num_manual": "number", "num_auto": "number"}
COLUMNS = {
    "uuid": ["text"],
    "templates": [["text"]],
    "answers": [["text"]],
    "prediction": ["text"],
    "generation": ["text"],
}


class Result(NamedTuple):
    """A feather file."""

    path: str
    method: str
    settings: dict  # those that the method uses and in which results may differ


def find_results(folders, methods):
    """-> [Result] of these methods, SHA-256 of the facts."""
    found, first, programs = [], None, set()
    for folder in folders:
        tables = sorted(glob.glob(os.path.join(glob.escape(folder), "table_*.json")))
        message = f"{folder} has no table_*.json; name a folder of results of flex_generate.py"
        require(tables, message, None)
        for table in tables:
            record = read_record(table, {"config": KEY, "metrics": "dict"})
            key = record["config"]
            first = first or (table, key)
            check_alike(table, key, *first)
            programs.add(str(key.get("program")))
            found += results_beside(table, record, methods)
    message = f"there is no result of {', '.join(methods)} in {', '.join(folders)}"
    require(found, message, "methods")
    if len(programs) > 1:
        say(f"note: these results were made by {len(programs)} versions of flex_generate.py")
    return found, first[1]["path"]


def results_beside(table, record, methods):
    """[Result] of the feather files beside a table that have its settings.

    A table names the methods that it has answers of. Files of others may be older than the table.
    """
    found, unnamed, key = [], [], record["config"]
    templates = SimpleNamespace(num_manual=key["num_manual"], num_auto=key["num_auto"])
    for method in methods:
        path = os.path.join(os.path.dirname(table), results.file_name(templates, method))
        names = (*COMMON, *METHODS[method].settings)
        settings = {name: key[name] for name in names if name in key}
        if method in record["metrics"] and os.path.exists(path):
            found.append(Result(path, method, settings))
        elif os.path.exists(path):
            unnamed.append(method)
    if unnamed:
        names = ", ".join(unnamed)
        say(f"note: {table} does not name {names}; their files there are left out")
    return found


def check_alike(table, key, first_table, first_key):
    """ConfigError unless two results have the same model, facts, seed and so on."""
    ignored = {"model", "program", "lemmas", *COMMON}
    for method in METHODS.values():
        ignored.update(method.settings)
    names = [name for name in {**first_key, **key} if name not in ignored]
    different = [name for name in names if key.get(name) != first_key.get(name)]
    message = f"{table} and {first_table} differ in {', '.join(different)}"
    require(not different, f"{message}; name folders of one model and set of facts", None)


def label_of(result, found):
    """The method, and those of its settings in which it differs from its other results."""
    different = []
    for name, value in result.settings.items():
        values = [other.settings.get(name) for other in found if other.method == result.method]
        if any(other != value for other in values):
            different.append(f"{name}={value}")
    return f"{result.method} ({', '.join(different)})" if different else result.method


def read_columns(result, uuids):
    """The checked columns of a feather file. uuids: of all facts."""
    path, columns = result.path, results.read_feather(result.path)
    check_kinds(columns, COLUMNS, path)
    once = result.method == "per_prompt" or n_facts(columns) == len(columns["uuid"])
    require(once, f"{path} answers a fact twice; delete it and run again", None)
    for uuid in columns["uuid"]:
        message = f"{path} answers {uuid!r}, which is none of the facts; delete it and run again"
        require(uuid in uuids, message, None)
    return columns


def read_longest(found, uuids):
    """-> [(Result, columns)]. A method with the same settings in two folders counts once: the file
    with the most facts, of equals the first."""
    kept, settings = {}, [(result.method, result.settings) for result in found]
    for result in found:
        columns = read_columns(result, uuids)
        first = settings.index((result.method, result.settings))
        if first not in kept or n_facts(columns) > n_facts(kept[first][1]):
            kept[first] = result, columns
    return list(kept.values())


def n_facts(columns):
    return len(set(columns["uuid"]))


def open_results(folders, config):
    """Folders of flex_generate.py -> Candidates. config: path and methods of EvalConfig."""
    methods = list(METHODS)
    if config.methods:
        methods = [name.strip() for name in config.methods.split(";")]
    for name in methods:
        one_of(SimpleNamespace(methods=name), METHODS, "methods")
    facts = fact_files.read_facts(config.path)
    found, facts_sha256 = find_results(folders, methods)
    message = f"{folders[0]} holds answers to other facts; name their file with --path"
    own_sha256 = dataset_sha256(config.path or builtin_facts.__file__)
    require(facts_sha256 == own_sha256, message, "path")
    uuids = {fact["uuid"] for fact in facts}
    tables = read_longest(found, uuids)

    answered = [set(columns["uuid"]) for _, columns in tables]
    common, n_all = set.intersection(*answered), len(set.union(*answered))
    asked = [fact for fact in facts if fact["uuid"] in common]
    message = f"{', '.join(folders)}: a choice needs two facts that all of these methods answered"
    require(len(asked) > 1, message, None)
    if len(asked) < n_all:
        lacking = []
        for result, columns in tables:
            if n_facts(columns) < n_all:
                lacking.append(f"{label_of(result, found)} lacks {n_all - n_facts(columns)}")
        left_out = f"{n_all - len(asked)} of {n_all} facts are left out"
        say(f"note: {left_out}: {', '.join(lacking)}")
    correct, alone = {}, {}
    for result, columns in tables:
        label = label_of(result, found)
        if result.method == "per_prompt":
            alone[label] = read_alone(result.path, columns, asked)
        else:
            is_correct = dict(zip(columns["uuid"], results.correctness(columns)))
            correct[label] = [is_correct[fact["uuid"]] for fact in asked]
    return Candidates(asked, correct, alone)


# ---- votes of the best templates -----------------------------------------------------------------


class Alone(NamedTuple):
    """Answers of templates that were asked alone."""

    templates: list  # for each fact, the numbers of its templates
    words: list  # for each fact, what is scored of the answer to each of them
    asked: np.ndarray  # (N, T) bool
    correct: np.ndarray  # (N, T) bool


def read_alone(path, columns, facts):
    """The columns of a per_prompt file -> Alone. A template has one number in all facts.

    The paraphrases of whole questions are numbered by position, as in metrics.compare_templates.
    """
    rows_of = {}
    for row, uuid in enumerate(columns["uuid"]):
        rows_of.setdefault(uuid, []).append(row)
    is_correct = results.correctness(columns)
    number_of, templates, words = {}, [], []
    for fact in facts:
        name_of = {}  # of each filled template, what it is called in all facts
        for position, template in enumerate(fact["manual"] + fact["auto"]):
            # The text of a whole question belongs to one fact, so other facts cannot rank it.
            is_question = fact["subject"] == ""
            filled = prompts.fill(template, fact["subject"])
            name_of[filled] = position if is_question else template
        templates.append([])
        words.append([])
        for row in rows_of[fact["uuid"]]:
            filled = "".join(columns["templates"][row][:1])
            message = f"{path}: {filled[:60]!r} is no template of fact {fact['uuid']!r}"
            require(filled in name_of, f"{message}; delete the file and run again", None)
            templates[-1].append(number_of.setdefault(name_of[filled], len(number_of)))
            words[-1].append(prompts.scored_words(fact, columns["generation"][row]))
    asked = np.zeros((len(facts), len(number_of)), bool)
    correct = np.zeros_like(asked)
    for j, fact in enumerate(facts):
        asked[j, templates[j]] = True
        correct[j, templates[j]] = [is_correct[row] for row in rows_of[fact["uuid"]]]
    return Alone(templates, words, asked, correct)


def votes_of_best(alone, j, known, n_votes):
    """Is the vote of the k best templates of fact j correct, for k = 1 to n_votes? [bool]

    known: numbers of the facts whose answers say which templates are best. Of equal templates, the
    first one of the fact counts as better. Of equal answers, that of the better template wins.
    """
    templates, words = alone.templates[j], alone.words[j]
    n_asked = alone.asked[np.ix_(known, templates)].sum(0)
    n_correct = alone.correct[np.ix_(known, templates)].sum(0)
    # A template in which no known fact was asked counts as an average one.
    average = n_correct.sum() / max(1, n_asked.sum())
    accuracy = np.where(n_asked > 0, n_correct / np.maximum(1, n_asked), average)
    votes, first_template, answered = Counter(), {}, []
    for t in np.argsort(-accuracy, kind="stable"):
        votes[words[t]] += 1
        first_template.setdefault(words[t], templates[t])
        winner = max(votes, key=votes.get)
        answered.append(alone.correct[j, first_template[winner]])
    # Where a fact has fewer templates, all of them vote.
    return answered + answered[-1:] * (n_votes - len(answered))


# ---- the table of candidates ---------------------------------------------------------------------


class Candidates:
    """Which candidates answer which facts correctly.

    correct: (C, N), 1 or 0. The templates that vote on a fact are ranked on other facts.
    """

    def __init__(self, facts, correct, alone):
        """facts: N dicts with "uuid" and "relation". correct: {label: N bool}. alone: {label:
        Alone}."""
        self.uuids = [fact["uuid"] for fact in facts]
        names = [fact["relation"] for fact in facts]
        self.relations = list(dict.fromkeys(names))
        self.relation = np.array([self.relations.index(name) for name in names])  # (N,)
        self.labels, self.voters = list(correct), []  # voters: (Alone, rows of its votes)
        self.families = {}  # {name: rows of `correct` among which is chosen}
        if correct:
            self.families["methods"] = list(range(len(correct)))
        for label, answers in alone.items():
            first, n_votes = len(self.labels), max(map(len, answers.templates))
            rows = list(range(first, first + n_votes))
            self.labels += [f"{label}, vote of the {k} best" for k in range(1, n_votes + 1)]
            self.voters.append((answers, rows))
            self.families["templates"] = self.families.get("templates", []) + rows
        if len(self.families) > 1:
            self.families["both"] = list(range(len(self.labels)))
        self.correct = np.zeros((len(self.labels), len(facts)))
        for row, is_correct in enumerate(correct.values()):
            self.correct[row] = is_correct
        for j in range(len(facts)):
            known = self.others(j)
            for answers, rows in self.voters:
                self.correct[rows, j] = votes_of_best(answers, j, known, len(rows))

    def others(self, i):
        """Numbers of the other facts of the relation of fact i."""
        same = np.flatnonzero(self.relation == self.relation[i])
        return same[same != i]

    def without(self, i):
        """`correct` (C, N) with templates that were ranked without fact i, too."""
        correct, others = self.correct.copy(), self.others(i)
        for answers, rows in self.voters:
            for j in others:
                known = others[others != j]
                correct[rows, j] = votes_of_best(answers, j, known, len(rows))
        return correct
