"""gelu, exact and by tanh. On a CPU, float32 runs in the C++ of csrc/elementwise.h; torch has every other case."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import native_elementwise as native


def gelu(x: Tensor) -> Tensor:
    """x times the chance that a standard normal variable is below x (arXiv:1606.08415), in x's shape and dtype."""
    return _gelu(x) if native.serves(x) else F.gelu(x)


def gelu_new(x: Tensor) -> Tensor:
    """GPT-2's approximation, 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), in x's shape and dtype."""
    return _gelu(x, tanh=True) if native.serves(x) else F.gelu(x, approximate="tanh")


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
