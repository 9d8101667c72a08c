"""Attention forward (Dao, arXiv:2307.08691): a block of queries walks over its keys with a running softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.attention_scores import (
    LN2,
    LOG2E,
    far_values,
    fetch_tile,
    kept,
    key_limits,
    key_ranges,
    load_bias,
    load_tile,
    locate,
    queries_of,
    rows_of,
    shaped,
    store_tile,
    within,
)


@triton.jit
def _walk(
    acc0, acc1, total, peak, q0, q1, k, v, k_stride, v_stride, descriptors, source, first_row, first_position, begin, end,
    bounds, place, scores, dense, dropout, far,
    D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, NEAR: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Takes the keys [begin, end) into the running output, sum and maximum of each query."""
    length_q, length_k = bounds
    k0_tiles, k1_tiles, v0_tiles, v1_tiles = descriptors
    batch, head, sequence_head = place
    row = first_row + tl.arange(0, BLOCK_M)
    position = first_position + tl.arange(0, BLOCK_M)
    first, last = key_limits(position, length_k, scores.window, CAUSAL)
    WINDOWED: tl.constexpr = scores.window is not None
    # Where a score is a multiple of its product plus a constant, both fold into the exponent's multiply-add.
    FOLDED: tl.constexpr = (
        scores.softcap is None and scores.slopes is None and dense.data is None and (scores.table is None or not NEAR)
    )
    for n in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        key = n + tl.arange(0, BLOCK_N)[None, :]
        if k0_tiles is not None:
            k0 = fetch_tile(k0_tiles, source, n, length_k, BLOCK_N, 0, D0, True)
        else:
            k0 = load_tile(k, k_stride, n, length_k, BLOCK_N, 0, D0, HEAD_DIM, MASKED)
        qk = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        if D1 > 0:
            if k1_tiles is not None:
                k1 = fetch_tile(k1_tiles, source, n, length_k, BLOCK_N, D0, D1, True)
            else:
                k1 = load_tile(k, k_stride, n, length_k, BLOCK_N, D0, D1, HEAD_DIM, MASKED)
            qk = tl.dot(q1, tl.trans(k1), qk, input_precision=PRECISION)
        if FOLDED:
            if MASKED:
                qk = tl.where(within(key, first, last, WINDOWED, True), qk, float("-inf"))
            scale = scores.scale * LOG2E
            new_peak = tl.maximum(peak, tl.max(qk, 1) * scale + far)
            pivot = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
            p = tl.exp2(qk * scale - (pivot - far)[:, None])
        else:
            bias = 0.0
            if dense.data is not None:
                bias = load_bias(dense, batch, head, row[:, None], key, length_q, length_k)
            s, _ = shaped(qk, key - position[:, None], bias, head, scores, dense, far, NEAR, PRECISION == "tf32x3")
            if MASKED:
                s = tl.where(within(key, first, last, WINDOWED, True), s, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(s, 1))
            pivot = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
            p = tl.exp2(s - pivot[:, None])
        shrink = tl.exp2(peak - pivot)
        total = total * shrink + tl.sum(p, 1)
        if dropout.seed is not None:
            p = tl.where(kept(dropout, sequence_head, row[:, None], key), p, 0.0)
        if v0_tiles is not None:
            v0 = fetch_tile(v0_tiles, source, n, length_k, BLOCK_N, 0, D0, EXACT or not MASKED)
        else:
            v0 = load_tile(v, v_stride, n, length_k, BLOCK_N, 0, D0, HEAD_DIM, MASKED)
        p = p.to(v0.dtype)
        acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision=PRECISION)
        if D1 > 0:
            if v1_tiles is not None:
                v1 = fetch_tile(v1_tiles, source, n, length_k, BLOCK_N, D0, D1, EXACT or not MASKED)
            else:
                v1 = load_tile(v, v_stride, n, length_k, BLOCK_N, D0, D1, HEAD_DIM, MASKED)
            acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision=PRECISION)
        peak = new_peak
    return acc0, acc1, total, peak


@triton.jit
def attention_forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    k0_tiles,
    k1_tiles,
    v0_tiles,
    v1_tiles,
    lengths,
    scores,
    dense,
    dropout,
    heads,
    groups,
    blocks,
    D0: tl.constexpr,
    D1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    NEAR_STAGES: tl.constexpr,
):
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
    k_rows, v_rows = rows_of(k, batch, start_k, head // groups), rows_of(v, batch, start_k, head // groups)
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
    bounds, place = (length_q, real_k), (batch, head, sequence_head)
    descriptors = (k0_tiles, k1_tiles, v0_tiles, v1_tiles)
    EXACT: tl.constexpr = lengths.cu_seqlens_k is None and lengths.key_lengths is None
    source = (batch if lengths.cu_seqlens_k is None else 0, start_k, head // groups)
    if scores.window is not None:
        acc0, acc1, total, peak = _walk(
            acc0, acc1, total, peak, q0, q1, k_rows, v_rows, k.seq, v.seq, descriptors, source, first_row, first_position, b0, b1, bounds,
            place, scores, dense, dropout, 0.0, D0, D1, HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, True, True, EXACT, PRECISION,
            NEAR_STAGES,
        )  # fmt: skip
    if scores.table is None or scores.window is None:
        acc0, acc1, total, peak = _walk(
            acc0, acc1, total, peak, q0, q1, k_rows, v_rows, k.seq, v.seq, descriptors, source, first_row, first_position, b1, b2, bounds,
            place, scores, dense, dropout, far_left, D0, D1, HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, False, False, EXACT,
            PRECISION, STAGES,
        )  # fmt: skip
    if scores.table is not None and scores.window is None and not CAUSAL:
        acc0, acc1, total, peak = _walk(
            acc0, acc1, total, peak, q0, q1, k_rows, v_rows, k.seq, v.seq, descriptors, source, first_row, first_position, b2, b3, bounds,
            place, scores, dense, dropout, 0.0, D0, D1, HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, False, True, EXACT, PRECISION,
            NEAR_STAGES,
        )  # fmt: skip
        acc0, acc1, total, peak = _walk(
            acc0, acc1, total, peak, q0, q1, k_rows, v_rows, k.seq, v.seq, descriptors, source, first_row, first_position, b3, b4, bounds,
            place, scores, dense, dropout, far_right, D0, D1, HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, False, False, EXACT,
            PRECISION, STAGES,
        )  # fmt: skip
    else:
        b4 = b2
    acc0, acc1, total, peak = _walk(
        acc0, acc1, total, peak, q0, q1, k_rows, v_rows, k.seq, v.seq, descriptors, source, first_row, first_position, b4, b5, bounds,
        place, scores, dense, dropout, 0.0, D0, D1, HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, True, True, EXACT, PRECISION,
        NEAR_STAGES,
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
