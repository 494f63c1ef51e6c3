"""How fast, as ratios: python tests/bench.py [ROW ...] [--rounds 15] [--threads 2]; --help names the rows.

    python tests/bench.py lengths memory templates --figure figures/scaling.png     # and a picture of how cost grows

Each row compares ours with a plain peer. The two take turns, so that a busy machine slows both, and the ratio is the median
over the rounds. The peak of this machine is a 2048 x 2048 float32 matrix product timed in the same rounds; a training
step's share of it counts the floating-point operations of matrix products, those of attention without regard to the mask.
Slow rows take fewer rounds: the table says how many.
Run it with nothing else running: two threads beside a busy process can be many times slower than one.
"""

import argparse
import importlib
import os
import socket
import statistics
import subprocess
import sys
import time
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]

import data_mqar  # noqa: E402
import data_synth  # noqa: E402
import delta as D  # noqa: E402
import memory  # noqa: E402
import model as M  # noqa: E402
import train  # noqa: E402
from analysis import hooks  # noqa: E402
from analysis.ablation import measure_slots  # noqa: E402
from data_synth import BUILD  # noqa: E402
from myriadlama import (
    fusion,  # noqa: E402
    llama,  # noqa: E402
)
from naive import fla_naive, loop_sequences, naive_mask  # noqa: E402
from nanorecall import (
    distributed,  # noqa: E402
    metrics,  # noqa: E402
    plots,  # noqa: E402
    text,  # noqa: E402
)
from nanorecall.build import build_model, build_model_config  # noqa: E402
from nanorecall.run import Run  # noqa: E402


def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def take_turns(functions, rounds):
    """{name: f} -> {name: [seconds]}, all called once a round; two rounds before the first are not counted."""
    times = {name: [] for name in functions}
    for i in range(rounds + 2):
        for name, f in functions.items():
            t = seconds(f)
            if i >= 2:
                times[name].append(t)
    return times


def imported(name):
    """A package, or None with a note if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"(no comparison with {name}: pip install {name})", file=sys.stderr)


# What was timed, seconds of each round, the peer's name and seconds, share of the sgemm peak, and a size to draw it by
Row = namedtuple("Row", "what ours peer_name peer share x", defaults=(None, None))
CURVES = {  # rows with sizes: what these are
    "lengths": "tokens in a row (4,096 in a training step)",
    "memory": "slots in the table",
    "templates": "templates of a question",
}


def make_peak():
    a, b = torch.randn(2, 2048, 2048)
    return (lambda: a @ b), 2 * 2048**3


def make_stepper(model, loss_of, fused=True):
    """A whole optimiser step of a model as a function: forward, backward, clip, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)

    def step():
        loss_of(model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def count_flops(step):
    """Floating-point operations of the matrix products of a step. The counter knows no fused CPU attention, so the same
    products are counted unfused: whole T x T scores, no recomputation."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def train_rows(rounds):
    """A training step of configs/mqar_gpt.py on 32 pairs, against a plain loop: all logits, torch's default AdamW."""
    data = data_mqar.Data(data_mqar.Config(infinite_data=True))
    text, targets, _ = data.batch("train", 0, data.batch_indices(0, 32))

    def stepper(loss_of, compiled=False):
        torch.manual_seed(0)
        model = M.GPT(M.Config(dk=48, dv=48, init_std=1.0))
        if compiled:
            model.compile()
        return make_stepper(model, loss_of, fused=loss_of is labelled)

    def labelled(model):
        return model(text, targets)[1]

    def all_logits(model):
        return F.cross_entropy(model(text)[0].flatten(0, 1), targets.flatten(), ignore_index=-100)

    peak, peak_flops = make_peak()
    steps = {
        "ours": stepper(labelled),
        "ours, compiled": stepper(labelled, compiled=True),
        "all logits, eager": stepper(all_logits),
    }
    flops = count_flops(steps["ours"])
    times = take_turns({**steps, "peak": peak}, rounds)
    peak_rate = peak_flops / statistics.median(times["peak"])
    for ours in ("ours", "ours, compiled"):
        rate = flops / statistics.median(times[ours])
        yield "training step, " + ours, times[ours], "all logits, eager", times["all logits, eager"], rate / peak_rate
    print(f"(peak {peak_rate / 1e9:.0f} GFLOP/s; a step of ours is {flops / 1e9:.2f} GFLOP)", file=sys.stderr)


def data_rows(rounds):
    """The 40,000 training rows of the MQAR cell, against a numpy loop over rows with the same law."""
    c = data_mqar.Config()
    cell, n = data_mqar.TaskSize(c.input_seq_len, c.num_kv_pairs, c), c.n_train_examples
    ours = {"ours": lambda: data_mqar.make_sequences(cell, "train", np.arange(n))}
    peer = {"loop": lambda: loop_sequences(cell, n // 10, np.random.default_rng(0))}  # a tenth of the rows, or it takes a minute
    times = take_turns({**ours, **peer}, min(rounds, 5))
    yield f"{n} MQAR rows", times["ours"], "numpy loop over rows", [10 * t for t in times["loop"]], None


def mask_rows(rounds):
    """Label masks of 1,000,000 tokens of documents end to end, against the same rules letter by letter."""
    for kind, task in (("qa", {}), ("digits", {}), ("twohop", {}), ("hashhop", {"hops": (1, 2), "cot_frac": 0.5})):
        c = data_synth.Config(task=kind, pack_documents=True, **task)
        texts, _ = BUILD[kind](c).read("train", range(1000))
        documents = [text.BYTES.encode(text) for text in texts]
        copies = 10**6 // sum(map(len, documents)) + 1
        flat, ends = np.concatenate(documents * copies), np.cumsum([0, *map(len, documents * copies)])
        ours = {"ours": lambda: text.label_mask(flat, kind, ends)}
        times = take_turns(ours | {"loop": lambda: [naive_mask(d, kind) for d in documents]}, min(rounds, 5))
        yield f"{kind} mask of {len(flat)} tokens", times["ours"], "loop over tokens", [copies * t for t in times["loop"]], None


def memory_rows(rounds, T=256, H=4, Q=128, V=256, k=8):
    """Lookup and reading of a memory layer by number of slots, against flat keys, and against values gathered row by row."""
    g = torch.Generator().manual_seed(0)
    for n in (64, 128, 256, 512):
        q, keys = torch.randn(T, H, 2, Q // 2, generator=g), torch.randn(H, 2, n, Q // 2, generator=g)
        values, flat = torch.randn(n * n, V, generator=g), torch.randn(H, n * n, Q, generator=g) if n <= 256 else None

        def read(reader, q=q, keys=keys, values=values):
            scores, slots = memory.product_key_topk(q, keys, k)
            return reader(values, slots.flatten(1), scores.softmax(-1).flatten(1))

        def flat_keys(q=q, flat=flat, values=values):
            scores, slots = torch.einsum("nhse,hce->nhc", q.flatten(-2).unsqueeze(2), flat).topk(k)
            return memory.weighted_values(values, slots.flatten(1), scores.softmax(-1).flatten(1))

        functions = {"ours": lambda read=read: read(memory.weighted_values)}
        functions |= {"values one by one": lambda read=read: read(memory.naive_weighted_values)}
        functions |= {"flat keys": flat_keys} if n <= 256 else {}
        with torch.no_grad():
            times = take_turns(functions, rounds)
        for peer in list(functions)[1:]:
            yield f"memory, {n * n} slots, {T} tokens", times["ours"], peer, times[peer], None, n * n


@torch.no_grad()
def adam_on_rows(p, grad, mean, square, rows, step, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8):
    """Adam on the rows of a table that were read; the others keep value and moments, which Adam would move on."""
    g = grad[rows]
    mean[rows] = m = mean[rows].lerp_(g, 1 - beta1)
    square[rows] = v = square[rows].mul_(beta2).addcmul_(g, g, value=1 - beta2)
    p[rows] -= lr / (1 - beta1**step) * m / ((v / (1 - beta2**step)).sqrt_().add_(eps))


def optimizer_rows(rounds, slots=65536, V=256):
    """One step of the optimizer on a table of values: torch's fused AdamW on all of it, and Adam on the rows read."""
    g = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(slots, V, generator=g))
    p.grad = torch.randn(slots, V, generator=g)
    mine, mean, square = p.detach().clone(), torch.zeros(slots, V), torch.zeros(slots, V)
    optimizer = torch.optim.AdamW([p], fused=True, weight_decay=0.0)
    for step in (1, 2, 3):  # where every row is read, they are the same
        optimizer.step()
        adam_on_rows(mine, p.grad, mean, square, torch.arange(slots), step)
    torch.testing.assert_close(mine, p.detach(), rtol=1e-5, atol=1e-5)
    for share in (0.01, 0.03, 0.1, 0.3):
        rows = torch.randperm(slots, generator=g)[: int(share * slots)]
        ours, peer = optimizer.step, lambda rows=rows: adam_on_rows(mine, p.grad, mean, square, rows, 4)
        times = take_turns({"ours": ours, "rows": peer}, rounds)
        yield f"fused AdamW, {slots} x {V} values", times["ours"], f"the {share:.0%} of rows read", times["rows"], None


def delta_inputs(B, T, H, width):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, T, width, generator=g) for _ in range(3))
    return [x.requires_grad_() for x in (q, F.normalize(k, dim=-1), v, torch.rand(B, H, T, generator=g))]


def forward_and_backward(rule, inputs, **options):
    def f():
        o = rule(*inputs, **options)[0]
        torch.autograd.grad(o, inputs, torch.ones_like(o))

    return f


def delta_rows(rounds):
    """The chunked delta rule, forward and backward, against token by token and fla's naive chunks; is time linear in T?"""
    naive = fla_naive("delta_rule")
    if naive is None:
        print("(no comparison with fla's naive form: pip install fla-core)", file=sys.stderr)
    peak, peak_flops = make_peak()
    for B, T, H, width, C in ((32, 128, 2, 32, 16), (32, 128, 2, 48, 16), (8, 1024, 4, 64, 32)) if naive else ():
        inputs = delta_inputs(B, T, H, width)
        functions = {"ours": forward_and_backward(D.delta_rule_chunkwise, inputs, chunk_size=C), "peak": peak}
        functions["loop"] = forward_and_backward(D.delta_rule_recurrent, inputs)
        for peer in (16, 32, 64):
            functions[peer] = forward_and_backward(naive.delta_rule_chunkwise, inputs, chunk_size=peer)
        times = take_turns(functions, rounds)
        # Multiply-adds as in delta.py: C^2 (3 K + 2 V) + 3 C K V forward, C^2 (4 K + 4 V) + 6 C K V backward.
        flops = 2 * B * H * (T // C) * (13 * C**2 * width + 9 * C * width**2)
        share = flops / statistics.median(times["ours"]) / (peak_flops / statistics.median(times["peak"]))
        best = min((16, 32, 64), key=lambda peer: statistics.median(times[peer]))
        what = f"delta rule, {B} x {T}, {H} heads of {width}"
        yield what, times["ours"], "token by token", times["loop"], share
        yield what, times["ours"], "fla naive, its default", times[32], share
        yield what, times["ours"], f"fla naive, best chunk {best}", times[best], share
    lengths = (256, 1024, 8192)
    rules = {T: forward_and_backward(D.delta_rule_chunkwise, delta_inputs(4, T, 2, 48), chunk_size=16) for T in lengths}
    times = take_turns(rules, rounds)
    for T in lengths[1:]:
        yield f"delta rule, 4 x {T}", times[T], f"{T // 256} times 4 x 256", [t * (T // 256) for t in times[256]], None


def length_rows(rounds):
    """A training step of DeltaNet against GPT of the same sizes: with the same convolution, with none, and as shipped."""
    peak, peak_flops = make_peak()
    for T in (128, 512, 2048) if rounds < 5 else (128, 256, 512, 1024, 2048):
        data = data_mqar.Data(data_mqar.Config(infinite_data=True, input_seq_len=T))
        text, targets, _ = data.batch("train", 0, data.batch_indices(0, 4096 // T))
        sizes = dict(dk=48, dv=48, seq_len=T)
        models = {f"DeltaNet, conv {conv}": D.DeltaNet(D.Config(conv_size=conv, **sizes)) for conv in (4, 0)}
        models |= {f"GPT, conv {conv}": M.GPT(M.Config(conv_size=conv, **sizes)) for conv in (4, 0)}
        steps = {name: make_stepper(m, lambda m: m(text, targets)[1]) for name, m in models.items()}
        times = take_turns(steps | {"peak": peak}, rounds)
        for ours, peer in ((4, 4), (0, 0), (4, 0)) if T == 128 else ((4, 4),):
            name, other = f"DeltaNet, conv {ours}", f"GPT, conv {peer}"
            rate = count_flops(steps[name]) / statistics.median(times[name])
            of_peak = rate * statistics.median(times["peak"]) / peak_flops
            size = T if (ours, peer) == (4, 4) else None
            yield f"step, {4096 // T} x {T}, {name}", times[name], other, times[other], of_peak, size


STEPS = 5  # in a turn of the ranks


def rank_loop(rank, size, threads, port, orders):
    """One of `size` ranks: take orders from a pipe ("step", "step without exchange" or None) until the last one."""
    torch.set_num_threads(threads)
    if size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), GLOO_SOCKET_IFNAME="lo")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with distributed.process_group() as world:
        p = train.parse([os.path.join(ROOT, "configs", "mqar_gpt.py"), "--curriculum=[]", "--device=cpu"])
        runs = {"step": Run.create(p, world), "step without exchange": Run.create(p, world)}
        model = runs["step"].model
        runs["step"].parallel_model = distributed.wrap_model(model, "ddp", torch.device("cpu"))
        runs["step without exchange"].parallel_model = model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        number = 0
        while order := orders.recv():
            for _ in range(STEPS):
                train.forward_backward(runs[order], number, [])
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                number += 1
            orders.send("done")


def rank_rows(rounds):
    """Steps of configs/mqar_gpt.py on one process with two threads, and on two ranks with one each; the same global batch."""
    context, groups = torch.multiprocessing.get_context("spawn"), {}
    for size, threads in ((1, 2), (1, 1), (2, 1)):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        pipes = [context.Pipe() for _ in range(size)]
        for rank, (_, theirs) in enumerate(pipes):
            context.Process(target=rank_loop, args=(rank, size, threads, port, theirs), daemon=True).start()
        groups[size, threads] = [ours for ours, _ in pipes]

    def turn(group, order):
        for pipe in groups[group]:
            pipe.send(order)
        for pipe in groups[group]:
            pipe.recv()

    orders = {group: lambda group=group: turn(group, "step") for group in groups}
    orders["alone"] = lambda: turn((2, 1), "step without exchange")
    times = {name: [t / STEPS for t in ts] for name, ts in take_turns(orders, rounds).items()}
    for group in groups:
        for pipe in groups[group]:
            pipe.send(None)
    yield "step of 32 rows, 2 ranks", times[2, 1], "1 process, 2 threads", times[1, 2], None
    yield "step of 32 rows, 2 ranks", times[2, 1], "1 process, 1 thread", times[1, 1], None
    yield "the same, no exchange of gradients", times["alone"], "2 ranks", times[2, 1], None


def eval_rows(rounds):
    """Evaluation of 180 rows of synthetic QA (configs/qa_2k_memory.py), 100 rows at once against one at a time."""
    p = train.parse([os.path.join(ROOT, "configs", "qa_2k_memory.py"), "--n_test_examples=180"])
    data = p.data_module.Data(p.data)
    torch.manual_seed(0)
    model = build_model(p, build_model_config(p, data)).eval()

    def all_rows(batch_size):
        return lambda: list(metrics.iter_predictions(model, data, "test", batch_size, torch.device("cpu")))

    times = take_turns({"ours": all_rows(100), "one at a time": all_rows(1)}, max(1, rounds // 3))
    yield "evaluation of 180 rows", times["ours"], "one at a time", times["one at a time"], None


def ablate_rows(rounds):
    """Every slot of ten rows of synthetic QA removed (configs/qa_2k_memory.py), many at once from the memory layer on, against
    a whole forward pass for each; per (row, slot)."""
    p = train.parse([os.path.join(ROOT, "configs", "qa_2k_memory.py")])
    data = p.data_module.Data(p.data)
    torch.manual_seed(0)
    model = build_model(p, build_model_config(p, data)).eval()
    look = SimpleNamespace(data=data, config=SimpleNamespace(split="test"), pad=data.tokenizer.pad, device="cpu")
    cases, _ = hooks.load_examples(look, np.arange(10))
    slots = hooks.run_with_cache(model, cases).reads[0]["slots"]
    counted = len(measure_slots(model, cases, ["zero"])["drop"]) // cases.label_pos.shape[1]

    @torch.no_grad()
    def one_by_one():
        for slot in slots[0].unique().tolist()[:20]:
            silence = lambda f, slot=slot: {"slots": f["slots"], "weights": f["weights"].masked_fill(f["slots"] == slot, 0)}
            model(cases.tokens[:1], intervene={0: silence})

    times = take_turns({"ours": lambda: measure_slots(model, cases, ["zero"]), "naive": one_by_one}, max(1, rounds // 3))
    ours, naive = [t / counted for t in times["ours"]], [t / 20 for t in times["naive"]]
    yield "a slot removed from a row", ours, "a forward pass each", naive, None


def small_llama():
    """A random Llama of SmolLM2's shape, 10 layers instead of 30, and the shared prefix of its questions: 5 examples."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=49152, dim=576, n_layers=10, n_heads=9, n_kv_heads=3, head_dim=64, intermediate_size=1536)
    prefix = np.random.default_rng(0).integers(10, 49152, 104).tolist()
    return llama.Llama(llama.Config(**sizes)).eval().requires_grad_(False), prefix


def fuse(model, prefix, questions, n, new_tokens=4):
    """Encode the prefix once and each of n templates of 15 tokens once, fuse them, decode: for so many questions at once."""
    random = np.random.default_rng(1)
    segments = random.integers(10, 49152, (questions * n, 15)).tolist()
    never = fusion.StopCriteria(torch.tensor([], dtype=torch.long), *torch.zeros(2, 49152, dtype=torch.bool))

    def f():
        shared = fusion.prefill_prefix(model, prefix)
        rows = [(s, range(104, 119)) for s in segments]
        places = [range(i, i + n) for i in range(0, len(rows), n)]
        cache = fusion.build_cache(shared, rows, fusion.prefill(model, shared, rows), places, [119] * questions)
        fusion.greedy_decode(model, cache, 7, fusion.argmax_each, never, max_new_tokens=new_tokens)

    return f, segments


def flex_rows(rounds):
    """One question in 5 + 5 templates behind 5 shots, fused: ours, 8 questions at once, against the documented way, in which
    every template brings its own shots, each token a new mask, and nothing is cached; and against transformers' generate,
    which caches, on the same tokens under its causal mask, 8 rows at once."""
    model, prefix = small_llama()
    ours, segments = fuse(model, prefix, 8, 10)
    manual = torch.arange(10) < 5

    def documented():
        ids = [t for s in segments[:10] for t in [*prefix, *s, 7, 3]]
        segment = [i for i, s in enumerate(segments[:10]) for _ in range(len(prefix) + len(s) + 2)]
        for _ in range(4):
            seen = fusion.dense_mask("isolated", torch.tensor(segment), manual)
            attend = lambda layer, q, k, v, seen=seen: F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
            x = model(torch.tensor([ids]), torch.arange(len(ids))[None], attend)
            ids, segment = [*ids, int(model.logits(x[:, -1]).argmax())], [*segment, fusion.ANSWER]

    functions = {"ours": ours, "no cache, own shots each": documented}
    if transformers := imported("transformers"):
        sizes = dict(vocab_size=49152, hidden_size=576, num_hidden_layers=10, num_attention_heads=9, num_key_value_heads=3)
        config = transformers.LlamaConfig(**sizes, intermediate_size=1536, tie_word_embeddings=True, eos_token_id=None)
        peer = transformers.LlamaForCausalLM(config).eval()
        ids = torch.tensor([[*prefix, *sum(segments[i : i + 10], []), 7] for i in range(0, 80, 10)])
        words = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
        functions["transformers generate"] = lambda: peer.generate(ids, **words)
    times = take_turns(functions, max(1, rounds // 5))
    yield (
        "a question fused, 4 tokens",
        [t / 8 for t in times["ours"]],
        "no cache, own shots each",
        times["no cache, own shots each"],
        None,
    )
    if transformers:
        each = {name: [t / 8 for t in times[name]] for name in ("ours", "transformers generate")}
        yield "a question fused, 4 tokens", each["ours"], "transformers generate", each["transformers generate"], None


def template_rows(rounds):
    """Fused questions by number of templates, of questions at once, of new tokens: against as many times the smallest."""
    model, prefix = small_llama()
    for what, sizes in (
        ("templates", {n: (4, n, 4) for n in (2, 5, 10, 20)}),
        ("questions at once", {b: (b, 5, 4) for b in (1, 4, 16)}),
        ("new tokens", {t: (4, 5, t) for t in (4, 16, 64)}),
    ):
        functions = {n: fuse(model, prefix, *size)[0] for n, size in sizes.items()}
        times, first = take_turns(functions, max(1, rounds // 5)), min(sizes)
        for n in sizes if what == "templates" else list(sizes)[1:]:
            linear = [t * n / first for t in times[first]]
            size = n if what == "templates" else None
            yield f"fused, {n} {what}", times[n], f"linear from {first}", linear, None, size


BENCHES = {
    "train": train_rows,
    "data": data_rows,
    "masks": mask_rows,
    "memory": memory_rows,
    "optimizer": optimizer_rows,
    "eval": eval_rows,
    "ablate": ablate_rows,
    "flex": flex_rows,
    "templates": template_rows,
    "delta": delta_rows,
    "lengths": length_rows,
    "ranks": rank_rows,
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
    return parser.parse_args(argv)


def main():
    args = parse()
    args.rounds = 3 if args.quick else args.rounds
    torch.set_num_threads(args.threads)
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"torch {torch.__version__}, {args.threads} threads, {args.rounds} rounds, commit {commit}")
    print(f"{'what':36s} {'rounds':>6s} {'ours, ms':>9s}  {'peer':25s} {'peer, ms':>9s} {'ratio':>6s} {'of peak':>8s}")
    found = {name: [] for name in CURVES}
    for name in args.names or BENCHES:
        for row in (Row(*row) for row in BENCHES[name](args.rounds)):
            ours, peer = (statistics.median(times) * 1e3 for times in (row.ours, row.peer))
            ratio = statistics.median(p / o for o, p in zip(row.ours, row.peer))
            share = "" if row.share is None else f"{row.share:.0%}"
            end = f"{row.peer_name:25s} {peer:9.1f} {ratio:6.2f} {share:>8s}"
            print(f"{row.what:36s} {len(row.ours):6d} {ours:9.1f}  {end}", flush=True)
            if row.x is not None:
                found[name].append((row.x, ours, row.peer_name, peer))
    if args.figure:
        draw_curves(args.figure, {name: rows for name, rows in found.items() if rows}, args.rounds)
        print(f"wrote {args.figure}")


def draw_curves(path, found, rounds):
    """found {bench: [(size, ours, peer's name, peer)]} in ms -> a panel for each."""
    from matplotlib.ticker import LogLocator  # matplotlib takes a second to import, and only --figure needs it

    plt, fig, axes = plots.figure(1, max(1, len(found)), width=4)
    for axis, (name, rows) in zip(axes, found.items()):
        lines = {"ours": {x: ours for x, ours, _, _ in rows}}
        for x, _, peer, ms in rows:
            lines.setdefault(peer, {})[x] = ms
        for label, points in lines.items():
            axis.plot(list(points), list(points.values()), "o-", ms=3, lw=1, label=label)
        axis.set(xscale="log", yscale="log", xlabel=CURVES[name], ylabel="ms")
        sizes = sorted({x for x, *_ in rows})
        axis.set_xticks(sizes, [f"{x:,}" for x in sizes], fontsize=7)
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_yticks([], minor=True)
        axis.yaxis.set_major_formatter("{x:,.4g}")
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    threads = torch.get_num_threads()
    fig.supxlabel(f"{threads} thread{'s' * (threads > 1)}, medians of up to {rounds} interleaved rounds", fontsize=7)
    plots.finish_figure(fig, plt, path, "")


if __name__ == "__main__":
    main()
