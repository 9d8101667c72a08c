"""What the attention kernels share: where a sequence lies, which keys a tile may see, and what becomes of a score.

Scores are kept in base 2: 2^(s * log2 e) is one instruction where e^s is two. Positions are counted in keys: query i
of a sequence stands at p = i + seqlen_k - seqlen_q, and a distance is j - p, as in ``kernels.attention_options``.

Arguments travel in named tuples; a None in one is known when the kernel is compiled, so that what a call does not use
costs it nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
VARYING = ("seqlen_q", "seqlen_k", "blocks")  # arguments whose values get no kernel of their own
DROPOUT_ROUNDS: tl.constexpr = tl.constexpr(7)  # the fewest that pass every test of randomness (Salmon et al. 2011)


class Rows(NamedTuple):
    """A tensor of heads, (batch, seqlen, heads, head_dim) or packed, and its strides; packed ones have batch 0."""

    data: Any
    batch: int
    seq: int
    head: int


class Lengths(NamedTuple):
    """All int32: where packed sequences begin, or how many padded keys are real."""

    cu_seqlens_q: Any
    cu_seqlens_k: Any
    key_lengths: Any


class Scores(NamedTuple):
    """What makes a score of a product; None is absent. The table is RelativeBias's: (heads, 2 * reach + 1)."""

    scale: float
    softcap: float | None
    window: int | None
    slopes: Any
    table: Any
    reach: int | None


class DenseBias(NamedTuple):
    """A tensor added to the scores, or its gradient, and the strides: 0 where it is broadcast."""

    data: Any
    batch: int | None
    head: int | None
    row: int | None
    key: int | None


class Dropout(NamedTuple):
    """``seed`` int64 (1,); a weight is dropped where 24 random bits are below ``threshold``; ``keep`` = 1 / (1 - p)."""

    seed: Any
    threshold: int | None
    keep: float | None


@triton.jit
def locate(lengths, batch, seqlen_q, seqlen_k):
    """Where sequence ``batch`` starts in packed queries and keys, its two lengths, and how many keys are real."""
    if lengths.cu_seqlens_q is not None:
        start_q = tl.load(lengths.cu_seqlens_q + batch)
        start_k = tl.load(lengths.cu_seqlens_k + batch)
        length_q = tl.load(lengths.cu_seqlens_q + batch + 1) - start_q
        length_k = tl.load(lengths.cu_seqlens_k + batch + 1) - start_k
        return start_q, start_k, length_q, length_k, length_k
    length_q, length_k = tl.cast(seqlen_q, tl.int32), tl.cast(seqlen_k, tl.int32)
    if lengths.key_lengths is not None:
        real_k = tl.minimum(tl.load(lengths.key_lengths + batch).to(tl.int32), length_k)
        return 0, 0, length_q, length_k, tl.maximum(real_k, 0)
    return 0, 0, length_q, length_k, length_k


@triton.jit
def rows_of(x, batch, start, head):
    """The first row of one head of one sequence; 64-bit, since a tensor may hold more than 2^31 numbers."""
    batch_stride = tl.cast(x.batch, tl.int64)
    return x.data + batch * batch_stride + start * tl.cast(x.seq, tl.int64) + head * tl.cast(x.head, tl.int64)


@triton.jit
def per_query(lengths, batch, heads, head, start, stride):
    """Where a head's numbers begin in (batch, heads, seqlen_q), or (heads, tokens_q); stride is the last dimension."""
    row = head if lengths.cu_seqlens_q is not None else batch * heads + head
    return row * tl.cast(stride, tl.int64) + start


@triton.jit
def tile_pointers(x, stride, first, row, dim):
    return x + first * tl.cast(stride, tl.int64) + (row * stride + dim)


@triton.jit
def load_tile(
    x,
    stride,
    first,
    count,
    BLOCK: tl.constexpr,
    BEGIN: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows ``first`` on of x, dims BEGIN on: (BLOCK, WIDTH). Zeros past HEAD_DIM, and if MASKED past ``count`` rows."""
    row, dim = tl.arange(0, BLOCK)[:, None], BEGIN + tl.arange(0, WIDTH)[None, :]
    pointers = tile_pointers(x, stride, first, row, dim)
    if MASKED and BEGIN + WIDTH > HEAD_DIM:
        return tl.load(pointers, mask=(row < count - first) & (dim < HEAD_DIM), other=0.0)
    if MASKED:
        return tl.load(pointers, mask=row < count - first, other=0.0)
    if BEGIN + WIDTH > HEAD_DIM:
        return tl.load(pointers, mask=dim < HEAD_DIM, other=0.0)
    return tl.load(pointers)


@triton.jit
def next_tile(
    descriptor, source, x, stride, first, count, BLOCK: tl.constexpr, BEGIN: tl.constexpr, WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """``load_tile``, by the copy engine where there is a descriptor of (batch, seqlen, heads, head_dim).

    Its own ends give zeros. Unless EXACT, rows from ``count`` on are another sequence's: they are cleared, for a NaN
    there must stay there.
    """
    if descriptor is not None:
        batch, start, head = source
        tile = descriptor.load([batch, start + first, head, BEGIN]).reshape(BLOCK, WIDTH)
        if MASKED and not EXACT:
            tile = tl.where(tl.arange(0, BLOCK)[:, None] < count - first, tile, 0.0)
    else:
        tile = load_tile(x, stride, first, count, BLOCK, BEGIN, WIDTH, HEAD_DIM, MASKED)
    return tile


@triton.jit
def store_tile(
    x,
    stride,
    first,
    count,
    value,
    BLOCK: tl.constexpr,
    BEGIN: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Writes a tile's rows before ``count`` and dims before HEAD_DIM, in x's dtype."""
    row, dim = tl.arange(0, BLOCK)[:, None], BEGIN + tl.arange(0, WIDTH)[None, :]
    pointers = tile_pointers(x, stride, first, row, dim)
    tl.store(pointers, value.to(x.dtype.element_ty), mask=(row < count - first) & (dim < HEAD_DIM))


@triton.jit
def add_tile(
    x,
    stride,
    first,
    count,
    value,
    BLOCK: tl.constexpr,
    BEGIN: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Adds to what is there; programs take turns in any order."""
    row, dim = tl.arange(0, BLOCK)[:, None], BEGIN + tl.arange(0, WIDTH)[None, :]
    pointers = tile_pointers(x, stride, first, row, dim)
    tl.atomic_add(pointers, value, mask=(row < count - first) & (dim < HEAD_DIM), sem="relaxed")


@triton.jit
def round_down(x, MULTIPLE: tl.constexpr):
    return tl.maximum(x, 0) // MULTIPLE * MULTIPLE


@triton.jit
def round_up(x, MULTIPLE: tl.constexpr):
    return (tl.maximum(x, 0) + MULTIPLE - 1) // MULTIPLE * MULTIPLE


@triton.jit
def key_ranges(first, length_k, scores, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """Cuts the keys that queries at positions ``first`` to ``first + BLOCK_M - 1`` see into runs of tiles.

    Returns bounds b0 <= b1 <= b2 <= b3 <= b4 and b5. Every pair of [b1, b4) is visible; tiles of [b0, b1) and [b4, b5)
    need a mask. With a table, all distances in [b1, b2) are at most -reach, and in [b3, b4) at least reach. Each run
    begins on a tile's border; the last one ends at a key, or is empty where b5 < b4. With a table and a window,
    [b1, b4) is empty: windows are narrow.
    """
    last = first + BLOCK_M - 1
    begin, end, whole_end = tl.cast(0, tl.int32), length_k, length_k
    whole_begin = tl.cast(0, tl.int32)
    if CAUSAL:
        end = tl.minimum(end, last + 1)
        whole_end = tl.minimum(whole_end, first + 1)
    if scores.window is not None:
        begin = round_down(first - scores.window + 1, BLOCK_N)
        whole_begin = round_up(last - scores.window + 1, BLOCK_N)
        if not CAUSAL:
            end = tl.minimum(end, last + scores.window)
            whole_end = tl.minimum(whole_end, first + scores.window)
    end = tl.maximum(end, begin)
    whole_end = round_down(whole_end, BLOCK_N)
    b1 = tl.minimum(tl.maximum(whole_begin, begin), round_up(end, BLOCK_N))
    b2, b3 = tl.maximum(whole_end, b1), tl.maximum(whole_end, b1)
    if scores.table is not None:
        if scores.window is not None:
            b2, b3, whole_end = b1, b1, b1
        else:
            b2 = tl.minimum(tl.maximum(round_down(first - scores.reach + 1, BLOCK_N), b1), b2)
            b3 = tl.minimum(tl.maximum(round_up(last + scores.reach, BLOCK_N), b2), b3)
    b4 = tl.maximum(whole_end, b3)
    return begin, b1, b2, b3, b4, end


@triton.jit
def query_ranges(
    first, offset, length_q, length_k, scores, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr
):
    """The same for the queries that see some of the keys ``first`` to ``first + BLOCK_N - 1``; offset is p - i.

    Returns b0 to b5 as ``key_ranges``, with distances of at least reach in [b1, b2) and at most -reach in
    [b3, b4). Where the tile of keys runs past their end every pair is masked.
    """
    last = first + BLOCK_N - 1
    begin, end, whole_end = tl.cast(0, tl.int32), length_q, length_q
    whole_begin = tl.cast(0, tl.int32)
    if CAUSAL:
        begin = round_down(first - offset, BLOCK_M)
        whole_begin = round_up(last - offset, BLOCK_M)
    if scores.window is not None:
        end = tl.minimum(end, last + scores.window - offset)
        whole_end = tl.minimum(whole_end, first + scores.window - offset)
        if not CAUSAL:
            begin = round_down(first - scores.window + 1 - offset, BLOCK_M)
            whole_begin = round_up(last - scores.window + 1 - offset, BLOCK_M)
    end = tl.maximum(end, begin)
    whole_end = round_down(whole_end, BLOCK_M)
    if last >= length_k:
        whole_end = tl.cast(0, tl.int32)
    b1 = tl.minimum(tl.maximum(whole_begin, begin), round_up(end, BLOCK_M))
    b3, b4 = b1, tl.maximum(whole_end, b1)
    b2 = b1
    if scores.table is not None:
        if scores.window is not None:
            b4 = b1
        else:
            if not CAUSAL:
                b2 = tl.minimum(tl.maximum(round_down(first - scores.reach - offset + 1, BLOCK_M), b1), b4)
            b3 = tl.minimum(tl.maximum(round_up(last + scores.reach - offset, BLOCK_M), b2), b4)
            b4 = tl.maximum(b4, b3)
    return begin, b1, b2, b3, b4, end


@triton.jit
def key_runs(b0, b1, b2, b3, b4, b5, WINDOWED: tl.constexpr):
    """``key_ranges`` as two loops, of whole tiles and of others: each (start, turn, stop, jump).

    A loop runs from ``start`` to ``stop``, and from ``turn`` on it is ``jump`` ahead of its counter.
    """
    whole = (b1, b2, b4 - (b3 - b2), b3 - b2)
    if WINDOWED:
        partial = (b0, b1, b5 - (b4 - b1), b4 - b1)
    else:
        partial = (b2, b3, b5 - (b4 - b3), b4 - b3)
    return whole, partial


@triton.jit
def query_runs(b0, b1, b2, b3, b4, b5, BEHIND: tl.constexpr):
    """The same of ``query_ranges``. BEHIND: some of the first queries see only some keys, as under a causal mask."""
    whole = (b1, b2, b4 - (b3 - b2), b3 - b2)
    partial = (b0 if BEHIND else b2, b3, b5 - (b4 - b3), b4 - b3)
    return whole, partial


@triton.jit
def key_limits(position, length_k, window, CAUSAL: tl.constexpr):
    """The first and the last key that each query sees."""
    first, last = position * 0, length_k - 1 + position * 0
    if CAUSAL:
        last = tl.minimum(last, position)
    if window is not None:
        first = position - window + 1
        if not CAUSAL:
            last = tl.minimum(last, position + window - 1)
    return first, last


@triton.jit
def query_limits(key, offset, length_k, window, CAUSAL: tl.constexpr):
    """The first and the last query that sees each key; none of a key past the end."""
    beyond: tl.constexpr = 0x3FFFFFFF
    first, last = tl.where(key < length_k, -beyond, beyond), key * 0 + beyond
    if CAUSAL:
        first = tl.maximum(first, key - offset)
    if window is not None:
        last = key - offset + window - 1
        if not CAUSAL:
            first = tl.maximum(first, key - offset - window + 1)
    return first, last


@triton.jit
def within(column, first, last, LOWER: tl.constexpr, UPPER: tl.constexpr):
    """Which columns lie from each row's ``first`` to its ``last``, as far as asked: most masks have one side."""
    seen = column >= first[:, None] if LOWER else column <= last[:, None]
    if LOWER and UPPER:
        seen = seen & (column <= last[:, None])
    return seen


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """1 - 2 / (1 + e^2x) loses the last digits of a small x, which matter to float32 alone."""
    y = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))
    if PRECISE:
        square = x * x
        series = x * (1.0 + square * (-0.33333333333 + square * (0.13333333333 - square * 0.053968253968)))
        y = tl.where(square < 0.01, series, y)
    return y


@triton.jit
def shaped(qk, distance, bias, head, scores, dense, far, NEAR: tl.constexpr, PRECISE: tl.constexpr):
    """Base-2 scores of the products ``qk``, before the mask, and the soft-cap's tanh (or anything, without one).

    ``distance`` and the dense ``bias`` have qk's shape, whichever way round it lies. Outside the near band the table's
    value is ``far``, in base 2.
    """
    if scores.softcap is not None:
        capped = tanh(qk * (scores.scale / scores.softcap), PRECISE)
        s = capped * (scores.softcap * LOG2E)
    else:
        capped = qk
        s = qk * (scores.scale * LOG2E)
    if scores.table is not None:
        if NEAR:
            reach = tl.cast(scores.reach, tl.int32)
            place = tl.minimum(tl.maximum(distance + reach, 0), 2 * reach)
            s += tl.load(scores.table + head * (2 * reach + 1) + place) * LOG2E
        else:
            s += far
    if scores.slopes is not None:
        s -= tl.load(scores.slopes + head) * LOG2E * tl.abs(distance).to(tl.float32)
    if dense.data is not None:
        s += bias.to(tl.float32) * LOG2E
    return s, capped


@triton.jit
def far_values(scores, head):
    """The table's two ends, in base 2: for distances of at most -reach, and of at least reach."""
    if scores.table is not None:
        row = scores.table + head * (2 * tl.cast(scores.reach, tl.int32) + 1)
        return tl.load(row) * LOG2E, tl.load(row + 2 * tl.cast(scores.reach, tl.int32)) * LOG2E
    return 0.0, 0.0


@triton.jit
def bias_pointers(dense, batch, head, row, key):
    base = dense.data + batch * tl.cast(dense.batch, tl.int64) + head * tl.cast(dense.head, tl.int64)
    return base + row * tl.cast(dense.row, tl.int64) + key * tl.cast(dense.key, tl.int64)


@triton.jit
def load_bias(dense, batch, head, row, key, length_q, length_k):
    """The dense bias of queries ``row`` and keys ``key``, which broadcast together; zeros outside."""
    mask = (row < length_q) & (key < length_k)
    return tl.load(bias_pointers(dense, batch, head, row, key), mask=mask, other=0.0)


@triton.jit
def kept(dropout, sequence_head, row, key):
    """Which weights survive: Philox keyed by the call's seed, counted by (key, row, sequence and head)."""
    nothing = row * 0 + key * 0
    bits, _, _, _ = tl.philox(
        tl.load(dropout.seed), nothing + key, nothing + row, nothing + sequence_head, nothing, DROPOUT_ROUNDS
    )
    return (bits >> 8).to(tl.int32) >= dropout.threshold
