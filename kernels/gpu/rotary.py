"""Rotary positions in one pass over x, whose strides may be those of a view into a fused projection."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.library import first_derivative_only, operator
from kernels.gpu.target import INTERPRETED


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, out_ptr, rows, seqlen, heads, head_dim, half,
    x_batch, x_token, x_head, angle_batch, angle_token,
    INTERLEAVED: tl.constexpr, BACK: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """A tile of rows, each a head of a token; HALF and REST are powers of two that hold half and head_dim - 2 half."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = (row < rows)[:, None]
    token, head = row // heads, row % heads
    batch, token = (token // seqlen).to(tl.int64), (token % seqlen).to(tl.int64)
    x_ptr += (batch * x_batch + token * x_token + head.to(tl.int64) * x_head)[:, None]
    out_ptr += (row.to(tl.int64) * head_dim)[:, None]
    angle = (batch * angle_batch + token * angle_token)[:, None]

    column = tl.arange(0, HALF)[None, :]
    mask = real & (column < half)
    cos = tl.load(cos_ptr + angle + column, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle + column, mask=mask, other=0.0)
    if BACK:
        sin = -sin
    if INTERLEAVED:
        both = tl.arange(0, 2 * HALF)[None, :]
        inside = real & (both < 2 * half)
        pairs = tl.load(x_ptr + both, mask=inside, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(pairs, [ROWS, HALF, 2]))
        turned = tl.interleave(first * cos - second * sin, second * cos + first * sin)
        tl.store(out_ptr + both, turned.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        first = tl.load(x_ptr + column, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x_ptr + half + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + column, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out_ptr + half + column, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=mask)
    if REST:
        rest = 2 * half + tl.arange(0, REST)[None, :]
        inside = real & (rest < head_dim)
        tl.store(out_ptr + rest, tl.load(x_ptr + rest, mask=inside), mask=inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> Tensor:
    """x ([batch,] seqlen, heads, head_dim) by float32 angles that broadcast to it, the same for all heads, or by
    their opposites: ``back``."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return out
    x = x if x.stride(-1) == 1 else x.contiguous()
    padded = x if x.dim() == 4 else x[None]
    batch, seqlen, heads, head_dim = padded.shape
    half = cos.shape[-1]
    cos, sin = (angles.contiguous().expand(batch, seqlen, 1, half) for angles in (cos, sin))
    rows, block = batch * seqlen * heads, triton.next_power_of_2(half)
    tile = max(1, (16384 if INTERPRETED else 1024) // block)
    rest = head_dim - 2 * half
    _rotate[(triton.cdiv(rows, tile),)](
        padded, cos, sin, out, rows, seqlen, heads, head_dim, half, *padded.stride()[:3], *cos.stride()[:2],
        INTERLEAVED=interleaved, BACK=back, ROWS=tile, HALF=block, REST=triton.next_power_of_2(rest) if rest else 0,
        num_warps=4,
    )  # fmt: skip
    return out


def _shape(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


ROTATE = operator("rotate(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool back) -> Tensor", rotate, _shape)


class Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return ROTATE(x, cos, sin, interleaved, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        first_derivative_only("rotate")
        return ROTATE(grad, *ctx.saved_tensors, ctx.interleaved, True), None, None, None
