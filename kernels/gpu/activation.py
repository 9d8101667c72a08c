"""Gated activations: activation(gate) * up in one pass forward, and one back that computes the activation again."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.library import first_derivative_only, operator
from kernels.gpu.target import INTERPRETED


@triton.jit
def _activate(x, NAME: tl.constexpr):
    """(activation, slope) at float32 x."""
    if NAME == "relu":
        return tl.where(x < 0, 0.0, x), tl.where(x <= 0, 0.0, 1.0)
    elif NAME == "silu":
        chance = tl.sigmoid(x)
        return x * chance, chance * (1 + x * (1 - chance))
    elif NAME == "gelu":
        chance = 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)
        return x * chance, chance + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        # 0.5 (1 + tanh(y)) is sigmoid(2 y), here of y = sqrt(2 / pi) (x + 0.044715 x^3).
        chance = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        steep = 1.5957691216057308 * (1 + 3 * 0.044715 * x * x)
        # Far out the sigmoid is flat, and the product of its slope and the polynomial's could be 0 times inf.
        return x * chance, chance + tl.where(tl.abs(x) < 16, x * chance * (1 - chance) * steep, 0.0)


@triton.jit
def _tile(x_ptr, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Gate and up of this program's tile in float32, and where they and the output are."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (row < rows) & (column < width)
    at = row * 2 * width + column
    gate = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + at + width, mask=mask, other=0.0).to(tl.float32)
    return gate, up, at, row * width + column, mask


@triton.jit
def _forward(x_ptr, out_ptr, rows, width, NAME: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    gate, up, _, to, mask = _tile(x_ptr, rows, width, ROWS, BLOCK)
    activated, _ = _activate(gate, NAME)
    tl.store(out_ptr + to, (activated * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(grad_ptr, x_ptr, grad_x_ptr, rows, width, NAME: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    gate, up, at, to, mask = _tile(x_ptr, rows, width, ROWS, BLOCK)
    grad = tl.load(grad_ptr + to, mask=mask, other=0.0).to(tl.float32)
    activated, slope = _activate(gate, NAME)
    tl.store(grad_x_ptr + at, (grad * up * slope).to(grad_x_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_x_ptr + at + width, (grad * activated).to(grad_x_ptr.dtype.element_ty), mask=mask)


def _launch(kernel: Any, tensors: tuple[Tensor, ...], rows: int, width: int, name: str) -> None:
    block = min(triton.next_power_of_2(width), 1024)
    tile = max(1, (16384 if INTERPRETED else 1024) // block)
    grid = (triton.cdiv(rows, tile), triton.cdiv(width, block))
    kernel[grid](*tensors, rows, width, NAME=name, ROWS=tile, BLOCK=block, num_warps=4)


def forward(x: Tensor, name: str) -> Tensor:
    """(..., width) for x (..., 2 width), gate first."""
    out = _forward_shape(x, name)
    if out.numel():
        width = out.shape[-1]
        _launch(_forward, (x.contiguous(), out), out.numel() // width, width, name)
    return out


def _forward_shape(x: Tensor, name: str) -> Tensor:
    return torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)


def backward(grad: Tensor, x: Tensor, name: str) -> Tensor:
    """The gradient of x, for that of the output."""
    grad_x = _backward_shape(grad, x, name)
    if grad_x.numel():
        width = grad.shape[-1]
        _launch(_backward, (grad.contiguous(), x.contiguous(), grad_x), grad.numel() // width, width, name)
    return grad_x


def _backward_shape(grad: Tensor, x: Tensor, name: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


FORWARD = operator("glu(Tensor x, str activation) -> Tensor", forward, _forward_shape)
BACKWARD = operator("glu_backward(Tensor grad, Tensor x, str activation) -> Tensor", backward, _backward_shape)


class Glu(torch.autograd.Function):
    """Keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.name = name
        return FORWARD(x, name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        first_derivative_only("glu")
        return BACKWARD(grad, *ctx.saved_tensors, ctx.name), None
