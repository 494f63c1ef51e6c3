"""Memory layers: a table of values, addressed by product keys, in place of an MLP or beside it.

    python train.py configs/qa_2k_memory.py            # memory: in place of the MLP of some blocks
    python train.py configs/qa_2k_router.py            # memory_router: both, weighted per token
    python train.py configs/qa_2k_delta_memory.py      # memory layers in blocks of the delta rule
    python memory.py params configs/qa_2k_memory.py    # parameters, active ones, bytes, by block
    python memory.py params runs/RUN                   # and how sparse its activations are
    python memory.py inspect runs/A runs/B             # names and shapes of weights; differences
    python memory.py inspect --trace runs/A runs/B     # the same of activations, module by module
    python memory.py convert runs/A x.pt --to memory_router

A query is cut into two halves. Each half is scored against n sub-keys of its own. The table has
n * n slots. The score of slot (i, j) is the sum of the first half's score i and the second half's
score j. The k best slots are among the k * k sums of the k best scores of each half, so a lookup
computes 2 n + k * k scores instead of n * n (Lample et al. 2019, arXiv 1907.05242; Berges et al.
2024, arXiv 2412.09764, replace MLPs by it). Options are those of LLMonade.

Letters: N tokens, D model width, H heads, n sub-keys per half, n * n slots, k slots that a head
reads, R slots read for a token by all heads (H * k), Q width of a query, V width of a value.
"""

import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import hybrid
import model
from model import GPT, NORMS, GPTBlock
from nanorecall.ops import (
    IGNORE_INDEX,
    column_sharded_embedding_bag,
    gather_positions,
    labelled_positions,
    sparse_embedding_bag,
)
from nanorecall.second_order import transformed
from nanorecall.settings import at_least, field_names, one_of, require, run_cli, within


@dataclass
class Config(model.Config):
    use_ffn: bool = True  # an MLP in blocks without a memory layer (memory_router: in all)
    blocks: tuple[str, ...] = ()  # kinds of blocks with their settings, as for hybrid; empty: gpt
    memory_layers: tuple[int, ...] = (1,)  # blocks with a memory layer, counted from 0
    mem_n_keys: int = 32  # sub-keys per half of a query; the table has its square as slots
    mem_heads: int = 4  # lookups per token, whose values are summed
    mem_knn: int = 8  # slots that each head reads
    mem_k_dim: int = 64  # width of a query per head, both halves
    mem_v_dim: int = 0  # width of a value; 0: dim
    mem_score: str = "softmax"  # weights of the slots read: softmax over them, or sigmoid of each
    mem_query_norm: str = "layer"  # norm of half queries, to use slots evenly: none l2 l1 rms layer
    mem_share_values: bool = True  # one table of values for all memory layers of the model
    mem_gated: bool = False  # multiply the values read by silu(W x) before the output projection
    mem_balance_rate: float = 0.0  # load balancing: change per step of a sub-key's selection bias
    mem_value_lr_scale: float = 1.0  # learning rate of the values, relative to all others
    mem_sparse_grad: bool = False  # update only the values that a step reads: for large tables
    mem_shard_values: bool = False  # under torchrun, each rank keeps some columns of the table
    mem_top1: bool = False  # memory_router: each token takes the likelier of MLP and memory alone

    def check(self):
        super().check()
        within(self, 1, 2**14, "mem_n_keys")
        within(self, 1, 2**12, "mem_heads", "mem_knn")
        within(self, 2, 2**16, "mem_k_dim")
        within(self, 0, 2**16, "mem_v_dim")
        within(self, 0, 1000, "mem_value_lr_scale")
        at_least(self, 0, "mem_balance_rate")
        one_of(self, SCORES, "mem_score")
        one_of(self, NORMS, "mem_query_norm")
        require(self.use_ffn, "memory layers take the place of MLPs: use_ffn=1", "use_ffn")
        message = f"mem_k_dim={self.mem_k_dim} must be even: a query has two halves"
        require(self.mem_k_dim % 2 == 0, message, "mem_k_dim")
        message = f"mem_knn={self.mem_knn} is more than mem_n_keys={self.mem_n_keys}"
        message += ", the sub-keys that each half chooses from"
        require(self.mem_knn <= self.mem_n_keys, message, "mem_knn")
        message = "mem_knn=1 with mem_score=softmax: its only weight is 1, so no gradient would"
        message += " reach queries and keys; use sigmoid or mem_knn=2"
        require(self.mem_knn > 1 or self.mem_score != "softmax", message, "mem_knn")
        message = "mem_shard_values=1 takes no sparse gradients: set mem_sparse_grad=0"
        require(not (self.mem_shard_values and self.mem_sparse_grad), message, "mem_shard_values")
        layers = self.memory_layers
        message = f"memory_layers={layers} must name blocks, once each"
        require(layers and len(set(layers)) == len(layers), message, "memory_layers")
        message = f"memory_layers={layers} must lie in 0 to {self.n_layers - 1}, the blocks of"
        message += f" n_layers={self.n_layers}"
        require(min(layers) >= 0 and max(layers) < self.n_layers, message, "memory_layers")
        if self.blocks:
            hybrid.parse_blocks(self)

    def unused(self):
        reasons = super().unused()
        if self.blocks:
            names = set(field_names(model.Config)) - set(field_names(hybrid.Config))
            reasons |= dict.fromkeys(names, "blocks gives each block settings of its own")
        return reasons


SCORES = {  # scores (N, H, k) -> weights
    "softmax": lambda scores: scores.softmax(-1),
    "sigmoid": torch.sigmoid,  # slots do not compete, as in sigma-MoE (arXiv 2310.10837)
}


# ---- lookup --------------------------------------------------------------------------------------


def product_key_topk(q, keys, k, bias=None):
    """Find the k best slots of each head, exactly.

    q (N, H, 2, Q/2), keys (H, 2, n, Q/2) -> scores (N, H, k), slots (N, H, k) long. Slot
    i * n + j scores q[0] . keys[0, i] + q[1] . keys[1, j]. bias (H, 2, n) is added for the choice
    of slots, but not to the scores that are returned.
    """
    n = keys.shape[2]
    half_scores = torch.einsum("nhse,hske->nhsk", q, keys)  # (N, H, 2, n)
    ranking = half_scores if bias is None else half_scores + bias
    best, index = ranking.topk(k, dim=-1)  # (N, H, 2, k)
    sums = best[:, :, 0, :, None] + best[:, :, 1, None, :]  # (N, H, k, k)
    scores, pair = sums.flatten(-2).topk(k, dim=-1)  # (N, H, k)
    first = index[:, :, 0].gather(-1, pair // k)
    second = index[:, :, 1].gather(-1, pair % k)
    if bias is not None:
        # The bias is for load balancing alone: it changes which slots are read, not their weights.
        scores = half_scores[:, :, 0].gather(-1, first) + half_scores[:, :, 1].gather(-1, second)
    return scores, first * n + second


def naive_product_key_topk(q, keys, k, bias=None):
    """product_key_topk with the scores of all n * n slots."""

    def slot_scores(half_scores):
        first, second = half_scores.unbind(2)
        return (first[..., :, None] + second[..., None, :]).flatten(-2)  # (N, H, n * n)

    half_scores = torch.einsum("nhse,hske->nhsk", q, keys)
    ranking = slot_scores(half_scores if bias is None else half_scores + bias)
    slots = ranking.topk(k, dim=-1).indices
    return slot_scores(half_scores).gather(-1, slots), slots


def weighted_values(values, slots, weights, sparse_grad=False):
    """Weighted sums of rows of a table: values (slots, V), slots and weights (N, R) -> (N, V).

    sparse_grad: the gradient of values is a sparse tensor of the rows read. Second derivatives
    raise an error of torch's; naive_weighted_values has them.
    """
    if transformed():
        return naive_weighted_values(values, slots, weights)
    if hasattr(values, "full_tensor"):  # a DTensor: mem_shard_values
        return column_sharded_embedding_bag(slots, values, weights)
    if sparse_grad:
        return sparse_embedding_bag(slots, values, weights)
    return F.embedding_bag(slots, values, per_sample_weights=weights, mode="sum")


def naive_weighted_values(values, slots, weights):
    """weighted_values with a copy of all N * R rows, which is 50 times as slow on a CPU."""
    return (values[slots] * weights.unsqueeze(-1)).sum(-2)


# ---- the layer -----------------------------------------------------------------------------------


class MemoryLayer(nn.Module):
    """x (..., D) -> (..., D): each head reads k slots; their weighted values are summed over heads.

    What a layer reads is a dict: "slots" (..., H, k) long, "weights" (..., H, k), and "output"
    (..., V), the weighted sum of values.
    """

    def __init__(self, c, values=None):
        """values: the table (n * n, V) of another layer, to share it."""
        super().__init__()
        self.config = c
        H, n = c.mem_heads, c.mem_n_keys
        V = c.mem_v_dim or c.dim
        bound = c.mem_k_dim**-0.5
        self.query = nn.Linear(c.dim, H * c.mem_k_dim)
        self.keys = nn.Parameter(torch.empty(H, 2, n, c.mem_k_dim // 2).uniform_(-bound, bound))
        if values is None:
            # mul_ works in place: a second copy of a large table may not fit in memory.
            values = nn.Parameter(torch.randn(n * n, V).mul_(V**-0.5))
        self.values = values
        self.gate = nn.Linear(c.dim, V, bias=False) if c.mem_gated else None
        self.out = nn.Linear(V, c.dim, bias=False) if c.mem_gated or V != c.dim else None
        self.register_buffer("bias", torch.zeros(H, 2, n) if c.mem_balance_rate else None)
        self.forget_reads()

    def half_queries(self, x):
        """x (..., D) -> normalised halves of each head's query (..., H, 2, Q/2)."""
        q = self.query(x).unflatten(-1, (self.config.mem_heads, 2, -1))
        return NORMS[self.config.mem_query_norm](q)

    def topk_slots(self, x, k):
        """x (..., D) -> scores and slots (..., H, k) of each head's k best slots."""
        shape = x.shape[:-1]
        q = self.half_queries(x.flatten(0, -2))
        # Under autocast queries are in half precision, and keys are not.
        scores, slots = product_key_topk(q, self.keys.to(q.dtype), k, self.bias)
        return scores.unflatten(0, shape), slots.unflatten(0, shape)

    def forward(self, x, intervene=None, reads=None, counted=None):
        """-> y (..., D), and the reads.

        reads: given slots and weights, in place of a lookup. intervene: a function from the reads
        to others; if these have an "output", it replaces the weighted sum. counted (M,) long: the
        tokens whose reads are noted, as indices into the flattened (...); None: every token.
        """
        c = self.config
        if reads is None:
            scores, slots = self.topk_slots(x, c.mem_knn)
            # torch.func allows no change of a buffer.
            if self.training and not transformed():
                every = slots.flatten(0, -3)
                self.note_reads(every if counted is None else every[counted])
            reads = {"slots": slots, "weights": SCORES[c.mem_score](scores)}
        if intervene:
            reads = intervene(reads)
        if "output" not in reads:
            slots = reads["slots"].flatten(0, -3).flatten(1)  # (N, H * k)
            weights = reads["weights"].flatten(0, -3).flatten(1).to(self.values.dtype)
            output = weighted_values(self.values, slots, weights, c.mem_sparse_grad)
            reads = {**reads, "output": output.unflatten(0, x.shape[:-1])}
        y = reads["output"]
        if self.gate:
            y = y * F.silu(self.gate(x))
        return self.out(y) if self.out else y, reads

    # The slots read in a training step are kept in a list, and counted only where counts are
    # needed, so that the cost of a step does not grow with the table. Checkpoints are saved between
    # steps, when the list is empty.

    def forget_reads(self):
        """Begin a new training step."""
        self.slots_read = []  # a tensor (N, H, k) for each forward pass
        self.read_counts = None  # (H, n * n) long, of what is no longer in slots_read

    @torch._disable_dynamo
    def note_reads(self, slots):
        """Note slots (N, H, k) as read in this training step."""
        self.slots_read.append(slots)
        # A training loop may never call on_step_end. Then counts take less memory than the list.
        c = self.config
        if sum(s.numel() for s in self.slots_read) > c.mem_heads * c.mem_n_keys**2:
            self.count_reads()

    def count_reads(self):
        """How often each head has read each slot in this training step: (H, n * n) long."""
        c, size, device = self.config, self.config.mem_n_keys**2, self.keys.device
        if self.read_counts is None:
            self.read_counts = torch.zeros(c.mem_heads, size, dtype=torch.long, device=device)
        # The model may have been moved since it read.
        self.read_counts = self.read_counts.to(device)
        for slots in self.slots_read:
            self.read_counts += count_per_head(slots.to(device), size)
        self.slots_read = []
        return self.read_counts

    def count_half_reads(self):
        """How often each head has read slots of each sub-key in this step: (H, 2, n) long."""
        n, device = self.config.mem_n_keys, self.keys.device
        counts = torch.zeros(self.config.mem_heads, 2, n, dtype=torch.long, device=device)
        for slots in self.slots_read:
            slots = slots.to(device)  # the model may have been moved since it read
            counts[:, 0] += count_per_head(slots // n, n)
            counts[:, 1] += count_per_head(slots % n, n)
        if self.read_counts is not None:
            table = self.read_counts.to(device).unflatten(1, (n, n))
            counts += torch.stack([table.sum(2), table.sum(1)], dim=1)
        return counts

    @torch.no_grad()
    def update_balance_bias(self, counts):
        """Raise the bias of sub-keys that were read less than average in this step, lower others'.

        Each changes by mem_balance_rate: loss-free balancing (Wang et al. 2024, arXiv 2408.15664).
        counts (H, 2, n): of all ranks.
        """
        counts = in_float64(counts)
        change = torch.sign(counts.mean(-1, keepdim=True) - counts)
        self.bias += self.config.mem_balance_rate * change.to(self.bias)


def count_per_head(numbers, size):
    """numbers (N, H, k) below size -> how often each occurs in each head: (H, size) long."""
    H = numbers.shape[1]
    # One bincount for all heads: each has a range of its own.
    flat = numbers + size * torch.arange(H, device=numbers.device)[:, None]
    return torch.bincount(flat.flatten(), minlength=H * size).view(H, size)


def in_float64(x):
    """x in float64; on the CPU if x is on an mps device, which has no float64."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def sum_over_ranks(counts):
    """Add up the counts of all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts


def slot_usage(counts):
    """How evenly slots are read: counts (slots,) -> {"fraction", "dead", "kl", "top"}.

    fraction: of slots that were read; dead: number of the others; kl: divergence from even use in
    nats, 0 to log(slots); top: the five most read slots, with their fraction of all reads.
    """
    p = in_float64(counts)
    p = p / p.sum().clamp(min=1)
    kl = float((p[p > 0] * (p[p > 0] * len(p)).log()).sum())
    fractions, slots = p.topk(min(5, len(p)))
    n_read = int((counts > 0).sum())
    top = list(zip(slots.tolist(), fractions.tolist()))
    return {"fraction": n_read / len(p), "dead": len(p) - n_read, "kl": kl, "top": top}


# ---- models --------------------------------------------------------------------------------------


class MemoryBlock(GPTBlock):
    """A GPT block in which a memory layer may replace the MLP, or share its work by a router."""

    def __init__(self, c, mixer=None):
        """mixer: class of the sequence mixer, made from c; None: attention."""
        if mixer is not None:
            self.mixer = mixer
        super().__init__(c)
        self.memory = self.router = self.layer_idx = None

    def forward(self, x, query_pos=None, trace=None, intervene=None, counted=None, **options):
        y = gather_positions(x, query_pos)
        if self.att:
            y = self.add(y, self.mix(self.att_norm(x), query_pos, **options))
        change = (intervene or {}).get(self.layer_idx)
        counted = (counted or {}).get(self.layer_idx)
        return self.add(y, self.mlp_or_memory(self.ffn_norm(y), trace, change, counted=counted))

    def mlp_or_memory(self, x, trace=None, intervene=None, reads=None, counted=None):
        """MLP, memory, or both: (..., D) -> (..., D). The reads are appended to trace, a list."""
        if self.memory is None:
            return self.ffn(x)
        y, reads = self.memory(x, intervene, reads, counted)
        if self.router:
            route = self.router(x).softmax(-1)  # (..., 2): weight of the MLP, of memory
            if self.top1:
                # Times its probability, so that the router gets a gradient (Switch Transformer).
                route = route * (route == route.amax(-1, keepdim=True))
            reads["route"] = route
            y = route[..., :1] * self.ffn(x) + route[..., 1:] * y
        if trace is not None:
            trace.append(reads)
        return y


def counted_tokens(targets):
    """Tokens of the last block whose reads count: targets (B, T) -> (M,), indices into (B * n,).

    The last block computes n tokens of every sequence, as many as the sequence with most labels
    has. Of each sequence, those count that it would compute in a batch of its own: its labelled
    ones, or all T if more than half are labelled. So counts do not depend on how a batch is split.
    """
    query_pos, label_index, _ = labelled_positions(targets)
    if query_pos is not None:
        return label_index
    labelled = targets != IGNORE_INDEX
    has_many = 2 * labelled.sum(1, keepdim=True) > targets.shape[1]
    return (labelled | has_many).flatten().nonzero().squeeze(1)


class MemoryGPT(GPT):
    """GPT, or blocks of other kinds, with a memory layer in place of the MLP of some blocks.

    forward(tokens, targets, cu_seqlens, trace=False, intervene=None): with trace, a third result
    lists the reads of each memory layer in order (see MemoryLayer); those of memory_router have
    "route" (..., 2), the weights of MLP and memory. With targets, the last block's reads are at
    labelled positions only. intervene: {block: function of its reads}.
    """

    block = MemoryBlock
    inactive_settings = {**GPT.inactive_settings, "mem_top1": "only memory_router chooses"}
    has_mlp = False  # beside the memory layer

    def __init__(self, config):
        super().__init__(config)
        values = None
        for i in sorted(config.memory_layers):
            layer = self.layers[i]
            layer.layer_idx = i
            layer.memory = MemoryLayer(config, values)
            if config.mem_share_values:
                values = layer.memory.values
            if self.has_mlp:
                layer.router = nn.Linear(config.dim, 2)
                layer.top1 = config.mem_top1
            else:
                layer.ffn = None

    def make_layers(self, c):
        if not c.blocks:
            return super().make_layers(c)
        return [self.block(config, kind.block.mixer) for kind, config in hybrid.parse_blocks(c)]

    @classmethod
    def describe_backend(cls, c, device, dtype):
        if c.blocks:
            return hybrid.Hybrid.describe_backend(c, device, dtype)
        return super().describe_backend(c, device, dtype)

    def forward(self, tokens, targets=None, cu_seqlens=None, trace=False, intervene=None):
        reads = [] if trace else None
        options = {"trace": reads, "intervene": intervene}
        last = len(self.layers) - 1
        if self.training and targets is not None and last in self.config.memory_layers:
            options["counted"] = {last: counted_tokens(targets)}
        logits, loss = super().forward(tokens, targets, cu_seqlens, **options)
        return (logits, loss, reads) if trace else (logits, loss)

    def memory_layers(self):
        """{block: its memory layer}"""
        return {i: block.memory for i, block in enumerate(self.layers) if block.memory is not None}

    def lr_scales(self):
        """{end of a parameter's name: factor of its learning rate}; these do not decay."""
        return {"memory.values": self.config.mem_value_lr_scale}

    def sparse_gradients(self):
        """Ends of the names of parameters whose gradients are sparse tensors."""
        return ["memory.values"] if self.config.mem_sparse_grad else []

    def column_sharded(self):
        """Ends of the names of parameters of which each rank keeps some columns."""
        return ["memory.values"] if self.config.mem_shard_values else []

    def on_step_end(self, report=False):
        """After each training step: update balancing biases, forget the reads.

        -> {block: usage of slots over all ranks} if report, else {}
        """
        usage = {}
        for i, memory in self.memory_layers().items():
            # Ranks read different tokens, but must change their biases in the same way.
            if self.config.mem_balance_rate and memory.keys.requires_grad:
                memory.update_balance_bias(sum_over_ranks(memory.count_half_reads()))
            if report:
                usage[str(i)] = slot_usage(sum_over_ranks(memory.count_reads().sum(0)))
            memory.forget_reads()
        return usage


class MemoryRouterGPT(MemoryGPT):
    """GPT in which some blocks have an MLP and a memory layer, weighted per token by a router."""

    has_mlp = True
    inactive_settings = GPT.inactive_settings


def main(argv=None):
    # Not imported at the top: training needs none of it.
    from analysis import weights

    return weights.main(sys.argv[1:] if argv is None else list(argv), __doc__)


if __name__ == "__main__":
    run_cli(main)
