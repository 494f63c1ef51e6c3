"""Which facts are asked, in which templates, after which examples."""

from typing import NamedTuple

import numpy as np

from myriadlama import fact_files, prompts
from nanorecall.settings import require


def choose_facts(config):
    """-> facts to ask, those to ask without max_samples, pool, {relation: examples out of the pool}

    Examples are facts of shots_path that are not asked, or without it some of each relation, which
    are then not asked. shots says which of them a question gets: those of its own relation, or,
    mixed, the same random ones of any relation, as the code of MyriadLAMA does.
    """
    facts = fact_files.read_facts(config.path, "path")
    rng = np.random.default_rng(config.seed)
    pool = []
    if config.num_shots == 0:
        examples = {fact["relation"]: [] for fact in facts}
    elif config.shots_path:
        pool = fact_files.read_facts(config.shots_path, "shots_path")
        pool = prompts.exclude(pool, facts)
        relations = dict.fromkeys(fact["relation"] for fact in facts)
        examples = prompts.sample_few_shot(pool, relations, config.num_shots, rng)
    else:
        examples, facts = prompts.split_few_shot(facts, config.num_shots, rng)
        pool = sum(examples.values(), [])
    if config.shots == "mixed":
        # Random numbers of its own, so that both kinds of examples are followed by one choice of
        # questions and can be compared in pairs.
        order = np.random.default_rng([config.seed, 1]).permutation(len(pool))
        mixed = [pool[i] for i in order[: config.num_shots]]
        examples = dict.fromkeys(examples, mixed)
    asked = facts
    if 0 < config.max_samples < len(facts):
        asked = spread_over_relations(facts, config.max_samples, rng)
    return asked, facts, pool, examples


def spread_over_relations(facts, n, rng):
    """n random facts, as evenly from all relations as possible, in their old order."""
    counts, ranked = {}, []  # ranked: (number of the fact within its relation, index)
    for i in rng.permutation(len(facts)):
        relation = facts[i]["relation"]
        ranked.append((counts.get(relation, 0), i))
        counts[relation] = counts.get(relation, 0) + 1
    chosen = sorted(i for _, i in sorted(ranked)[:n])
    return [facts[i] for i in chosen]


class Prompted(NamedTuple):
    """A fact with the templates in which it is asked."""

    fact: dict
    texts: list  # n filled templates
    is_manual: np.ndarray  # (n,) bool
    priors: list = ()  # the same templates without the subject


def make_batches(facts, config):
    """Facts -> lists of up to batch_size Prompted. Those in a list have the same prefix.

    A prefix is of a relation, and of whole questions or of templates with a subject. Numbers of
    templates may differ.
    """
    groups = {}
    for fact in facts:
        rng = np.random.default_rng([config.seed, *fact["uuid"].encode()])
        templates, is_manual = prompts.select_templates(
            fact, config.num_manual, config.num_auto, rng
        )
        message = f"question {fact['uuid']} has no template of the kind asked for"
        require(templates, f"{message}; raise num_manual or num_auto", "num_auto")
        texts = [prompts.fill(template, fact["subject"]) for template in templates]
        priors = [prompts.without_subject(fact, template) for template in templates]
        is_question = fact["subject"] == ""
        group = groups.setdefault((fact["relation"], is_question), [])
        group.append(Prompted(fact, texts, is_manual, priors))
    batches = []
    for group in groups.values():
        for first in range(0, len(group), config.batch_size):
            batches.append(group[first : first + config.batch_size])
    return batches
