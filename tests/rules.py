"""What tests of the recurrent rules share: delta.py, delta_variants.py, linear.py, ttt.py."""

import torch


def detached(arguments):
    return [x if x is None else x.detach() for x in arguments]


def with_gradients(arguments, dtype=None):
    """Copies of tensors, in another dtype if one is given, that want gradients."""
    return [x if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in arguments]


def outputs_and_gradients(rule, arguments, **options):
    """[o, state, gradient of every input that has one] for one fixed gradient of o and state."""
    wanted = [x for x in arguments if x is not None and x.requires_grad]
    results = rule(*arguments, **options)
    g = torch.Generator().manual_seed(7)
    grads = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in results]
    return [x.detach() for x in results] + list(torch.autograd.grad(results, wanted, grads))


def assert_all_close(ours, expected, tolerance):
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def error(ours, exact):
    """The largest error, relative to the largest exact number."""
    return ((ours.double() - exact).abs().max() / exact.abs().max()).item()


def random_tokens(B):
    """B sequences of 12 tokens, of a vocabulary of 19."""
    return torch.randint(19, (B, 12), generator=torch.Generator().manual_seed(0))
