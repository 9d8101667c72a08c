"""The sampler on a GPU: a pass over the logits, then a program a row that looks at the blocks that matter.

The order of things, ties and the random number are those of csrc/sampling.cpp: a token is drawn by inversion in order
of id, so that a request's tokens are the same on both devices but for rounding at a boundary. Nothing is sorted; no
launch depends on values; nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.penalties import penalise, rescan
from kernels.gpu.row_blocks import (
    ANY_ID,
    COUNT,
    FEW,
    INFINITY_KEY,
    LOWEST_KEY,
    MASS,
    NO_KEY,
    TYPICAL,
    block_size,
    bound_of_largest,
    cut_at,
    keys_of,
    list_blocks,
    load_keys,
    load_row,
    load_tile,
    log_weight_of,
    measure,
    order_key,
    scan,
    value_of,
    weight_of,
    within,
)
from kernels.gpu.sampling_columns import DeviceColumns
from kernels.gpu.top_tokens import report, tile_of

MESSAGES = (
    None,
    "the logits hold NaN",
    "the logits hold +inf",
    "no token is left to choose: every logit is -inf",
    "the history holds a token id outside the vocabulary",
)
HAS_NAN, HAS_INFINITY, NOTHING_LEFT, BAD_HISTORY = (tl.constexpr(code) for code in range(1, 5))


@triton.jit
def fault_of(top):
    """What is wrong with a row whose largest key this is; 0 is nothing."""
    fault = tl.where(top < LOWEST_KEY, NOTHING_LEFT, 0)
    return tl.where(top > INFINITY_KEY, HAS_NAN, tl.where(top == INFINITY_KEY, HAS_INFINITY, fault))


@triton.jit
def uniform(seed, position):
    """Philox4x32-10, 53 bits, as csrc/philox.h: float64 in [0, 1)."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    first, second, _, _ = tl.philox(seed, low, high, low * 0, low * 0, 10)
    bits = ((first.to(tl.uint64) << 32) | second.to(tl.uint64)) >> 11
    return bits.to(tl.int64).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _first_of(x_ptr, copy_ptr, edited, keys, top, vocab, B: tl.constexpr, NB: tl.constexpr):
    """The first token of the largest logit."""
    block = tl.min(tl.where(keys == top, tl.arange(0, NB), NB), axis=0)
    column = block * B + tl.arange(0, B)
    x = load_row(x_ptr, copy_ptr, edited, column, column < vocab)
    return tl.min(tl.where(order_key(x) == top, column, ANY_ID), axis=0)


@triton.jit
def _draw(
    sums, u, x_ptr, copy_ptr, edited, vocab, peak, scale, mean, cut_key, cut_id, typical_key, typical_id,
    FILTERS: tl.constexpr, TYPICAL_TOO: tl.constexpr, B: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """The first token within the cuts at which the running weight exceeds u of all; ``sums``, float64, by block.

    Running sums made in parallel may step back by a rounding: only what has a weight is ever returned.
    """
    index = tl.arange(0, NB)
    running = tl.cumsum(sums, axis=0)
    target = tl.sum(sums, axis=0) * u
    hit = tl.min(tl.where((running > target) & (sums > 0), index, NB), axis=0)
    block = tl.where(hit < NB, hit, tl.max(tl.where(sums > 0, index, 0), axis=0))
    before = tl.sum(tl.where(index == block, running - sums, 0.0), axis=0)
    rest = tl.where(hit < NB, target - before, float("inf"))
    column = block * B + tl.arange(0, B)
    x = load_row(x_ptr, copy_ptr, edited, column, column < vocab)
    weight = weight_of(x, peak, scale)
    if FILTERS:
        weight = tl.where(within(x, column, cut_key, cut_id), weight, 0.0)
    if TYPICAL_TOO:
        key = keys_of(x, peak, scale, mean, TYPICAL)
        kept = (key > typical_key) | ((key == typical_key) & (column <= typical_id))
        weight = tl.where(kept, weight, 0.0)
    running = tl.cumsum(weight.to(tl.float64), axis=0)
    first = tl.min(tl.where((running > rest) & (weight > 0), column, ANY_ID), axis=0)
    last = tl.max(tl.where(weight > 0, column, -1), axis=0)
    return tl.minimum(first, last)


@triton.jit
def _sum_tile(
    x, column, places_ptr, picks_ptr, active, tile, peak, scale, mean, cut_key, cut_id, typical_key, typical_id,
    TYPICAL_TOO: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The weights within the cuts of a tile's blocks, written where ``_draw`` looks for them."""
    kept = within(x, column, cut_key, cut_id)
    if TYPICAL_TOO:
        key = keys_of(x, peak, scale, mean, TYPICAL)
        kept &= (key > typical_key) | ((key == typical_key) & (column <= typical_id))
    at = tile * TILE + tl.arange(0, TILE)
    block = tl.load(places_ptr + at, mask=at < active, other=0)
    tl.store(picks_ptr + block, tl.sum(tl.where(kept, weight_of(x, peak, scale), 0.0), axis=1), mask=at < active)


@triton.jit
def _mean_of_tile(x, column, cut_key, cut_id, peak, scale):
    """Weights and weights times their logs, summed."""
    kept = within(x, column, cut_key, cut_id)
    weight = tl.where(kept, weight_of(x, peak, scale), 0.0).to(tl.float64)
    logs = tl.where(kept, log_weight_of(x, peak, scale), 0.0)
    return tl.sum(tl.sum(weight, axis=1), axis=0), tl.sum(tl.sum(weight * logs, axis=1), axis=0)


@triton.jit
def _whole_sums(keys, weights_ptr, row, blocks, peak, scale, NB: tl.constexpr):
    """The weights of all tokens of each block, relative to the row's largest."""
    block = tl.arange(0, NB)
    weights = tl.load(weights_ptr + row * blocks + block, mask=block < blocks, other=0.0)
    shrunk = weights * weight_of(value_of(tl.maximum(keys, LOWEST_KEY)), peak, scale)
    return tl.where(keys >= LOWEST_KEY, shrunk, 0.0)


@triton.jit
def _filter(
    x_ptr, copy_ptr, edited, places_ptr, picks_ptr, vocab, blocks, keys, top, total, peak, scale,
    floor, top_k, top_p, typical_p, TYPICAL_TOO: tl.constexpr,
    B: tl.constexpr, NB: tl.constexpr, TILE: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Writes to ``picks`` the weights that the filters leave in each block, and returns the cuts."""
    cut_key = tl.full((), LOWEST_KEY, tl.int32)
    cut_id = tl.full((), ANY_ID, tl.int32)
    typical_key = tl.full((), NO_KEY, tl.int32)
    typical_id = tl.full((), ANY_ID, tl.int32)
    mean = tl.full((), 0.0, tl.float64)
    # A bound on the logits: of min_p; a key that top_k reach; with top_p alone one below which all together lack the
    # mass to be needed, with room for rounding.
    has_floor = floor > float("-inf")
    if has_floor:
        cut_key = tl.maximum(cut_key, order_key((peak.to(tl.float64) + floor).to(tl.float32)))
    if top_k > 0:
        cut_key = tl.maximum(cut_key, bound_of_largest(keys, top, top_k))
    elif (top_p < 1) & (floor == float("-inf")):
        needed = (0.9 * (1.0 - top_p) * total / vocab).to(tl.float32)
        bound = peak + tl.log(needed) / scale - 2e-7 * tl.abs(peak)
        cut_key = tl.maximum(cut_key, order_key(bound))
    active = list_blocks(keys, cut_key, places_ptr, NB)
    x, column = load_tile(x_ptr, copy_ptr, edited, places_ptr, active, active * 0, vocab, B, TILE)
    count, mass = measure(
        x, column, x_ptr, copy_ptr, edited, places_ptr, active, vocab, cut_key, cut_key, cut_id, peak, scale, mean,
        MASS, B, TILE,
    )  # fmt: skip
    if (top_k > 0) & (count > top_k):
        cut_key, cut_id = cut_at(
            x, column, x_ptr, copy_ptr, edited, places_ptr, active, vocab, cut_key, top, count,
            top_k.to(tl.float64), cut_key, cut_id, peak, scale, mean, COUNT, B, TILE, FEW,
        )  # fmt: skip
        count, mass = measure(
            x, column, x_ptr, copy_ptr, edited, places_ptr, active, vocab, cut_key, cut_key, cut_id, peak, scale,
            mean, MASS, B, TILE,
        )  # fmt: skip
    if top_p < 1:
        if (top_k > 0) | has_floor:
            total = mass
        cut_key, cut_id = cut_at(
            x, column, x_ptr, copy_ptr, edited, places_ptr, active, vocab, cut_key, top, count,
            top_p * total, cut_key, cut_id, peak, scale, mean, MASS, B, TILE, FEW,
        )  # fmt: skip
    if TYPICAL_TOO:  # noqa: SIM102, known when compiled
        if typical_p < 1:
            total, logs = _mean_of_tile(x, column, cut_key, cut_id, peak, scale)
            for tile in range(1, tl.cdiv(active, TILE)):
                other, ids = load_tile(x_ptr, copy_ptr, edited, places_ptr, active, tile, vocab, B, TILE)
                more, more_logs = _mean_of_tile(other, ids, cut_key, cut_id, peak, scale)
                total += more
                logs += more_logs
            mean = logs / total
            count, _ = measure(
                x, column, x_ptr, copy_ptr, edited, places_ptr, active, vocab, cut_key, cut_key, cut_id, peak, scale,
                mean, COUNT, B, TILE,
            )  # fmt: skip
            nearest, furthest = order_key(peak * 0), order_key(peak * 0 - 200.0)  # logs of weights lie within 87
            typical_key, typical_id = cut_at(
                x, column, x_ptr, copy_ptr, edited, places_ptr, active, vocab, furthest, nearest, count,
                typical_p * total, cut_key, cut_id, peak, scale, mean, TYPICAL, B, TILE, FEW,
            )  # fmt: skip
    block = tl.arange(0, NB)
    tl.store(picks_ptr + block, tl.zeros([NB], tl.float32), mask=block < blocks)
    tl.debug_barrier()
    _sum_tile(
        x, column, places_ptr, picks_ptr, active, active * 0, peak, scale, mean, cut_key, cut_id, typical_key,
        typical_id, TYPICAL_TOO, TILE,
    )  # fmt: skip
    for tile in range(1, tl.cdiv(active, TILE)):
        other, ids = load_tile(x_ptr, copy_ptr, edited, places_ptr, active, tile, vocab, B, TILE)
        _sum_tile(
            other, ids, places_ptr, picks_ptr, active, tile, peak, scale, mean, cut_key, cut_id, typical_key,
            typical_id, TYPICAL_TOO, TILE,
        )  # fmt: skip
    tl.debug_barrier()
    return cut_key, cut_id, typical_key, typical_id, mean


@triton.jit
def _choose(
    x_ptr, copy_ptr, keys_ptr, edited_keys_ptr, weights_ptr, bad_ptr, places_ptr, picks_ptr,
    scale_ptr, floor_ptr, top_k_ptr, top_p_ptr, typical_p_ptr, seed_ptr, position_ptr, lengths_ptr,
    tokens_ptr, errors_ptr, logprobs_ptr, ranks_ptr, stride, vocab, blocks,
    DRAWS: tl.constexpr, FILTERS: tl.constexpr, TYPICAL_TOO: tl.constexpr,
    B: tl.constexpr, NB: tl.constexpr, TILE: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride
    keys = load_keys(keys_ptr, row, blocks, NB)
    top = tl.max(keys, axis=0)
    error = fault_of(top)
    edited = tl.full((), 0, tl.int32)
    if copy_ptr is not None:
        copy_ptr += row * vocab
        edited = tl.load(lengths_ptr + row)
        keys = load_keys(edited_keys_ptr, row, blocks, NB)
        top = tl.max(keys, axis=0)
        bad = tl.load(bad_ptr + row)
        error = tl.where(error == 0, tl.where(bad != 0, BAD_HISTORY, fault_of(top)), error)
    token = tl.full((), -1, tl.int32)
    if error == 0:
        scale = tl.load(scale_ptr + row)
        drawn = scale > 0 if DRAWS else False
        if drawn:
            peak = value_of(top)
            u = uniform(tl.load(seed_ptr + row), tl.load(position_ptr + row))
            cut_key = tl.full((), LOWEST_KEY, tl.int32)
            cut_id = tl.full((), ANY_ID, tl.int32)
            typical_key = tl.full((), NO_KEY, tl.int32)
            typical_id = tl.full((), ANY_ID, tl.int32)
            mean = tl.full((), 0.0, tl.float64)
            sums = tl.zeros([NB], tl.float32)
            if weights_ptr is not None:
                sums = _whole_sums(keys, weights_ptr, row, blocks, peak, scale, NB)
            if FILTERS:
                floor, top_k = tl.load(floor_ptr + row), tl.minimum(tl.load(top_k_ptr + row), vocab)
                top_p, typical_p = tl.load(top_p_ptr + row), tl.load(typical_p_ptr + row)
                if (floor > float("-inf")) | (top_k > 0) | (top_p < 1) | (typical_p < 1):
                    total = tl.sum(sums.to(tl.float64), axis=0)
                    picks_ptr += row * blocks
                    cut_key, cut_id, typical_key, typical_id, mean = _filter(
                        x_ptr, copy_ptr, edited, places_ptr + row * blocks, picks_ptr, vocab,
                        blocks, keys, top, total, peak, scale, floor, top_k, top_p, typical_p, TYPICAL_TOO, B, NB,
                        TILE, FEW,
                    )  # fmt: skip
                    block = tl.arange(0, NB)
                    sums = tl.load(picks_ptr + block, mask=block < blocks, other=0.0)
            token = _draw(
                sums.to(tl.float64), u, x_ptr, copy_ptr, edited, vocab, peak, scale, mean, cut_key, cut_id,
                typical_key, typical_id, FILTERS, TYPICAL_TOO, B, NB,
            )  # fmt: skip
        else:
            token = _first_of(x_ptr, copy_ptr, edited, keys, top, vocab, B, NB)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(errors_ptr + row, error)
    tl.store(logprobs_ptr + row, float("nan"))  # until ``report`` knows better
    tl.store(ranks_ptr + row, 0)


class DeviceResult(NamedTuple):
    """What ``launch`` writes: views of one buffer on the device; as in ``kernels.sampling.SampleResult``."""

    buffer: Tensor  # int64
    token_ids: Tensor
    top_ids: Tensor
    logprobs: Tensor
    ranks: Tensor
    errors: Tensor  # int32 (rows,), places in MESSAGES
    top_logprobs: Tensor

    @classmethod
    def views(cls, buffer: Tensor, rows: int, num_top: int) -> DeviceResult:
        tokens, top_ids, narrow = buffer.split([rows, rows * num_top, len(buffer) - rows * (1 + num_top)])
        logprobs, ranks, errors, top = narrow.view(torch.int32)[: rows * (3 + num_top)].split(
            [rows, rows, rows, rows * num_top]
        )
        return cls(
            buffer, tokens, top_ids.view(rows, num_top), logprobs.view(torch.float32), ranks, errors,
            top.view(torch.float32).view(rows, num_top),
        )  # fmt: skip

    @classmethod
    def empty(cls, rows: int, num_top: int, device: torch.device) -> DeviceResult:
        words = rows * (1 + num_top) + (rows * (3 + num_top) + 1) // 2
        return cls.views(torch.empty(words, dtype=torch.int64, device=device), rows, num_top)

    def download(self) -> Callable[[], DeviceResult]:
        """Asks for the same on the CPU, in one copy; what is returned waits for it."""
        rows, num_top = self.top_ids.shape
        if not self.buffer.is_cuda:
            return lambda: self
        host = torch.empty(self.buffer.shape, dtype=torch.int64, pin_memory=True)
        host.copy_(self.buffer, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

        def wait() -> DeviceResult:
            arrived.synchronize()
            return self.views(host, rows, num_top)

        return wait


def launch(logits: Tensor, columns: DeviceColumns) -> DeviceResult:
    """Draws a token a row, all on the device; what ``columns.plan`` says is launched, so that a graph may hold it.

    Args:
        logits: float32, bfloat16 or float16 (rows, vocab), contiguous along the vocabulary. They are not written.
    """
    plan, (rows, vocab), device = columns.plan, logits.shape, logits.device
    block = block_size(vocab)
    blocks = triton.cdiv(vocab, block)

    def scratch(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    weights = (scratch(rows, blocks, dtype=torch.float32), columns["scale"]) if plan.whole else None
    copy = edited_keys = bad = None
    if plan.penalties and columns.longest:
        copy, edited_keys, bad = scratch(rows, vocab, dtype=torch.float32), scratch(rows, blocks), scratch(rows)
        edited = (copy, edited_keys, columns["history_lengths"], bad)
        keys, sums = scan(logits, block, sums=plan.logprobs, weights=weights, edited=edited)
        penalties = columns["repetition_penalty"], columns["presence_penalty"], columns["frequency_penalty"]
        penalise(logits, copy, None, columns.history, penalties, bad, columns.longest)
        rescan(copy, columns.history, edited_keys, weights, block, columns.longest)
    else:
        keys, sums = scan(logits, block, sums=plan.logprobs, weights=weights)
    result = DeviceResult.empty(rows, plan.num_top, device)
    places = scratch(rows, blocks) if plan.filters or plan.logprobs else None
    picks = scratch(rows, blocks, dtype=torch.float32) if plan.filters else None
    tile = tile_of(blocks, narrow=plan.typical or copy is not None)
    _choose[(rows,)](
        logits, copy, keys, edited_keys, None if weights is None else weights[0], bad, places, picks,
        columns["scale"], columns["floor"], columns["top_k"], columns["top_p"], columns["typical_p"],
        columns["seed"], columns["position"], columns["history_lengths"], result.token_ids, result.errors,
        result.logprobs, result.ranks, logits.stride(0), vocab, blocks,
        DRAWS=plan.draws, FILTERS=plan.filters, TYPICAL_TOO=plan.typical,
        B=block, NB=triton.next_power_of_2(blocks), TILE=tile, FEW=FEW, num_warps=8,
    )  # fmt: skip
    if sums is not None:
        report(logits, keys, sums, places, columns["num_logprobs"], result, block)
    return result
