"""Attention backward: the probabilities are computed again from the saved log-sum-exp (Dao, arXiv:2307.08691).

Two kernels, each owning what it writes, so that the result is the same bit for bit: a block of keys walks over its
queries for dk and dv, a block of queries over its keys for dq. Or one kernel, where the first adds dq up in float32 with
atomics: fewer products, but sums in no fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.attention_scores import (
    LOG2E,
    bias_pointers,
    far_values,
    kept,
    key_limits,
    key_ranges,
    load_bias,
    load_tile,
    locate,
    queries_of,
    query_limits,
    query_ranges,
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
    if grad_lse is not None:
        seen = tl.load(queries_of(lse, batch, start_q, head) + row, mask=row < length_q, other=0.0) > float("-inf")
        given = tl.load(queries_of(grad_lse, batch, start_q, head) + row, mask=(row < length_q) & seen, other=0.0)
        total -= given
    tl.store(queries_of(delta, batch, start_q, head) + row, total, mask=row < length_q)


@triton.jit
def load_statistics(lse, delta, row, length_q):
    """lse in base 2 and delta; infinity where there is no key or no row, so that its probabilities are zero."""
    real = row < length_q
    sums = tl.load(lse + row, mask=real, other=float("-inf"))
    sums = tl.where(sums == float("-inf"), float("inf"), sums * LOG2E)
    return sums, tl.load(delta + row, mask=real, other=0.0)


@triton.jit
def _walk_queries(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, do, dq, lse, delta, q_stride, do_stride, dq_stride, first_key, offset, begin,
    end, bounds, place, scores, dense, dropout, far,
    D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, NEAR: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds what the queries [begin, end) give dk and dv; scores lie transposed, (keys, queries)."""
    length_q, length_k = bounds
    batch, head, sequence_head = place
    key = first_key + tl.arange(0, BLOCK_N)
    first, last = query_limits(key, offset, length_k, scores.window, CAUSAL)
    WINDOWED: tl.constexpr = scores.window is not None
    for m in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        rows = m + tl.arange(0, BLOCK_M)
        q0 = load_tile(q, q_stride, m, length_q, BLOCK_M, 0, D0, HEAD_DIM, MASKED)
        qk = tl.dot(k0, tl.trans(q0), input_precision=PRECISION)
        if D1 > 0:
            q1 = load_tile(q, q_stride, m, length_q, BLOCK_M, D0, D1, HEAD_DIM, MASKED)
            qk = tl.dot(k1, tl.trans(q1), qk, input_precision=PRECISION)
        sums, deltas = load_statistics(lse, delta, rows, length_q)
        bias = 0.0
        if dense.data is not None:
            bias = load_bias(dense, batch, head, rows[None, :], key[:, None], length_q, length_k)
        s, capped = shaped(
            qk, (key - offset)[:, None] - rows[None, :], bias, head, scores, dense, far, NEAR, PRECISION == "tf32x3"
        )
        p = tl.exp2(s - sums[None, :])
        if MASKED:
            p = tl.where(within(rows[None, :], first, last, True, WINDOWED), p, 0.0)
        do0 = load_tile(do, do_stride, m, length_q, BLOCK_M, 0, D0, HEAD_DIM, MASKED)
        dp = tl.dot(v0, tl.trans(do0), input_precision=PRECISION)
        if D1 > 0:
            do1 = load_tile(do, do_stride, m, length_q, BLOCK_M, D0, D1, HEAD_DIM, MASKED)
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
        if dq is not None:
            dim = tl.arange(0, D0)[None, :]
            part = tl.dot(tl.trans(ds), k0, input_precision=PRECISION) * scores.scale
            pointers = dq + m * tl.cast(dq_stride, tl.int64) + (tl.arange(0, BLOCK_M)[:, None] * dq_stride + dim)
            tl.atomic_add(pointers, part, mask=(rows < length_q)[:, None] & (dim < HEAD_DIM), sem="relaxed")
            if D1 > 0:
                dim1 = D0 + tl.arange(0, D1)[None, :]
                part1 = tl.dot(tl.trans(ds), k1, input_precision=PRECISION) * scores.scale
                pointers = dq + m * tl.cast(dq_stride, tl.int64) + (tl.arange(0, BLOCK_M)[:, None] * dq_stride + dim1)
                tl.atomic_add(pointers, part1, mask=(rows < length_q)[:, None] & (dim1 < HEAD_DIM), sem="relaxed")
    return dk0, dk1, dv0, dv1


@triton.jit
def attention_backward_keys_kernel(
    q, k, v, grad_out, lse, delta, dq, dk, dv, lengths, scores, dense, dropout, heads, groups, blocks,
    D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, NEAR_STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys, summed over the query heads that share them; dq too where ``dq`` is given."""
    program = tl.program_id(0)
    block, sequence_head = program % blocks, program // blocks
    kv_heads = heads // groups
    batch, kv_head = sequence_head // kv_heads, sequence_head % kv_heads
    start_q, start_k, length_q, length_k, real_k = locate(lengths, batch)
    first_key = block * BLOCK_N
    if first_key >= length_k:
        return
    offset = length_k - length_q
    k_rows, v_rows = rows_of(k, batch, start_k, kv_head), rows_of(v, batch, start_k, kv_head)
    k0 = load_tile(k_rows, k.seq, first_key, real_k, BLOCK_N, 0, D0, HEAD_DIM, True)
    v0 = load_tile(v_rows, v.seq, first_key, real_k, BLOCK_N, 0, D0, HEAD_DIM, True)
    dk0, dv0 = tl.zeros((BLOCK_N, D0), tl.float32), tl.zeros((BLOCK_N, D0), tl.float32)
    if D1 > 0:
        k1 = load_tile(k_rows, k.seq, first_key, real_k, BLOCK_N, D0, D1, HEAD_DIM, True)
        v1 = load_tile(v_rows, v.seq, first_key, real_k, BLOCK_N, D0, D1, HEAD_DIM, True)
        dk1, dv1 = tl.zeros((BLOCK_N, D1), tl.float32), tl.zeros((BLOCK_N, D1), tl.float32)
    else:
        k1, v1, dk1, dv1 = 0.0, 0.0, 0.0, 0.0
    b0, b1, b2, b3, b4, b5 = query_ranges(first_key, offset, length_q, real_k, scores, BLOCK_M, BLOCK_N, CAUSAL)
    if first_key >= real_k:
        b5 = b0
        b1, b2, b3, b4 = b0, b0, b0, b0
    bounds = (length_q, real_k)
    for member in tl.range(0, groups):
        head = kv_head * groups + member
        place = (batch, head, batch * heads + head)
        far_left, far_right = far_values(scores, head)
        q_rows, do_rows = rows_of(q, batch, start_q, head), rows_of(grad_out, batch, start_q, head)
        dq_rows = rows_of(dq, batch, start_q, head) if dq.data is not None else None
        sums, deltas = queries_of(lse, batch, start_q, head), queries_of(delta, batch, start_q, head)
        if CAUSAL or scores.window is not None:
            dk0, dk1, dv0, dv1 = _walk_queries(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_rows, do_rows, dq_rows, sums, deltas, q.seq, grad_out.seq, dq.seq,
                first_key, offset, b0, b1, bounds, place, scores, dense, dropout, 0.0,
                D0, D1, HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, True, True, PRECISION, NEAR_STAGES,
            )  # fmt: skip
        if scores.table is not None and scores.window is None:
            if not CAUSAL:
                dk0, dk1, dv0, dv1 = _walk_queries(
                    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_rows, do_rows, dq_rows, sums, deltas, q.seq, grad_out.seq,
                    dq.seq, first_key, offset, b1, b2, bounds, place, scores, dense, dropout, far_right,
                    D0, D1, HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, False, False, PRECISION, STAGES,
                )  # fmt: skip
            dk0, dk1, dv0, dv1 = _walk_queries(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_rows, do_rows, dq_rows, sums, deltas, q.seq, grad_out.seq, dq.seq,
                first_key, offset, b2, b3, bounds, place, scores, dense, dropout, 0.0,
                D0, D1, HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, False, True, PRECISION, NEAR_STAGES,
            )  # fmt: skip
        if scores.table is None or scores.window is None:
            dk0, dk1, dv0, dv1 = _walk_queries(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_rows, do_rows, dq_rows, sums, deltas, q.seq, grad_out.seq, dq.seq,
                first_key, offset, b3, b4, bounds, place, scores, dense, dropout, far_left,
                D0, D1, HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, False, False, PRECISION, STAGES,
            )  # fmt: skip
        dk0, dk1, dv0, dv1 = _walk_queries(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_rows, do_rows, dq_rows, sums, deltas, q.seq, grad_out.seq, dq.seq,
            first_key, offset, b4, b5, bounds, place, scores, dense, dropout, 0.0,
            D0, D1, HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, True, True, PRECISION, NEAR_STAGES,
        )  # fmt: skip
    dk_rows, dv_rows = rows_of(dk, batch, start_k, kv_head), rows_of(dv, batch, start_k, kv_head)
    store_tile(dk_rows, dk.seq, first_key, length_k, dk0 * scores.scale, BLOCK_N, 0, D0, HEAD_DIM)
    store_tile(dv_rows, dv.seq, first_key, length_k, dv0, BLOCK_N, 0, D0, HEAD_DIM)
    if D1 > 0:
        store_tile(dk_rows, dk.seq, first_key, length_k, dk1 * scores.scale, BLOCK_N, D0, D1, HEAD_DIM)
        store_tile(dv_rows, dv.seq, first_key, length_k, dv1, BLOCK_N, D0, D1, HEAD_DIM)


@triton.jit
def score_gradients(
    q0, q1, do0, do1, k0, k1, v0, v1, sums, deltas, row, position, n, bounds, place, scores, dense, dropout, far,
    D1: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, NEAR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of biased scores, (queries, keys n to n + BLOCK_N - 1), and the soft-cap's tanh."""
    length_q, length_k = bounds
    key = n + tl.arange(0, BLOCK_N)[None, :]
    batch, head, sequence_head = place
    qk = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    dp = tl.dot(do0, tl.trans(v0), input_precision=PRECISION)
    if D1 > 0:
        qk = tl.dot(q1, tl.trans(k1), qk, input_precision=PRECISION)
        dp = tl.dot(do1, tl.trans(v1), dp, input_precision=PRECISION)
    bias = 0.0
    if dense.data is not None:
        bias = load_bias(dense, batch, head, row[:, None], key, length_q, length_k)
    s, capped = shaped(qk, key - position[:, None], bias, head, scores, dense, far, NEAR, PRECISION == "tf32x3")
    p = tl.exp2(s - sums[:, None])
    if MASKED:
        first, last = key_limits(position, length_k, scores.window, CAUSAL)
        p = tl.where(within(key, first, last, scores.window is not None, True), p, 0.0)
    if dropout.seed is not None:
        dp = tl.where(kept(dropout, sequence_head, row[:, None], key), dp * dropout.keep, 0.0)
    return p * (dp - deltas[:, None]), capped


@triton.jit
def _walk_keys(
    dq0, dq1, far_sum, q0, q1, do0, do1, k, v, k_stride, v_stride, sums, deltas, first_row, first_position, begin, end,
    bounds, place, scores, dense, grad_dense, dropout, far,
    D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, NEAR: tl.constexpr, ADD_UP: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Adds what the keys [begin, end) give dq, and if ADD_UP the sum of their scores' gradients to ``far_sum``."""
    length_q, length_k = bounds
    batch, head, _ = place
    row, position = first_row + tl.arange(0, BLOCK_M), first_position + tl.arange(0, BLOCK_M)
    k1, v1 = 0.0, 0.0
    for n in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        k0 = load_tile(k, k_stride, n, length_k, BLOCK_N, 0, D0, HEAD_DIM, MASKED)
        v0 = load_tile(v, v_stride, n, length_k, BLOCK_N, 0, D0, HEAD_DIM, MASKED)
        if D1 > 0:
            k1_tile = load_tile(k, k_stride, n, length_k, BLOCK_N, D0, D1, HEAD_DIM, MASKED)
            v1_tile = load_tile(v, v_stride, n, length_k, BLOCK_N, D0, D1, HEAD_DIM, MASKED)
            ds, capped = score_gradients(
                q0, q1, do0, do1, k0, k1_tile, v0, v1_tile, sums, deltas, row, position, n, bounds, place, scores,
                dense, dropout, far, D1, BLOCK_N, CAUSAL, MASKED, NEAR, PRECISION,
            )  # fmt: skip
        else:
            ds, capped = score_gradients(
                q0, q1, do0, do1, k0, k1, v0, v1, sums, deltas, row, position, n, bounds, place, scores, dense,
                dropout, far, D1, BLOCK_N, CAUSAL, MASKED, NEAR, PRECISION,
            )  # fmt: skip
        if ADD_UP:
            far_sum += tl.sum(ds, 1)
        if grad_dense.data is not None:
            key = n + tl.arange(0, BLOCK_N)[None, :]
            pointers = bias_pointers(grad_dense, batch, head, row[:, None], key)
            tl.store(pointers, ds, mask=(row < length_q)[:, None] & (key < length_k))
        if scores.softcap is not None:
            ds *= 1.0 - capped * capped
        ds = ds.to(k0.dtype)
        dq0 = tl.dot(ds, k0, dq0, input_precision=PRECISION)
        if D1 > 0:
            dq1 = tl.dot(ds, k1_tile, dq1, input_precision=PRECISION)
    return dq0, dq1, far_sum


@triton.jit
def attention_backward_queries_kernel(
    q, k, v, grad_out, lse, delta, dq, far_sums, lengths, scores, dense, grad_dense, dropout, heads, groups, blocks,
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
    k_rows, v_rows = rows_of(k, batch, start_k, head // groups), rows_of(v, batch, start_k, head // groups)
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
        queries_of(lse, batch, start_q, head), queries_of(delta, batch, start_q, head), rows, length_q
    )
    far_sum = tl.zeros((BLOCK_M,), tl.float32)
    far_left, far_right = far_values(scores, head)
    b0, b1, b2, b3, b4, b5 = key_ranges(first_position, real_k, scores, BLOCK_M, BLOCK_N, CAUSAL)
    bounds, place = (length_q, real_k), (batch, head, sequence_head)
    if scores.window is not None:
        dq0, dq1, far_sum = _walk_keys(
            dq0, dq1, far_sum, q0, q1, do0, do1, k_rows, v_rows, k.seq, v.seq, sums, deltas, first_row, first_position,
            b0, b1, bounds, place, scores, dense, grad_dense, dropout, 0.0,
            D0, D1, HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, True, True, False, PRECISION, NEAR_STAGES,
        )  # fmt: skip
    if scores.table is None or scores.window is None:
        dq0, dq1, far_sum = _walk_keys(
            dq0, dq1, far_sum, q0, q1, do0, do1, k_rows, v_rows, k.seq, v.seq, sums, deltas, first_row, first_position,
            b1, b2, bounds, place, scores, dense, grad_dense, dropout, far_left,
            D0, D1, HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, False, False, far_sums.data is not None, PRECISION, STAGES,
        )  # fmt: skip
    if scores.table is not None and scores.window is None and not CAUSAL:
        dq0, dq1, far_sum = _walk_keys(
            dq0, dq1, far_sum, q0, q1, do0, do1, k_rows, v_rows, k.seq, v.seq, sums, deltas, first_row, first_position,
            b2, b3, bounds, place, scores, dense, grad_dense, dropout, 0.0,
            D0, D1, HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, False, True, False, PRECISION, NEAR_STAGES,
        )  # fmt: skip
        dq0, dq1, far_sum = _walk_keys(
            dq0, dq1, far_sum, q0, q1, do0, do1, k_rows, v_rows, k.seq, v.seq, sums, deltas, first_row, first_position,
            b3, b4, bounds, place, scores, dense, grad_dense, dropout, far_right,
            D0, D1, HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, False, False, False, PRECISION, STAGES,
        )  # fmt: skip
    else:
        b4 = b2
    dq0, dq1, far_sum = _walk_keys(
        dq0, dq1, far_sum, q0, q1, do0, do1, k_rows, v_rows, k.seq, v.seq, sums, deltas, first_row, first_position,
        b4, b5, bounds, place, scores, dense, grad_dense, dropout, 0.0,
        D0, D1, HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, True, True, False, PRECISION, NEAR_STAGES,
    )  # fmt: skip
    dq_rows = rows_of(dq, batch, start_q, head)
    store_tile(dq_rows, dq.seq, first_row, length_q, dq0 * scores.scale, BLOCK_M, 0, D0, HEAD_DIM)
    if D1 > 0:
        store_tile(dq_rows, dq.seq, first_row, length_q, dq1 * scores.scale, BLOCK_M, D0, D1, HEAD_DIM)
    if far_sums.data is not None:
        tl.store(queries_of(far_sums, batch, start_q, head) + rows, far_sum, mask=rows < length_q)
