"""How fast are the parts, beside a baseline each? python tests/bench.py [NAME ...] [--rounds 15]

    python tests/bench.py train delta             # two benchmarks; --help lists them
    python tests/bench.py --quick                 # all, in less than 3 minutes
    python tests/bench.py memory slots templates --figure figures/scaling.png  # how cost grows
    python tests/bench.py lengths --figure figures/lengths.png  # every mixer: one table
    python tests/bench.py --figure figures/lengths.png --draw_only  # from figures/lengths.json

A figure's numbers are kept beside it, as .json.

Ours and the baseline are timed alternately, so that a busy machine slows both, and the ratio is
the median over the rounds. Utilisation is relative to a 2048 x 2048 float32 matrix product timed
in the same rounds. It counts the floating-point operations of matrix products, those of attention
without regard to the mask. Slow benchmarks take fewer rounds: the table says how many.
Run it with nothing else running: two threads beside a busy process can be many times slower than
one.
"""
# ruff: noqa: E402

import argparse
import importlib
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]

import data_mqar
import data_synth
import delta
import delta_variants
import hybrid
import memory
import train
import ttt
from analysis import hooks
from analysis.ablation import measure_slots
from model import GPT, NORMS
from model import Config as GPTConfig
from myriadlama import decoding, fact_files, fusion, llama, prompts
from naive import fla_naive, loop_sequences, naive_mask
from nanorecall import distributed, metrics, ops, plots, text
from nanorecall.attention import apply_rotary, rope_table, softmax_attention
from nanorecall.build import build_model, build_model_config
from nanorecall.ops import sparse_rows
from nanorecall.records import read_record, write_json
from nanorecall.run import Run
from nanorecall.settings import require, run_cli
from nanorecall.sparse import SparseAdamW


@dataclass
class Result:
    """A line of the table. Seconds are a list with one number for each round."""

    what: str
    seconds: list
    baseline: str  # its name
    baseline_seconds: list
    utilisation: float | None = None  # fraction of the peak of a large matrix product
    size: int | None = None  # where to draw it in the figure


# Benchmarks with sizes: what these are, and what is compared with the baseline (None: `what`).
CURVES = {
    "lengths": ("tokens in a sequence (of as many in a step)", None),
    "memory": ("slots in the table (lookup)", "product keys, ours"),
    "slots": ("slots in the table (training step)", "sparse gradients"),
    "templates": ("templates of a question", "fused, ours"),
}


def seconds_of(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleave(functions, rounds):
    """{name: function} -> {name: [seconds]}, all called once a round. Two rounds warm up."""
    times = {name: [] for name in functions}
    for number in range(rounds + 2):
        for name, function in functions.items():
            seconds = seconds_of(function)
            if number >= 2:
                times[name].append(seconds)
    return times


def scaled(times, factor):
    return [seconds * factor for seconds in times]


def optional_import(name):
    """A package, or None with a note if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"(no comparison with {name}: pip install {name})", file=sys.stderr)
        return None


PEAK_FLOP = 2 * 2048**3


def peak_function():
    a, b = torch.randn(2, 2048, 2048)
    return lambda: a @ b


def utilisation(flop, times, peak_times):
    rate = flop / statistics.median(times)
    return rate / (PEAK_FLOP / statistics.median(peak_times))


# ---- training steps ------------------------------------------------------------------------------


def make_step(model, loss_of, fused=True):
    """A function that makes an optimizer step: forward, backward, clip, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)

    def step():
        loss_of(model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def count_flop(step):
    """Floating-point operations of the matrix products of a step.

    The counter does not know fused attention on a CPU, so the same products are counted unfused:
    whole T x T scores, no recomputation.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def mqar_gpt_settings(*flags):
    """Of configs/mqar_gpt.py, without its curriculum: all sequences have 128 tokens."""
    config = os.path.join(ROOT, "configs", "mqar_gpt.py")
    return train.parse([config, "--curriculum=[]", "--stage_loss=0", *flags])


def mqar_gpt():
    """-> a new model of configs/mqar_gpt.py, tokens and targets of a batch, both (32, 128)."""
    settings = mqar_gpt_settings()
    data = data_mqar.Data(settings.data)
    tokens, targets, _ = data.batch("train", 0, data.batch_indices(0, 32))
    return build_model(settings, build_model_config(settings, data)), tokens, targets


def bench_train(rounds):
    """A step of configs/mqar_gpt.py on 32 pairs, against all logits and torch's default AdamW."""
    _, tokens, targets = mqar_gpt()

    def loss_of_labels(model):
        return model(tokens, targets)[1]

    def loss_of_all_logits(model):
        logits, _ = model(tokens)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)

    def new_step(loss_of, compiled=False):
        model, _, _ = mqar_gpt()
        if compiled:
            model.compile()
        return make_step(model, loss_of, fused=loss_of is loss_of_labels)

    steps = {
        "ours": new_step(loss_of_labels),
        "ours, compiled": new_step(loss_of_labels, compiled=True),
        "all logits, eager": new_step(loss_of_all_logits),
    }
    flop = count_flop(steps["ours"])
    times = interleave({**steps, "peak": peak_function()}, rounds)
    baseline = "all logits, eager"
    for name in ("ours", "ours, compiled"):
        of_peak = utilisation(flop, times[name], times["peak"])
        yield Result(f"training step, {name}", times[name], baseline, times[baseline], of_peak)
    peak = PEAK_FLOP / statistics.median(times["peak"]) / 1e9
    print(f"(peak {peak:.0f} GFLOP/s; a step takes {flop / 1e9:.2f} GFLOP)", file=sys.stderr)


@dataclass
class Part:
    """A part of a training step, with what bounds it: arithmetic, or numbers to be moved."""

    function: object  # runs it once, forward and backward
    flop: int = 0  # floating-point operations, as in utilisation
    moved: int = 0  # numbers that it must read or write at least, 4 bytes each


def with_gradients(f, *sizes):
    """A function that runs y = f(random tensors of these sizes) and its backward."""
    inputs = [torch.randn(size, requires_grad=True) for size in sizes]
    dy = torch.ones_like(f(*inputs))
    return lambda: torch.autograd.grad(f(*inputs), inputs, dy)


def repeat(function, n):
    """A function that runs another n times."""

    def repeated():
        for _ in range(n):
            function()

    return repeated


def linear_part(n_layers, rows, width, out_width):
    function = with_gradients(F.linear, (rows, width), (out_width, width))
    return Part(repeat(function, n_layers), flop=n_layers * 3 * 2 * rows * width * out_width)


def step_parts(B=32, T=128, n=32, D=64, H=2, K=48, vocab_size=2048, n_layers=4):
    """The parts of a step of configs/mqar_gpt.py with n labels in each of B sequences.

    In the last block, queries and all that follows are computed at labels only.
    """
    full, C = n_layers - 1, H * K
    table = rope_table(K, T)
    query_pos = torch.arange(n).expand(B, -1) * (T // n)
    labels = torch.randint(vocab_size, (B * n,))
    model = GPT(GPTConfig(dk=K, dv=K))
    for q in model.parameters():
        q.grad = torch.randn_like(q)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    n_parameters = sum(q.numel() for q in model.parameters())

    def rotate(x):
        return apply_rotary(x, table)

    def attend(*qkv):
        return softmax_attention(*(x.transpose(1, 2) for x in qkv))

    def attend_at_labels(*qkv):
        return softmax_attention(*(x.transpose(1, 2) for x in qkv), query_pos)

    def update():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    x, q, q_n = (B, T, D), (B, T, H, K), (B, n, H, K)
    attention = with_gradients(attend, q, q, q)
    attention_n = with_gradients(attend_at_labels, q_n, q, q)
    # numbers moved, forward + backward: a norm 2 + 3, a rotation 2 + 2, a loss 2 + 2, a sum 3 + 3,
    # AdamW 7 and clipping 3
    return {
        "queries, keys, values": linear_part(full, B * T, D, 3 * C),
        "keys, values of the last block": linear_part(1, B * T, D, 2 * C),
        "output projections": linear_part(full, B * T, C, D),
        "output head": linear_part(1, B * n, D, vocab_size),
        # forward 2 products of T x T x K, backward 5
        "attention": Part(repeat(attention, full), flop=full * 7 * 2 * B * H * T * T * K),
        "attention of the last block": Part(attention_n, flop=7 * 2 * B * H * n * T * K),
        "norms of blocks": Part(
            repeat(with_gradients(NORMS["rms"], x), n_layers), moved=n_layers * 5 * B * T * D
        ),
        "norms of queries and keys": Part(
            repeat(with_gradients(NORMS["rms"], q), 2 * full + 1),
            moved=(2 * full + 1) * 5 * B * T * C,
        ),
        "rotary positions": Part(
            repeat(with_gradients(rotate, q), 2 * full + 1), moved=(2 * full + 1) * 4 * B * T * C
        ),
        "residual sums": Part(
            repeat(with_gradients(torch.add, x, x), full), moved=full * 6 * B * T * D
        ),
        "loss": Part(
            with_gradients(lambda x: ops.cross_entropy(x, labels), (B * n, vocab_size)),
            moved=4 * B * n * vocab_size,
        ),
        "clipping and AdamW": Part(update, moved=10 * n_parameters),
    }


def bench_step(rounds):
    """The parts of a step of configs/mqar_gpt.py, each alone, against what bounds it.

    That is the rate of a large matrix product, or a copy of as many numbers as it must move.
    """
    model, tokens, targets = mqar_gpt()
    step = make_step(model, lambda model: model(tokens, targets)[1])
    parts = step_parts()
    functions = {name: part.function for name, part in parts.items()}
    source, target = torch.randn(2, 4096, 96)  # as large as queries or keys
    functions["copy"] = lambda: target.copy_(source)
    times = interleave({**functions, "step": step, "peak": peak_function()}, rounds)
    copy = [seconds / (2 * source.numel()) for seconds in times["copy"]]  # a number moved
    peak = [seconds / PEAK_FLOP for seconds in times["peak"]]
    for name, part in parts.items():
        if part.flop:
            of_peak = utilisation(part.flop, times[name], times["peak"])
            limit = scaled(peak, part.flop)
            yield Result(name, times[name], "at the peak rate", limit, of_peak)
        else:
            limit = scaled(copy, part.moved)
            yield Result(name, times[name], "a copy of its numbers", limit)
    together = [sum(seconds) for seconds in zip(*(times[name] for name in parts))]
    yield Result("the whole step", times["step"], "its parts one by one", together)


def bench_lengths(rounds):
    """A training step of every sequence mixer at several lengths, against one of softmax attention.

    A step has as many tokens at each length, so a time that does not change is linear in length.
    """
    lengths = (128, 512, 2048) if rounds < 5 else (128, 512, 2048, 8192)
    mixers = {kind: (kind, {}) for kind in hybrid.KINDS}
    mixers["gpt, window 64"] = ("gpt", {"window": 64})
    steps = {}
    for name, (kind, options) in mixers.items():
        for T in lengths:
            steps[name, T] = mixer_step(kind, T, max(lengths), **options)
    times = interleave(steps, min(rounds, 5))
    for (name, T), seconds in times.items():
        if name != "gpt":
            yield Result(name, seconds, "gpt", times["gpt", T], size=T)


def mixer_step(kind, T, n_tokens, **options):
    """A function that makes a step of one block with a mixer, on n_tokens in sequences of T.

    All mixers have the same width, heads and convolution, and their default chunk size. Every token
    is labelled, or attention would skip queries of its last block, and the vocabulary is small, so
    most of the time is the mixer's.
    """
    config_class, model_class = hybrid.KINDS[kind]
    sizes = dict(n_layers=1, dk=48, dv=48, du=48, conv_size=4, vocab_size=256, seq_len=T)
    torch.manual_seed(0)
    model = model_class(config_class(**sizes, **options))
    tokens = torch.randint(256, (n_tokens // T, T))
    return make_step(model, lambda model: model(tokens, tokens)[1])


def print_lengths(results):
    """Results of bench_lengths as a table: a line for each mixer, a column for each length.

    The exponent p, from the two longest: the time of one sequence grows as T^p.
    """
    rows = {}
    for result in results:
        ours, baseline = milliseconds(result)
        rows.setdefault(result.baseline, {})[result.size] = baseline
        rows.setdefault(result.what, {})[result.size] = ours
    lengths = sorted(rows["gpt"])
    columns = "".join(f"{T:9,d}" for T in lengths)
    print(f"training step of {max(lengths):,} tokens, ms; columns: tokens in a sequence")
    print(f"{'mixer':16s}{columns}  exponent")
    for name, row in rows.items():
        before, last = lengths[-2:]
        exponent = 1 + math.log(row[last] / row[before]) / math.log(last / before)
        columns = "".join(f"{row[T]:9.1f}" for T in lengths)
        print(f"{name:16s}{columns}  {exponent:8.2f}", flush=True)


STEPS = 5  # of a rank in each round


def rank_loop(rank, size, threads, port, orders):
    """One of `size` ranks: take orders from a pipe until it gets None.

    Orders: "step" and "step without exchange" (of gradients).
    """
    torch.set_num_threads(threads)
    if size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    settings = mqar_gpt_settings("--device=cpu")
    with distributed.process_group() as world:
        runs = {"step": Run.create(settings, world)}
        runs["step without exchange"] = Run.create(settings, world)
        model = runs["step"].model
        runs["step"].parallel_model = distributed.wrap_model(model, "ddp", torch.device("cpu"))
        runs["step without exchange"].parallel_model = model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        number, order = 0, orders.recv()
        while order is not None:
            for _ in range(STEPS):
                train.forward_backward(runs[order], number, [])
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                number += 1
            orders.send("done")
            order = orders.recv()


def start_ranks(size, threads):
    """Start rank_loop in `size` processes -> a pipe to each."""
    context = torch.multiprocessing.get_context("spawn")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pipes = []
    for rank in range(size):
        here, there = context.Pipe()
        args = (rank, size, threads, port, there)
        context.Process(target=rank_loop, args=args, daemon=True).start()
        pipes.append(here)
    return pipes


def send_order(pipes, order):
    for pipe in pipes:
        pipe.send(order)
    for pipe in pipes:
        pipe.recv()


def bench_ranks(rounds):
    """Steps of configs/mqar_gpt.py by one process and by two ranks; the same global batch."""
    groups = {
        "1 process, 2 threads": start_ranks(1, threads=2),
        "1 process, 1 thread": start_ranks(1, threads=1),
        "2 ranks": start_ranks(2, threads=1),
    }
    functions = {name: partial(send_order, pipes, "step") for name, pipes in groups.items()}
    functions["no exchange"] = partial(send_order, groups["2 ranks"], "step without exchange")
    times = interleave(functions, rounds)
    for pipes in groups.values():
        for pipe in pipes:
            pipe.send(None)
    per_step = {name: scaled(seconds, 1 / STEPS) for name, seconds in times.items()}
    for baseline in ("1 process, 2 threads", "1 process, 1 thread"):
        what = "step of 32 sequences, 2 ranks"
        yield Result(what, per_step["2 ranks"], baseline, per_step[baseline])
    what = "the same, no exchange of gradients"
    yield Result(what, per_step["no exchange"], "2 ranks", per_step["2 ranks"])


# ---- data ----------------------------------------------------------------------------------------


def bench_data(rounds):
    """The 40,000 training sequences of MQAR, against a numpy loop over sequences."""
    c = data_mqar.Config()
    size, n = data_mqar.TaskSize(c.input_seq_len, c.num_kv_pairs, c), c.n_train_examples
    functions = {
        "ours": lambda: data_mqar.make_sequences(size, "train", np.arange(n)),
        # A tenth of the sequences, or it would take a minute.
        "loop": lambda: loop_sequences(size, n // 10, np.random.default_rng(0)),
    }
    times = interleave(functions, min(rounds, 5))
    loop = scaled(times["loop"], 10)
    yield Result(f"{n} MQAR sequences", times["ours"], "numpy loop over sequences", loop)


def bench_masks(rounds):
    """Label masks of 1,000,000 tokens of documents end to end, against a loop over tokens."""
    for task in ("qa", "digits", "twohop", "hashhop"):
        options = {"hops": (1, 2), "cot_frac": 0.5} if task == "hashhop" else {}
        c = data_synth.Config(task=task, pack_documents=True, **options)
        texts, _ = data_synth.BUILD[task](c).read("train", range(1000))
        documents = [text.BYTES.encode(document) for document in texts]
        copies = 10**6 // sum(map(len, documents)) + 1
        tokens = np.concatenate(documents * copies)
        cu_seqlens = np.cumsum([0, *map(len, documents * copies)])
        functions = {
            "ours": partial(text.label_mask, tokens, task, cu_seqlens),
            "loop": partial(mask_one_by_one, documents, task),
        }
        times = interleave(functions, min(rounds, 5))
        what = f"{task} mask of {len(tokens)} tokens"
        yield Result(what, times["ours"], "loop over tokens", scaled(times["loop"], copies))


def mask_one_by_one(documents, task):
    for document in documents:
        naive_mask(document, task)


# ---- memory layers -------------------------------------------------------------------------------


def bench_memory(rounds, T=256, H=4, Q=128, V=256, k=8):
    """A memory layer by number of slots, against flat keys, and against values one by one."""
    g = torch.Generator().manual_seed(0)
    for n in (64, 128, 256, 512):
        q, keys = (
            torch.randn(T, H, 2, Q // 2, generator=g),
            torch.randn(H, 2, n, Q // 2, generator=g),
        )
        values = torch.randn(n * n, V, generator=g)

        def read(weighted_values, q=q, keys=keys, values=values):
            scores, slots = memory.product_key_topk(q, keys, k)
            return weighted_values(values, slots.flatten(1), scores.softmax(-1).flatten(1))

        functions = {
            "ours": partial(read, memory.weighted_values),
            "values one by one": partial(read, memory.naive_weighted_values),
        }
        if n <= 256:
            flat = torch.randn(H, n * n, Q, generator=g)
            functions["flat keys"] = partial(read_flat, q, flat, values, k)
        with torch.no_grad():
            times = interleave(functions, rounds)
        for baseline in list(functions)[1:]:
            what = f"memory, {n * n} slots, {T} tokens"
            yield Result(what, times["ours"], baseline, times[baseline], size=n * n)


def read_flat(q, keys, values, k):
    """A memory without product keys: every query is compared with the key of every slot."""
    scores, slots = torch.einsum("nhse,hce->nhc", q.flatten(-2).unsqueeze(2), keys).topk(k)
    return memory.weighted_values(values, slots.flatten(1), scores.softmax(-1).flatten(1))


def bench_optimizer(rounds, slots=65536, V=256):
    """A step on a table of values: torch's fused AdamW, against SparseAdamW on the rows read."""
    g = torch.Generator().manual_seed(0)
    table = torch.nn.Parameter(torch.randn(slots, V, generator=g))
    table.grad = torch.randn(slots, V, generator=g)
    dense = torch.optim.AdamW([table], fused=True)
    for fraction in (0.01, 0.03, 0.1, 0.3):
        rows = torch.randperm(slots, generator=g)[: int(fraction * slots)].sort().values
        values = torch.randn(len(rows), V, generator=g)
        grad = sparse_rows(rows, values, (slots, V), is_coalesced=True)
        sparse_table = torch.nn.Parameter(table.detach().clone())
        optimizer = SparseAdamW([sparse_table], fused=True)

        def step_rows(sparse_table=sparse_table, grad=grad, optimizer=optimizer):
            sparse_table.grad = grad
            optimizer.step()

        times = interleave({"rows": step_rows, "all": dense.step}, rounds)
        what = f"SparseAdamW, {fraction:.0%} of {slots} x {V}"
        yield Result(what, times["rows"], "fused AdamW on all", times["all"])


def bench_slots(rounds):
    """A training step by slots of the memory, V = 256: sparse gradients against dense ones."""
    for n in (64, 256, 1024):
        functions = {
            "ours": slots_step(n, sparse_grad=True),
            "dense gradients": slots_step(n, sparse_grad=False),
        }
        times = interleave(functions, min(rounds, 5))
        del functions  # or their tables would stay in memory
        baseline = "dense gradients"
        yield Result(f"step, {slots_text(n)}", times["ours"], baseline, times[baseline], size=n * n)
    if rounds < 5:
        return
    # 13 GB. With dense gradients it would take 17 GB, which is not tried.
    largest = interleave({"ours": slots_step(2048, sparse_grad=True)}, 5)
    baseline = "a quarter of the slots"
    what = f"step, {slots_text(2048)}"
    yield Result(what, largest["ours"], baseline, times["ours"], size=2048 * 2048)


def slots_text(n, V=256):
    """Slots, and the memory of table and moments (float32)."""
    return f"{n * n} slots, {3 * 4 * V * n * n / 1e9:.2g} GB"


def slots_step(n, sparse_grad):
    """A function that makes a training step of a small memory model on 32 sequences of MQAR."""
    data = data_mqar.Data(data_mqar.Config(infinite_data=True))
    tokens, targets, _ = data.batch("train", 0, data.batch_indices(0, 32))
    torch.manual_seed(0)
    table = dict(mem_n_keys=n, mem_v_dim=256, mem_sparse_grad=sparse_grad, memory_layers=(0,))
    model = memory.MemoryGPT(memory.Config(n_layers=1, dk=48, dv=48, **table))
    optimizer = train.configure_optimizer(model, train.TrainConfig())

    def step():
        model(tokens, targets)[1].backward()
        distributed.clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.on_step_end()

    return step


# ---- the delta rule ------------------------------------------------------------------------------


def delta_inputs(B, T, H, width):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, T, width, generator=g) for _ in range(3))
    beta = torch.rand(B, H, T, generator=g)
    return [x.requires_grad_() for x in (q, F.normalize(k, dim=-1), v, beta)]


def forward_and_backward(rule, inputs, **options):
    def function():
        output = rule(*inputs, **options)[0]
        torch.autograd.grad(output, inputs, torch.ones_like(output))

    return function


def bench_delta(rounds):
    """The chunkwise delta rule, forward and backward, against the recurrence and fla's chunks."""
    naive = fla_naive("delta_rule")
    if naive is None:
        print("(no comparison with fla's naive form: pip install fla-core)", file=sys.stderr)
    else:
        for sizes in ((32, 128, 2, 32, 16), (32, 128, 2, 48, 16), (8, 1024, 4, 64, 32)):
            yield from bench_delta_at(rounds, naive, *sizes)
    # Is time linear in T?
    functions = {}
    for T in (256, 1024, 8192):
        inputs = delta_inputs(4, T, 2, 48)
        functions[T] = forward_and_backward(delta.delta_rule_chunkwise, inputs, chunk_size=16)
    times = interleave(functions, rounds)
    for T in (1024, 8192):
        linear = scaled(times[256], T // 256)
        yield Result(f"delta rule, 4 x {T}", times[T], f"{T // 256} times 4 x 256", linear)


def bench_delta_at(rounds, naive, B, T, H, width, chunk_size):
    inputs = delta_inputs(B, T, H, width)
    functions = {
        "ours": forward_and_backward(delta.delta_rule_chunkwise, inputs, chunk_size=chunk_size),
        "token by token": forward_and_backward(delta.delta_rule_recurrent, inputs),
        "peak": peak_function(),
    }
    for size in (16, 32, 64):
        rule = naive.delta_rule_chunkwise
        functions[size] = forward_and_backward(rule, inputs, chunk_size=size)
    times = interleave(functions, rounds)
    # Multiply-adds as in delta.py: C^2 (3 K + 2 V) + 3 C K V forward, C^2 (4 K + 4 V) + 6 C K V
    # backward.
    C = chunk_size
    flop = 2 * B * H * (T // C) * (13 * C**2 * width + 9 * C * width**2)
    of_peak = utilisation(flop, times["ours"], times["peak"])
    best = min((16, 32, 64), key=lambda size: statistics.median(times[size]))
    baselines = {
        "token by token": "token by token",
        "fla naive, its default": 32,
        f"fla naive, best chunk {best}": best,
    }
    what = f"delta rule, {B} x {T}, {H} heads of {width}"
    for baseline, key in baselines.items():
        yield Result(what, times["ours"], baseline, times[key], of_peak)


def bench_kda(rounds):
    """KDA in chunks, forward and backward, against the loop, one decay a head and fla's chunks."""
    naive = fla_naive("kda")
    B, T, H, width = 32, 128, 2, 48
    q, k, v, beta = delta_inputs(B, T, H, width)
    decay = (-0.1 * torch.rand(B, H, T, width)).requires_grad_()
    inputs = [q, k, v, beta, decay]
    functions = {
        "ours": forward_and_backward(delta_variants.kda_chunkwise, inputs, chunk_size=16),
        "token by token": forward_and_backward(delta_variants.kda_recurrent, inputs),
        "one decay a head": forward_and_backward(
            delta.delta_rule_chunkwise, [q, k, v, beta, decay[..., 0]], chunk_size=16
        ),
    }
    if naive is None:
        print("(no comparison with fla's naive form: pip install fla-core)", file=sys.stderr)
    else:
        functions["fla naive, its default"] = fla_kda(naive, inputs)
    times = interleave(functions, rounds)
    ours = times.pop("ours")
    for baseline, seconds in times.items():
        yield Result(f"KDA, {B} x {T}, {H} heads of {width}", ours, baseline, seconds)


def fla_kda(naive, inputs):
    """A function that runs fla's chunks forward and backward on inputs (B, H, T, width)."""

    def rule(q, k, v, beta, decay):
        q, k, v, beta, decay = (x.transpose(1, 2) for x in (q, k, v, beta, decay))
        return naive.naive_chunk_kda(q, k, v, decay, beta)

    return forward_and_backward(rule, inputs)


# ---- test-time training --------------------------------------------------------------------------


def bench_ttt(rounds):
    """Inner steps in the dual form, forward and backward, against a loop with torch.func.grad."""
    K, hidden = 48, 192
    nets = {"TTT-Linear": [(K, K)], "TTT-MLP": [(K, hidden), (hidden, K)]}
    inputs = delta_inputs(8, 128, 2, K)
    for name, sizes in nets.items():
        weights = [0.1 * torch.randn(2, *size) for size in sizes]
        options = dict(weights=weights, norm=(torch.ones(2, K), torch.zeros(2, K)))
        functions = {
            "ours": forward_and_backward(ttt.ttt, inputs, **options),
            "loop": forward_and_backward(ttt.ttt_recurrent, inputs, **options),
        }
        times = interleave(functions, rounds)
        what = f"{name}, 8 x 128, 2 heads of {K}"
        yield Result(what, times["ours"], "token by token, torch.func.grad", times["loop"])


# ---- evaluation and ablation ---------------------------------------------------------------------


def memory_model(*flags):
    """configs/qa_2k_memory.py with random weights -> model, data."""
    settings = train.parse([os.path.join(ROOT, "configs", "qa_2k_memory.py"), *flags])
    data = settings.data_module.Data(settings.data)
    torch.manual_seed(0)
    return build_model(settings, build_model_config(settings, data)).eval(), data


def bench_eval(rounds):
    """Evaluation of 180 examples of synthetic QA, 100 at a time against one at a time."""
    model, data = memory_model("--n_test_examples=180")

    def evaluate(batch_size):
        cpu = torch.device("cpu")
        return list(metrics.iter_predictions(model, data, "test", batch_size, cpu))

    functions = {"ours": partial(evaluate, 100), "one at a time": partial(evaluate, 1)}
    times = interleave(functions, max(1, rounds // 3))
    what, baseline = "evaluation of 180 examples", "one at a time"
    yield Result(what, times["ours"], baseline, times[baseline])


def bench_ablate(rounds):
    """Ablation of every slot of ten examples, batched from the memory layer on.

    The baseline is a whole forward pass for each slot; both are per (example, slot).
    """
    model, data = memory_model()
    config = SimpleNamespace(split="test")
    run = SimpleNamespace(data=data, config=config, pad=data.tokenizer.pad, device="cpu")
    examples, _ = hooks.load_examples(run, np.arange(10))
    slots = hooks.run_with_cache(model, examples).reads[0]["slots"]
    some_slots = slots[0].unique().tolist()[:20]
    n_labels = examples.label_pos.shape[1]
    n_ablations = len(measure_slots(model, examples, ["zero"])["drop"]) // n_labels

    def silence(slot, reads):
        weights = reads["weights"].masked_fill(reads["slots"] == slot, 0)
        return {"slots": reads["slots"], "weights": weights}

    @torch.no_grad()
    def one_by_one():
        for slot in some_slots:
            model(examples.tokens[:1], intervene={0: partial(silence, slot)})

    functions = {
        "ours": lambda: measure_slots(model, examples, ["zero"]),
        "naive": one_by_one,
    }
    times = interleave(functions, max(1, rounds // 3))
    ours, naive = scaled(times["ours"], 1 / n_ablations), scaled(times["naive"], 1 / 20)
    yield Result("ablation of a slot in an example", ours, "a forward pass each", naive)


# ---- MyriadLAMA ----------------------------------------------------------------------------------

SMOLLM2 = dict(vocab_size=49152, dim=576, n_heads=9, n_kv_heads=3, head_dim=64)


def small_llama():
    """A random Llama of SmolLM2's shape with 10 of its 30 layers, and a prefix of 104 tokens."""
    torch.manual_seed(0)
    config = llama.Config(**SMOLLM2, n_layers=10, intermediate_size=1536)
    prefix = np.random.default_rng(0).integers(10, 49152, 104).tolist()
    return llama.Llama(config).eval().requires_grad_(False), prefix


def random_questions(n_questions, n_templates):
    """Questions of so many templates of 15 tokens."""
    rng = np.random.default_rng(1)
    return rng.integers(10, 49152, (n_questions, n_templates, 15)).tolist()


def animal_questions(n):
    """n questions about animals in the ten templates of myriadlama/facts.py, a token for each word.

    Their beginnings are as much alike as those of the 12 relations on average.
    """
    numbers, questions = {}, []
    facts = [fact for fact in fact_files.read_facts("") if fact["relation"] == "animal"]
    for fact in facts[:n]:
        templates = []
        for template in fact["manual"] + fact["auto"]:
            text = f"Q: {prompts.fill(template, fact['subject'])}\nA"
            words = re.findall(r"\w+|[^\w ]", text)
            templates.append([numbers.setdefault(word, 10 + len(numbers)) for word in words])
        questions.append(templates)
    return questions


def fusion_steps(model, prefix, questions, max_new_tokens=4):
    """Three functions: () -> the prefix's keys and values -> cache of the templates -> tokens."""
    no_tokens = torch.tensor([], dtype=torch.long)
    never = decoding.StopCriteria(no_tokens, *torch.zeros(2, 49152, dtype=torch.bool))
    rows, members, next_pos, start = [], [], [], len(prefix)
    for templates in questions:
        members.append(range(len(rows), len(rows) + len(templates)))
        rows += [(ids, range(start, start + len(ids))) for ids in templates]
        next_pos.append(start + max(map(len, templates)))

    def encode_prefix():
        return fusion.prefill_prefix(model, prefix)

    def encode_templates(prefix_kv):
        encoded = fusion.prefill(model, prefix_kv, rows)
        return fusion.build_cache(prefix_kv, encoded, members, next_pos)

    def decode(cache):
        argmax = decoding.argmax_each
        return decoding.greedy_decode(model, cache, 7, argmax, never, max_new_tokens)[0]

    return encode_prefix, encode_templates, decode


def make_fusion(*args):
    """A function that encodes the prefix and all templates, fuses those of a question, decodes."""
    encode_prefix, encode_templates, decode = fusion_steps(*args)
    return lambda: decode(encode_templates(encode_prefix()))


def bench_flex(rounds):
    """A question in 5 + 5 templates behind 5 examples, when 1, 8 or 16 are answered at once.

    Baselines: the documented way, one at a time (each template with its own examples, a new mask
    for each token, no cache), and transformers' generate with its cache on the same tokens, as many
    sequences at once as we answer questions. Then the parts of our time.
    """
    model, prefix = small_llama()
    questions = animal_questions(16)
    is_manual = torch.arange(10) < 5

    def documented():
        ids, segment = [], []
        for number, template in enumerate(questions[0]):
            ids += [*prefix, *template, 7, 3]
            segment += [number] * (len(prefix) + len(template) + 2)
        for _ in range(4):
            mask = fusion.dense_mask("isolated", torch.tensor(segment), is_manual)

            def attention(layer, q, k, v, mask=mask):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

            x = model(torch.tensor([ids]), torch.arange(len(ids))[None], attention)
            ids.append(int(model.logits(x[:, -1]).argmax()))
            segment.append(fusion.ANSWER)

    own_examples = "no cache, own examples each"
    functions = {own_examples: documented}
    transformers = optional_import("transformers")
    if transformers:
        theirs = transformers_llama(transformers, model)
        check_tokens(model, theirs, prefix, questions[:2])
    for n in (1, 8, 16):
        functions[n] = make_fusion(model, prefix, questions[:n])
        encode_prefix, encode_templates, decode = fusion_steps(model, prefix, questions[:n])
        prefix_kv = encode_prefix()
        functions["prefix", n] = encode_prefix
        functions["templates", n] = partial(encode_templates, prefix_kv)
        functions["answers", n] = partial(decode, encode_templates(prefix_kv))
        if transformers:
            functions["generate", n] = make_generate(theirs, prefix, questions[:n])
    times = interleave(functions, max(1, rounds // 5))
    ours = scaled(times[8], 1 / 8)
    yield Result("a question fused, 8 at once", ours, own_examples, times[own_examples])
    for n in (1, 8, 16) if transformers else ():
        what, generate = f"a question fused, {n} at once", scaled(times["generate", n], 1 / n)
        yield Result(what, scaled(times[n], 1 / n), "transformers generate", generate)
    for n in (1, 8, 16):
        for part in ("prefix", "templates", "answers"):
            seconds, whole = scaled(times[part, n], 1 / n), scaled(times[n], 1 / n)
            yield Result(f"of these {part}, {n} at once", seconds, "all of a question", whole)


def transformers_llama(transformers, model):
    """A random model of transformers, whose weights `model` gets."""
    config = transformers.LlamaConfig(
        vocab_size=SMOLLM2["vocab_size"],
        hidden_size=SMOLLM2["dim"],
        num_hidden_layers=model.config.n_layers,
        num_attention_heads=SMOLLM2["n_heads"],
        num_key_value_heads=SMOLLM2["n_kv_heads"],
        intermediate_size=model.config.intermediate_size,
        rms_norm_eps=model.config.norm_eps,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    theirs = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.1)  # with smaller weights every token would be the last one
    weights = {name.removeprefix("model."): p.clone() for name, p in theirs.state_dict().items()}
    llama.interleave_rotary_pairs(weights, model.config)
    model.load_state_dict(weights)
    return theirs


def make_generate(theirs, prefix, questions):
    """transformers' generate for questions of equal length, the templates one after another."""
    ids = torch.tensor([[*prefix, *sum(templates, []), 7] for templates in questions])
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    return partial(theirs.generate, ids, attention_mask=torch.ones_like(ids), **options)


def check_tokens(model, theirs, prefix, questions):
    """Exit unless we decode the same tokens as transformers.

    All templates of a question are one here, as generate has no masks for several.
    """
    rows = [[sum(templates, [])] for templates in questions]
    ours = make_fusion(model, prefix, rows)()
    expected = make_generate(theirs, prefix, questions)()[:, -4:]
    if not ours.equal(expected):
        sys.exit(f"ours decodes {ours.tolist()}, transformers {expected.tolist()}")


def bench_templates(rounds):
    """Fused questions by templates, by questions at once, by new tokens: is time linear?"""
    model, prefix = small_llama()
    sizes = {  # questions at once, templates, new tokens
        "templates": {n: (4, n, 4) for n in (2, 5, 10, 20)},
        "questions at once": {n: (n, 5, 4) for n in (1, 4, 16)},
        "new tokens": {n: (4, 5, n) for n in (4, 16, 64)},
    }
    for what, numbers in sizes.items():
        functions = {}
        for n, (n_questions, n_templates, n_tokens) in numbers.items():
            questions = random_questions(n_questions, n_templates)
            functions[n] = make_fusion(model, prefix, questions, n_tokens)
        times = interleave(functions, max(1, rounds // 5))
        first = min(numbers)
        for n in numbers:
            if n == first and what != "templates":
                continue
            linear = scaled(times[first], n / first)
            size = n if what == "templates" else None
            baseline = f"linear from {first}"
            yield Result(f"fused, {n} {what}", times[n], baseline, linear, size=size)


# ---- command line --------------------------------------------------------------------------------

BENCHES = {
    "train": bench_train,
    "step": bench_step,
    "data": bench_data,
    "masks": bench_masks,
    "memory": bench_memory,
    "optimizer": bench_optimizer,
    "slots": bench_slots,
    "eval": bench_eval,
    "ablate": bench_ablate,
    "flex": bench_flex,
    "templates": bench_templates,
    "delta": bench_delta,
    "kda": bench_kda,
    "ttt": bench_ttt,
    "lengths": bench_lengths,
    "ranks": bench_ranks,
}


def parse(argv=None):
    """Command line -> argparse.Namespace."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    help = "which benchmarks; all if left out"
    parser.add_argument("names", nargs="*", choices=[*BENCHES, []], help=help)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="3 rounds, in less than 3 minutes")
    help = "draw how cost grows with length, slots and templates, for the benchmarks that are run"
    parser.add_argument("--figure", help=help)
    help = "measure nothing: draw the figure again from the .json beside it"
    parser.add_argument("--draw_only", action="store_true", help=help)
    args = parser.parse_args(argv)
    if args.draw_only and not args.figure:
        parser.error("--draw_only needs --figure FILE.png, beside which FILE.json lies")
    if args.quick:
        args.rounds = 3
    return args


def commit():
    command = ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def milliseconds(result):
    """Medians of ours and of the baseline."""
    ours = 1e3 * statistics.median(result.seconds)
    return ours, 1e3 * statistics.median(result.baseline_seconds)


def print_result(result):
    ours, baseline = milliseconds(result)
    pairs = zip(result.seconds, result.baseline_seconds)
    ratio = statistics.median(theirs / mine for mine, theirs in pairs)
    of_peak = "" if result.utilisation is None else f"{result.utilisation:.0%}"
    first = f"{result.what:36s} {len(result.seconds):6d} {ours:9.1f}"
    end = f"{result.baseline:27s} {baseline:12.1f} {ratio:6.2f} {of_peak:>11s}"
    print(f"{first}  {end}", flush=True)


def main():
    args = parse()
    if args.draw_only:
        draw_curves(args.figure, read_record(numbers_path(args.figure), SHOWN))
        print(f"wrote {args.figure}")
        return
    torch.set_num_threads(args.threads)
    machine = f"torch {torch.__version__}, {args.threads} threads, {args.rounds} rounds"
    print(f"{machine}, commit {commit()}")
    first = f"{'what':36s} {'rounds':>6s} {'ours, ms':>9s}"
    end = f"{'baseline':27s} {'baseline, ms':>12s} {'ratio':>6s} {'utilisation':>11s}"
    print(f"{first}  {end}")
    curves = {}
    for name in args.names or BENCHES:
        results = BENCHES[name](args.rounds)
        if name == "lengths":
            results = list(results)
            print_lengths(results)
        for result in results:
            if name != "lengths":
                print_result(result)
            if result.size is not None:
                curves.setdefault(name, []).append(result)
    if args.figure:
        lines = {name: curve_lines(name, results) for name, results in curves.items()}
        shown = {"threads": args.threads, "rounds": args.rounds, "curves": lines}
        draw_curves(args.figure, shown)
        write_json(numbers_path(args.figure), shown)
        print(f"wrote {args.figure}, {numbers_path(args.figure)}")


# ---- the figure ----------------------------------------------------------------------------------

# What a figure shows: for each benchmark {line: medians by size}.
SHOWN = {
    "threads": "size",
    "rounds": "size",
    "curves": {"*": {"*": [{"size": "size", "ms": "number"}]}},
}


def numbers_path(figure_path):
    """The .json beside a figure."""
    return os.path.splitext(figure_path)[0] + ".json"


def curve_lines(name, results):
    """Results with a size, of one benchmark -> {line: [{"size", "ms": the median}]}"""
    _, ours_is = CURVES[name]
    lines = {}
    for result in results:
        ours, baseline = milliseconds(result)
        lines.setdefault(ours_is or result.what, {})[result.size] = ours
        # One baseline may stand beside many of ours.
        lines.setdefault(result.baseline, {})[result.size] = baseline
    points = {}
    for line, of_line in lines.items():
        points[line] = [{"size": size, "ms": ms} for size, ms in of_line.items()]
    return points


def draw_curves(path, shown):
    """shown: see SHOWN. A panel for each benchmark."""
    from matplotlib.ticker import LogLocator  # slow to import, and only --figure needs it

    curves = shown["curves"]
    unknown = ", ".join(sorted(set(curves) - set(CURVES)))
    require(not unknown, f"{numbers_path(path)}: no benchmark with a figure is {unknown}", None)
    n_columns = 2 if len(curves) > 1 else 1
    n_rows = math.ceil(len(curves) / n_columns)
    plt, fig, axes = plots.figure(max(1, n_rows), n_columns, width=4)
    for axis in axes[len(curves) :]:
        axis.remove()
    for axis, (name, lines) in zip(axes, curves.items()):
        highest = {}
        for line, points in lines.items():
            highest[line] = max(point["ms"] for point in points)
        # The highest line comes first in the legend.
        for i, line in enumerate(sorted(lines, key=highest.get, reverse=True)):
            points = lines[line]
            if len(points) == 1:  # only in the table
                continue
            style = "o-" if i < 10 else "s--"  # there are ten colours
            sizes = [point["size"] for point in points]
            times = [point["ms"] for point in points]
            axis.plot(sizes, times, style, ms=3, lw=1, label=line)
        axis.set(xscale="log", yscale="log", xlabel=CURVES[name][0], ylabel="ms")
        sizes = sorted({point["size"] for points in lines.values() for point in points})
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axis.set_yticks([], minor=True)
        axis.yaxis.set_major_formatter("{x:,.4g}")
        axis.legend()
        if len(lines) > 6:
            axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    unit = "thread" if shown["threads"] == 1 else "threads"
    caption = f"{shown['threads']} {unit}, medians of up to {shown['rounds']} interleaved rounds"
    fig.supxlabel(caption, fontsize=7)
    plots.finish_figure(fig, plt, path, "")


if __name__ == "__main__":
    run_cli(main)
