"""Attention backward: the probabilities are computed again from the saved log-sum-exp (Dao, arXiv:2307.08691).

Two kernels, each owning what it writes, so that the result is the same bit for bit: a block of keys walks over its
queries for dk and dv, a block of queries over its keys for dq. Or one kernel, where the first adds dq up in float32
with atomics: fewer products, but sums in no fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.attention_scores import (
    LOG2E,
    Rows,
    add_tile,
    bias_pointers,
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
    query_limits,
    query_ranges,
    query_runs,
    rows_of,
    shaped,
    store_tile,
    within,
)


@triton.jit
def attention_delta_kernel(
    out, grad_out, lse, grad_lse, delta, lengths, heads, blocks,
    D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = sum(out * grad_out) - grad_lse: what the softmax takes off each score's gradient."""
    program = tl.program_id(0)
    block, sequence_head = program % blocks, program // blocks
    batch, head = sequence_head // heads, sequence_head % heads
    start_q, _, length_q, _, _ = locate(lengths, batch)
    first = block * BLOCK_M
    if first >= length_q:
        return
    o_rows, do_rows = rows_of(out, batch, start_q, head), rows_of(grad_out, batch, start_q, head)
    o = load_tile(o_rows, out.seq, first, length_q, BLOCK_M, 0, D0, HEAD_DIM, True).to(tl.float32)
    do = load_tile(do_rows, grad_out.seq, first, length_q, BLOCK_M, 0, D0, HEAD_DIM, True).to(tl.float32)
    total = tl.sum(o * do, 1)
    if D1 > 0:
        o = load_tile(o_rows, out.seq, first, length_q, BLOCK_M, D0, D1, HEAD_DIM, True).to(tl.float32)
        do = load_tile(do_rows, grad_out.seq, first, length_q, BLOCK_M, D0, D1, HEAD_DIM, True).to(tl.float32)
        total += tl.sum(o * do, 1)
    row = first + tl.arange(0, BLOCK_M)
    if grad_lse.data is not None:
        seen = tl.load(queries_of(lse, batch, start_q, head) + row, mask=row < length_q, other=0.0) > float("-inf")
        given = tl.load(queries_of(grad_lse, batch, start_q, head) + row, mask=(row < length_q) & seen, other=0.0)
        total -= given
    tl.store(queries_of(delta, batch, start_q, head) + row, total, mask=row < length_q)


@triton.jit
def load_statistics(lse, delta, row, length_q, MASKED: tl.constexpr):
    """lse in base 2 and delta; infinity where there is no key or no row, so that its probabilities are zero."""
    if MASKED:
        real = row < length_q
        sums, deltas = tl.load(lse + row, mask=real, other=float("-inf")), tl.load(delta + row, mask=real, other=0.0)
    else:
        sums, deltas = tl.load(lse + row), tl.load(delta + row)
    return tl.where(sums == float("-inf"), float("inf"), sums * LOG2E), deltas


@triton.jit
def _walk_queries(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, queries, dq, run, first_key, offset, bounds, place, scores, dense, dropout,
    far_right, far_left,
    D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, PARTIAL: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds what a run of queries gives dk and dv; scores lie transposed, (keys, queries)."""
    start, turn, stop, jump = run
    length_q, length_k = bounds
    batch, head, sequence_head = place
    q, do, q_stride, do_stride, lse, delta, q0_tiles, q1_tiles, do0_tiles, do1_tiles, source = queries
    key = first_key + tl.arange(0, BLOCK_N)
    first, last = query_limits(key, offset, length_k, scores.window, CAUSAL)
    WINDOWED: tl.constexpr = scores.window is not None
    for i in tl.range(start, stop, BLOCK_M, num_stages=STAGES):
        m = tl.multiple_of(i + tl.where(i >= turn, jump, 0), BLOCK_M)
        far = tl.where(i >= turn, far_left, far_right)
        rows = m + tl.arange(0, BLOCK_M)
        q0 = next_tile(q0_tiles, source, q, q_stride, m, length_q, BLOCK_M, 0, D0, HEAD_DIM, PARTIAL, EXACT)
        qk = tl.dot(k0, tl.trans(q0), input_precision=PRECISION)
        if D1 > 0:
            q1 = next_tile(q1_tiles, source, q, q_stride, m, length_q, BLOCK_M, D0, D1, HEAD_DIM, PARTIAL, EXACT)
            qk = tl.dot(k1, tl.trans(q1), qk, input_precision=PRECISION)
        sums, deltas = load_statistics(lse, delta, rows, length_q, PARTIAL)
        bias = 0.0
        if dense.data is not None:
            bias = load_bias(dense, batch, head, rows[None, :], key[:, None], length_q, length_k)
        distance = (key - offset)[:, None] - rows[None, :]
        s, capped = shaped(qk, distance, bias, head, scores, dense, far, PARTIAL, PRECISION == "tf32x3")
        p = tl.exp2(s - sums[None, :])
        if PARTIAL:
            p = tl.where(within(rows[None, :], first, last, True, WINDOWED), p, 0.0)
        do0 = next_tile(do0_tiles, source, do, do_stride, m, length_q, BLOCK_M, 0, D0, HEAD_DIM, PARTIAL, EXACT)
        dp = tl.dot(v0, tl.trans(do0), input_precision=PRECISION)
        if D1 > 0:
            do1 = next_tile(do1_tiles, source, do, do_stride, m, length_q, BLOCK_M, D0, D1, HEAD_DIM, PARTIAL, EXACT)
            dp = tl.dot(v1, tl.trans(do1), dp, input_precision=PRECISION)
        dropped = p
        if dropout.seed is not None:
            keep = kept(dropout, sequence_head, rows[None, :], key[:, None])
            dropped = tl.where(keep, p * dropout.keep, 0.0)
            dp = tl.where(keep, dp * dropout.keep, 0.0)
        dropped = dropped.to(do0.dtype)
        dv0 = tl.dot(dropped, do0, dv0, input_precision=PRECISION)
        if D1 > 0:
            dv1 = tl.dot(dropped, do1, dv1, input_precision=PRECISION)
        ds = p * (dp - deltas[None, :])
        if scores.softcap is not None:
            ds *= 1.0 - capped * capped
        ds = ds.to(q0.dtype)
        dk0 = tl.dot(ds, q0, dk0, input_precision=PRECISION)
        if D1 > 0:
            dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
        if dq.data is not None:
            part = tl.dot(tl.trans(ds), k0, input_precision=PRECISION) * scores.scale
            add_tile(dq.data, dq.seq, m, length_q, part, BLOCK_M, 0, D0, HEAD_DIM)
            if D1 > 0:
                part = tl.dot(tl.trans(ds), k1, input_precision=PRECISION) * scores.scale
                add_tile(dq.data, dq.seq, m, length_q, part, BLOCK_M, D0, D1, HEAD_DIM)
    return dk0, dk1, dv0, dv1


@triton.jit
def attention_backward_keys_kernel(
    q, k, v, grad_out, lse, delta, dq, dk, dv, q0_tiles, q1_tiles, do0_tiles, do1_tiles, lengths, scores, dense,
    dropout, heads, groups, blocks,
    D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, NEAR_STAGES: tl.constexpr,
):  # fmt: skip
    """What one head's queries give dk and dv of a block of keys; dq too where it is given.

    Query heads that share keys write apart, to be summed: a loop over them here would keep too much in registers.
    """
    program = tl.program_id(0)
    block, sequence_head = program % blocks, program // blocks
    batch, head = sequence_head // heads, sequence_head % heads
    start_q, start_k, length_q, length_k, real_k = locate(lengths, batch)
    first_key = block * BLOCK_N
    if first_key >= length_k:
        return
    offset = length_k - length_q
    k_rows, v_rows = rows_of(k, batch, start_k, head // groups), rows_of(v, batch, start_k, head // groups)
    k0 = load_tile(k_rows, k.seq, first_key, real_k, BLOCK_N, 0, D0, HEAD_DIM, True)
    v0 = load_tile(v_rows, v.seq, first_key, real_k, BLOCK_N, 0, D0, HEAD_DIM, True)
    dk0, dv0 = tl.zeros((BLOCK_N, D0), tl.float32), tl.zeros((BLOCK_N, D0), tl.float32)
    if D1 > 0:
        k1 = load_tile(k_rows, k.seq, first_key, real_k, BLOCK_N, D0, D1, HEAD_DIM, True)
        v1 = load_tile(v_rows, v.seq, first_key, real_k, BLOCK_N, D0, D1, HEAD_DIM, True)
        dk1, dv1 = tl.zeros((BLOCK_N, D1), tl.float32), tl.zeros((BLOCK_N, D1), tl.float32)
    else:
        k1, v1, dk1, dv1 = 0.0, 0.0, 0.0, 0.0
    if first_key >= real_k:
        length_q = 0  # nobody sees these keys
    b0, b1, b2, b3, b4, b5 = query_ranges(first_key, offset, length_q, real_k, scores, BLOCK_M, BLOCK_N, CAUSAL)
    whole, partial = query_runs(b0, b1, b2, b3, b4, b5, CAUSAL or scores.window is not None)
    bounds, place = (length_q, real_k), (batch, head, sequence_head)
    far_left, far_right = far_values(scores, head)
    EXACT: tl.constexpr = lengths.cu_seqlens_q is None
    dq_rows = dq
    if dq.data is not None:
        dq_rows = Rows(rows_of(dq, batch, start_q, head), 0, dq.seq, 0)
    queries = (
        rows_of(q, batch, start_q, head), rows_of(grad_out, batch, start_q, head), q.seq, grad_out.seq,
        queries_of(lse, batch, start_q, head), queries_of(delta, batch, start_q, head),
        q0_tiles, q1_tiles, do0_tiles, do1_tiles, (batch if lengths.cu_seqlens_q is None else 0, start_q, head),
    )  # fmt: skip
    dk0, dk1, dv0, dv1 = _walk_queries(
        dk0, dk1, dv0, dv1, k0, k1, v0, v1, queries, dq_rows, whole, first_key, offset, bounds, place, scores,
        dense, dropout, far_right, far_left,
        D0, D1, HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, False, EXACT, PRECISION, STAGES,
    )  # fmt: skip
    dk0, dk1, dv0, dv1 = _walk_queries(
        dk0, dk1, dv0, dv1, k0, k1, v0, v1, queries, dq_rows, partial, first_key, offset, bounds, place, scores,
        dense, dropout, 0.0, 0.0,
        D0, D1, HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, True, EXACT, PRECISION, NEAR_STAGES,
    )  # fmt: skip
    dk_rows, dv_rows = rows_of(dk, batch, start_k, head), rows_of(dv, batch, start_k, head)
    store_tile(dk_rows, dk.seq, first_key, length_k, dk0 * scores.scale, BLOCK_N, 0, D0, HEAD_DIM)
    store_tile(dv_rows, dv.seq, first_key, length_k, dv0, BLOCK_N, 0, D0, HEAD_DIM)
    if D1 > 0:
        store_tile(dk_rows, dk.seq, first_key, length_k, dk1 * scores.scale, BLOCK_N, D0, D1, HEAD_DIM)
        store_tile(dv_rows, dv.seq, first_key, length_k, dv1, BLOCK_N, D0, D1, HEAD_DIM)


@triton.jit
def score_gradients(
    q0, q1, do0, do1, k0, k1, v0, v1, sums, deltas, row, position, n, bounds, place, scores, dense, dropout, far,
    D1: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of biased scores, (queries, keys n to n + BLOCK_N - 1), and the soft-cap's tanh."""
    length_q, length_k = bounds
    batch, head, sequence_head = place
    key = n + tl.arange(0, BLOCK_N)[None, :]
    qk = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    dp = tl.dot(do0, tl.trans(v0), input_precision=PRECISION)
    if D1 > 0:
        qk = tl.dot(q1, tl.trans(k1), qk, input_precision=PRECISION)
        dp = tl.dot(do1, tl.trans(v1), dp, input_precision=PRECISION)
    bias = 0.0
    if dense.data is not None:
        bias = load_bias(dense, batch, head, row[:, None], key, length_q, length_k)
    s, capped = shaped(qk, key - position[:, None], bias, head, scores, dense, far, PARTIAL, PRECISION == "tf32x3")
    p = tl.exp2(s - sums[:, None])
    if PARTIAL:
        first, last = key_limits(position, length_k, scores.window, CAUSAL)
        p = tl.where(within(key, first, last, scores.window is not None, True), p, 0.0)
    if dropout.seed is not None:
        dp = tl.where(kept(dropout, sequence_head, row[:, None], key), dp * dropout.keep, 0.0)
    return p * (dp - deltas[:, None]), capped


@triton.jit
def _walk_keys(
    dq0, dq1, far_sum, q0, q1, do0, do1, keys, run, sums, deltas, first_row, first_position, bounds, place, scores,
    dense, grad_dense, dropout, far_left, far_right,
    D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, PARTIAL: tl.constexpr, ADD_UP: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Adds what a run of keys gives dq; if ADD_UP, also its scores' gradients, before the turn, to ``far_sum``."""
    start, turn, stop, jump = run
    length_q, length_k = bounds
    batch, head, _ = place
    k, v, k_stride, v_stride, k0_tiles, k1_tiles, v0_tiles, v1_tiles, source = keys
    row, position = first_row + tl.arange(0, BLOCK_M), first_position + tl.arange(0, BLOCK_M)
    for i in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        n = tl.multiple_of(i + tl.where(i >= turn, jump, 0), BLOCK_N)
        far = tl.where(i >= turn, far_right, far_left)
        k0 = next_tile(k0_tiles, source, k, k_stride, n, length_k, BLOCK_N, 0, D0, HEAD_DIM, PARTIAL, EXACT)
        v0 = next_tile(v0_tiles, source, v, v_stride, n, length_k, BLOCK_N, 0, D0, HEAD_DIM, PARTIAL, EXACT)
        if D1 > 0:
            k1 = next_tile(k1_tiles, source, k, k_stride, n, length_k, BLOCK_N, D0, D1, HEAD_DIM, PARTIAL, EXACT)
            v1 = next_tile(v1_tiles, source, v, v_stride, n, length_k, BLOCK_N, D0, D1, HEAD_DIM, PARTIAL, EXACT)
        else:
            k1, v1 = 0.0, 0.0
        ds, capped = score_gradients(
            q0, q1, do0, do1, k0, k1, v0, v1, sums, deltas, row, position, n, bounds, place, scores, dense, dropout,
            far, D1, BLOCK_N, CAUSAL, PARTIAL, PRECISION,
        )  # fmt: skip
        if ADD_UP:
            far_sum += tl.where(i >= turn, 0.0, tl.sum(ds, 1))
        if grad_dense.data is not None:
            key = n + tl.arange(0, BLOCK_N)[None, :]
            pointers = bias_pointers(grad_dense, batch, head, row[:, None], key)
            tl.store(pointers, ds, mask=(row < length_q)[:, None] & (key < length_k))
        if scores.softcap is not None:
            ds *= 1.0 - capped * capped
        ds = ds.to(k0.dtype)
        dq0 = tl.dot(ds, k0, dq0, input_precision=PRECISION)
        if D1 > 0:
            dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
    return dq0, dq1, far_sum


@triton.jit
def attention_backward_queries_kernel(
    q, k, v, grad_out, lse, delta, dq, far_sums, k0_tiles, k1_tiles, v0_tiles, v1_tiles, lengths, scores, dense,
    grad_dense, dropout, heads, groups, blocks,
    D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, NEAR_STAGES: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries; ``far_sums``, where given, the sum of each one's gradients at distances <= -reach."""
    program = tl.program_id(0)
    block, sequence_head = program % blocks, program // blocks
    if CAUSAL:
        block = blocks - 1 - block
    batch, head = sequence_head // heads, sequence_head % heads
    start_q, start_k, length_q, length_k, real_k = locate(lengths, batch)
    first_row = block * BLOCK_M
    if first_row >= length_q:
        return
    first_position = first_row + length_k - length_q
    q_rows, do_rows = rows_of(q, batch, start_q, head), rows_of(grad_out, batch, start_q, head)
    q0 = load_tile(q_rows, q.seq, first_row, length_q, BLOCK_M, 0, D0, HEAD_DIM, True)
    do0 = load_tile(do_rows, grad_out.seq, first_row, length_q, BLOCK_M, 0, D0, HEAD_DIM, True)
    dq0 = tl.zeros((BLOCK_M, D0), tl.float32)
    if D1 > 0:
        q1 = load_tile(q_rows, q.seq, first_row, length_q, BLOCK_M, D0, D1, HEAD_DIM, True)
        do1 = load_tile(do_rows, grad_out.seq, first_row, length_q, BLOCK_M, D0, D1, HEAD_DIM, True)
        dq1 = tl.zeros((BLOCK_M, D1), tl.float32)
    else:
        q1, do1, dq1 = 0.0, 0.0, 0.0
    rows = first_row + tl.arange(0, BLOCK_M)
    sums, deltas = load_statistics(
        queries_of(lse, batch, start_q, head), queries_of(delta, batch, start_q, head), rows, length_q, True
    )
    far_sum = tl.zeros((BLOCK_M,), tl.float32)
    far_left, far_right = far_values(scores, head)
    b0, b1, b2, b3, b4, b5 = key_ranges(first_position, real_k, scores, BLOCK_M, BLOCK_N, CAUSAL)
    whole, partial = key_runs(b0, b1, b2, b3, b4, b5, scores.window is not None)
    bounds, place = (length_q, real_k), (batch, head, sequence_head)
    EXACT: tl.constexpr = lengths.cu_seqlens_k is None and lengths.key_lengths is None
    keys = (
        rows_of(k, batch, start_k, head // groups), rows_of(v, batch, start_k, head // groups), k.seq, v.seq,
        k0_tiles, k1_tiles, v0_tiles, v1_tiles, (batch if lengths.cu_seqlens_k is None else 0, start_k, head // groups),
    )  # fmt: skip
    dq0, dq1, far_sum = _walk_keys(
        dq0, dq1, far_sum, q0, q1, do0, do1, keys, whole, sums, deltas, first_row, first_position, bounds, place,
        scores, dense, grad_dense, dropout, far_left, far_right,
        D0, D1, HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, False, far_sums.data is not None, EXACT, PRECISION, STAGES,
    )  # fmt: skip
    dq0, dq1, far_sum = _walk_keys(
        dq0, dq1, far_sum, q0, q1, do0, do1, keys, partial, sums, deltas, first_row, first_position, bounds, place,
        scores, dense, grad_dense, dropout, 0.0, 0.0,
        D0, D1, HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, True, False, EXACT, PRECISION, NEAR_STAGES,
    )  # fmt: skip
    dq_rows = rows_of(dq, batch, start_q, head)
    store_tile(dq_rows, dq.seq, first_row, length_q, dq0 * scores.scale, BLOCK_M, 0, D0, HEAD_DIM)
    if D1 > 0:
        store_tile(dq_rows, dq.seq, first_row, length_q, dq1 * scores.scale, BLOCK_M, D0, D1, HEAD_DIM)
    if far_sums.data is not None:
        tl.store(queries_of(far_sums, batch, start_q, head) + rows, far_sum, mask=rows < length_q)
