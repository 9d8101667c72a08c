"""New keys and values into their slots of a paged cache, in one launch: rotated, with the queries, and quantised."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.attention_scores import Rows
from kernels.gpu.paged_attention import pages_of
from kernels.gpu.target import INTERPRETED

HALF_LEVELS: tl.constexpr = tl.constexpr(127.0)  # of int8; csrc/cache_append_impl.h rounds to the same ones
INTEGERS: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no room for a fraction
E4M3_MOST: tl.constexpr = tl.constexpr(448.0)


class Angles(NamedTuple):
    """float32 (tokens, half), contiguous; None where nothing is rotated."""

    cos: Any
    sin: Any


@triton.jit
def _largest(x):
    """Each row's largest magnitude; NaN where the row holds what is not finite."""
    return tl.max(tl.abs(x), 1) + tl.sum(x * 0.0, 1)


@triton.jit
def _put(target, x, factor, mask):
    """Stores float32 numbers as the target's: int8 after multiplying with ``factor``, rounded to the nearest."""
    if target.dtype.element_ty == tl.int8:
        x = x * factor[:, None] + INTEGERS - INTEGERS
    elif target.dtype.element_ty == tl.float8e4nv:
        x = tl.where(x > E4M3_MOST, E4M3_MOST, tl.where(x < -E4M3_MOST, -E4M3_MOST, x))  # NaN stays NaN
    tl.store(target, x.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _levels(target, scale, largest, stored):
    """For int8, leaves the scale and returns what takes a row to its levels."""
    if target.dtype.element_ty == tl.int8:
        levels = tl.full(largest.shape, HALF_LEVELS, tl.float32)
        tl.store(scale, tl.div_rn(largest, levels), mask=stored)
        return tl.where(largest > 0, tl.div_rn(levels, tl.where(largest > 0, largest, 1.0)), 0.0)
    return largest


@triton.jit
def _move(source, target, scale, stored, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)[None, :]
    mask = stored[:, None] & (column < HEAD_DIM)
    x = tl.load(source[:, None] + column, mask=mask, other=0.0).to(tl.float32)
    _put(target[:, None] + column, x, _levels(target, scale, _largest(x), stored), mask)


@triton.jit
def _rotate(
    source, target, scale, angles, angle, stored,
    HEAD_DIM: tl.constexpr, ROTATED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rows of ``source`` by their tokens' angles; all is read before any is written: the target may be the source."""
    column = tl.arange(0, HALF)[None, :]
    mask = stored[:, None] & (column < ROTATED // 2)
    cos = tl.load(angles.cos + angle[:, None] + column, mask=mask, other=0.0)
    sin = tl.load(angles.sin + angle[:, None] + column, mask=mask, other=0.0)
    both = tl.arange(0, 2 * HALF)[None, :]
    inside = stored[:, None] & (both < ROTATED)
    if INTERLEAVED:
        pairs = tl.load(source[:, None] + both, mask=inside, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(pairs, [source.shape[0], HALF, 2]))
    else:
        first = tl.load(source[:, None] + column, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(source[:, None] + (ROTATED // 2 + column), mask=mask, other=0.0).to(tl.float32)
    turned, other = first * cos - second * sin, second * cos + first * sin
    largest = tl.maximum(_largest(turned), _largest(other), propagate_nan=tl.PropagateNan.ALL)
    if REST > 0:
        rest = ROTATED + tl.arange(0, REST)[None, :]
        unturned = stored[:, None] & (rest < HEAD_DIM)
        x = tl.load(source[:, None] + rest, mask=unturned, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, _largest(x), propagate_nan=tl.PropagateNan.ALL)
    factor = _levels(target, scale, largest, stored)
    if INTERLEAVED:
        _put(target[:, None] + both, tl.interleave(turned, other), factor, inside)
    else:
        _put(target[:, None] + column, turned, factor, mask)
        _put(target[:, None] + (ROTATED // 2 + column), other, factor, mask)
    if REST > 0:
        _put(target[:, None] + rest, x, factor, unturned)


@triton.jit
def _append(
    x, pages, scales, slots, angles, tokens, program,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTATED: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr, INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of rows, each a head of a token, into the slots that are not negative."""
    row = program * ROWS + tl.arange(0, ROWS)
    token, head = (row // HEADS).to(tl.int64), row % HEADS
    slot = tl.load(slots + token, mask=token < tokens, other=-1)
    stored = slot >= 0
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    source = x.data + (token * x.seq + head * x.head)
    target = pages.data + (block * pages.block + offset * pages.token + head * pages.head)
    scale = target
    if scales.data is not None:
        scale = scales.data + (block * scales.block + offset * scales.token + head * scales.head)
    if ROTATED > 0:
        _rotate(
            source, target, scale, angles, token * (ROTATED // 2), stored, HEAD_DIM, ROTATED, HALF, REST, INTERLEAVED
        )
    else:
        _move(source, target, scale, stored, HEAD_DIM, WIDTH)


@triton.jit(do_not_specialize=("tokens", "key_programs"))
def cache_append_kernel(
    q, k, v, caches, slots, angles, tokens, key_programs,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROTATED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Programs for the keys come first, as many for the values, and the queries' last."""
    program = tl.program_id(0)
    k_cache, v_cache, k_scales, v_scales = caches
    if program < key_programs:
        _append(
            k, k_cache, k_scales, slots, angles, tokens, program,
            BLOCK_SIZE, KV_HEADS, HEAD_DIM, ROTATED, HALF, REST, INTERLEAVED, WIDTH, ROWS,
        )  # fmt: skip
    elif program < 2 * key_programs:
        _append(
            v, v_cache, v_scales, slots, angles, tokens, program - key_programs,
            BLOCK_SIZE, KV_HEADS, HEAD_DIM, 0, HALF, REST, INTERLEAVED, WIDTH, ROWS,
        )  # fmt: skip
    elif q.data is not None:
        row = (program - 2 * key_programs) * ROWS + tl.arange(0, ROWS)
        token, head = (row // HEADS).to(tl.int64), row % HEADS
        place = q.data + (token * q.seq + head * q.head)
        _rotate(
            place, place, place, angles, token * (ROTATED // 2), token < tokens,
            HEAD_DIM, ROTATED, HALF, 0, INTERLEAVED,
        )  # fmt: skip


def append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, k_scale: Tensor | None,
    v_scale: Tensor | None, cos: Tensor | None, sin: Tensor | None, interleaved: bool, q: Tensor | None,
) -> None:  # fmt: skip
    """See ``kernels.paged_attention.append_to_cache``, which has checked the tensors; angles are (tokens, half)."""
    tokens, kv_heads, head_dim = k.shape
    if not k.numel():
        return
    rotated = 0 if cos is None else 2 * cos.shape[-1]
    q = q if rotated else None
    heads = 0 if q is None else q.shape[1]
    width, half = triton.next_power_of_2(head_dim), triton.next_power_of_2(max(1, rotated // 2))
    rest = head_dim - rotated if rotated else 0
    rows = max(1, (4096 if INTERPRETED else 1024) // width)
    key_programs, query_programs = triton.cdiv(tokens * kv_heads, rows), triton.cdiv(tokens * heads, rows)
    angles = Angles(None if cos is None else cos.contiguous(), None if sin is None else sin.contiguous())
    with torch.cuda.device(k.device) if k.is_cuda else contextlib.nullcontext():
        cache_append_kernel[(2 * key_programs + query_programs,)](
            _rows(q), _rows(k), _rows(v), (pages_of(k_cache), pages_of(v_cache), pages_of(k_scale), pages_of(v_scale)),
            slots.contiguous(), angles, tokens, key_programs,
            BLOCK_SIZE=k_cache.shape[1], HEADS=max(1, heads), KV_HEADS=kv_heads, HEAD_DIM=head_dim, ROTATED=rotated,
            HALF=half, REST=triton.next_power_of_2(rest) if rest else 0, INTERLEAVED=interleaved, WIDTH=width,
            ROWS=rows, num_warps=4,
        )  # fmt: skip


def _rows(x: Tensor | None) -> Rows:
    return Rows(None, 0, 0, 0) if x is None else Rows(x, 0, x.stride(0), x.stride(1))
