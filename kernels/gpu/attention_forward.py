"""Attention forward (Dao, arXiv:2307.08691): a block of queries walks over its keys with a running softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.attention_scores import (
    LN2,
    LOG2E,
    far_values,
    kept,
    key_limits,
    key_ranges,
    key_runs,
    load_bias,
    load_tile,
    locate,
    next_tile,
    queries_of,
    rows_of,
    shaped,
    store_tile,
    within,
)


@triton.jit
def _walk(
    acc0, acc1, total, peak, q0, q1, keys, run, first_row, first_position, bounds, place, scores, dense, dropout,
    far_left, far_right,
    D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, PARTIAL: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Takes a run of keys into each query's running output, sum and maximum; PARTIAL ones need a mask, or lie near."""
    start, turn, stop, jump = run
    length_q, length_k = bounds
    k, v, k_stride, v_stride, k0_tiles, k1_tiles, v0_tiles, v1_tiles, source = keys
    batch, head, sequence_head = place
    row = first_row + tl.arange(0, BLOCK_M)
    position = first_position + tl.arange(0, BLOCK_M)
    first, last = key_limits(position, length_k, scores.window, CAUSAL)
    WINDOWED: tl.constexpr = scores.window is not None
    # Where a score is a multiple of its product plus a constant, both fold into the exponent's multiply-add.
    FOLDED: tl.constexpr = (
        scores.softcap is None
        and scores.slopes is None
        and dense.data is None
        and (scores.table is None or not PARTIAL)
    )
    for i in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        n = tl.multiple_of(i + tl.where(i >= turn, jump, 0), BLOCK_N)
        far = tl.where(i >= turn, far_right, far_left)
        key = n + tl.arange(0, BLOCK_N)[None, :]
        k0 = next_tile(k0_tiles, source, k, k_stride, n, length_k, BLOCK_N, 0, D0, HEAD_DIM, PARTIAL, True)
        qk = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        if D1 > 0:
            k1 = next_tile(k1_tiles, source, k, k_stride, n, length_k, BLOCK_N, D0, D1, HEAD_DIM, PARTIAL, True)
            qk = tl.dot(q1, tl.trans(k1), qk, input_precision=PRECISION)
        if FOLDED:
            if PARTIAL:
                qk = tl.where(within(key, first, last, WINDOWED, True), qk, float("-inf"))
            scale = scores.scale * LOG2E
            new_peak = tl.maximum(peak, tl.max(qk, 1) * scale + far)
            pivot = tl.where(new_peak == float("-inf"), 0.0, new_peak) if PARTIAL else new_peak
            p = tl.exp2(qk * scale - (pivot - far)[:, None])
        else:
            bias = 0.0
            if dense.data is not None:
                bias = load_bias(dense, batch, head, row[:, None], key, length_q, length_k)
            s, _ = shaped(qk, key - position[:, None], bias, head, scores, dense, far, PARTIAL, PRECISION == "tf32x3")
            if PARTIAL:
                s = tl.where(within(key, first, last, WINDOWED, True), s, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(s, 1))
            pivot = tl.where(new_peak == float("-inf"), 0.0, new_peak) if PARTIAL else new_peak
            p = tl.exp2(s - pivot[:, None])
        shrink = tl.exp2(peak - pivot)
        total = total * shrink + tl.sum(p, 1)
        if dropout.seed is not None:
            p = tl.where(kept(dropout, sequence_head, row[:, None], key), p, 0.0)
        v0 = next_tile(v0_tiles, source, v, v_stride, n, length_k, BLOCK_N, 0, D0, HEAD_DIM, PARTIAL, EXACT)
        p = p.to(v0.dtype)
        acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision=PRECISION)
        if D1 > 0:
            v1 = next_tile(v1_tiles, source, v, v_stride, n, length_k, BLOCK_N, D0, D1, HEAD_DIM, PARTIAL, EXACT)
            acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision=PRECISION)
        peak = new_peak
    return acc0, acc1, total, peak


@triton.jit
def attention_forward_kernel(
    q, k, v, out, lse, k0_tiles, k1_tiles, v0_tiles, v1_tiles, lengths, scores, dense, dropout, heads, groups, blocks,
    D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, NEAR_STAGES: tl.constexpr,
):  # fmt: skip
    """The output and log-sum-exp of a block of one head's queries."""
    program = tl.program_id(0)
    block, sequence_head = program % blocks, program // blocks
    if CAUSAL:
        block = blocks - 1 - block  # the longest first
    batch, head = sequence_head // heads, sequence_head % heads
    start_q, start_k, length_q, length_k, real_k = locate(lengths, batch)
    first_row = block * BLOCK_M
    if first_row >= length_q:
        return
    first_position = first_row + length_k - length_q
    q_rows = rows_of(q, batch, start_q, head)
    q0 = load_tile(q_rows, q.seq, first_row, length_q, BLOCK_M, 0, D0, HEAD_DIM, True)
    acc0 = tl.zeros((BLOCK_M, D0), tl.float32)
    if D1 > 0:
        q1 = load_tile(q_rows, q.seq, first_row, length_q, BLOCK_M, D0, D1, HEAD_DIM, True)
        acc1 = tl.zeros((BLOCK_M, D1), tl.float32)
    else:
        q1, acc1 = 0.0, 0.0
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    far_left, far_right = far_values(scores, head)
    b0, b1, b2, b3, b4, b5 = key_ranges(first_position, real_k, scores, BLOCK_M, BLOCK_N, CAUSAL)
    whole, partial = key_runs(b0, b1, b2, b3, b4, b5, scores.window is not None)
    bounds, place = (length_q, real_k), (batch, head, sequence_head)
    EXACT: tl.constexpr = lengths.cu_seqlens_k is None and lengths.key_lengths is None
    keys = (
        rows_of(k, batch, start_k, head // groups), rows_of(v, batch, start_k, head // groups), k.seq, v.seq,
        k0_tiles, k1_tiles, v0_tiles, v1_tiles, (batch if lengths.cu_seqlens_k is None else 0, start_k, head // groups),
    )  # fmt: skip
    acc0, acc1, total, peak = _walk(
        acc0, acc1, total, peak, q0, q1, keys, whole, first_row, first_position, bounds, place, scores, dense, dropout,
        far_left, far_right,
        D0, D1, HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, False, EXACT, PRECISION, STAGES,
    )  # fmt: skip
    acc0, acc1, total, peak = _walk(
        acc0, acc1, total, peak, q0, q1, keys, partial, first_row, first_position, bounds, place, scores, dense,
        dropout, 0.0, 0.0,
        D0, D1, HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, True, EXACT, PRECISION, NEAR_STAGES,
    )  # fmt: skip
    empty = total == 0.0
    weight = 1.0 / tl.where(empty, 1.0, total)
    row = first_row + tl.arange(0, BLOCK_M)
    log_sum = tl.where(empty, float("-inf"), (peak + tl.log2(total)) * LN2)
    tl.store(queries_of(lse, batch, start_q, head) + row, log_sum, mask=row < length_q)
    if dropout.seed is not None:
        weight *= dropout.keep
    out_rows = rows_of(out, batch, start_q, head)
    store_tile(out_rows, out.seq, first_row, length_q, acc0 * weight[:, None], BLOCK_M, 0, D0, HEAD_DIM)
    if D1 > 0:
        store_tile(out_rows, out.seq, first_row, length_q, acc1 * weight[:, None], BLOCK_M, D0, D1, HEAD_DIM)
