"""Linear layers of few rows, whose time is that of reading the weight once: integers and floats of eight bits, integers
of four, or halves.

A program takes a block of outputs and all rows, walks over its share of the inputs, makes numbers of the weight's bits
in registers, and multiplies on tensor cores. Where blocks of outputs are too few to fill the GPU, several programs
share one: each leaves its sums, and the last to arrive adds them up, in an order of their own, so that the bits do not
depend on who is last. Sums are float32.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.activation import _activate
from kernels.gpu.target import INTERPRETED, architecture, multiprocessors

if TYPE_CHECKING:
    from kernels.weight_only_linear import DeviceWeight

TILE = 256  # four-bit inputs whose scales lie together: rows are padded to a multiple
RESIDENT = 4  # programs that a multiprocessor holds at once, whatever the configuration


class Config(NamedTuple):
    """Rows, outputs and inputs of a program's tile; warps; and buffers of the pipeline, of which one is worked on.

    Two warps, as four would have Triton take wgmma, for which the weight's numbers go through shared memory.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# By bits of a weight, then by the most rows: each multiprocessor has some 64 KB of the weight on its way.
CONFIGS: dict[int, dict[int, Config]] = {
    4: {8: Config(8, 64, TILE, 2, 4), 16: Config(16, 64, TILE, 2, 3), 64: Config(32, 64, TILE, 2, 3)},
    8: {8: Config(8, 64, 128, 2, 4), 16: Config(16, 64, 128, 2, 4), 64: Config(32, 64, 128, 2, 3)},
    16: {8: Config(8, 64, 128, 2, 3), 16: Config(16, 64, 128, 2, 3), 64: Config(32, 64, 64, 2, 4)},
    32: {64: Config(16, 32, 64, 2, 2)},  # float32 rows, whatever the weight
}
# What another architecture takes instead, by (architecture, bits, most rows).
OTHERS: dict[tuple[str, int, int], Config] = {
    ("sm80", 4, 16): Config(16, 32, TILE, 2, 4),  # the wider tile spills
}


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
    """The nibbles at SHIFT and SHIFT + 16 of int32 words (N, 8), less 8, as numbers (N, 8, 2)."""
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
    """The first or second 32 inputs of int32 words (N, 8), less 8, as (N, 32): see ``pack_nibbles``."""
    first = _pairs(words, 8 * GROUP, dtype, ASSEMBLY)
    second = _pairs(words, 8 * GROUP + 4, dtype, ASSEMBLY)
    both = tl.permute(tl.join(first, second), (0, 3, 1, 2))
    return tl.reshape(both, (words.shape[0], 32))


_ONE_AS_BFLOAT16 = tl.constexpr("mov.b32 $0, 0x3F803F80; // $1")
_ONE_AS_FLOAT16 = tl.constexpr("mov.b32 $0, 0x3C003C00; // $1")


@triton.jit
def _ones(words, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Ones for ``_group``'s numbers, (N, 32): made alike, they share the layout of what both multiply."""
    if ASSEMBLY and dtype != tl.float32:
        both = tl.inline_asm_elementwise(
            _ONE_AS_BFLOAT16 if dtype == tl.bfloat16 else _ONE_AS_FLOAT16,
            "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
        low = both.to(tl.int16).to(dtype, bitcast=True)
        pair = tl.join(low, low)
        return tl.reshape(tl.permute(tl.join(pair, pair), (0, 3, 1, 2)), (words.shape[0], 32))
    else:
        return tl.full((words.shape[0], 32), 1.0, tl.float32).to(dtype)


@triton.jit
def _one_of_eight(values, INDEX: tl.constexpr):
    """Column INDEX of (N, 8)."""
    even, odd = tl.split(tl.reshape(values, (values.shape[0], 4, 2)))
    half = odd if INDEX % 2 else even
    even, odd = tl.split(tl.reshape(half, (values.shape[0], 2, 2)))
    half = odd if INDEX // 2 % 2 else even
    even, odd = tl.split(half)
    return odd if INDEX // 4 else even


@triton.jit
def _four_bit_sums(
    acc, x_ptr, weight_ptr, scale_ptr, minimum_ptr, tile, row, outputs, inputs, x_rows, x_mask,
    EVEN_K: tl.constexpr, ASSEMBLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + W x^T over the 256 inputs of a tile."""
    eight = tl.arange(0, 8)[None, :]
    place = row.to(tl.int64) + tile * outputs
    scales = tl.load(scale_ptr + place[:, None] * 8 + eight)
    if minimum_ptr is not None:
        minimums = tl.load(minimum_ptr + place[:, None] * 8 + eight)
    for block in tl.static_range(4):
        place = row.to(tl.int64) + (tile * 4 + block) * outputs
        words = tl.load(weight_ptr + place[:, None] * 8 + eight)
        for group in tl.static_range(2):
            column = tile * 256 + block * 64 + group * 32 + tl.arange(0, 32)
            mask = x_mask if EVEN_K else x_mask & (column < inputs)[None, :]
            x = tl.load(x_ptr + x_rows + column[None, :], mask=mask, other=0.0)
            scale = _one_of_eight(scales, 2 * block + group).to(tl.float32)[:, None]
            values = _group(words, group, x.dtype, ASSEMBLY)
            acc += tl.dot(values, tl.trans(x), input_precision=PRECISION) * scale
            if minimum_ptr is not None:
                # The sum of a row's inputs is a product too, which costs less than a multiplication a weight.
                minimum = _one_of_eight(minimums, 2 * block + group).to(tl.float32)[:, None] + 8 * scale
                ones = _ones(words, x.dtype, ASSEMBLY)
                acc += tl.dot(ones, tl.trans(x), input_precision=PRECISION) * minimum
    return acc


@triton.jit
def _sums(
    acc, x, weight_ptr, column, row, inputs, pitch,
    FLOAT8: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + W x^T over the inputs ``column`` of a weight in eight or more bits, with rows ``pitch`` apart."""
    at = row.to(tl.int64)[:, None] * pitch + column[None, :]
    if EVEN_K:
        weight = tl.load(weight_ptr + at)
    else:
        weight = tl.load(weight_ptr + at, mask=(column < inputs)[None, :], other=0)
    if FLOAT8:
        weight = weight.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return tl.dot(weight.to(x.dtype), tl.trans(x), acc, input_precision=PRECISION)


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
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, ASSEMBLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """width: of the result, outputs or half of them. pitch: of the weight's rows, but in four bits."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    row = tl.minimum(n, width - 1)  # those beyond the last are read as it, and not written
    x_mask = (m < rows)[:, None]
    x_rows = m.to(tl.int64)[:, None] * inputs
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    factor = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    tiles = tl.cdiv(inputs, BLOCK_K)
    for tile in tl.range(tiles * split // splits, tiles * (split + 1) // splits, num_stages=STAGES):
        if FOUR_BITS:
            acc = _four_bit_sums(
                acc, x_ptr, weight_ptr, scale_ptr, minimum_ptr, tile, row, outputs, inputs, x_rows, x_mask,
                EVEN_K, ASSEMBLY, PRECISION,
            )  # fmt: skip
            if GATED:
                factor = _four_bit_sums(
                    factor, x_ptr, weight_ptr, scale_ptr, minimum_ptr, tile, row + width, outputs, inputs, x_rows,
                    x_mask, EVEN_K, ASSEMBLY, PRECISION,
                )  # fmt: skip
        else:
            column = tile * BLOCK_K + tl.arange(0, BLOCK_K)
            mask = x_mask if EVEN_K else x_mask & (column < inputs)[None, :]
            x = tl.load(x_ptr + x_rows + column[None, :], mask=mask, other=0.0)
            acc = _sums(acc, x, weight_ptr, column, row, inputs, pitch, FLOAT8, EVEN_K, PRECISION)
            if GATED:
                factor = _sums(factor, x, weight_ptr, column, row + width, inputs, pitch, FLOAT8, EVEN_K, PRECISION)

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
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        factor = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for i in range(splits):
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
        eight = tl.arange(0, 8)[None, :]
        place = (row + tile * outputs)[:, None] * 8 + eight
        scales = tl.load(scale_ptr + place)
        if minimum_ptr is not None:
            minimums = tl.load(minimum_ptr + place)
        for block in tl.static_range(4):
            words = tl.load(weight_ptr + (row + (tile * 4 + block) * outputs)[:, None] * 8 + eight)
            for group in tl.static_range(2):
                column = (tile * 256 + block * 64 + group * 32 + tl.arange(0, 32))[None, :]
                scale = _one_of_eight(scales, 2 * block + group).to(tl.float32)[:, None]
                values = _group(words, group, tl.float32, False)
                if minimum_ptr is not None:
                    minimum = _one_of_eight(minimums, 2 * block + group).to(tl.float32)[:, None]
                    weight = (values + 8) * scale + minimum
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


def config_of(weight: DeviceWeight, rows: int, gated: bool) -> Config:
    """Two sums a result, of gates and factors or of values and minimums, take half a tile's outputs."""
    width = 32 if weight.dtype == torch.float32 else weight.bits
    most = min(most for most in CONFIGS[width] if rows <= most)
    config = OTHERS.get((architecture(), width, most), CONFIGS[width][most])
    halvings = gated + (weight.minimums is not None and config.block_m > 8)
    block_k = TILE if weight.bits == 4 else config.block_k
    return config._replace(block_n=max(16, config.block_n >> halvings), block_k=block_k)


@functools.cache
def splits_of(blocks: int, tiles: int, most: int, programs: int) -> int:
    """How many programs share a block of outputs, so that ``programs`` multiprocessors have equally much to read.

    blocks: of outputs and rows. tiles: of inputs. Each takes two tiles or more, and all of them run at once. What
    counts is how full the busiest multiprocessor's time is with reading, and that it has several programs to wait on.
    """

    def score(splits: int) -> float:
        load = blocks * splits / programs
        return min(1, load / 3) * load / -(-blocks * splits // programs) * tiles / splits / -(-tiles // splits)

    allowed = [n for n in range(1, min(most, tiles // 2) + 1) if blocks * n <= RESIDENT * programs]
    return max(allowed or [1], key=lambda splits: (round(score(splits), 6), -splits))


def _bits(weight: DeviceWeight) -> Tensor:
    """The values; floats of eight bits as integers, which may be masked like any."""
    return weight.values.view(torch.int8) if weight.is_float8 else weight.values


def _kind(weight: DeviceWeight) -> dict[str, bool]:
    return {"FOUR_BITS": weight.bits == 4, "FLOAT8": weight.is_float8, "ROW_SCALES": weight.bits == 8}


def linear(
    x: Tensor, weight: DeviceWeight, bias: Tensor | None, activation: str, gated: bool, residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """(rows, width) for contiguous x (rows, inputs) of at most 64 rows; see ``kernels.weight_only_linear``."""
    rows, width = len(x), weight.out_features // 2 if gated else weight.out_features
    out = torch.empty((rows, width), dtype=dtype, device=x.device)
    if not out.numel():
        return out
    config = config_of(weight, rows, gated)
    blocks_m, blocks_n = triton.cdiv(rows, config.block_m), triton.cdiv(width, config.block_n)
    # Sums that are written and read again may be half as many bytes as the weight.
    most = max(1, weight.in_features * weight.bits // (8 * 16 * rows))
    tiles = triton.cdiv(weight.in_features, config.block_k)
    splits = splits_of(blocks_m * blocks_n, tiles, most, multiprocessors())
    sums = (2 if gated else 1) * splits * rows * width
    partials = torch.empty(sums, dtype=torch.float32, device=x.device) if splits > 1 else None
    counters = weight.counters if splits > 1 else None
    _linear[(blocks_m, blocks_n, splits)](
        x, _bits(weight), weight.scales, weight.minimums, bias, residual, out, partials, counters,
        rows, splits, weight.out_features, width, weight.in_features, weight.values.shape[-1],
        **_kind(weight), ACTIVATION=activation, GATED=gated,
        SHARED=splits > 1, EVEN_K=weight.in_features % config.block_k == 0,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, STAGES=config.stages,
        ASSEMBLY=not INTERPRETED,
        PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32", num_warps=config.warps,
    )  # fmt: skip
    return out


def dequantize(weight: DeviceWeight, rows: slice, dtype: torch.dtype) -> Tensor:
    """Rows of the weight as floats (rows, inputs)."""
    count = rows.stop - rows.start
    out = torch.empty((count, weight.in_features), dtype=dtype, device=weight.values.device)
    if out.numel():
        _dequantize[(triton.cdiv(count, 16), triton.cdiv(weight.in_features, TILE))](
            _bits(weight), weight.scales, weight.minimums, out, rows.start, count,
            weight.out_features, weight.in_features, weight.values.shape[-1],
            **_kind(weight), BLOCK_N=16, TILE=TILE, num_warps=4,
        )  # fmt: skip
    return out
