"""The largest of each row in order, and what is told of a row besides its token: log-probabilities and ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.row_blocks import (
    ANY_ID,
    COUNT,
    FEW,
    INFINITY_KEY,
    LOWEST_KEY,
    NAN_KEY,
    block_size,
    bound_of_largest,
    count_between,
    cut_at,
    list_blocks,
    load_keys,
    load_tile,
    measure,
    order_key,
    pick,
    scan,
    value_of,
    weight_of,
)

if TYPE_CHECKING:
    from kernels.gpu.sampling import DeviceResult

SORTED = 64  # compared with so many at once


@triton.jit
def _gather(
    x, column, x_ptr, places_ptr, tile, vocab, cut_key, cut_id, found_ptr, width, noted,
    B: tl.constexpr, TILE: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Writes keys and ids of a tile's elements within the cut behind those noted; returns how many there are now."""
    zero, nowhere = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float64)
    low, high = LOWEST_KEY, NAN_KEY
    counts = count_between(x, column, low, high, cut_key, cut_id, zero, zero, nowhere, COUNT)
    total = tl.sum(counts, axis=0)
    for first in range(0, total, FEW):
        scores, tokens = pick(
            counts, first, x_ptr, None, 0, places_ptr, tile, vocab, low, high, cut_key, cut_id, zero, zero, nowhere,
            COUNT, B, TILE, FEW,
        )  # fmt: skip
        number = first + tl.arange(0, FEW)
        mask = (number < total) & (noted + number < width)
        tl.store(found_ptr + noted + number, order_key(scores), mask=mask)
        tl.store(found_ptr + width + noted + number, tokens, mask=mask)
    return noted + total


@triton.jit
def _largest(
    x_ptr, keys, top, k, vocab, places_ptr, found_ptr, width, shift, values_ptr, ids_ptr,
    B: tl.constexpr, NB: tl.constexpr, TILE: tl.constexpr, FEW: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """Writes the k largest of a row less ``shift``, largest first, lower ids first among equals; returns how many,
    which is fewer where others are -inf. ``found`` has room for 2 x width."""
    cut_key = bound_of_largest(keys, top, k)
    cut_id = tl.full((), ANY_ID, tl.int32)
    active = list_blocks(keys, cut_key, places_ptr, NB)
    x, column = load_tile(x_ptr, None, 0, places_ptr, active, active * 0, vocab, B, TILE)
    zero = tl.full((), 0.0, tl.float32)
    nowhere = tl.full((), 0.0, tl.float64)
    count, _ = measure(
        x, column, x_ptr, None, 0, places_ptr, active, vocab, cut_key, cut_key, cut_id, zero, zero, nowhere, COUNT,
        B, TILE,
    )  # fmt: skip
    if count > k:
        cut_key, cut_id = cut_at(
            x, column, x_ptr, None, 0, places_ptr, active, vocab, cut_key, top, count, k.to(tl.float64),
            cut_key, cut_id, zero, zero, nowhere, COUNT, B, TILE, FEW,
        )  # fmt: skip
    noted = _gather(
        x, column, x_ptr, places_ptr, active * 0, vocab, cut_key, cut_id, found_ptr, width, active * 0, B, TILE, FEW
    )
    for tile in range(1, tl.cdiv(active, TILE)):
        other, ids = load_tile(x_ptr, None, 0, places_ptr, active, tile, vocab, B, TILE)
        noted = _gather(
            other, ids, x_ptr, places_ptr, tile, vocab, cut_key, cut_id, found_ptr, width, noted, B, TILE, FEW
        )
    tl.debug_barrier()
    noted = tl.minimum(noted, k)
    for first in range(0, noted, SORTED):
        i = first + tl.arange(0, SORTED)
        key = tl.load(found_ptr + i, mask=i < noted, other=0)
        token = tl.load(found_ptr + width + i, mask=i < noted, other=0)
        rank = tl.zeros([SORTED], tl.int32)
        for start in range(0, noted, SORTED):
            j = start + tl.arange(0, SORTED)
            other_key = tl.load(found_ptr + j, mask=j < noted, other=0)[None, :]
            other_token = tl.load(found_ptr + width + j, mask=j < noted, other=0)[None, :]
            before = (other_key > key[:, None]) | ((other_key == key[:, None]) & (other_token < token[:, None]))
            rank += tl.sum((before & (j < noted)[None, :]).to(tl.int32), axis=1)
        tl.store(values_ptr + rank, value_of(key) - shift, mask=i < noted)
        tl.store(ids_ptr + rank, token.to(tl.int64), mask=i < noted)
    return noted


@triton.jit
def _clear(values_ptr, ids_ptr, start, width, value, token, SORTED: tl.constexpr):
    for first in range(start, width, SORTED):
        i = first + tl.arange(0, SORTED)
        tl.store(values_ptr + i, tl.zeros([SORTED], tl.float32) + value, mask=i < width)
        tl.store(ids_ptr + i, tl.zeros([SORTED], tl.int64) + token, mask=i < width)


@triton.jit
def _report(
    x_ptr, keys_ptr, sums_ptr, places_ptr, found_ptr, wanted_ptr, tokens_ptr, errors_ptr, logprobs_ptr,
    ranks_ptr, values_ptr, ids_ptr, stride, vocab, blocks, width,
    TOP: tl.constexpr, B: tl.constexpr, NB: tl.constexpr, TILE: tl.constexpr, FEW: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride
    values_ptr += row * width
    ids_ptr += row * width
    logprob = tl.full((), float("nan"), tl.float32)
    rank = tl.full((), 0, tl.int32)
    written = tl.full((), 0, tl.int32)
    wanted = tl.minimum(tl.load(wanted_ptr + row), width)
    if (wanted >= 0) & (tl.load(errors_ptr + row) == 0):
        places_ptr += row * blocks
        keys = load_keys(keys_ptr, row, blocks, NB)
        top = tl.max(keys, axis=0)
        peak = value_of(top)
        block = tl.arange(0, NB)
        sums = tl.load(sums_ptr + row * blocks + block, mask=block < blocks, other=0.0)
        one = tl.full((), 1.0, tl.float32)
        shrunk = sums * weight_of(value_of(tl.maximum(keys, LOWEST_KEY)), peak, one)
        total = tl.sum(tl.where(keys >= LOWEST_KEY, shrunk, 0.0).to(tl.float64), axis=0)
        log_sum_exp = peak + tl.log(total.to(tl.float32))
        token = tl.load(tokens_ptr + row).to(tl.int32)
        chosen = tl.load(x_ptr + token).to(tl.float32)
        logprob = chosen - log_sum_exp
        # Those above it, and its equals up to itself.
        key = order_key(chosen)
        active = list_blocks(keys, tl.maximum(key, LOWEST_KEY), places_ptr, NB)
        x, column = load_tile(x_ptr, None, 0, places_ptr, active, active * 0, vocab, B, TILE)
        nowhere = tl.full((), 0.0, tl.float64)
        rank, _ = measure(
            x, column, x_ptr, None, 0, places_ptr, active, vocab, key, key, token, one, one, nowhere, COUNT, B, TILE
        )
        if TOP:  # noqa: SIM102, known when compiled
            if wanted > 0:
                written = _largest(
                    x_ptr, keys, top, tl.minimum(wanted, vocab), vocab, places_ptr,
                    found_ptr + row * 2 * width, width, log_sum_exp, values_ptr, ids_ptr, B, NB, TILE, FEW, SORTED,
                )  # fmt: skip
    if TOP:
        _clear(values_ptr, ids_ptr, written, width, float("-inf"), -1, SORTED)
    tl.store(logprobs_ptr + row, logprob)
    tl.store(ranks_ptr + row, rank)


@triton.jit
def _top_k(
    x_ptr, keys_ptr, places_ptr, found_ptr, values_ptr, ids_ptr, stride, vocab, blocks, k,
    B: tl.constexpr, NB: tl.constexpr, TILE: tl.constexpr, FEW: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    values_ptr += row * k
    ids_ptr += row * k
    keys = load_keys(keys_ptr, row, blocks, NB)
    top = tl.max(keys, axis=0)
    written = tl.full((), 0, tl.int32)
    if (top >= LOWEST_KEY) & (top < INFINITY_KEY):
        written = _largest(
            x_ptr + row * stride, keys, top, written + k, vocab, places_ptr + row * blocks,
            found_ptr + row * 2 * k, k, 0.0, values_ptr, ids_ptr, B, NB, TILE, FEW, SORTED,
        )  # fmt: skip
    rest = tl.where(top >= INFINITY_KEY, float("nan"), float("-inf"))
    _clear(values_ptr, ids_ptr, written, k, rest, 0, SORTED)


def tile_of(blocks: int, *, narrow: bool = False) -> int:
    """Blocks that a program holds: no more than registers do, of which ``narrow`` ones leave fewer. The 50 largest
    mostly lie in 64."""
    return min(32 if narrow else 64, triton.next_power_of_2(blocks))


def report(
    logits: Tensor, keys: Tensor, sums: Tensor, places: Tensor | None, wanted: Tensor, result: DeviceResult,
    block: int,
) -> None:  # fmt: skip
    """Fills in log-probabilities and ranks of the chosen tokens, and the largest of each row: int32 ``wanted``.

    ``keys`` and ``sums`` are what ``row_blocks.scan`` says of the logits.
    """
    rows, vocab = logits.shape
    width, blocks = result.top_ids.shape[1], keys.shape[1]
    found = torch.empty(rows, 2, width, dtype=torch.int32, device=logits.device)
    _report[(rows,)](
        logits, keys, sums, places, found, wanted, result.token_ids, result.errors, result.logprobs, result.ranks,
        result.top_logprobs, result.top_ids, logits.stride(0), vocab, blocks, width,
        TOP=width > 0, B=block, NB=triton.next_power_of_2(blocks), TILE=tile_of(blocks), FEW=FEW,
        SORTED=SORTED, num_warps=8,
    )  # fmt: skip


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As ``kernels.sampling.top_k``, of float32, bfloat16 or float16 scores on the device."""
    rows, vocab = scores.shape
    values = torch.empty(rows, k, dtype=torch.float32, device=scores.device)
    ids = torch.empty(rows, k, dtype=torch.int64, device=scores.device)
    if not rows:
        return values, ids
    block = block_size(vocab)
    keys, _ = scan(scores, block)
    blocks = keys.shape[1]
    places, found = (torch.empty(rows, n, dtype=torch.int32, device=scores.device) for n in (blocks, 2 * k))
    _top_k[(rows,)](
        scores, keys, places, found, values, ids, scores.stride(0), vocab, blocks, k,
        B=block, NB=triton.next_power_of_2(blocks), TILE=tile_of(blocks), FEW=FEW, SORTED=SORTED, num_warps=8,
    )  # fmt: skip
    return values, ids
