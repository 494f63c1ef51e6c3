"""Sparse gradients, of a large table of which a step reads few rows, and their optimizer."""

import torch
from torch.optim.adamw import adamw

from nanorecall.ops import sparse_rows

# Rows that are updated at a time: their copies should fit in a cache.
ROWS_AT_A_TIME = 4096


class SparseAdamW(torch.optim.AdamW):
    """AdamW that takes dense and sparse gradients; a sparse one updates its own rows alone.

    Other rows keep their values and moments. So the cost of a step depends on the rows that it has
    read, not on the size of the table. A row with a gradient in every step changes as under AdamW.
    One that is read seldom differs: AdamW would move it on by its old moments, and let these decay.
    The bias correction counts the steps of the whole table. The state has AdamW's names and shapes.

    torch.optim.SparseAdam treats rows in the same way. But it refuses dense gradients, has no
    weight decay, and adds eps to the root before the bias correction instead of after it.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    self.update_rows(parameter, coalesce(parameter.grad), group)
                    parameter.grad = None
        super().step()

    def update_rows(self, parameter, grad, group):
        """One AdamW update of the rows in grad, a coalesced sparse tensor (slots, V)."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        options = {name: group[name] for name in ("lr", "weight_decay", "eps", "maximize", "fused")}
        options["beta1"], options["beta2"] = group["betas"]
        all_rows = grad.indices()[0].split(ROWS_AT_A_TIME)
        for rows, row_grads in zip(all_rows, grad.values().split(ROWS_AT_A_TIME)):
            values = parameter[rows]
            mean = state["exp_avg"][rows]
            square = state["exp_avg_sq"][rows]
            step = state["step"].clone()  # adamw adds 1 to it
            adamw([values], [row_grads], [mean], [square], [], [step], amsgrad=False, **options)
            parameter[rows] = values
            state["exp_avg"][rows] = mean
            state["exp_avg_sq"][rows] = square
        state["step"] += 1


def coalesce(grad):
    """A sparse gradient with each of its rows once, in order."""
    if grad.is_coalesced():
        return grad
    rows = grad._indices()[0]
    # torch forgets that a gradient is coalesced when it stores it. To check costs less than to sum.
    if (rows[1:] > rows[:-1]).all():
        return sparse_rows(rows, grad._values(), grad.shape, is_coalesced=True)
    return grad.coalesce()
