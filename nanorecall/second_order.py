"""Second derivatives and torch.func, for which a fast operator calls its naive twin.

A backward written by hand returns tensors without a graph. A second derivative through it would be
wrong, without an error. Where a graph is wanted, the twin computes it in plain operations. A kernel
without a twin raises an error.
"""

import torch
from torch.autograd import forward_ad


class Twinned(torch.autograd.Function):
    """A Function whose subclass has `twin`, a static method with the arguments of `forward`."""

    @classmethod
    def apply(cls, *inputs):
        return cls.twin(*inputs) if transformed() else super().apply(*inputs)


def transformed():
    """Is a transform of torch.func (grad, vmap, jvp, ...) or forward-mode AD at work?"""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def needs_twin():
    """In a backward: is a graph of the gradients wanted (create_graph=True)?"""
    return torch.is_grad_enabled() or transformed()


def twin_gradients(twin, ctx, inputs, *grads):
    """The gradients that a backward returns, computed by the twin, to be differentiated again.

    inputs: those of `forward`, as saved by ctx; grads: of its outputs.
    """
    wanted = ctx.needs_input_grad
    with torch.enable_grad():
        # An alias of each, since one tensor may be several inputs.
        inputs = [x.view_as(x) if w else x for x, w in zip(inputs, wanted)]
        outputs = twin(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        # autograd.grad refuses outputs that depend on no input with a gradient
        linked = [(y, g) for y, g in zip(outputs, grads) if y.requires_grad]
        outputs, grads = zip(*linked)
        sources = [x for x, w in zip(inputs, wanted) if w]
        input_grads = iter(torch.autograd.grad(outputs, sources, grads, create_graph=True))
    return tuple(next(input_grads) if w else None for w in wanted)


class FirstOrder(torch.autograd.Function):
    """The identity; RuntimeError at a second derivative.

    It follows a kernel whose own backward would give wrong ones without an error.
    """

    @staticmethod
    def forward(ctx, x, name):
        ctx.name = name
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        if needs_twin():
            raise RuntimeError(f"{ctx.name} has no second derivatives; take them in float32")
        return grad, None
