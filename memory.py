"""Memory layers: a table of value vectors, looked up by product keys, in place of an MLP or beside it.

    python train.py configs/qa_2k_memory.py              # --model memory: in place of the MLP of the blocks in memory_layers
    python train.py configs/qa_2k_router.py              # --model memory_router: both, and a choice between them for each token
    python memory.py params configs/qa_2k_memory.py      # parameters, in all and active for a token
    python memory.py inspect runs/A runs/B               # names and shapes of weights, and where two differ
    python memory.py convert runs/A x.pt --to memory_router

A query is cut into two halves; each is compared with n sub-keys, and the slot (i, j) of n * n has the sum of the i-th score of
the first and the j-th of the second. The best k of all n * n slots are among the k * k sums of the best k of either half, so a
lookup costs n and k * k where flat keys would cost n * n (Lample et al. 2019, arXiv 1907.05242; Berges et al. 2024, arXiv
2412.09764, put it in place of MLPs). The options are those of LLMonade's experiments and pipeline.

Letters: N tokens, D width of the residual stream, H heads, n sub-keys in a half, n * n slots, k slots read by a head,
Q width of a query, V width of a value.
"""

import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import model as M
from model import GPT, NORMS, GPTBlock, gather_positions
from nanorecall.checkpoint import atomic_write
from nanorecall.metrics import print_table
from nanorecall.pretrained import our_name, read_weights
from nanorecall.build import build_model, build_model_config, resolve_model
from nanorecall.second_order import transformed
from nanorecall.settings import at_least, one_of, require, run_cli, say, split_argv, within


@dataclass
class Config(M.Config):
    use_ffn: bool = True  # an MLP in every block that has no memory layer (memory_router: in every block)
    memory_layers: tuple[int, ...] = (1,)  # blocks with a memory layer, counted from 0
    mem_n_keys: int = 32  # sub-keys in each half of a query; the table has the square of it as slots
    mem_heads: int = 4  # lookups per token, whose values are summed
    mem_knn: int = 8  # slots that a head reads
    mem_k_dim: int = 64  # width of a query per head, both halves
    mem_v_dim: int = 0  # width of a value; 0: dim
    mem_score: str = "softmax"  # weights of the slots read: softmax over them, or sigmoid of each
    mem_query_norm: str = "layer"  # norm of each half of a query, so that all slots get used: none l2 l1 rms layer
    mem_share_values: bool = True  # one table of values for all memory layers of the model
    mem_gated: bool = False  # multiply what was read by silu(W x) before the last projection
    mem_balance: float = 0.0  # raise the bias of sub-keys read less than average by so much a step, lower the others'
    mem_value_lr: float = 1.0  # learning rate of the values over that of everything else; they never decay
    mem_hard: bool = False  # memory_router: take the likelier of MLP and memory only, not their weighted sum

    def check(self):
        super().check()
        within(self, 1, 2**12, "mem_n_keys", "mem_heads", "mem_knn")
        within(self, 2, 2**16, "mem_k_dim")
        within(self, 0, 2**16, "mem_v_dim")
        within(self, 0, 1000, "mem_value_lr")
        at_least(self, 0, "mem_balance")
        one_of(self, SCORES, "mem_score")
        one_of(self, NORMS, "mem_query_norm")
        require(self.use_ffn, "memory layers take the place of MLPs: use_ffn=1", "use_ffn")
        require(self.mem_k_dim % 2 == 0, f"mem_k_dim={self.mem_k_dim} must be even: a query has two halves", "mem_k_dim")
        message = f"mem_knn={self.mem_knn} is more than mem_n_keys={self.mem_n_keys}, the sub-keys that each half chooses from"
        require(self.mem_knn <= self.mem_n_keys, message, "mem_knn")
        message = "mem_knn=1 with mem_score=softmax: its only weight is 1, so no gradient would reach queries and keys"
        require(self.mem_knn > 1 or self.mem_score != "softmax", message + "; use sigmoid or mem_knn=2", "mem_knn")
        layers = self.memory_layers
        require(
            layers and len(set(layers)) == len(layers), f"memory_layers={layers} must name blocks, once each", "memory_layers"
        )
        message = f"memory_layers={layers} must lie in 0 to {self.n_layers - 1}, the blocks of n_layers={self.n_layers}"
        require(min(layers) >= 0 and max(layers) < self.n_layers, message, "memory_layers")


SCORES = {  # scores (N, H, k) -> weights
    "softmax": lambda s: s.softmax(-1),
    "sigmoid": torch.sigmoid,  # each slot by itself, as in sigma-MoE (arXiv 2310.10837)
}


# ---- lookup ------------------------------------------------------------------------------------------------------------


def product_key_topk(q, keys, k, bias=None):
    """The k best slots of each head, exactly: q (N, H, 2, Q/2), keys (H, 2, n, Q/2) -> scores (N, H, k), slots (N, H, k) long.

    Slot i * n + j scores q[0].keys[0, i] + q[1].keys[1, j]. bias (H, 2, n) counts for the choice only, not in the scores.
    """
    n = keys.shape[2]
    halves = torch.einsum("nhse,hske->nhsk", q, keys)  # (N, H, 2, n)
    chosen_by = halves if bias is None else halves + bias
    best, at = chosen_by.topk(k, dim=-1)  # (N, H, 2, k)
    sums = best[:, :, 0, :, None] + best[:, :, 1, None, :]  # (N, H, k, k)
    scores, place = sums.flatten(-2).topk(k, dim=-1)  # (N, H, k)
    first, second = at[:, :, 0].gather(-1, place // k), at[:, :, 1].gather(-1, place % k)
    if bias is not None:
        scores = halves[:, :, 0].gather(-1, first) + halves[:, :, 1].gather(-1, second)
    return scores, first * n + second


def naive_product_key_topk(q, keys, k, bias=None):
    """lookup by the scores of all n * n slots: the oracle of the tests."""
    halves = torch.einsum("nhse,hske->nhsk", q, keys)
    biased = halves if bias is None else halves + bias
    every, chosen_by = ((h[:, :, 0, :, None] + h[:, :, 1, None, :]).flatten(-2) for h in (halves, biased))
    slots = chosen_by.topk(k, dim=-1).indices
    return every.gather(-1, slots), slots


def weighted_values(values, slots, weights):
    """Weighted sums of rows of a table: values (slots, V); slots and weights (N, R) -> (N, V).

    torch has no second derivative of it and says so; naive_read_values has.
    """
    if transformed():
        return naive_weighted_values(values, slots, weights)
    return F.embedding_bag(slots, values, per_sample_weights=weights, mode="sum")


def naive_weighted_values(values, slots, weights):
    """read_values, row by row: N * R rows are copied, which takes 50 times as long on a CPU."""
    return (values[slots] * weights.unsqueeze(-1)).sum(-2)


# ---- the layer ---------------------------------------------------------------------------------------------------------


class MemoryLayer(nn.Module):
    """x (..., D) -> (..., D): a query per head, the values of its k best slots, and their weighted sum over all heads."""

    def __init__(self, c, values=None):
        """values: the table (n * n, V) of another layer, to share it."""
        super().__init__()
        self.config = c
        H, n, width = c.mem_heads, c.mem_n_keys, c.mem_v_dim or c.dim
        bound = c.mem_k_dim**-0.5
        self.query = nn.Linear(c.dim, H * c.mem_k_dim)
        self.keys = nn.Parameter(torch.empty(H, 2, n, c.mem_k_dim // 2).uniform_(-bound, bound))
        self.values = nn.Parameter(torch.randn(n * n, width) * width**-0.5) if values is None else values
        self.gate = nn.Linear(c.dim, width, bias=False) if c.mem_gated else None
        self.out = nn.Linear(width, c.dim, bias=False) if c.mem_gated or width != c.dim else None
        self.register_buffer("bias", torch.zeros(H, 2, n) if c.mem_balance else None)
        self.register_buffer("reads", torch.zeros(H, n * n, dtype=torch.long), persistent=False)  # of this training step

    def search(self, x, k):
        """x (..., D) -> scores and slots (..., H, k) of each head's k best slots."""
        c, shape = self.config, x.shape[:-1]
        q = self.query(x.flatten(0, -2)).unflatten(-1, (c.mem_heads, 2, -1))  # (N, H, 2, Q/2)
        q = NORMS[c.mem_query_norm](q)
        return [y.unflatten(0, shape) for y in product_key_topk(q, self.keys.to(q.dtype), k, self.bias)]

    def forward(self, x, intervene=None, found=None):
        """-> (..., D), and what was found: {"slots": (..., H, k) long, "weights": (..., H, k), "read": (..., V)}.

        intervene: a function of slots and weights that returns others, and with "read" the vectors to take instead.
        found: slots and weights known already; nothing is searched for then.
        """
        c = self.config
        if found is None:
            scores, slots = self.search(x, c.mem_knn)
            if self.training and not transformed():  # torch.func allows no change of a buffer
                self.count(slots.flatten(0, -3))
            found = {"slots": slots, "weights": SCORES[c.mem_score](scores)}
        found = intervene(found) if intervene else found
        if "read" not in found:
            slots, weights = (found[name].flatten(0, -3).flatten(1) for name in ("slots", "weights"))  # (N, H * k)
            read = weighted_values(self.values, slots, weights.to(self.values.dtype)).unflatten(0, x.shape[:-1])
            found = {**found, "read": read}
        y = found["read"]
        if self.gate:
            y = y * F.silu(self.gate(x))
        return self.out(y) if self.out else y, found

    @torch.no_grad()
    def count(self, slots):
        """Add slots (N, H, k) to the reads of this step."""
        H, size = self.reads.shape
        at = slots + size * torch.arange(H, device=slots.device)[:, None]
        self.reads += torch.bincount(at.flatten(), minlength=H * size).view(H, size)

    @torch.no_grad()
    def balance(self):
        """Move the bias of each sub-key by mem_balance: up if it was read less than the average of this step, else down
        (loss-free balancing, Wang et al. 2024, arXiv 2408.15664)."""
        n = self.config.mem_n_keys
        table = in_float64(self.reads).view(-1, n, n)
        halves = torch.stack([table.sum(2), table.sum(1)], dim=1)  # (H, 2, n)
        change = torch.sign(halves.mean(-1, keepdim=True) - halves)
        self.bias += self.config.mem_balance * change.to(self.bias)


def in_float64(x):
    """x in float64, where it is, or on the CPU if its device has no such numbers (mps)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def slot_usage(reads):
    """Times that each slot was read (slots,) -> share of slots read at all, number of the others, KL divergence from even use
    in nats (0: even; log of the number of slots: always the same one), and the five slots read most with their shares."""
    p = in_float64(reads)
    p = p / p.sum().clamp(min=1)
    kl = float((p[p > 0] * (p[p > 0] * len(p)).log()).sum())
    best, at = p.topk(min(5, len(p)))
    used = int((reads > 0).sum())
    return {"share": used / len(p), "dead": len(p) - used, "kl": kl, "top": [*zip(at.tolist(), best.tolist())]}


# ---- models ------------------------------------------------------------------------------------------------------------


class MemoryBlock(GPTBlock):
    """A GPT block whose MLP may be a memory layer, or beside one with a router."""

    def __init__(self, c):
        super().__init__(c)
        self.memory = self.router = self.number = None
        self.hard = c.mem_hard

    def forward(self, x, rows=None, trace=None, intervene=None, **extra):
        y = gather_positions(x, rows)
        if self.att:
            y = self.add(y, self.att(self.att_norm(x), rows, **extra))
        return self.add(y, self.feed(self.ffn_norm(y), trace, (intervene or {}).get(self.number)))

    def feed(self, x, trace=None, intervene=None, found=None):
        """What takes the MLP's place: (..., D) -> (..., D)."""
        if self.memory is None:
            return self.ffn(x)
        y, found = self.memory(x, intervene, found)
        if self.router:
            share = self.router(x).softmax(-1)  # (..., 2): of the MLP, of memory
            if self.hard:  # the likelier one alone, times its probability, so that the router learns (Switch Transformer)
                share = share * (share == share.amax(-1, keepdim=True))
            found["route"] = share
            y = share[..., :1] * self.ffn(x) + share[..., 1:] * y
        if trace is not None:
            trace.append(found)
        return y


class MemoryGPT(GPT):
    """GPT with a memory layer in place of the MLP of some blocks.

    forward(tokens, targets, cu_seqlens, trace=False, intervene=None). With trace, a third result lists for each memory layer,
    in order, {"slots", "weights", "read"} (see MemoryLayer.forward) and, of memory_router, "route" (..., 2), the shares of MLP
    and memory: at all positions without targets, else the last block's at the labelled ones only. intervene: {block: function}.
    """

    block = MemoryBlock
    inactive_settings = {**GPT.inactive_settings, "mem_hard": "only memory_router chooses"}
    keeps_mlp = False

    def __init__(self, config):
        super().__init__(config)
        values = None
        for i in sorted(config.memory_layers):
            layer, self.layers[i].number = self.layers[i], i
            layer.memory = MemoryLayer(config, values)
            values = layer.memory.values if config.mem_share_values else None
            if self.keeps_mlp:
                layer.router = nn.Linear(config.dim, 2)
            else:
                layer.ffn = None

    def forward(self, tokens, targets=None, cu_seqlens=None, trace=False, intervene=None):
        found = [] if trace else None
        logits, loss = super().forward(tokens, targets, cu_seqlens, trace=found, intervene=intervene)
        return (logits, loss, found) if trace else (logits, loss)

    def memories(self):
        """{block: its memory layer}"""
        return {i: layer.memory for i, layer in enumerate(self.layers) if layer.memory is not None}

    def lr_scales(self):
        """{end of a parameter's name: its learning rate over that of the others}; what is named here does not decay."""
        return {"memory.values": self.config.mem_value_lr}

    @torch.no_grad()
    def on_step_end(self, report=False):
        """Once after each training step: balance, and forget what was read. -> {block: usage} over all ranks if `report`."""
        found = {}
        for i, memory in self.memories().items():
            if dist.is_initialized() and (report or self.config.mem_balance):
                dist.all_reduce(memory.reads)
            if self.config.mem_balance and memory.keys.requires_grad:
                memory.balance()
            if report:
                found[str(i)] = slot_usage(memory.reads.sum(0))
            memory.reads.zero_()
        return found

    @classmethod
    def label(cls, c):
        layers = "-".join(map(str, c.memory_layers))
        return f"{super().label(c)}_M{layers}_S{c.mem_n_keys**2}_H{c.mem_heads}_K{c.mem_knn}"


class MemoryRouterGPT(MemoryGPT):
    """GPT in which some blocks have a memory layer beside the MLP, and each token its own weights of the two."""

    keeps_mlp = True
    inactive_settings = GPT.inactive_settings


# ---- changing facts without gradients ----------------------------------------------------------------------------------


@M.in_eval_mode
def edit_facts(model, tokens, targets, keep=None, margin=2.0, ridge=1e-4):
    """Change rows of the last block's values so that the model answers `targets` -> what `undo` needs to take it back.

    tokens, targets: (B, T), labels as in training; each prompt is read with its new answer before it. Two closed forms, no
    gradient. First, at each label, a change of what is read that lifts the answer's logit by `margin` above all others. Then
    the smallest change of value rows that adds these to what is read there, least squares with a ridge; with keep, a tensor
    (slots, slots) from `reading_statistics`, the one that changes least what was read in those texts (as MEMIT does in MLPs,
    Meng et al. 2023, arXiv 2210.07229, eq. 14). ValueError if the last block's memory layer cannot be written so.
    """
    if check_editable(model):
        raise ValueError(check_editable(model))
    memory = model.layers[-1].memory
    slots, weights, hidden, logits, answers = last_layer_reads(model, tokens, targets)
    head = model.lm_head.weight * model.final_norm.weight  # (tokens, D): logits are head @ hidden, times a scale per position
    reach = head if memory.out is None else head @ memory.out.weight  # (tokens, V): and change so with what is read
    change = target_updates(reach, hidden, logits, answers, margin)  # (N, V)
    read, at = slots.unique(return_inverse=True)  # (S,), (N, H * k)
    A = hidden.new_zeros(len(slots), len(read)).scatter_add_(1, at.view_as(slots), weights)  # (N, S): read = A @ values
    flat = A if keep is None else torch.linalg.solve(add_ridge(keep[read][:, read].to(A), ridge), A.T).T  # (N, S)
    rows = flat.T @ torch.linalg.solve(add_ridge(A @ flat.T, ridge), change)  # (S, V)
    before = memory.values[read]
    memory.values[read] += rows
    return {"slots": read, "values": before, "written": memory.values[read]}


def check_editable(model):
    """Why `write` cannot reach this model's answers, or ""."""
    memory = model.layers[-1].memory
    if memory is None or memory.gate is not None or model.layers[-1].residual_mul:
        return "write needs a memory layer without gate in the last block, and no residual_mul"
    if sum(m.values is memory.values for m in model.memories().values()) > 1:
        return "write needs values of the last block's own, as with mem_share_values=0: earlier blocks would change"
    return ""


@torch.no_grad()
def undo_edit(model, record):
    """Take a `write` back, to the last bit; of several that share rows, the last one first.

    ValueError, and nothing changes, if the rows are not as that `write` left them.
    """
    values, slots = model.layers[-1].memory.values, record["slots"]
    # Bytes, because a nan would differ from itself.
    if not torch.equal(values[slots].view(torch.uint8), record["written"].view(torch.uint8)):
        raise ValueError("the rows are not as this write left them; undo what came after it first")
    values[slots] = record["values"]


def last_layer_reads(model, tokens, targets):
    """At each of the N labels -> slots (N, H * k) and weights (N, H * k) that the last block reads (weights times the router's
    share), the last hidden state (N, D) before the final norm, logits (N, V), answers (N,)."""
    caught = []
    keep = lambda module, inputs, output: caught.append(inputs[0])
    with model.final_norm.register_forward_hook(keep):
        logits, _, found = model(tokens, targets, trace=True)
    _, flat, answers = M.labelled_positions(targets)
    last = found[-1]
    slots, weights = (last[name].flatten(-2).flatten(0, 1)[flat] for name in ("slots", "weights"))
    if "route" in last:
        weights = weights * last["route"].flatten(0, 1)[flat][:, 1:]
    return slots, weights.to(caught[0].dtype), caught[0], logits, answers


def add_ridge(matrix, ridge):
    """matrix + ridge * its mean diagonal * I"""
    return matrix + ridge * matrix.diagonal().mean() * torch.eye(len(matrix), device=matrix.device, dtype=matrix.dtype)


def target_updates(reach, hidden, logits, answers, margin, rounds=100):
    """Small changes (N, V) of what is read after which each answer leads all other tokens by `margin` logits, if the final norm
    kept its scale. reach (tokens, V): logits by what is read, before that scale.

    Each round projects onto the half-space in which the answer leads its strongest rival, which is a closed form.
    """
    scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)  # (N, 1)
    start, change = logits / scale, hidden.new_zeros(len(hidden), reach.shape[1])
    for _ in range(rounds):
        now = start + change @ reach.T  # (N, tokens)
        lead, rival = now.scatter(1, answers[:, None], -torch.inf).max(1, keepdim=True)
        need = lead + margin / scale - now.gather(1, answers[:, None])  # (N, 1)
        if (need <= 1e-3 / scale).all():
            break
        direction = reach[answers] - reach[rival.squeeze(1)]
        change = change + need.clamp(min=0) * direction / direction.square().sum(-1, keepdim=True)
    return change


@M.in_eval_mode
def key_second_moment(model, batches):
    """Sum over labels of (tokens, targets) batches of w w^T, w the weights of all slots that the last block reads: `keep`."""
    values = model.layers[-1].memory.values
    total = torch.zeros(len(values), len(values), device=values.device)
    for tokens, targets in batches:
        slots, weights, *_ = last_layer_reads(model, tokens, targets)
        A = torch.zeros(len(slots), len(values), device=values.device)
        A.scatter_add_(1, slots, weights.float())
        total += A.T @ A
    return total


# ---- counting, inspecting, converting ----------------------------------------------------------------------------------


def count_active(model):
    """[(name, parameters, of these active for one token, floating-point operations for one token)], shared ones once.

    All sub-keys are compared with every query, so all are active; of a table of values, heads * k rows are; of an embedding,
    one. A multiplication and an addition for each active number of a matrix; attention over other tokens is not counted.
    """
    rows = []
    for name, q in model.named_parameters():
        c, active, operations = model.config, q.numel(), 2 * q.numel() if q.ndim >= 2 else 0
        if name.endswith("memory.values"):
            uses = len(c.memory_layers) if c.mem_share_values else 1
            active = min(q.numel(), uses * c.mem_heads * c.mem_knn * q.shape[1])
            operations = 2 * active
        elif name.startswith(("embed", "pos_embed")) and q is not model.lm_head.weight:
            active, operations = q.shape[1], 0
        rows.append((name, q.numel(), active, operations))
    return rows


def params(words):
    """Parameters of a config: in all, active for each token, and what reading them costs."""
    from train import parse  # not above: train.py builds its model from this file

    p = parse(words)
    model = build_model(p, build_model_config(p, p.data_module.Data(p.data)))
    modules = {}
    for name, *numbers in count_active(model):
        module = name.rsplit(".", 1)[0] if name.endswith(("weight", "bias")) else name
        modules[module] = [a + b for a, b in zip(modules.get(module, [0, 0, 0]), numbers)]
    rows = [(module, *numbers, 4 * numbers[1]) for module, numbers in modules.items()]
    total = [sum(column) for column in list(zip(*rows))[1:]]
    print_table(("module", "parameters", "active a token", "flop a token", "bytes a token"), [*rows, ("all", *total)])


def compare_weights(words):
    """Names, shapes and sizes of the weights in one run or file; of two, where they differ."""
    require(1 <= len(words) <= 2, "name one or two runs or files: python memory.py inspect A [B]", None)
    found = [{our_name(n): t for n, t in read_weights(path)[0].items()} for path in words]
    rows = []
    for name in dict.fromkeys(n for weights in found for n in weights):
        tensors = [weights.get(name) for weights in found]
        shapes = [str(tuple(t.shape)) if t is not None else "-" for t in tensors]
        note = ""
        if len(words) == 2:
            same = None not in tensors and shapes[0] == shapes[1]
            note = difference(*tensors) if same else shape_hint(name, *shapes)
        first = next(t for t in tensors if t is not None)
        rows.append((name, *shapes, first.numel(), spread(first), note))
    heads = ("name", *(["shape"] if len(words) == 1 else ["shape in A", "shape in B"]), "numbers", "std", "largest difference")
    print_table(heads, rows)


def spread(t):
    """The standard deviation of its numbers, as text."""
    return f"{t.double().std(correction=0):.3g}" if t.numel() else "-"


def difference(a, b):
    """The largest one between two tensors of one shape, as text."""
    return f"{(a.double() - b.double()).abs().max():.3g}" if a.numel() else "-"


def shape_hint(name, a, b):
    """Which setting makes two shapes differ, as far as the name tells."""
    settings = {
        "memory.values": "mem_n_keys (rows) or mem_v_dim (columns)",
        "memory.keys": "mem_heads, mem_n_keys or mem_k_dim",
        "memory.query": "mem_heads or mem_k_dim",
        "embed": "vocab_size or dim",
        "lm_head": "vocab_size or dim",
        "ffn": "dim or ffn_expand_factor",
        "att.": "n_heads, dk, dv or dim",
    }
    if "-" in (a, b):
        return "only in A" if b == "-" else "only in B"
    return "differ: " + next((text for part, text in settings.items() if part in name), "dim")


def convert_checkpoint(words, to):
    """The weights of a run as those of the other kind of model, in a new file for --init_from.

    To memory_router: MLPs and routers are added, each router so sure of memory that the model answers as before. To memory:
    MLPs beside memory layers and routers are left out; train on after that.
    """
    message = "name a run and the file to write: python memory.py convert runs/RUN x.pt --to memory_router"
    require(len(words) == 2, message, None)
    folder, path = words
    require(not os.path.exists(path), f"{path} exists already; name another file or delete it first", None)
    from train import load_run

    p, data, model, _ = load_run(folder, "ckpt")
    kind, kinds = p.train.model, ("memory", "memory_router")
    require(to in kinds, f"--to must be memory or memory_router, not {to!r}", None)
    require(kind in kinds, f"{folder} holds a {kind}; only memory and memory_router can be converted", None)
    require(kind != to, f"{folder} holds a {to} already", None)
    new = resolve_model(to)[1](model.config)
    weights = model.state_dict()
    for name, t in new.state_dict().items():
        if name in weights:
            t.copy_(weights[name])
        elif name.endswith("router.bias"):
            t.copy_(torch.tensor([-30.0, 30.0]))
        elif name.endswith("router.weight"):
            t.zero_()
    atomic_write(path, lambda f: torch.save({"model": new.state_dict()}, f))
    after = new.state_dict()
    added, left = (", ".join(n for n in a if n not in b) or "none" for a, b in ((after, weights), (weights, after)))
    say(f"{path}: {to} with {len(after)} tensors; new: {added}; left out: {left}")


def main(argv=None):
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    command, rest = words[0], words[1:]
    require(command in ("params", "inspect", "convert"), f"{command!r} is none of params, inspect and convert", None)
    if command == "params":
        params(rest)
        return 0
    rest, settings = split_argv(rest)
    allowed = {"to"} if command == "convert" else set()
    unknown = [s.source for s in settings if s.key not in allowed]
    require(not unknown, f"{command} takes no {' '.join(unknown)}", None)
    compare_weights(rest) if command == "inspect" else convert_checkpoint(rest, next((s.value for s in settings), ""))
    return 0


if __name__ == "__main__":
    run_cli(main)
