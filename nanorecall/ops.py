"""Fast operators of the models, each with its naive twin.

From top to bottom: small helpers, labelled positions, norms, causal convolution, cross-entropy,
rows of a table, packed documents; attention has a file of its own. A model calls them by name, so
it can be read without opening this file. The twins, written from the definition, are what the
tests compare with and what second derivatives use (see second_order.py).

Letters: B batch, T tokens, n queried positions, N labelled positions, C channels, K width of a
vector, V vocabulary or width of a table's row, R documents in a packed sequence, L tokens in the
longest of them.
"""

import contextlib

import torch
import torch.nn.functional as F

from nanorecall.rng import IGNORE_INDEX
from nanorecall.second_order import Twinned, needs_twin, twin_gradients

# ---- small helpers -------------------------------------------------------------------------------


def accum_dtype(x):
    """The dtype for sums over x: float32 for half precision, else x's own."""
    return torch.promote_types(x.dtype, torch.float32)


def no_autocast(x):
    """A context in which autocast does not round x to bfloat16. (It refuses meta tensors.)"""
    if x.is_meta:
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def dot(x, y):
    """x.y over the last axis, in float32 at least: (..., K), (..., K) -> (..., 1)."""
    dtype = accum_dtype(x)
    with no_autocast(x):
        return torch.linalg.vecdot(x.to(dtype), y.to(dtype)).unsqueeze(-1)


def gather_positions(x, positions):
    """x (B, T, C) at positions (B, n) -> (B, n, C); all of x if positions is None."""
    if positions is None:
        return x
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def fused_linear(x, *linears):
    """Bias-free nn.Linears of the same tokens, as one matrix product: (B, T, D) -> (B, T, sum).

    The outputs lie side by side; one large product is faster than several small ones.
    """
    return F.linear(x, torch.cat([m.weight for m in linears]))


def append_to_cache(cache, name, new, window=0):
    """cache[name] (B, earlier tokens, ...) with new (B, T, ...) behind it, stored and returned.

    With a window, only the last window - 1 are stored: the next token sees no others.
    """
    # torch.cat also copies the first: a view would keep the whole output of fused_linear in memory.
    seen = torch.cat([cache[name], new] if name in cache else [new], dim=1)
    cache[name] = seen
    if window and seen.shape[1] >= window:
        cache[name] = seen[:, seen.shape[1] - window + 1 :].clone()
    return seen


# Sizes depend on the data, so torch.compile would compile it again for every batch. (The public
# torch.compiler.disable imports torch._dynamo at once, which takes a second of every --help.)
@torch._disable_dynamo
def labelled_positions(targets):
    """Where the labels are: targets (B, T) -> query_pos (B, n), label_index (N,), labels (N,).

    n is the largest number of labels in a sequence; sequences with fewer are padded. query_pos are
    positions in ascending order, label_index picks the real ones from the flattened (B, n). If
    that would save less than half of the positions, query_pos is None and label_index picks from
    the flattened (B, T). All are long, labels in row-major order.
    """
    mask = targets != IGNORE_INDEX
    labels = targets[mask]
    counts = mask.sum(1)
    # 1 at least: a batch without labels, or without sequences, has a loss of 0, not an error
    n = max(1, int(counts.max()) if len(counts) else 0)
    if 2 * n > targets.shape[1]:
        return None, mask.flatten().nonzero().squeeze(1), labels
    # A stable sort puts the labelled positions first and keeps their order.
    query_pos = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :n]
    is_real = torch.arange(n, device=targets.device) < counts[:, None]  # (B, n)
    return query_pos, is_real.flatten().nonzero().squeeze(1), labels


# ---- norms ---------------------------------------------------------------------------------------


def naive_normalize(x, n):
    """x / sqrt(|x|^2 / n + 1e-6) over the last axis, in float32 at least."""
    return x * torch.rsqrt(dot(x, x) / n + 1e-6)


class Normalize(Twinned):
    """naive_normalize whose backward takes half as many passes over memory as autograd's."""

    twin = staticmethod(naive_normalize)

    @staticmethod
    def forward(ctx, x, n):
        scale = torch.rsqrt(dot(x, x) / n + 1e-6)
        y = x * scale
        ctx.save_for_backward(x, y, scale)
        ctx.n = n
        return y

    @staticmethod
    def backward(ctx, dy):
        x, y, scale = ctx.saved_tensors
        if needs_twin():
            return twin_gradients(naive_normalize, ctx, (x, ctx.n), dy)
        # dx = (dy - y (y.dy) / n) scale
        dx = torch.addcmul(dy, y, dot(y, dy), value=-1 / ctx.n).mul_(scale)
        return dx.to(x.dtype), None


def l2_normalize(x):
    """Vectors of length 1 (but for the 1e-6 that keeps zeros finite): (..., K) -> (..., K)."""
    return Normalize.apply(x, 1)


def rms_normalize(x):
    """Vectors whose features have a mean square of 1, likewise: (..., K) -> (..., K)."""
    return Normalize.apply(x, x.shape[-1])


# ---- causal convolution --------------------------------------------------------------------------


def naive_causal_conv1d(x, w):
    """y_t = sum_j w_j * x_{t-j}, j = 0..width-1, for each channel; x (B, T, C), w (width, C)."""
    y = 0
    for j in range(len(w)):
        y = y + w[j] * F.pad(x, (0, 0, j, 0))[:, : x.shape[1]]
    return y


CONV_BLOCK = 2**17  # numbers that the convolution's backward takes at a time


class CausalConv1d(Twinned):
    """naive_causal_conv1d by shifted multiply-adds into one buffer.

    On a CPU, forward and backward take less than half the time of the same sum left to autograd,
    and of nn.Conv1d.
    """

    twin = staticmethod(naive_causal_conv1d)

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        y = x * w[0]
        for j in range(1, min(len(w), x.shape[1])):
            y[:, j:].addcmul_(x[:, :-j], w[j])
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        if needs_twin():
            return twin_gradients(naive_causal_conv1d, ctx, (x, w), dy)
        dx = torch.empty_like(dy)
        # In bfloat16, a sum of many parts would stop growing long before the last of them.
        dw = torch.zeros_like(w, dtype=accum_dtype(w))
        # A few sequences at a time, which stay in a core's cache over all shifts.
        T, C = x.shape[1:]
        n = max(1, CONV_BLOCK // max(1, T * C))
        for x_n, dy_n, dx_n in zip(x.split(n), dy.split(n), dx.split(n)):
            torch.mul(dy_n, w[0], out=dx_n)
            for j in range(min(len(w), T)):
                if j:
                    dx_n[:, :-j].addcmul_(dy_n[:, j:], w[j])
                dw[j] += (dy_n[:, j:] * x_n[:, : T - j]).sum((0, 1), dtype=dw.dtype)
        return dx, dw.to(w.dtype)


def causal_conv1d(x, w):
    """Depthwise causal convolution: x (B, T, C), w (width, C) -> (B, T, C), zeros before x."""
    return CausalConv1d.apply(x, w)


# ---- cross-entropy -------------------------------------------------------------------------------


def naive_cross_entropy(logits, labels):
    """Mean cross-entropy in nats of logits (N, V) and labels (N,); 0 if N is 0."""
    log_p = logits.log_softmax(-1)
    return -log_p.gather(1, labels[:, None]).sum() / max(1, len(labels))


class CrossEntropy(Twinned):
    """naive_cross_entropy with a leaner backward.

    The gradient is (softmax - one_hot) / N, written in one buffer; torch's own first fills an
    (N, V) gradient of the log probabilities with zeros. Worth 5% of a training step on a CPU.
    """

    twin = staticmethod(naive_cross_entropy)

    @staticmethod
    def forward(ctx, logits, labels):
        log_p = logits.log_softmax(-1)
        ctx.save_for_backward(logits, log_p, labels)
        return -log_p.gather(1, labels[:, None]).sum() / max(1, len(labels))

    @staticmethod
    def backward(ctx, grad):
        logits, log_p, labels = ctx.saved_tensors
        if needs_twin():
            return twin_gradients(naive_cross_entropy, ctx, (logits, labels), grad)
        p = log_p.exp()
        p[torch.arange(len(p), device=p.device), labels] -= 1
        return p.mul_(grad / max(1, len(p))), None


def cross_entropy(logits, labels):
    """Mean cross-entropy in nats, in float32 at least: logits (N, V), labels (N,) -> scalar."""
    return CrossEntropy.apply(logits.to(accum_dtype(logits)), labels)


# ---- rows of a table -----------------------------------------------------------------------------


class SparseTableGradient(torch.autograd.Function):
    """The identity of y (N, V), a weighted sum of rows; its backward gives the table a gradient."""

    @staticmethod
    def forward(ctx, y, values, slots, weights):
        ctx.save_for_backward(slots, weights)
        ctx.shape = values.shape
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        if needs_twin():
            raise RuntimeError("a sparse gradient has no second derivatives: set mem_sparse_grad=0")
        if not ctx.needs_input_grad[1]:
            return dy, None, None, None
        slots, weights = ctx.saved_tensors
        # All reads in the order of their slots. The gradient of a row is itself a weighted sum of
        # rows: those of dy, for the tokens that read it.
        ordered, read = slots.flatten().sort(stable=True)
        rows, counts = ordered.unique_consecutive(return_counts=True)
        row_grads = F.embedding_bag(
            read // slots.shape[1],
            dy,
            counts.cumsum(0) - counts,
            per_sample_weights=weights.flatten()[read],
            mode="sum",
        )
        grad = sparse_rows(rows, row_grads, ctx.shape, is_coalesced=True)
        return dy, grad, None, None


def sparse_rows(rows, values, shape, is_coalesced=False):
    """A sparse tensor with these rows: rows (N,) long, values (N, V); its shape is (slots, V)."""
    # torch warns unless it is told whether to check.
    options = dict(is_coalesced=is_coalesced, check_invariants=False)
    return torch.sparse_coo_tensor(rows[None], values, shape, **options)


# torch.compile knows no sparse tensors.
@torch._disable_dynamo
def sparse_embedding_bag(slots, values, weights):
    """Weighted sums of rows, with a sparse gradient: slots, weights (N, R), values -> (N, V).

    The gradient of `values` has each row that was read once. That of F.embedding_bag(sparse=True)
    has one for every read, N * R of them, which takes twice the time.
    """
    y = F.embedding_bag(slots, values.detach(), per_sample_weights=weights, mode="sum")
    return SparseTableGradient.apply(y, values, slots, weights)


# torch.compile would have to break its graph at each exchange.
@torch._disable_dynamo
def column_sharded_embedding_bag(slots, values, weights):
    """Weighted sums of rows of a table whose columns lie on several ranks.

    slots, weights (N, R) of this rank, each rank with its own N; values: a DTensor (slots, V) in
    placement Shard(1) -> (N, V). Every rank must call it. Each reads its columns for the tokens of
    all ranks, then they exchange (tokens, V / ranks) for (tokens / ranks, V): a table that no rank
    can hold is never gathered, and the gradient of its columns needs no exchange.

    As facebookresearch/memory does it (Berges et al. 2024). torch's ColwiseParallel splits the
    columns of an nn.Embedding too, but knows no weighted sums, and wants all ranks to have the same
    tokens.
    """
    from torch.distributed.tensor import DTensor, Partial, Shard

    mesh, N = values.device_mesh, len(slots)
    # Tensors must have one shape to be exchanged. A padded token has weights of 0.
    longest = torch.tensor(N, device=slots.device)
    torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX, mesh.get_group())
    padding = (0, 0, 0, int(longest) - N)
    slots, weights = F.pad(slots, padding), F.pad(weights, padding)
    slots = DTensor.from_local(slots, mesh, [Shard(0)]).full_tensor()
    weights = DTensor.from_local(weights, mesh, [Shard(0)])
    weights = weights.full_tensor(grad_placements=[Partial()])  # each rank has a part of it
    y = F.embedding_bag(slots, values.to_local(), per_sample_weights=weights, mode="sum")
    y = DTensor.from_local(y, mesh, [Shard(1)]).redistribute(placements=[Shard(0)])
    return y.to_local()[:N]


# ---- packed documents ----------------------------------------------------------------------------


def check_cu_seqlens(cu_seqlens, B, T, device):
    """cu_seqlens (R + 1,) of any integer dtype on any device -> long, on `device`.

    ValueError unless B is 1 and they rise from 0 to T. Two may be equal: a document may be empty.
    """
    is_integer = torch.is_tensor(cu_seqlens) and not (
        cu_seqlens.is_floating_point() or cu_seqlens.is_complex() or cu_seqlens.dtype == torch.bool
    )
    if not is_integer or cu_seqlens.ndim != 1:
        raise ValueError("cu_seqlens must be a tensor of integers with one axis")
    ends = cu_seqlens.tolist()
    fits = len(ends) >= 2 and ends[0] == 0 and ends[-1] == T and ends == sorted(ends)
    if B != 1 or not fits:
        what = f"cu_seqlens must rise from 0 to T={T} over one sequence"
        raise ValueError(f"{what}; got {ends[:9]} for {B} sequences")
    return cu_seqlens.to(device, torch.long)


class PackedDocuments:
    """R documents end to end in one sequence (1, T, ...), and padded to one sequence each.

    cu_seqlens (R + 1,): document d is tokens cu_seqlens[d] to cu_seqlens[d + 1].
    doc_id, position (T,): the document of each token, and where in it the token is, from 0.
    """

    def __init__(self, cu_seqlens, tokens):
        """tokens (1, T); ValueError if cu_seqlens do not fit them: see check_cu_seqlens."""
        self.cu_seqlens = check_cu_seqlens(cu_seqlens, *tokens.shape, tokens.device)
        lengths = self.cu_seqlens.diff()
        self.count = len(lengths)
        self.longest = int(lengths.max())
        device = lengths.device
        self.doc_id = torch.arange(self.count, device=device).repeat_interleave(lengths)
        all_tokens = torch.arange(len(self.doc_id), device=device)
        self.position = all_tokens - self.cu_seqlens[:-1][self.doc_id]
        # Where each token goes in the padded (R * L); None if no document needs padding.
        self.flat_index = None
        if int(lengths.min()) < self.longest:
            self.flat_index = self.doc_id * self.longest + self.position

    def pad(self, x):
        """(1, T, ...) -> (R, L, ...), zeros at the end of shorter documents."""
        if self.flat_index is None:
            return x.unflatten(1, (self.count, self.longest)).squeeze(0)
        padded = x.new_zeros(self.count * self.longest, *x.shape[2:])
        padded = padded.index_copy(0, self.flat_index, x[0])
        return padded.unflatten(0, (self.count, self.longest))

    def pack(self, x):
        """(R, L, ...) -> (1, T, ...)"""
        x = x.flatten(0, 1)
        if self.flat_index is not None:
            x = x[self.flat_index]
        return x.unsqueeze(0)


def token_positions(x, cache=None, documents=None):
    """Positions of the tokens of x (B, T, D) in their documents, (B, T); None: 0 to T - 1."""
    if documents:
        return documents.position[None]
    if cache and cache["seen"]:
        positions = torch.arange(x.shape[1], device=x.device) + cache["seen"]
        return positions.expand(len(x), -1)
    return None
