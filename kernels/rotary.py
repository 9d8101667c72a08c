"""Rotary positions (arXiv:2104.09864): one pass in the C++ of csrc/elementwise.h for float32 on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import native_elementwise as native
from kernels import reference


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x (..., seqlen, heads, head_dim): element i of the first half pairs with element i of the second.

    cos and sin are (seqlen, 1, head_dim / 2), of the tokens' angles and the same for every sequence; for packed x
    (tokens, heads, head_dim) they are (tokens, 1, head_dim / 2). They get no gradient. Where they are narrower, so is
    what is rotated: the rest of each head stays as it is.
    """
    rotated = 2 * cos.shape[-1]
    if rotated < x.shape[-1]:
        return torch.cat((rotate(x[..., :rotated], cos, sin), x[..., rotated:]), dim=-1)
    if not (native.serves(x) and native.serves(cos) and native.serves(sin) and _fits(x, cos)):
        return reference.rotate(x, cos, sin)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotate.apply(x, cos, sin)
    return native.rotate(x, cos, sin, back=False)


def _fits(x: Tensor, cos: Tensor) -> bool:
    """Positions that differ from sequence to sequence of a padded batch are left to the formula."""
    return x.dim() in (3, 4) and cos.shape == (x.shape[-3], 1, x.shape[-1] // 2)


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return native.rotate(x, cos, sin, back=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return native.rotate(grad, *ctx.saved_tensors, back=True), None, None
