"""What every operator owes besides its numbers: to be traced, compiled, exported, and clear where gradients end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import DEVICE

COMPILERS = ("eager", "aot_eager", "inductor")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Function = Callable[..., Any]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers on the device under test, the same on every device, with gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()


def outputs_and_gradients(function: Function, inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """What a function of tensors returns, then the gradient of every input, for upstream gradients without pattern."""
    out = function(*inputs)
    outputs = out if isinstance(out, tuple) else (out,)
    grads = [randn(*y.shape, dtype=y.dtype, seed=7 + i).detach() for i, y in enumerate(outputs)]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, wanted, grads)]


def in_float64(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in inputs]


def assert_as_exact_as_torch(ours: Function, torchs: Function, inputs: Sequence[Tensor | None]) -> None:
    """The error against float64 is at most twice torch's in the same dtype, for outputs and gradients."""
    truth = outputs_and_gradients(torchs, in_float64(inputs))
    actual, peers = (outputs_and_gradients(function, inputs) for function in (ours, torchs))
    for a, b, t in zip(actual, peers, truth, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if a.numel():
            error, allowed = ((x.double() - t).abs().max().item() for x in (a, b))
            assert error <= 2 * allowed + 4e-6 * (t.abs().max().item() or 1.0), (error, allowed)


def assert_compiles(function: Function, inputs: Sequence[Tensor | None], compiler: str) -> None:
    """Without a graph break, and to the same numbers."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    results = [outputs_and_gradients(f, inputs) for f in (compiled, function)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def assert_exports(function: Function, inputs: Sequence[Tensor]) -> None:
    class Module(torch.nn.Module):
        def forward(self, *args: Tensor) -> Any:
            return function(*args)

    detached = tuple(x.detach() for x in inputs)
    program = torch.export.export(Module(), detached)
    torch.testing.assert_close(program.module()(*detached), function(*detached))


def assert_strided_gradients_fit(function: Function, inputs: Sequence[Tensor | None]) -> None:
    """An expanded scalar and a transposed tensor are gradients as good as others."""
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    out = function(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    dense = torch.randn_like(out)
    for strange in (torch.ones((), dtype=out.dtype, device=out.device).expand_as(out), dense.mT.contiguous().mT):
        actual, expected = (
            torch.autograd.grad(out, wanted, grad, retain_graph=True) for grad in (strange, strange.contiguous())
        )
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def assert_no_second_gradient(function: Function, inputs: Sequence[Tensor | None]) -> None:
    x = inputs[0]
    assert x is not None
    out = function(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    with pytest.raises(RuntimeError, match="has no second derivative on triton"):
        torch.autograd.grad(out.sum(), x, create_graph=True)
