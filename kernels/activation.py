"""gelu in both forms, and gated activations.

On a CPU, float32 gelu runs in the C++ of csrc/elementwise.h; on a GPU, Triton joins a gate and its product; torch has
every other case.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import native_elementwise as native
from kernels import reference
from kernels.backend import BACKENDS, TRITON_DEVICE, available, choose, triton_serves

if TRITON_DEVICE is not None:
    from kernels.gpu import activation as gpu_activation

Gate = Literal["relu", "silu", "gelu", "gelu_new"]


def gelu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """x times the chance that a standard normal variable is below x (arXiv:1606.08415), in x's shape and dtype.

    Raises ValueError for a backend that is missing: there are ``native`` (float32 on a CPU, gradients once), ``torch``
    and ``reference``.
    """
    name = _choose("gelu", x, backend)
    if name == "native":
        return _gelu(x)
    return reference.gelu(x) if name == "reference" else F.gelu(x)


def gelu_new(x: Tensor, *, backend: str | None = None) -> Tensor:
    """GPT-2's approximation, 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))): see ``gelu``."""
    name = _choose("gelu_new", x, backend)
    if name == "native":
        return _gelu(x, tanh=True)
    return reference.gelu_new(x) if name == "reference" else F.gelu(x, approximate="tanh")


def glu(x: Tensor, activation: Gate, *, backend: str | None = None) -> Tensor:
    """activation(gate) * up, (..., width), for x (..., 2 * width) of both, gate first (arXiv:2002.05202).

    ``relu``, ``silu``, ``gelu`` and ``gelu_new`` make ReGLU, SwiGLU and both forms of GeGLU. backend is ``triton``
    (half precision and float32 on a GPU, gradients once), ``native`` (C++ for the gelus; float32 on a CPU, gradients
    once), ``torch`` or ``reference``; chosen by ``kernels.backend`` unless given.
    Raises ValueError for an unknown activation, an odd last dimension or a backend that is missing.
    """
    if activation not in TORCH:
        raise ValueError(f"unknown activation {activation!r} of a gate: choose one of {', '.join(TORCH)}")
    if x.shape[-1] % 2:
        raise ValueError(f"a gate and what it multiplies need an even last dimension, got {tuple(x.shape)}")
    in_native = activation in NATIVE
    names = available(x.device, triton=triton_serves(x), native=in_native and native.serves(x))
    name = choose("glu", names, backend, has=BACKENDS if in_native else WITHOUT_NATIVE)
    if name == "triton":
        return gpu_activation.Glu.apply(x, activation)
    if name == "reference":
        return reference.glu(x, activation)
    gate, up = x.chunk(2, dim=-1)
    return (NATIVE if name == "native" else TORCH)[activation](gate) * up


def _choose(operation: str, x: Tensor, backend: str | None) -> str:
    return choose(operation, available(x.device, native=native.serves(x)), backend, has=UNGATED)


def _gelu(x: Tensor, tanh: bool = False) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _Gelu.apply(x, tanh)
    return native.gelu(x, tanh)


class _Gelu(torch.autograd.Function):
    """Keeps x alone: the backward pass computes the slope from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tanh: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tanh = tanh
        return native.gelu(x, tanh)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return native.gelu_backward(x, grad, ctx.tanh), None


UNGATED = ("native", "torch", "reference")
WITHOUT_NATIVE = ("triton", "torch", "reference")
NATIVE: dict[str, Callable[[Tensor], Tensor]] = {"gelu": _gelu, "gelu_new": functools.partial(_gelu, tanh=True)}
TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
}
