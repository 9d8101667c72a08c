"""Linear layers of few rows, whose time is that of reading the weight once: integers and floats of eight bits, integers
of four, or halves.

A program takes a block of outputs and a block of rows, usually all; its warps share out the inputs or the outputs, and
each makes numbers of its weight's bits in registers and multiplies on tensor cores: the warps are a dimension of their
own, for which Triton takes mma.sync even on Hopper. Where blocks of outputs are too few to fill the GPU, several
programs share one: each leaves its sums, and the last to arrive adds them up, in an order of their own, so that the
bits do not depend on who is last. Sums are float32.

From Hopper on, a kernel starts while the one before it ends: it asks for the first of its weight, which no kernel
writes, and waits before it reads anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.gpu.activation import _activate
from kernels.gpu.target import INTERPRETED, architecture, multiprocessors
from kernels.gpu.weight_only_configs import Config, choose, splits_of

if TYPE_CHECKING:
    from kernels.weight_only_linear import DeviceWeight

TILE = 256  # four-bit inputs whose scales lie together: rows are padded to a multiple
PIECE = tl.constexpr(64)  # bytes that are asked for at once


# One instruction masks four bits of each half of a word and puts a power of two above them, one takes it off again, and
# 8 more: (1 x both) - 136 as two bfloat16, or - 1032 as two float16.
_NIBBLES_AS_BFLOAT16 = tl.constexpr(
    "{ .reg .b32 both, mask, power, one, off; mov.b32 mask, 0x000F000F; mov.b32 power, 0x43004300; "
    "mov.b32 one, 0x3F803F80; mov.b32 off, 0xC308C308; "
    "lop3.b32 both, $1, mask, power, 0xEA; fma.rn.bf16x2 $0, both, one, off; }"
)
_NIBBLES_AS_FLOAT16 = tl.constexpr(
    "{ .reg .b32 both, mask, power, one, off; mov.b32 mask, 0x000F000F; mov.b32 power, 0x64006400; "
    "mov.b32 one, 0x3C003C00; mov.b32 off, 0xE408E408; "
    "lop3.b32 both, $1, mask, power, 0xEA; fma.rn.f16x2 $0, both, one, off; }"
)


@triton.jit
def _pairs(words, SHIFT: tl.constexpr, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The nibbles at SHIFT and SHIFT + 16 of int32 words (..., 8), less 8, as numbers (..., 8, 2)."""
    if dtype == tl.float32:
        low = ((words >> SHIFT) & 15).to(tl.float32) - 8
        high = ((words >> (SHIFT + 16)) & 15).to(tl.float32) - 8
    elif ASSEMBLY:
        both = tl.inline_asm_elementwise(
            _NIBBLES_AS_BFLOAT16 if dtype == tl.bfloat16 else _NIBBLES_AS_FLOAT16,
            "=r,r", [words >> SHIFT], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
        low = both.to(tl.int16).to(dtype, bitcast=True)
        high = (both >> 16).to(tl.int16).to(dtype, bitcast=True)
    else:
        POWER: tl.constexpr = 0x43004300 if dtype == tl.bfloat16 else 0x64006400
        OFF: tl.constexpr = 136.0 if dtype == tl.bfloat16 else 1032.0
        both = ((words >> SHIFT) & 0x000F000F) | POWER
        low = (both.to(tl.int16).to(dtype, bitcast=True).to(tl.float32) - OFF).to(dtype)
        high = ((both >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32) - OFF).to(dtype)
    return tl.join(low, high)


@triton.jit
def _group(words, GROUP: tl.constexpr, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The first or second 32 inputs of int32 words (G, N, 8), less 8, as (G, N, 32): see ``pack_nibbles``."""
    first = _pairs(words, 8 * GROUP, dtype, ASSEMBLY)
    second = _pairs(words, 8 * GROUP + 4, dtype, ASSEMBLY)
    both = tl.permute(tl.join(first, second), (0, 1, 4, 2, 3))
    return tl.reshape(both, (words.shape[0], words.shape[1], 32))


_ONE_AS_BFLOAT16 = tl.constexpr("mov.b32 $0, 0x3F803F80; // $1")
_ONE_AS_FLOAT16 = tl.constexpr("mov.b32 $0, 0x3C003C00; // $1")


@triton.jit
def _ones(words, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Ones for ``_group``'s numbers, (G, N, 32): made alike, they share the layout of what both multiply."""
    if ASSEMBLY and dtype != tl.float32:
        both = tl.inline_asm_elementwise(
            _ONE_AS_BFLOAT16 if dtype == tl.bfloat16 else _ONE_AS_FLOAT16,
            "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
        low = both.to(tl.int16).to(dtype, bitcast=True)
        pair = tl.join(low, low)
        both = tl.permute(tl.join(pair, pair), (0, 1, 4, 2, 3))
        return tl.reshape(both, (words.shape[0], words.shape[1], 32))
    else:
        return tl.full((words.shape[0], words.shape[1], 32), 1.0, tl.float32).to(dtype)


@triton.jit
def _half(pair, INDEX: tl.constexpr):
    """The first or second float16 of int32 pairs, as float32."""
    return (pair >> (16 * INDEX)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _four_bit_sums(
    acc, x_ptr, weight_ptr, scale_ptr, minimum_ptr, first, row, outputs, inputs, blocks, x_rows, x_mask,
    BLOCKS: tl.constexpr, EVEN_K: tl.constexpr, ASSEMBLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + W x^T over BLOCKS blocks of 64 inputs from block ``first`` (G or 1, 1, 1) on, of rows (G or 1, N, 1)."""
    eight, column = tl.arange(0, 8)[None, None, :], tl.arange(0, 32)[None, None, :]
    for i in tl.static_range(BLOCKS):
        block = first + i
        inside = block if EVEN_K else tl.minimum(block, blocks - 1)  # beyond it, x is 0
        words = tl.load(weight_ptr + (row + inside * outputs) * 8 + eight)
        pair = (row + inside // 4 * outputs) * 4 + inside % 4
        scales = tl.load(scale_ptr + pair)
        if minimum_ptr is not None:
            minimums = tl.load(minimum_ptr + pair)
        for group in tl.static_range(2):
            k = block * 64 + group * 32 + column
            mask = x_mask if EVEN_K else x_mask & (k < inputs)
            x = tl.load(x_ptr + x_rows + k, mask=mask, other=0.0)
            x = tl.permute(tl.broadcast_to(x, (acc.shape[0], acc.shape[2], 32)), (0, 2, 1))
            scale = _half(scales, group)
            acc += tl.dot(_group(words, group, x.dtype, ASSEMBLY), x, input_precision=PRECISION) * scale
            if minimum_ptr is not None:
                # The sum of a row's inputs is a product too, which costs less than a multiplication a weight.
                ones = _ones(words, x.dtype, ASSEMBLY)
                acc += tl.dot(ones, x, input_precision=PRECISION) * (_half(minimums, group) + 8 * scale)
    return acc


@triton.jit
def _sums(
    acc, x, weight_ptr, column, row, inputs, pitch,
    FLOAT8: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + W x^T over the inputs ``column`` of a weight in eight or more bits, with rows ``pitch`` apart."""
    at = row * pitch + column
    if EVEN_K:
        weight = tl.load(weight_ptr + at)
    else:
        weight = tl.load(weight_ptr + at, mask=column < inputs, other=0)
    if FLOAT8:
        weight = weight.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return tl.dot(weight.to(x.dtype), tl.permute(x, (0, 2, 1)), acc, input_precision=PRECISION)


@triton.jit
def _ask_for(
    weight_ptr, n, k, outputs, pitch, FOUR_BITS: tl.constexpr, OUTPUTS: tl.constexpr, AHEAD: tl.constexpr
):  # fmt: skip
    """Has the first AHEAD inputs from k on of OUTPUTS outputs from n on brought to the L2 cache.

    What the last program asks for ends where the weight does.
    """
    if FOUR_BITS:
        row = tl.minimum(n + tl.arange(0, OUTPUTS // 2) * 2, outputs - 2)  # of 32 bytes
        block = tl.minimum(k // 64 + tl.arange(0, AHEAD // 64), pitch - 1)
        at = (row.to(tl.int64)[None, :] + block[:, None] * outputs) * 8
    else:
        NUMBERS: tl.constexpr = PIECE * 8 // weight_ptr.dtype.element_ty.primitive_bitwidth
        column = tl.minimum(k + tl.arange(0, AHEAD // NUMBERS) * NUMBERS, pitch - NUMBERS)
        row = tl.minimum(n + tl.arange(0, OUTPUTS), outputs - 1)
        at = row.to(tl.int64)[:, None] * pitch + column[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [(weight_ptr + at).to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _affine(acc, scale_ptr, bias_ptr, n, inside, ROW_SCALES: tl.constexpr):
    if ROW_SCALES:
        acc *= tl.load(scale_ptr + n, mask=inside, other=0.0)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    return acc


@triton.jit(do_not_specialize=["rows", "splits"])  # one kernel for all of a configuration's rows
def _linear(
    x_ptr, weight_ptr, scale_ptr, minimum_ptr, bias_ptr, residual_ptr, out_ptr, partials_ptr, counters_ptr,
    rows, splits, outputs, width, inputs, pitch,
    FOUR_BITS: tl.constexpr, FLOAT8: tl.constexpr, ROW_SCALES: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, SHARED: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, WARPS: tl.constexpr, DEEP: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    ASSEMBLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """width: of the result, outputs or half of them. pitch: of the weight's rows; in four bits, the blocks of one."""
    STEP: tl.constexpr = WARPS * BLOCK_K if DEEP else BLOCK_K
    OUTPUTS: tl.constexpr = BLOCK_N if DEEP else WARPS * BLOCK_N
    tiles = tl.cdiv(inputs, STEP)
    split = tl.program_id(2)
    start = tiles * split // splits
    if AHEAD:
        gdc_launch_dependents()
        n = tl.program_id(1) * OUTPUTS
        _ask_for(weight_ptr, n, start * STEP, outputs, pitch, FOUR_BITS, OUTPUTS, AHEAD)
        if GATED:
            _ask_for(weight_ptr, n + width, start * STEP, outputs, pitch, FOUR_BITS, OUTPUTS, AHEAD)
        gdc_wait()
    warp = tl.arange(0, WARPS)[:, None, None]
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, BLOCK_N)[None, :, None]
    if not DEEP:
        n += warp * BLOCK_N
    row = tl.minimum(n, width - 1).to(tl.int64)  # those beyond the last are read as it, and not written
    x_mask = (m < rows)[None, :, None]
    x_rows = m.to(tl.int64)[None, :, None] * inputs
    acc = tl.zeros([WARPS, BLOCK_N, BLOCK_M], tl.float32)
    factor = tl.zeros([WARPS, BLOCK_N, BLOCK_M], tl.float32)
    for tile in tl.range(start, tiles * (split + 1) // splits, num_stages=STAGES):
        k = tile * STEP + warp * BLOCK_K if DEEP else tile * STEP + tl.zeros([1, 1, 1], tl.int32)
        if FOUR_BITS:
            acc = _four_bit_sums(
                acc, x_ptr, weight_ptr, scale_ptr, minimum_ptr, k // 64, row, outputs, inputs, pitch, x_rows, x_mask,
                BLOCK_K // 64, EVEN_K, ASSEMBLY, PRECISION,
            )  # fmt: skip
            if GATED:
                factor = _four_bit_sums(
                    factor, x_ptr, weight_ptr, scale_ptr, minimum_ptr, k // 64, row + width, outputs, inputs, pitch,
                    x_rows, x_mask, BLOCK_K // 64, EVEN_K, ASSEMBLY, PRECISION,
                )  # fmt: skip
        else:
            column = k + tl.arange(0, BLOCK_K)[None, None, :]
            mask = x_mask if EVEN_K else x_mask & (column < inputs)
            x = tl.load(x_ptr + x_rows + column, mask=mask, other=0.0)
            x = tl.broadcast_to(x, (WARPS, BLOCK_M, BLOCK_K))
            acc = _sums(acc, x, weight_ptr, column, row, inputs, pitch, FLOAT8, EVEN_K, PRECISION)
            if GATED:
                factor = _sums(factor, x, weight_ptr, column, row + width, inputs, pitch, FLOAT8, EVEN_K, PRECISION)

    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    acc = tl.sum(acc, 0) if DEEP else tl.reshape(acc, (OUTPUTS, BLOCK_M))
    if GATED:
        factor = tl.sum(factor, 0) if DEEP else tl.reshape(factor, (OUTPUTS, BLOCK_M))
    inside = n < width
    mask = inside[:, None] & (m < rows)[None, :]
    at = m.to(tl.int64)[None, :] * width + n[:, None]
    if SHARED:
        size = tl.cast(rows, tl.int64) * width
        SUMS: tl.constexpr = 2 if GATED else 1
        mine = partials_ptr + split * SUMS * size + at
        tl.store(mine, acc, mask=mask)
        if GATED:
            tl.store(mine + size, factor, mask=mask)
        tl.debug_barrier()  # what all threads stored comes before the count that one of them adds to
        counter = counters_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        if tl.atomic_add(counter, 1, sem="acq_rel") < splits - 1:
            return
        tl.store(counter, 0)  # for the next launch
        acc = tl.zeros([OUTPUTS, BLOCK_M], tl.float32)
        if GATED:
            factor = tl.zeros([OUTPUTS, BLOCK_M], tl.float32)
        for i in tl.range(splits, loop_unroll_factor=4 if DEEP else 1):  # loads on their way at once
            theirs = partials_ptr + i * SUMS * size + at
            acc += tl.load(theirs, mask=mask, other=0.0, cache_modifier=".cg")
            if GATED:
                factor += tl.load(theirs + size, mask=mask, other=0.0, cache_modifier=".cg")

    out = _affine(acc, scale_ptr, bias_ptr, n, inside, ROW_SCALES)
    if ACTIVATION != "none":
        out, _ = _activate(out, ACTIVATION)
    if GATED:
        out *= _affine(factor, scale_ptr, bias_ptr, n + width, inside, ROW_SCALES)
    if residual_ptr is not None:
        out += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize(
    weight_ptr, scale_ptr, minimum_ptr, out_ptr, start, rows, outputs, inputs, pitch,
    FOUR_BITS: tl.constexpr, FLOAT8: tl.constexpr, ROW_SCALES: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rows of the weight from ``start`` on, as the floats they stand for: a tile of TILE inputs."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.program_id(1)
    row = start + tl.minimum(n, rows - 1).to(tl.int64)
    to = n.to(tl.int64)[:, None] * inputs
    real = (n < rows)[:, None]
    if FOUR_BITS:
        for block in tl.static_range(4):
            place = (row + (tile * 4 + block) * outputs)[None, :, None] * 8
            words = tl.load(weight_ptr + place + tl.arange(0, 8)[None, None, :])
            pair = (row + tile * outputs)[:, None] * 4 + block
            scales = tl.load(scale_ptr + pair)
            for group in tl.static_range(2):
                column = (tile * 256 + block * 64 + group * 32 + tl.arange(0, 32))[None, :]
                scale = _half(scales, group)
                values = tl.reshape(_group(words, group, tl.float32, False), (BLOCK_N, 32))
                if minimum_ptr is not None:
                    weight = (values + 8) * scale + _half(tl.load(minimum_ptr + pair), group)
                else:
                    weight = values * scale
                tl.store(out_ptr + to + column, weight.to(out_ptr.dtype.element_ty), mask=real & (column < inputs))
    else:
        column = (tile * TILE + tl.arange(0, TILE))[None, :]
        mask = real & (column < inputs)
        weight = tl.load(weight_ptr + row[:, None] * pitch + column, mask=mask, other=0)
        if FLOAT8:
            weight = weight.to(tl.float8e4nv, bitcast=True)
        weight = weight.to(tl.float32)
        if ROW_SCALES:
            weight *= tl.load(scale_ptr + row)[:, None]
        tl.store(out_ptr + to + column, weight.to(out_ptr.dtype.element_ty), mask=mask)


def _bits(weight: DeviceWeight) -> Tensor:
    """The values; floats of eight bits as integers, which may be masked like any."""
    return weight.values.view(torch.int8) if weight.is_float8 else weight.values


def _scales(weight: DeviceWeight) -> tuple[Tensor | None, Tensor | None]:
    """Scales and minimums; those of groups as int32, two neighbours each."""
    if weight.bits != 4 or weight.scales is None:
        return weight.scales, None
    return weight.scales.view(torch.int32), None if weight.minimums is None else weight.minimums.view(torch.int32)


def _kind(weight: DeviceWeight) -> dict[str, bool]:
    return {"FOUR_BITS": weight.bits == 4, "FLOAT8": weight.is_float8, "ROW_SCALES": weight.bits == 8}


def ahead_of(weight: DeviceWeight, config: Config) -> int:
    """How many inputs a program asks for before the kernel before it has ended: 0 where that cannot be."""
    starts_early = architecture().startswith(("sm9", "sm10", "sm12"))
    has_pieces = weight.out_features >= 2 and weight.in_features * weight.bits >= 8 * PIECE.value
    return config.ahead if starts_early and has_pieces else 0


def linear(
    x: Tensor, weight: DeviceWeight, bias: Tensor | None, activation: str, gated: bool, residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """(rows, width) for contiguous x (rows, inputs) of at most 64 rows; see ``kernels.weight_only_linear``."""
    rows, width = len(x), weight.out_features // 2 if gated else weight.out_features
    out = torch.empty((rows, width), dtype=dtype, device=x.device)
    if not out.numel():
        return out
    config = choose(weight.kind, rows, gated, width)
    blocks_m, blocks_n = triton.cdiv(rows, config.block_m), triton.cdiv(width, config.outputs)
    # Sums that are written and read again may be half as many bytes as the weight.
    most = max(1, weight.in_features * weight.bits // (8 * 16 * rows))
    tiles = triton.cdiv(weight.in_features, config.inputs)
    splits = splits_of(blocks_m * blocks_n, tiles, most, multiprocessors(), config.warps, config.resident)
    sums = (2 if gated else 1) * splits * rows * width
    partials = torch.empty(sums, dtype=torch.float32, device=x.device) if splits > 1 else None
    counters = weight.counters if splits > 1 else None
    scales, minimums = _scales(weight)
    ahead = ahead_of(weight, config)
    options: dict[str, Any] = {"launch_pdl": True} if ahead else {}
    _linear[(blocks_m, blocks_n, splits)](
        x, _bits(weight), scales, minimums, bias, residual, out, partials, counters,
        rows, splits, weight.out_features, width, weight.in_features, weight.pitch,
        **_kind(weight), ACTIVATION=activation, GATED=gated,
        SHARED=splits > 1, EVEN_K=weight.in_features % config.inputs == 0,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, WARPS=config.warps, DEEP=config.deep,
        STAGES=config.stages, AHEAD=ahead, ASSEMBLY=not INTERPRETED,
        PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32", num_warps=config.warps, **options,
    )  # fmt: skip
    return out


def dequantize(weight: DeviceWeight, rows: slice, dtype: torch.dtype) -> Tensor:
    """Rows of the weight as floats (rows, inputs)."""
    count = rows.stop - rows.start
    out = torch.empty((count, weight.in_features), dtype=dtype, device=weight.values.device)
    if out.numel():
        _dequantize[(triton.cdiv(count, 16), triton.cdiv(weight.in_features, TILE))](
            _bits(weight), *_scales(weight), out, rows.start, count,
            weight.out_features, weight.in_features, weight.values.shape[-1],
            **_kind(weight), BLOCK_N=16, TILE=TILE, num_warps=4,
        )  # fmt: skip
    return out
