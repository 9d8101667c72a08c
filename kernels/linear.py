"""x W^T + b. On a CPU, float32 training goes through oneDNN where it beats the matrix library behind ``F.linear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import native_elementwise as native


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., out_features) for x (..., in_features), weight (out_features, in_features), bias (out_features,)."""
    trained = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and trained and _prefers_onednn(x, weight):
        return _OneDnnLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def _prefers_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes this product of a training step.

    It compiles a kernel for every new shape, some 10 ms each: training soon knows all its shapes, but an engine's steps
    differ in their number of rows, so products without gradients stay with ``F.linear``. So do those under
    torch.compile, which has a lowering of its own, and under autocast, which has a dtype to apply.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    """Forward and input gradient by oneDNN (1.1x at 2,048 rows, 2x at 128); most weight gradients are faster in MKL."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = _onednn(rows.contiguous(), weight.t(), None).view_as(x) if need_x else None
        if need_weight and need_bias and _transposes(rows, x):
            return grad_x, *_weight_and_bias_gradients(rows, x.reshape(-1, x.shape[-1]))
        grad_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if need_weight else None
        return grad_x, grad_weight, rows.sum(0) if need_bias else None


def _transposes(rows: Tensor, x: Tensor) -> bool:
    """Whether oneDNN's faster product is worth the transpose it needs: the one of a narrow gradient is cheap.

    At 2,048 rows, 1024 to 256 features, the whole backward pass gains a tenth; from 256 to 256 or 768 the
    transpose costs what the product gains, and from 256 to 1024 more.
    """
    return 4 * rows.shape[1] <= x.shape[-1]


def _weight_and_bias_gradients(rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    sums = torch.empty(rows.shape[1])
    return _onednn(native.transpose(rows, sums), x.t(), None), sums
