"""Attention over a paged cache: a block of a sequence's rows walks over its keys, which programs may share out.

A row is a query and one of the heads that share a kv head, so that a tile of keys serves all of them; a block is so
many consecutive rows of a sequence. Lengths and tables are read on the device alone: the launch depends on shapes, and
a CUDA graph of it serves all lengths. Where the keys of a block are split, each split leaves its output and the
log-sum-exp of its scores, and a second kernel joins them (Dao et al. 2023, "Flash-Decoding").
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import paged_configs
from kernels.gpu.attention import _precision, dims
from kernels.gpu.attention_scores import LOG2E, DenseBias, Rows, Scores, key_limits, round_down, shaped, within

CHUNK = 16  # splits that are joined at a time; a constant, as batch-invariant calls add in a fixed order
VARYING = ("batch", "tokens", "most_keys", "splits")  # arguments whose values get no kernel of their own
INT8_VALUES: tl.constexpr = tl.constexpr(128.0)  # keeps weight x scale well inside half precision


class Pages(NamedTuple):
    """A cache or its scales, and the strides between blocks, tokens and heads; None is absent."""

    data: Any
    block: int
    token: int
    head: int


class Sequences(NamedTuple):
    """Where each sequence's blocks are, how many keys it has, and where its queries begin."""

    table: Any
    stride: int
    cache_seqlens: Any
    cu_seqlens_q: Any


@triton.jit
def _first_block(sequences, i, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Sequence i's first block, where each has room for one more than its rows need."""
    return tl.load(sequences.cu_seqlens_q + i).to(tl.int32) * GROUPS // BLOCK_M + i


@triton.jit
def _locate(sequences, block, batch, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, SEARCH: tl.constexpr):
    """The sequence of a block, and the block's first row in it, which may lie past its end."""
    if SEARCH:
        low, high = tl.cast(0, tl.int32), tl.cast(batch, tl.int32)
        while high - low > 1:
            middle = (low + high) // 2
            before = _first_block(sequences, middle, GROUPS, BLOCK_M) <= block
            low, high = tl.where(before, middle, low), tl.where(before, high, middle)
        return low, (block - _first_block(sequences, low, GROUPS, BLOCK_M)) * BLOCK_M
    return block, tl.cast(0, tl.int32)


@triton.jit
def _clear_padding(out, first, step, tokens, kv_head, heads, WIDTH: tl.constexpr):
    """Zeros for a kv head's WIDTH numbers of queries ``first``, ``first + step``, ..., which belong to no sequence."""
    column = tl.arange(0, triton.next_power_of_2(WIDTH))
    for token in range(first, tokens, step):
        at = out + (tl.cast(token, tl.int64) * heads * WIDTH + kv_head * WIDTH) + column
        tl.store(at, tl.zeros_like(column).to(out.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def _blocks(table, first, stop, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where keys ``first`` on lie; block 0, which is always there, for those from ``stop`` on."""
    key = first + tl.arange(0, BLOCK_N)
    return tl.load(table + key // BLOCK_SIZE, mask=key < stop, other=0)


@triton.jit
def _starts(pages, block, offset, kv_head):
    """Where a head's numbers of each key begin; 64-bit, since a cache may hold more than 2^31 numbers."""
    within_block = offset * pages.token + kv_head * pages.head
    return pages.data + (block * tl.cast(pages.block, tl.int64) + within_block)


@triton.jit
def _load(starts, inside, BEGIN: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Dims BEGIN on of keys: (keys, WIDTH). Zeros past HEAD_DIM, and if MASKED outside, whatever memory holds there."""
    dim = BEGIN + tl.arange(0, WIDTH)[None, :]
    pointers = starts[:, None] + dim
    if MASKED and BEGIN + WIDTH > HEAD_DIM:
        return tl.load(pointers, mask=inside[:, None] & (dim < HEAD_DIM), other=0.0)
    if MASKED:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    if BEGIN + WIDTH > HEAD_DIM:
        return tl.load(pointers, mask=dim < HEAD_DIM, other=0.0)
    return tl.load(pointers)


@triton.jit
def _walk(
    acc0, acc1, total, peak, q0, q1, position, head, kv_head, start, stop, length_k, table, pages, scores, dense, far,
    BLOCK_SIZE: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Takes keys ``start`` to ``stop`` into each row's running output, sum and maximum; PARTIAL tiles need a mask."""
    k, v, k_scales, v_scales = pages
    first, last = key_limits(position, length_k, scores.window, CAUSAL)
    # The next tile's blocks are looked up a tile ahead: were the look-up and the loads that need it in one iteration,
    # the pipeline would spend half of its stages on it.
    next_block = _blocks(table, start, stop, BLOCK_SIZE, BLOCK_N)
    for n in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        key = n + tl.arange(0, BLOCK_N)
        inside = key < stop
        block = next_block.to(tl.int64)
        next_block = _blocks(table, n + BLOCK_N, stop, BLOCK_SIZE, BLOCK_N)
        offset = key % BLOCK_SIZE
        keys, values = _starts(k, block, offset, kv_head), _starts(v, block, offset, kv_head)
        k0 = _load(keys, inside, 0, D0, HEAD_DIM, PARTIAL).to(q0.dtype)
        qk = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        if D1 > 0:
            k1 = _load(keys, inside, D0, D1, HEAD_DIM, PARTIAL).to(q0.dtype)
            qk = tl.dot(q1, tl.trans(k1), qk, input_precision=PRECISION)
        if k_scales.data is not None:
            k_scale = tl.load(_starts(k_scales, block, offset, kv_head), mask=inside, other=0.0)
            qk *= k_scale[None, :]
        distance = key[None, :] - position[:, None]
        s, _ = shaped(qk, distance, 0.0, head[:, None], scores, dense, far, PARTIAL, PRECISION == "tf32x3")
        if PARTIAL:
            s = tl.where(within(key[None, :], first, last, scores.window is not None, True), s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        pivot = tl.where(new_peak == float("-inf"), 0.0, new_peak) if PARTIAL else new_peak
        p = tl.exp2(s - pivot[:, None])
        shrink = tl.exp2(peak - pivot)
        total = total * shrink + tl.sum(p, 1)
        if v_scales.data is not None:
            v_scale = tl.load(_starts(v_scales, block, offset, kv_head), mask=inside, other=0.0)
            p *= (v_scale * INT8_VALUES)[None, :]
        p = p.to(q0.dtype)
        v0 = _load(values, inside, 0, D0, HEAD_DIM, PARTIAL).to(q0.dtype)
        acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision=PRECISION)
        if D1 > 0:
            v1 = _load(values, inside, D0, D1, HEAD_DIM, PARTIAL).to(q0.dtype)
            acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision=PRECISION)
        peak = new_peak
    return acc0, acc1, total, peak


@triton.jit
def _key_range(
    first_position, last_position, length_k, scores, split, splits,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, SPLIT_KEYS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """The keys of one split, from a tile's border on: [begin, whole) is seen by all rows and far, [whole, end) by some.

    Even shares of what the rows see, or SPLIT_KEYS each wherever the rows are.
    """
    begin, end = tl.cast(0, tl.int32), length_k
    whole = length_k
    if CAUSAL:
        end = tl.minimum(end, last_position + 1)
        whole = tl.minimum(whole, first_position + 1)
    if scores.window is not None:
        begin = round_down(first_position - scores.window + 1, BLOCK_N)
        if not CAUSAL:
            end = tl.minimum(end, last_position + scores.window)
        whole = begin
    if scores.table is not None:
        whole = tl.minimum(whole, first_position - scores.reach + 1)
    if SPLIT_KEYS > 0:
        begin, end = tl.maximum(begin, split * SPLIT_KEYS), tl.minimum(end, (split + 1) * SPLIT_KEYS)
    elif SPLIT:
        share = tl.cdiv(tl.maximum(end - begin, 0), splits * BLOCK_N) * BLOCK_N
        begin += split * share
        end = tl.minimum(end, begin + share)
    return begin, tl.maximum(round_down(tl.minimum(whole, end), BLOCK_N), begin), end


@triton.jit(do_not_specialize=VARYING)
def paged_attention_kernel(
    q, out, partials, lse, pages, sequences, scores, dense, batch, tokens, most_keys, splits,
    BLOCK_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    SPLIT_KEYS: tl.constexpr, CAUSAL: tl.constexpr, SEARCH: tl.constexpr, TWO_RUNS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, NEAR_STAGES: tl.constexpr,
):  # fmt: skip
    """A block of rows of one kv head over one split of its keys: the output, or a part of it."""
    # Heads lie side by side in memory: those of a block are read at the same time.
    program = tl.program_id(0)
    kv_head, split, block = program % KV_HEADS, program // KV_HEADS % splits, program // KV_HEADS // splits
    blocks = tl.num_programs(0) // KV_HEADS // splits
    HEADS: tl.constexpr = KV_HEADS * GROUPS
    # All that a program has to know is asked for before it waits for any of it.
    queries = tl.load(sequences.cu_seqlens_q + batch).to(tl.int32)
    sequence, first_row = _locate(sequences, block, batch, GROUPS, BLOCK_M, SEARCH)
    start_q = tl.load(sequences.cu_seqlens_q + sequence).to(tl.int32)
    rows = (tl.load(sequences.cu_seqlens_q + sequence + 1).to(tl.int32) - start_q) * GROUPS
    length_k = tl.load(sequences.cache_seqlens + sequence).to(tl.int32)
    if not SPLIT:
        _clear_padding(out, queries + block, blocks, tokens, kv_head, KV_HEADS, GROUPS * HEAD_DIM)
    if first_row >= rows:
        return
    length_k = tl.minimum(tl.maximum(length_k, 0), most_keys)
    behind = length_k - rows // GROUPS  # keys before the first query's own
    row = first_row + tl.arange(0, BLOCK_M)
    head = kv_head * GROUPS + row % GROUPS
    position = row // GROUPS + behind
    last_row = tl.minimum(first_row + BLOCK_M, rows) - 1
    first_position = first_row // GROUPS + behind
    begin, whole, end = _key_range(
        first_position, last_row // GROUPS + behind, length_k, scores, split, splits, BLOCK_N, SPLIT, SPLIT_KEYS, CAUSAL
    )
    real = row < rows
    at = (start_q + row // GROUPS).to(tl.int64) * HEADS + head  # of all rows of q
    if SPLIT:  # noqa: SIM102 (one is known to the compiler, the other is not)
        if begin >= end:
            tl.store(lse + at * splits + split, tl.full((BLOCK_M,), float("-inf"), tl.float32), mask=real)
            return
    q_rows = q.data + ((start_q + row // GROUPS).to(tl.int64) * q.seq + head * q.head)
    q0 = _load(q_rows, real, 0, D0, HEAD_DIM, True)
    acc0 = tl.zeros((BLOCK_M, D0), tl.float32)
    if D1 > 0:
        q1 = _load(q_rows, real, D0, D1, HEAD_DIM, True)
        acc1 = tl.zeros((BLOCK_M, D1), tl.float32)
    else:
        q1, acc1 = 0.0, 0.0
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    table = sequences.table + sequence.to(tl.int64) * sequences.stride
    if TWO_RUNS:
        far = 0.0
        if scores.table is not None:
            far = tl.load(scores.table + head * (2 * scores.reach + 1))[:, None] * LOG2E
        acc0, acc1, total, peak = _walk(
            acc0, acc1, total, peak, q0, q1, position, head, kv_head, begin, whole, length_k, table, pages, scores,
            dense, far, BLOCK_SIZE, D0, D1, HEAD_DIM, BLOCK_N, CAUSAL, False, PRECISION, STAGES,
        )  # fmt: skip
        begin = whole
    acc0, acc1, total, peak = _walk(
        acc0, acc1, total, peak, q0, q1, position, head, kv_head, begin, end, length_k, table, pages, scores,
        dense, 0.0, BLOCK_SIZE, D0, D1, HEAD_DIM, BLOCK_N, CAUSAL, True, PRECISION, NEAR_STAGES,
    )  # fmt: skip
    empty = total == 0.0
    weight = 1.0 / tl.where(empty, 1.0, total)
    if pages[3].data is not None:
        weight *= 1.0 / INT8_VALUES
    if SPLIT:
        log_sum = tl.where(empty, float("-inf"), peak + tl.log2(total))
        tl.store(lse + at * splits + split, log_sum, mask=real)
        target = partials + (at * splits + split) * HEAD_DIM
    else:
        target = out + at * HEAD_DIM
    _store(target, real, acc0 * weight[:, None], 0, D0, HEAD_DIM)
    if D1 > 0:
        _store(target, real, acc1 * weight[:, None], D0, D1, HEAD_DIM)


@triton.jit
def _store(starts, real, value, BEGIN: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    dim = BEGIN + tl.arange(0, WIDTH)[None, :]
    tl.store(starts[:, None] + dim, value.to(starts.dtype.element_ty), mask=real[:, None] & (dim < HEAD_DIM))


@triton.jit(do_not_specialize=("batch", "splits"))
def paged_attention_join_kernel(
    partials, lse, out, cu_seqlens_q, batch, splits,
    HEADS: tl.constexpr, CHUNK: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A row's splits, weighted by their sums; zeros where no split saw a key, or the query is padding."""
    row = tl.program_id(0).to(tl.int64)
    real = row // HEADS < tl.load(cu_seqlens_q + batch)
    dim = tl.arange(0, WIDTH)
    acc = tl.zeros((WIDTH,), tl.float32)
    total, peak = tl.cast(0.0, tl.float32), tl.cast(float("-inf"), tl.float32)
    for first in tl.range(0, splits, CHUNK):
        split = first + tl.arange(0, CHUNK)
        log_sum = tl.load(lse + row * splits + split, mask=split < splits, other=float("-inf"))
        log_sum = tl.where(real, log_sum, float("-inf"))
        seen = log_sum > float("-inf")
        mask = seen[:, None] & (dim < HEAD_DIM)[None, :]
        part = tl.load(partials + ((row * splits + split) * HEAD_DIM)[:, None] + dim[None, :], mask=mask, other=0.0)
        new_peak = tl.maximum(peak, tl.max(log_sum, 0))
        pivot = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(log_sum - pivot)
        shrink = tl.exp2(peak - pivot)
        acc = acc * shrink + tl.sum(part * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        peak = new_peak
    acc /= tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * HEAD_DIM + dim, acc.to(out.dtype.element_ty), mask=dim < HEAD_DIM)


class Call(NamedTuple):
    """What a call takes beside its tensors."""

    max_seqlen_q: int
    causal: bool
    scale: float
    window: int | None
    softcap: float
    slopes: Tensor | None  # float32 (heads,)
    table: Tensor | None  # float32 (heads, 2 * reach + 1)
    k_scale: Tensor | None  # float32 (num_blocks, block_size, kv_heads)
    v_scale: Tensor | None
    batch_invariant: bool


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, cu_seqlens_q: Tensor,
    call: Call,
) -> Tensor:  # fmt: skip
    """See ``kernels.paged_attention.paged_attention``, which has checked the tensors."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    most_keys = block_table.shape[1] * k_cache.shape[1]
    if not q.numel() or not most_keys or not k_cache.numel() or not block_table.shape[0]:
        return out.zero_()
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        _launch(q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q, call, out, most_keys)
    return out


def _launch(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, cu_seqlens_q: Tensor,
    call: Call, out: Tensor, most_keys: int,
) -> None:  # fmt: skip
    tokens, heads, head_dim = q.shape
    batch, kv_heads, groups = block_table.shape[0], k_cache.shape[2], heads // k_cache.shape[2]
    rows = call.max_seqlen_q * groups
    config = paged_configs.choose(rows, k_cache.dtype, q.dtype, head_dim, call.batch_invariant)
    # One variant of the kernel serves all batch-invariant calls: another might round in other places.
    search = rows > config.block_m or call.batch_invariant
    blocks = triton.cdiv(tokens * groups, config.block_m) + batch if search else batch
    splits = paged_configs.splits(blocks * kv_heads, most_keys, config, call.batch_invariant)
    partials = lse = None
    split = splits > 1 or call.batch_invariant
    if split:
        partials = torch.empty(tokens * heads * splits * head_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(tokens * heads * splits, dtype=torch.float32, device=q.device)
    q = q if q.stride(-1) == 1 else q.contiguous()
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    cache_seqlens, cu_seqlens_q = cache_seqlens.contiguous(), cu_seqlens_q.contiguous()
    pages = (pages_of(k_cache), pages_of(v_cache), pages_of(call.k_scale), pages_of(call.v_scale))
    reach = None if call.table is None else call.table.shape[1] // 2
    # The last query sees all keys with or without a mask. A window wider than everything is none.
    window = None if call.window is None or call.window >= most_keys + call.max_seqlen_q else call.window
    paged_attention_kernel[(blocks * kv_heads * splits,)](
        Rows(q, 0, q.stride(0), q.stride(1)), out, partials, lse, pages,
        Sequences(block_table, block_table.stride(0), cache_seqlens, cu_seqlens_q),
        Scores(call.scale, call.softcap or None, window, call.slopes, call.table, reach),
        DenseBias(None, None, None, None, None), batch, tokens, most_keys, splits,
        BLOCK_SIZE=k_cache.shape[1], KV_HEADS=kv_heads, GROUPS=groups,
        **dict(zip(("D0", "D1", "HEAD_DIM"), dims(q, masked=config.block_m >= 64), strict=True)),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPLIT=split,
        SPLIT_KEYS=paged_configs.SPLIT_KEYS if call.batch_invariant else 0,
        CAUSAL=call.causal and (call.max_seqlen_q > 1 or call.batch_invariant), SEARCH=search,
        # Two loops round differently, and where one ends depends on the rows.
        TWO_RUNS=(search or call.table is not None) and window is None and not call.batch_invariant,
        PRECISION=_precision(q), STAGES=config.stages, NEAR_STAGES=config.near_stages,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if split:
        paged_attention_join_kernel[(tokens * heads,)](
            partials, lse, out, cu_seqlens_q, batch, splits, HEADS=heads, CHUNK=CHUNK, HEAD_DIM=head_dim,
            WIDTH=triton.next_power_of_2(head_dim), num_warps=2 if head_dim <= 128 else 4,
        )  # fmt: skip


def pages_of(x: Tensor | None) -> Pages:
    return Pages(None, 0, 0, 0) if x is None else Pages(x, *x.stride()[:3])
