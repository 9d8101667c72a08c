"""RMSNorm and LayerNorm over rows, with the addition that comes before them and the one that comes back.

A row that fits is held in registers; a wider one is read twice, the second time from the cache. Statistics, sums over
rows and all arithmetic are float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.library import first_derivative_only, operator
from kernels.gpu.target import INTERPRETED, architecture, multiprocessors


@triton.jit
def _load(x_ptr, at, mask):
    return tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(x_ptr, at, value, mask):
    tl.store(x_ptr + at, value.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_sum(x_ptr, other_ptr, residual_ptr, total_ptr, at, mask):
    """x, or x + residual as it is kept, rounded; x + other in place of x, rounded too."""
    x = _load(x_ptr, at, mask)
    if other_ptr is not None:
        x = (x + _load(other_ptr, at, mask)).to(x_ptr.dtype.element_ty).to(tl.float32)
    if residual_ptr is not None:
        x = (x + _load(residual_ptr, at, mask)).to(total_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _load_parameters(weight_ptr, bias_ptr, column, width):
    """Weight and bias; in place of a bias that is not there, something that nothing reads."""
    weight = _load(weight_ptr, column, column < width)
    if bias_ptr is None:
        return weight, weight
    else:
        return weight, _load(bias_ptr, column, column < width)


@triton.jit
def _scale_and_store(normal, weight, bias, out_ptr, at, mask, BIAS: tl.constexpr):
    out = normal * weight[None, :]
    if BIAS:
        out += bias[None, :]
    _store(out_ptr, at, out, mask)


@triton.jit
def _forward(
    x_ptr, other_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, total_ptr, statistics_ptr, rows, width, eps,
    CENTER: tl.constexpr, EARLY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    if EARLY:
        weight, bias = _load_parameters(weight_ptr, bias_ptr, column, width)
        tl.debug_barrier()  # or ptxas would ask for them when the row is there
    x = _load_sum(x_ptr, other_ptr, residual_ptr, total_ptr, at, mask)
    if residual_ptr is not None:
        _store(total_ptr, at, x, mask)
    if CENTER:
        mean = tl.sum(x, axis=1) / width
        tl.store(statistics_ptr + rows + row, mean, mask=row < rows)
        x = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    tl.store(statistics_ptr + row, rstd, mask=row < rows)
    if not EARLY:
        weight, bias = _load_parameters(weight_ptr, bias_ptr, column, width)
    _scale_and_store(x * rstd[:, None], weight, bias, out_ptr, at, mask, bias_ptr is not None)


@triton.jit
def _forward_wide(
    x_ptr, other_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, total_ptr, statistics_ptr, rows, width, eps,
    CENTER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    mean = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        x = _load_sum(x_ptr, other_ptr, residual_ptr, total_ptr, at, mask)
        if residual_ptr is not None:
            _store(total_ptr, at, x, mask)
        if CENTER:
            # The moments of the columns so far and of these, joined (Chan, Golub and LeVeque 1979).
            count = tl.minimum(BLOCK, width - start).to(tl.float32)
            share = count / (start + count)
            block_mean = tl.sum(x, axis=1) / count
            x = tl.where(mask, x - block_mean[:, None], 0.0)
            shift = block_mean - mean
            mean += shift * share
            squares += shift * shift * start * share
        squares += tl.sum(x * x, axis=1)
    rstd = tl.rsqrt(squares / width + eps)
    tl.store(statistics_ptr + row, rstd, mask=row < rows)
    if CENTER:
        tl.store(statistics_ptr + rows + row, mean, mask=row < rows)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        x = _load_sum(x_ptr, other_ptr, residual_ptr, total_ptr, at, mask)
        if CENTER:
            x -= mean[:, None]
        weight, bias = _load_parameters(weight_ptr, bias_ptr, column, width)
        _scale_and_store(x * rstd[:, None], weight, bias, out_ptr, at, mask, bias_ptr is not None)


@triton.jit
def _load_slope(grad_ptr, x_ptr, statistics_ptr, at, row, mask, rows, CENTER: tl.constexpr):
    """The incoming gradient, the normalised row and 1 / its deviation."""
    grad = _load(grad_ptr, at, mask)
    x = _load(x_ptr, at, mask)
    rstd = tl.load(statistics_ptr + row, mask=row < rows, other=0.0)
    if CENTER:
        x -= tl.load(statistics_ptr + rows + row, mask=row < rows, other=0.0)[:, None]
    return grad, x * rstd[:, None], rstd


@triton.jit
def _store_input_gradient(
    slope, normal, rstd, along, mean, grad_total_ptr, grad_x_ptr, grad_narrow_ptr, at, mask, CENTER: tl.constexpr
):
    grad_x = slope - normal * along[:, None]
    if CENTER:
        grad_x -= mean[:, None]
    grad_x *= rstd[:, None]
    if grad_total_ptr is not None:
        grad_x += _load(grad_total_ptr, at, mask)
    _store(grad_x_ptr, at, grad_x, mask)
    if grad_narrow_ptr is not None:
        _store(grad_narrow_ptr, at, grad_x, mask)


@triton.jit
def _backward(
    grad_ptr, grad_total_ptr, x_ptr, weight_ptr, statistics_ptr, grad_x_ptr, grad_narrow_ptr, partials_ptr,
    rows, width, CENTER: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program takes every programs-th tile of rows, and leaves its share of the parameters' gradients."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    grad_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    grad_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(program * ROWS, rows, programs * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * width + column[None, :]
        grad, normal, rstd = _load_slope(grad_ptr, x_ptr, statistics_ptr, at, row, mask, rows, CENTER)
        grad_weight += grad * normal
        if BIAS:
            grad_bias += grad
        slope = grad * _load(weight_ptr, column, inside)[None, :]  # each time: the registers are for the sums
        along = tl.sum(slope * normal, axis=1) / width
        mean = tl.sum(slope, axis=1) / width if CENTER else along
        _store_input_gradient(
            slope, normal, rstd, along, mean, grad_total_ptr, grad_x_ptr, grad_narrow_ptr, at, mask, CENTER
        )
    at = program.to(tl.int64) * width + column
    tl.store(partials_ptr + at, tl.sum(grad_weight, axis=0), mask=inside)
    if BIAS:
        tl.store(partials_ptr + programs.to(tl.int64) * width + at, tl.sum(grad_bias, axis=0), mask=inside)


@triton.jit
def _backward_wide(
    grad_ptr, grad_total_ptr, x_ptr, weight_ptr, statistics_ptr, grad_x_ptr, grad_narrow_ptr, partials_ptr,
    rows, width, CENTER: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same where no registers hold the sums over rows: a program adds to its own row of ``partials``."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    partial = partials_ptr + program.to(tl.int64) * width
    for start in range(program * ROWS, rows, programs * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        along = tl.zeros([ROWS], tl.float32)
        mean = tl.zeros([ROWS], tl.float32)
        for first in range(0, width, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < width
            mask = (row < rows)[:, None] & inside[None, :]
            at = row[:, None] * width + column[None, :]
            grad, normal, rstd = _load_slope(grad_ptr, x_ptr, statistics_ptr, at, row, mask, rows, CENTER)
            slope = grad * _load(weight_ptr, column, inside)[None, :]
            along += tl.sum(slope * normal, axis=1) / width
            mean += tl.sum(slope, axis=1) / width
        for first in range(0, width, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < width
            mask = (row < rows)[:, None] & inside[None, :]
            at = row[:, None] * width + column[None, :]
            grad, normal, rstd = _load_slope(grad_ptr, x_ptr, statistics_ptr, at, row, mask, rows, CENTER)
            slope = grad * _load(weight_ptr, column, inside)[None, :]
            _store_input_gradient(
                slope, normal, rstd, along, mean, grad_total_ptr, grad_x_ptr, grad_narrow_ptr, at, mask, CENTER
            )
            later = inside & (start > program * ROWS)
            tl.store(partial + column, _load(partial, column, later) + tl.sum(grad * normal, axis=0), mask=inside)
            if BIAS:
                of_bias = partial + programs.to(tl.int64) * width
                tl.store(of_bias + column, _load(of_bias, column, later) + tl.sum(grad, axis=0), mask=inside)
        tl.debug_barrier()  # the next tile's threads may read what others wrote


@triton.jit
def _sum_partials(
    partials_ptr, grad_weight_ptr, grad_bias_ptr, programs, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    of_bias = tl.program_id(1)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        at = (of_bias * programs + row).to(tl.int64)[:, None] * width + column[None, :]
        total += _load(partials_ptr, at, (row < programs)[:, None] & (column < width)[None, :])
    if of_bias == 0:
        _store(grad_weight_ptr, column, tl.sum(total, axis=0), column < width)
    elif grad_bias_ptr is not None:
        _store(grad_bias_ptr, column, tl.sum(total, axis=0), column < width)


class Tiling(NamedTuple):
    """How a program walks its rows: tiles of ``rows`` by ``block`` columns, all of them if it is ``whole``.

    ``registers`` is what a thread may use: left alone, ptxas spills a few to fit one more block on a multiprocessor.
    """

    whole: bool
    rows: int
    block: int
    warps: int
    registers: int | None = None

    def options(self) -> dict[str, int]:
        options = {"num_warps": self.warps}
        if self.registers is not None and architecture().startswith("sm"):
            options["maxnreg"] = self.registers
        return options


def forward_tiling(width: int) -> Tiling:
    """Rows up to 8,192 columns in registers, 8 elements a thread; up to 16,384 unless every element has an address."""
    block = triton.next_power_of_2(width)
    if INTERPRETED:
        return Tiling(block <= 256, 32, min(block, 256), 4)
    if block > (8192 if width % 16 else 16384):
        return Tiling(False, 1, 4096, 8, registers=128)
    return Tiling(True, max(1, 1024 // block), block, min(max(block // 256, 4), 32))


def backward_tiling(width: int, mixed: bool) -> Tiling:
    """Sums over rows stay in registers, 8 elements a thread. For one wide row 64 registers do, up to 8,192 columns; for
    several rows, ``mixed`` dtypes or addresses of every element's own 128 do, up to 4,096."""
    block = triton.next_power_of_2(width)
    if INTERPRETED:
        return Tiling(block <= 256, 32, min(block, 256), 4)
    registers = 128 if block < 1024 or mixed or width % 16 else 64
    if block > 2**19 // registers:
        return Tiling(False, 4, 1024, 8, registers=255)
    return Tiling(True, max(1, 1024 // block), block, min(max(block // 256, 4), 32), registers)


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, center: bool,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The norm of x, of x + residual or of (x + other) + residual, that sum (empty without a residual), and float32
    statistics (1 or 2, rows): 1 / deviation, and with ``center`` the mean."""
    out, total, statistics = _forward_shapes(x, residual, weight, bias, eps, center, other)
    rows, width = statistics.shape[1], x.shape[-1]
    if x.numel():
        tiling = forward_tiling(width)
        programs = triton.cdiv(rows, tiling.rows)
        # Few programs wait for memory alone, and wait once if they ask for everything at once. Many hide each other's
        # waits, and want the registers.
        early = {"EARLY": programs <= 2 * multiprocessors()} if tiling.whole else {}
        kernel = _forward if tiling.whole else _forward_wide
        kernel[(programs,)](
            x.contiguous(), None if other is None else other.contiguous(),
            None if residual is None else residual.contiguous(), weight.contiguous(),
            None if bias is None else bias.contiguous(), out, None if residual is None else total, statistics,
            rows, width, eps, CENTER=center, ROWS=tiling.rows, BLOCK=tiling.block, **early, **tiling.options(),
        )  # fmt: skip
    return out, total, statistics


def _forward_shapes(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, center: bool,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    wide = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    total = torch.empty((0,) if residual is None else x.shape, dtype=wide, device=x.device)
    rows = x.numel() // max(x.shape[-1], 1)
    return out, total, torch.empty(1 + center, rows, dtype=torch.float32, device=x.device)


def backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, statistics: Tensor, bias: bool,
    narrow: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the normed x, ``grad_total`` included; of x again as ``narrow``; of weight; of bias (empty
    where not asked for)."""
    grad_x, grad_narrow, grad_weight, grad_bias = _backward_shapes(
        grad, grad_total, x, weight, statistics, bias, narrow
    )
    rows, width = statistics.shape[1], x.shape[-1]
    if not x.numel():
        return grad_x, grad_narrow, grad_weight.zero_(), grad_bias.zero_()
    tiling = backward_tiling(width, mixed=narrow is not None or x.dtype != weight.dtype)
    # A fixed number of partial sums, added in a fixed order: the same bits every time. Of few rows, few of them.
    tiles = triton.cdiv(rows, tiling.rows)
    programs = min(triton.cdiv(tiles, 4), multiprocessors() * (32 // tiling.warps))
    partials = torch.empty(1 + bias, programs, width, dtype=torch.float32, device=x.device)
    kernel = _backward if tiling.whole else _backward_wide
    kernel[(programs,)](
        grad.contiguous(), None if grad_total is None else grad_total.contiguous(), x.contiguous(),
        weight.contiguous(), statistics, grad_x, None if narrow is None else grad_narrow, partials,
        rows, width, CENTER=statistics.shape[0] == 2, BIAS=bias, ROWS=tiling.rows, BLOCK=tiling.block,
        **tiling.options(),
    )  # fmt: skip
    block = 256 if INTERPRETED else 8
    _sum_partials[(triton.cdiv(width, block), 1 + bias)](
        partials, grad_weight, grad_bias if bias else None, programs, width, ROWS=2048 // block, BLOCK=block
    )
    return grad_x, grad_narrow, grad_weight, grad_bias


def _backward_shapes(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, statistics: Tensor, bias: bool,
    narrow: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_narrow = torch.empty((0,) if narrow is None else x.shape, dtype=narrow or x.dtype, device=x.device)
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    grad_bias = torch.empty(weight.shape if bias else (0,), dtype=weight.dtype, device=x.device)
    return grad_x, grad_narrow, grad_weight, grad_bias


FORWARD = operator(
    "norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool center, Tensor? other=None)"
    " -> (Tensor out, Tensor total, Tensor statistics)",
    forward,
    _forward_shapes,
)
BACKWARD = operator(
    "norm_backward(Tensor grad, Tensor? grad_total, Tensor x, Tensor weight, Tensor statistics, bool bias,"
    " ScalarType? narrow) -> (Tensor grad_x, Tensor grad_narrow, Tensor grad_weight, Tensor grad_bias)",
    backward,
    _backward_shapes,
)


class Norm(torch.autograd.Function):
    """Keeps what was normed, x or the sum, and its statistics."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, center: bool,
        other: Tensor | None = None,
    ) -> Any:  # fmt: skip
        out, total, statistics = FORWARD(x, residual, weight, bias, eps, center, other)
        ctx.save_for_backward(x if residual is None else total, weight, statistics)
        ctx.bias, ctx.other = bias is not None, other is not None
        ctx.set_materialize_grads(False)  # a sum that goes nowhere costs nothing
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        return out if residual is None else (out, total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None = None) -> tuple[Tensor | None, ...]:
        first_derivative_only("a norm")
        x, weight, statistics = ctx.saved_tensors
        if grad is None:
            grad = torch.zeros(x.shape, dtype=weight.dtype, device=x.device)
        narrow = next((dtype for dtype in ctx.dtypes if dtype not in (x.dtype, None)), None)
        grad_x, grad_narrow, grad_weight, grad_bias = BACKWARD(
            grad, grad_total, x, weight, statistics, ctx.bias, narrow
        )
        of_x, of_residual = (
            None if dtype is None else grad_x if dtype == x.dtype else grad_narrow for dtype in ctx.dtypes
        )
        of_other = of_x if ctx.other else None
        return of_x, of_residual, grad_weight, grad_bias if ctx.bias else None, None, None, of_other
