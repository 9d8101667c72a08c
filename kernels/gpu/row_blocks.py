"""Rows of scores in blocks: a pass that tells each block's largest, and a search among the blocks that matter.

Choices are made by order, so scores are compared as integers in the order of the floats: a search by halves then ends
whatever the values. A block whose largest lies below a bound is not read again. Of the blocks that do matter a program
holds the first tile in registers and reads the others in each pass: none where a filter leaves few tokens.

A cut (key, id) says which of a row are kept: those above the key, and of those at the key the ids up to the last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST_KEY = tl.constexpr(-2139095040)  # of the lowest finite float: what is -inf lies below
NO_KEY = tl.constexpr(-2147483648)
INFINITY_KEY = tl.constexpr(0x7F800000)
NAN_KEY = tl.constexpr(0x7FFFFFFF)
ANY_ID = tl.constexpr(0x7FFFFFFF)
VALUE_STEPS = tl.constexpr(24)
LEAST_LOG_WEIGHT = tl.constexpr(-87.0)  # weights below its exponential are 0

# What a search measures: how many, their weight, or their weight in order of how typical they are.
COUNT = tl.constexpr(0)
MASS = tl.constexpr(1)
TYPICAL = tl.constexpr(2)

FEW = 32  # when so few are in doubt, a search compares each with each


@triton.jit
def order_key(x):
    """int32 in the order of float32 x; both zeros have one key, NaN the largest."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, NAN_KEY, key)


@triton.jit
def value_of(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def weight_of(x, peak, scale):
    """exp((x - peak) * scale); 0 below exp(-87)."""
    z = (x - peak) * scale
    return tl.where((x > float("-inf")) & (z >= LEAST_LOG_WEIGHT), tl.exp(z), 0.0)


@triton.jit
def block_sums(x, tops, scale):
    """The sum of each block's weights, relative to its largest, ``tops`` (blocks,) as keys."""
    peak = value_of(tl.maximum(tops, LOWEST_KEY))
    return tl.sum(weight_of(x, peak[:, None], scale), axis=1)


@triton.jit
def _scan(
    x_ptr, keys_ptr, sums_ptr, edited_keys_ptr, weights_ptr, copy_ptr, scales_ptr, lengths_ptr, bad_ptr,
    stride, vocab, blocks, B: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    block = chunk * TILE + tl.arange(0, TILE)
    real = block < blocks
    column = block[:, None] * B + tl.arange(0, B)[None, :]
    x = tl.load(x_ptr + row * stride + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
    tops = tl.max(order_key(x), axis=1)
    at = row * blocks + block
    tl.store(keys_ptr + at, tops, mask=real)
    if sums_ptr is not None:
        tl.store(sums_ptr + at, block_sums(x, tops, 1.0), mask=real)
    if weights_ptr is not None:
        tl.store(weights_ptr + at, block_sums(x, tops, tl.load(scales_ptr + row)), mask=real)
    if copy_ptr is not None:
        tl.store(edited_keys_ptr + at, tops, mask=real)
        if tl.load(lengths_ptr + row) > 0:
            tl.store(copy_ptr + row * vocab + column, x, mask=column < vocab)
        if chunk == 0:
            tl.store(bad_ptr + row, 0)


def block_size(vocab: int) -> int:
    """Scores a block: few enough that the largest of a row lie in blocks of their own, and no more than 4,096 blocks
    up to a vocabulary of 262,144."""
    return 64 if vocab <= 1 << 18 else 256


def scan(
    x: Tensor, block: int, *, sums: bool = False, weights: tuple[Tensor, Tensor] | None = None,
    edited: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Each block's largest as keys, int32 (rows, blocks), and with ``sums`` its sum of exp(x - largest).

    Args:
        x: float32, bfloat16 or float16 (rows, vocab), contiguous along the vocabulary.
        weights: float32 (rows, blocks), which gets the sums of exp((x - largest) * scale), and the rows' scales.
        edited: what is to be edited afterwards. A float32 copy of x, written for rows whose history has a length; a
            second (rows, blocks) of keys; those lengths, int32 (rows,); a flag a row, set to 0.
    """
    rows, vocab = x.shape
    blocks = triton.cdiv(vocab, block)
    keys = torch.empty(rows, blocks, dtype=torch.int32, device=x.device)
    totals = torch.empty(rows, blocks, dtype=torch.float32, device=x.device) if sums else None
    copy, edited_keys, lengths, bad = (None,) * 4 if edited is None else edited
    into, scales = (None, None) if weights is None else weights
    # Of few rows many programs, that all multiprocessors read; of many rows 32 KB each.
    elements = 8192 if rows * vocab > 1 << 22 else 2048
    tile = min(elements // block, triton.next_power_of_2(blocks))
    _scan[(triton.cdiv(blocks, tile), rows)](
        x, keys, totals, edited_keys, into, copy, scales, lengths, bad, x.stride(0), vocab, blocks,
        B=block, TILE=tile, num_warps=8 if elements == 8192 else 4,
    )  # fmt: skip
    return keys, totals


@triton.jit
def load_row(x_ptr, copy_ptr, edited, column, inside):
    """float32 scores of a row, of its copy where it has been ``edited``; -inf outside."""
    if copy_ptr is None:
        x = tl.load(x_ptr + column, mask=inside, other=float("-inf")).to(tl.float32)
    else:
        raw = tl.load(x_ptr + column, mask=inside & (edited == 0), other=float("-inf")).to(tl.float32)
        x = tl.maximum(raw, tl.load(copy_ptr + column, mask=inside & (edited != 0), other=float("-inf")))
    return x


@triton.jit
def load_keys(keys_ptr, row, blocks, NB: tl.constexpr):
    block = tl.arange(0, NB)
    return tl.load(keys_ptr + row * blocks + block, mask=block < blocks, other=NO_KEY)


@triton.jit
def list_blocks(keys, bound, places_ptr, NB: tl.constexpr):
    """Writes the numbers of the blocks that reach the bound, in order; returns how many."""
    reached = (keys >= bound).to(tl.int32)
    place = tl.cumsum(reached, axis=0) - 1
    tl.debug_barrier()
    tl.store(places_ptr + place, tl.arange(0, NB), mask=reached != 0)
    tl.debug_barrier()
    return tl.sum(reached, axis=0)


@triton.jit
def middle_of(low, high, step):
    """A key between, int64: of the value halfway, as scores lie; after so many steps halfway among the keys, which ends
    whatever the values."""
    halfway = order_key(0.5 * value_of(low.to(tl.int32)) + 0.5 * value_of((high - 1).to(tl.int32))).to(tl.int64)
    halfway = tl.minimum(tl.maximum(halfway, low + 1), high - 1)
    return tl.where(step < VALUE_STEPS, halfway, low + ((high - low) >> 1))


@triton.jit
def bound_of_largest(keys, top, k):
    """A key that at least k of a row reach, and few more: k blocks do. The lowest where there are fewer blocks."""
    low = tl.min(tl.where(keys >= LOWEST_KEY, keys, top), axis=0).to(tl.int64)
    high = top.to(tl.int64) + 1
    reached = tl.sum((keys >= LOWEST_KEY).to(tl.int32), axis=0)
    bound = tl.where(reached >= k, low, tl.full((), LOWEST_KEY, tl.int64))
    step = reached * 0
    while (high - low > 1) & (reached > k + k // 4):
        middle = middle_of(low, high, step)
        step += 1
        count = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), axis=0)
        enough = count >= k
        low = tl.where(enough, middle, low)
        bound = low
        reached = tl.where(enough, count, reached)
        high = tl.where(enough, high, middle)
    return bound.to(tl.int32)


@triton.jit
def load_tile(
    x_ptr, copy_ptr, edited, places_ptr, active, tile, vocab, B: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Scores (TILE, B) of the listed blocks from ``tile`` x TILE on, -inf outside, and their ids."""
    at = tile * TILE + tl.arange(0, TILE)
    block = tl.load(places_ptr + at, mask=at < active, other=0)
    column = block[:, None] * B + tl.arange(0, B)[None, :]
    inside = (at < active)[:, None] & (column < vocab)
    return load_row(x_ptr, copy_ptr, edited, column, inside), column


@triton.jit
def log_weight_of(x, peak, scale):
    return tl.maximum((tl.maximum(x, -3.4028234663852886e38) - peak) * scale, LEAST_LOG_WEIGHT).to(tl.float64)


@triton.jit
def keys_of(x, peak, scale, mean, KIND: tl.constexpr):
    """What a search goes by: the scores, or how close a surprise is to the entropy, which is as far from it as the log
    of the weight is from its mean."""
    if KIND == TYPICAL:
        return order_key(-tl.abs(log_weight_of(x, peak, scale) - mean).to(tl.float32))
    else:
        return order_key(x)


@triton.jit
def within(x, column, cut_key, cut_id):
    key = order_key(x)
    return (key > cut_key) | ((key == cut_key) & (column <= cut_id))


@triton.jit
def tally(x, column, threshold, cut_key, cut_id, peak, scale, mean, KIND: tl.constexpr):
    """How many of each block of a tile within the cut have a key of at least the threshold, and, float64, their
    measure. Blocks are not added up before the end: a warp has its own, and need not wait for others."""
    kept = within(x, column, cut_key, cut_id) & (keys_of(x, peak, scale, mean, KIND) >= threshold)
    count = tl.sum(kept.to(tl.int32), axis=1)
    if KIND == COUNT:
        mass = count.to(tl.float64)
    else:
        mass = tl.sum(tl.where(kept, weight_of(x, peak, scale), 0.0), axis=1).to(tl.float64)
    return count, mass


@triton.jit
def measure(
    x, column, x_ptr, copy_ptr, edited, places_ptr, active, vocab, threshold, cut_key, cut_id, peak, scale, mean,
    KIND: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """How many elements of all listed blocks, the first tile of which is x, ``tally`` counts, and their measure."""
    count, mass = tally(x, column, threshold, cut_key, cut_id, peak, scale, mean, KIND)
    for tile in range(1, tl.cdiv(active, TILE)):
        other, ids = load_tile(x_ptr, copy_ptr, edited, places_ptr, active, tile, vocab, B, TILE)
        more, mass_of_more = tally(other, ids, threshold, cut_key, cut_id, peak, scale, mean, KIND)
        count += more
        mass += mass_of_more
    return tl.sum(count, axis=0), tl.sum(mass, axis=0)


@triton.jit
def _between(x, column, low, high, cut_key, cut_id, peak, scale, mean, KIND: tl.constexpr):
    key = keys_of(x, peak, scale, mean, KIND)
    return within(x, column, cut_key, cut_id) & (key >= low) & (key < high)


@triton.jit
def pick(
    counts, first, x_ptr, copy_ptr, edited, places_ptr, tile, vocab, low, high, cut_key, cut_id, peak, scale, mean,
    KIND: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Of a tile's elements within the cut whose keys are in [low, high), those from number ``first`` on: FEW scores and
    their ids. ``counts`` (TILE,) says how many each block has.

    Each looks for itself in the block it must lie in, as nothing can be written to a place that only a thread knows
    without all pointers changing hands.
    """
    ends = tl.cumsum(counts, axis=0)
    number = first + tl.arange(0, FEW)
    line = tl.sum((ends[None, :] <= number[:, None]).to(tl.int32), axis=1)
    begin = tl.sum(tl.where(tl.arange(0, TILE)[None, :] == line[:, None], (ends - counts)[None, :], 0), axis=1)
    block = tl.load(places_ptr + tile * TILE + line, mask=line < TILE, other=0)
    column = block[:, None] * B + tl.arange(0, B)[None, :]
    x = load_row(x_ptr, copy_ptr, edited, column, (line < TILE)[:, None] & (column < vocab))
    found = _between(x, column, low, high, cut_key, cut_id, peak, scale, mean, KIND)
    found &= tl.cumsum(found.to(tl.int32), axis=1) == (number - begin + 1)[:, None]
    return tl.sum(tl.where(found, x, 0.0), axis=1), tl.sum(tl.where(found, column, 0), axis=1)


@triton.jit
def count_between(x, column, low, high, cut_key, cut_id, peak, scale, mean, KIND: tl.constexpr):
    """How many elements each block of a tile has within the cut whose keys are in [low, high)."""
    return tl.sum(_between(x, column, low, high, cut_key, cut_id, peak, scale, mean, KIND).to(tl.int32), axis=1)


@triton.jit
def _settle_few(
    x, column, x_ptr, copy_ptr, edited, places_ptr, active, vocab, low, high, cut_key, cut_id, peak, scale, mean,
    reached, target, KIND: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """The cut of the few with keys in [low, high): each is kept that has less than the target before it. Where there is
    none, what reaches ``low`` is kept."""
    counts = count_between(x, column, low, high, cut_key, cut_id, peak, scale, mean, KIND)
    scores, tokens = pick(
        counts, 0, x_ptr, copy_ptr, edited, places_ptr, active * 0, vocab, low, high, cut_key, cut_id, peak, scale,
        mean, KIND, B, TILE, FEW,
    )  # fmt: skip
    noted = tl.sum(counts, axis=0)
    for tile in range(1, tl.cdiv(active, TILE)):
        other, ids = load_tile(x_ptr, copy_ptr, edited, places_ptr, active, tile, vocab, B, TILE)
        counts = count_between(other, ids, low, high, cut_key, cut_id, peak, scale, mean, KIND)
        more = tl.sum(counts, axis=0)
        if more > 0:
            other_scores, other_tokens = pick(
                counts, -noted, x_ptr, copy_ptr, edited, places_ptr, tile, vocab, low, high, cut_key, cut_id, peak,
                scale, mean, KIND, B, TILE, FEW,
            )  # fmt: skip
            behind = tl.arange(0, FEW) >= noted
            scores = tl.where(behind, other_scores, scores)
            tokens = tl.where(behind, other_tokens, tokens)
        noted += more
    index = tl.arange(0, FEW)
    keys = tl.where(index < noted, keys_of(scores, peak, scale, mean, KIND), NO_KEY)
    weights = tl.full([FEW], 1.0, tl.float32) if KIND == COUNT else weight_of(scores, peak, scale)
    weights = tl.where(index < noted, weights, 0.0).to(tl.float64)
    before = (keys[None, :] > keys[:, None]) | ((keys[None, :] == keys[:, None]) & (tokens[None, :] < tokens[:, None]))
    mass = reached + tl.sum(tl.where(before, weights[None, :], 0.0), axis=1)
    kept = (mass < target) & (index < noted)
    last_key = tl.min(tl.where(kept, keys, NAN_KEY), axis=0)
    last_id = tl.max(tl.where(kept & (keys == last_key), tokens, -1), axis=0)
    return tl.where(noted > 0, last_key, low), tl.where(noted > 0, last_id, ANY_ID)


@triton.jit
def _settle_equals(
    x_ptr, copy_ptr, edited, places_ptr, active, vocab, at_key, cut_key, cut_id, peak, scale, mean, reached, target,
    KIND: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The id at which the elements of one key, in order of id, reach the target; any where rounding leaves none."""
    crossed = tl.full((), -1, tl.int32)
    so_far = reached
    before = reached
    for tile in range(0, tl.cdiv(active, TILE)):
        x, column = load_tile(x_ptr, copy_ptr, edited, places_ptr, active, tile, vocab, B, TILE)
        equal = within(x, column, cut_key, cut_id) & (keys_of(x, peak, scale, mean, KIND) == at_key)
        weight = tl.full(x.shape, 1.0, tl.float32) if KIND == COUNT else weight_of(x, peak, scale)
        so_far += tl.sum(tl.sum(tl.where(equal, weight, 0.0), axis=1).to(tl.float64), axis=0)
        crossed = tl.where((crossed < 0) & (so_far >= target), tile, crossed)
        before = tl.where(crossed < 0, so_far, before)
    last_id = tl.full((), ANY_ID, tl.int32)
    if crossed >= 0:
        x, column = load_tile(x_ptr, copy_ptr, edited, places_ptr, active, crossed, vocab, B, TILE)
        equal = within(x, column, cut_key, cut_id) & (keys_of(x, peak, scale, mean, KIND) == at_key)
        weight = tl.full(x.shape, 1.0, tl.float32) if KIND == COUNT else weight_of(x, peak, scale)
        sums = tl.sum(tl.where(equal, weight, 0.0), axis=1).to(tl.float64)
        running = before + tl.cumsum(sums, axis=0)
        line = tl.arange(0, TILE)
        hit = tl.min(tl.where((running >= target) & (sums > 0), line, TILE), axis=0)
        hit = tl.where(hit < TILE, hit, tl.max(tl.where(sums > 0, line, 0), axis=0))
        before = tl.sum(tl.where(line == hit, running - sums, 0.0), axis=0)
        column = tl.load(places_ptr + crossed * TILE + hit) * B + tl.arange(0, B)
        x = load_row(x_ptr, copy_ptr, edited, column, column < vocab)
        equal = within(x, column, cut_key, cut_id) & (keys_of(x, peak, scale, mean, KIND) == at_key)
        weight = tl.full(x.shape, 1.0, tl.float32) if KIND == COUNT else weight_of(x, peak, scale)
        running = before + tl.cumsum(tl.where(equal, weight, 0.0).to(tl.float64), axis=0)
        first = tl.min(tl.where(equal & (running >= target), column, ANY_ID), axis=0)
        last_id = tl.minimum(first, tl.max(tl.where(equal, column, -1), axis=0))
    return last_id


@triton.jit
def cut_at(
    x, column, x_ptr, copy_ptr, edited, places_ptr, active, vocab, low, high, count, target,
    cut_key, cut_id, peak, scale, mean,
    KIND: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """The cut that keeps the smallest set of largest elements, lower ids first among equals, that measures the target.

    Of those within the cut so far; all ``count`` of them have keys from low to high. The first is always kept. The cut
    returned is in the order of KIND.
    """
    low, high = low.to(tl.int64), high.to(tl.int64) + 1
    above = tl.full((), 0, tl.int32)
    reached = tl.full((), 0.0, tl.float64)
    step = count * 0
    while (high - low > 1) & (count - above > FEW):
        middle = middle_of(low, high, step)
        step += 1
        at_least, measured = measure(
            x, column, x_ptr, copy_ptr, edited, places_ptr, active, vocab, middle.to(tl.int32), cut_key, cut_id,
            peak, scale, mean, KIND, B, TILE,
        )  # fmt: skip
        enough = measured >= target
        low = tl.where(enough, middle, low)
        count = tl.where(enough, at_least, count)
        high = tl.where(enough, high, middle)
        above = tl.where(enough, above, at_least)
        reached = tl.where(enough, reached, measured)
    last_key = low.to(tl.int32)
    last_id = tl.full((), ANY_ID, tl.int32)
    if count - above <= FEW:
        last_key, last_id = _settle_few(
            x, column, x_ptr, copy_ptr, edited, places_ptr, active, vocab, last_key, high.to(tl.int32), cut_key, cut_id,
            peak, scale, mean, reached, target, KIND, B, TILE, FEW,
        )  # fmt: skip
    else:
        last_id = _settle_equals(
            x_ptr, copy_ptr, edited, places_ptr, active, vocab, last_key, cut_key, cut_id, peak, scale, mean,
            reached, target, KIND, B, TILE,
        )  # fmt: skip
    return last_key, last_id
