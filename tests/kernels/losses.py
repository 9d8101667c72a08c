"""What the tests of both losses share: the rule for errors, and memory that shows what was not written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.kernels.conftest import DEVICE as DEVICE
from tests.kernels.conftest import poison as poison

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
COMPILERS = ["eager", "aot_eager", "inductor"]

Loss = Callable[..., Tensor]


def results(loss: Loss, inputs: Sequence[Tensor], upstream: float = 1.0) -> list[Tensor]:
    """The loss and its gradients by ``inputs``, in float64."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = loss(*inputs)
    gradients = torch.autograd.grad(out, inputs, out.new_tensor(upstream))
    assert [g.dtype for g in gradients] == [x.dtype for x in inputs]
    return [x.detach().double() for x in (out, *gradients)]


def assert_follows_the_error_rule(
    loss: Loss, reference: Loss, inputs: Sequence[Tensor], upstream: float = 1.0, rounding: float = 1e-6
) -> None:
    """Against the reference in float64, ``loss`` errs at most twice as much as the reference in the inputs' dtype.

    Allowed besides: ``rounding`` of a result's largest element, and a float32's of numbers around 1, which
    probabilities are.
    """
    exact = results(reference, [x.double() for x in inputs], upstream)
    ours, theirs = (results(f, inputs, upstream) for f in (loss, reference))
    for actual, expected, truth in zip(ours, theirs, exact, strict=True):
        assert actual.shape == truth.shape
        finite = truth.isfinite()
        torch.testing.assert_close(actual[~finite], truth[~finite], equal_nan=True)
        if finite.any():
            error, allowed = ((x - truth)[finite].abs().max() for x in (actual, expected))
            assert error <= 2 * allowed + rounding * truth[finite].abs().max() + 1e-7, (error, allowed)
