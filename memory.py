"""Memory layers: a table of value vectors, looked up by product keys, in place of an MLP or beside it.

    python train.py configs/qa_2k_memory.py              # --model memory: in place of the MLP of the blocks in memory_layers
    python train.py configs/qa_2k_router.py              # --model memory_router: both, and a choice between them for each token

A query is cut into two halves; each is compared with n sub-keys, and the slot (i, j) of n * n has the sum of the i-th score of
the first and the j-th of the second. The best k of all n * n slots are among the k * k sums of the best k of either half, so a
lookup costs n and k * k where flat keys would cost n * n (Lample et al. 2019, arXiv 1907.05242; Berges et al. 2024, arXiv
2412.09764, put it in place of MLPs). Memory layers as LLMonade's experiments and pipeline documents them.

Letters: N tokens, D width of the residual stream, H heads, n sub-keys in a half, n * n slots, k slots read by a head,
Q width of a query, V width of a value.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import model as M
from configs import at_least, one_of, require, within
from model import GPT, NORMS, GPTBlock, take


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
        require(self.use_ffn, "memory layers stand where MLPs do: use_ffn=1", "use_ffn")
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


def lookup(q, keys, k, bias=None):
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


def naive_lookup(q, keys, k, bias=None):
    """lookup by the scores of all n * n slots: the oracle of the tests."""
    halves = torch.einsum("nhse,hske->nhsk", q, keys)
    biased = halves if bias is None else halves + bias
    every, chosen_by = ((h[:, :, 0, :, None] + h[:, :, 1, None, :]).flatten(-2) for h in (halves, biased))
    slots = chosen_by.topk(k, dim=-1).indices
    return every.gather(-1, slots), slots


def read_values(values, slots, weights):
    """Weighted sums of rows of a table: values (slots, V); slots and weights (N, R) -> (N, V)."""
    return F.embedding_bag(slots, values, per_sample_weights=weights, mode="sum")


def naive_read_values(values, slots, weights):
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

    def forward(self, x, intervene=None):
        """-> (..., D), and what was found: {"slots": (..., H, k) long, "weights": (..., H, k), "read": (..., V)}.

        intervene: a function of slots and weights that returns others, and with "read" the vectors to take instead.
        """
        c, shape = self.config, x.shape[:-1]
        q = self.query(x.flatten(0, -2)).unflatten(-1, (c.mem_heads, 2, -1))  # (N, H, 2, Q/2)
        q = NORMS[c.mem_query_norm](q)
        scores, slots = lookup(q, self.keys.to(q.dtype), c.mem_knn, self.bias)
        if self.training:
            self.count(slots)
        found = {"slots": slots.unflatten(0, shape), "weights": SCORES[c.mem_score](scores).unflatten(0, shape)}
        found = intervene(found) if intervene else found
        if "read" not in found:
            slots, weights = (found[name].flatten(0, -3).flatten(1) for name in ("slots", "weights"))  # (N, H * k)
            found["read"] = read_values(self.values, slots, weights.to(self.values.dtype)).unflatten(0, shape)
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
        table = self.reads.view(-1, n, n).double()
        halves = torch.stack([table.sum(2), table.sum(1)], dim=1)  # (H, 2, n)
        self.bias += self.config.mem_balance * torch.sign(halves.mean(-1, keepdim=True) - halves).to(self.bias.dtype)


def usage(reads, top=5):
    """Times that each slot was read (slots,) -> share of slots read at all, their number, KL divergence from even use in
    nats (0: even; log of the number of slots: always the same one), and the slots read most with their shares."""
    p = reads.double() / reads.sum().clamp(min=1)
    kl = float((p[p > 0] * (p[p > 0] * len(p)).log()).sum())
    best, at = p.topk(min(top, len(p)))
    used = int((reads > 0).sum())
    return {"used": used / len(p), "dead": len(p) - used, "kl": kl, "top": [*zip(at.tolist(), best.tolist())]}


# ---- models ------------------------------------------------------------------------------------------------------------


class MemoryBlock(GPTBlock):
    """A GPT block whose MLP may be a memory layer, or stand beside one with a router."""

    def __init__(self, c):
        super().__init__(c)
        self.memory = self.router = self.number = None
        self.hard = c.mem_hard

    def forward(self, x, rows=None, trace=None, intervene=None, **extra):
        y = take(x, rows)
        if self.att:
            y = self.add(y, self.att(self.att_norm(x), rows, **extra))
        return self.add(y, self.feed(self.ffn_norm(y), trace, (intervene or {}).get(self.number)))

    def feed(self, x, trace, intervene):
        if self.memory is None:
            return self.ffn(x)
        y, found = self.memory(x, intervene)
        if self.router:
            share = self.router(x).softmax(-1)  # (..., 2): of the MLP, of memory
            if self.hard:  # the likelier one alone, times its probability, so that the router learns (Switch Transformer)
                share = share * (share == share.amax(-1, keepdim=True))
            found["route"] = share
            y = share[..., :1] * self.ffn(x) + share[..., 1:] * y
        if trace is not None:
            trace.append(found)
        return y


class Memory(GPT):
    """GPT with a memory layer in place of the MLP of some blocks.

    forward(tokens, targets, cu_seqlens, trace=False, intervene=None). With trace, a third result lists for each memory layer,
    in order, {"slots", "weights", "read"} (see MemoryLayer.forward) and, of memory_router, "route" (..., 2), the shares of MLP
    and memory: at all positions without targets, else the last block's at the labelled ones only. intervene: {block: function}.
    """

    block = MemoryBlock
    ignores = {**GPT.ignores, "mem_hard": "only memory_router chooses"}
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

    def learning_rates(self):
        """{end of a parameter's name: its learning rate over that of the others}; what is named here does not decay."""
        return {"memory.values": self.config.mem_value_lr}

    @torch.no_grad()
    def after_step(self, report=False):
        """Once after each training step: balance, and forget what was read. -> {block: usage} over all ranks if `report`."""
        found = {}
        for i, memory in self.memories().items():
            if dist.is_initialized() and (report or self.config.mem_balance):
                dist.all_reduce(memory.reads)
            if self.config.mem_balance and memory.keys.requires_grad:
                memory.balance()
            if report:
                found[str(i)] = usage(memory.reads.sum(0))
            memory.reads.zero_()
        return found

    @classmethod
    def label(cls, c):
        layers = "-".join(map(str, c.memory_layers))
        return f"{super().label(c)}_M{layers}_S{c.mem_n_keys**2}_H{c.mem_heads}_K{c.mem_knn}"


class MemoryRouter(Memory):
    """GPT in which some blocks have a memory layer beside the MLP, and each token its own weights of the two."""

    keeps_mlp = True
    ignores = GPT.ignores
