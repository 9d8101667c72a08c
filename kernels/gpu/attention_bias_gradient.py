"""The gradient of T5's relative bias: the scores' gradients summed along diagonals, in a band around p = j.

A distance of reach or more shares its number with all farther ones, so only tiles that a diagonal with |j - p| <
reach crosses need their sums apart: a few a block of queries, whatever the sequence's length. A tile is sheared in
registers so that its diagonals become columns, which are then summed. Two neighbouring tiles share half of their
diagonals: what one leaves unfinished the next completes, and each finished sum is written once, to a place of its
block's own.

The far sums need no walk of their own. A query's gradients over all its keys add up to its log-sum-exp's gradient, so
a causal block's far keys have what its near ones leave; where there are two far sides, ``attention_backward`` counted
one of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.attention_backward import load_statistics, score_gradients
from kernels.gpu.attention_scores import key_ranges, load_tile, locate, queries_of, rows_of


@triton.jit
def _finish(sums, diagonal, partial, reach, near, left, right, BLOCK: tl.constexpr):
    """Writes BLOCK finished sums, of distances ``diagonal`` on, and adds those of far ones up."""
    distance = diagonal + tl.arange(0, BLOCK)
    inside = (distance < reach) & (distance > -reach)
    tl.store(partial + distance + reach, sums, mask=inside)
    near += tl.sum(tl.where(inside, sums, 0.0), 0)
    left += tl.sum(tl.where(distance <= -reach, sums, 0.0), 0)
    right += tl.sum(tl.where(distance >= reach, sums, 0.0), 0)
    return near, left, right


@triton.jit
def attention_bias_gradient_kernel(
    q, k, v, grad_out, lse, delta, grad_lse, far_sums, partials, lengths, scores, dense, dropout, heads, groups, blocks,
    D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    COUNTED_M: tl.constexpr, COUNTED_N: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One block of queries' share: ``partials`` is float32 (batch, blocks, heads, 2 * reach + 1), zeros before.

    ``far_sums`` were counted by a kernel with tiles of COUNTED_M queries, a multiple of BLOCK, and COUNTED_N keys.
    """
    program = tl.program_id(0)
    block, sequence_head = program % blocks, program // blocks
    batch, head = sequence_head // heads, sequence_head % heads
    start_q, start_k, length_q, length_k, real_k = locate(lengths, batch)
    first_row = block * BLOCK
    if first_row >= length_q:
        return
    first = first_row + length_k - length_q  # the position of the first query
    q_rows, do_rows = rows_of(q, batch, start_q, head), rows_of(grad_out, batch, start_q, head)
    k_rows, v_rows = rows_of(k, batch, start_k, head // groups), rows_of(v, batch, start_k, head // groups)
    q0 = load_tile(q_rows, q.seq, first_row, length_q, BLOCK, 0, D0, HEAD_DIM, True)
    do0 = load_tile(do_rows, grad_out.seq, first_row, length_q, BLOCK, 0, D0, HEAD_DIM, True)
    if D1 > 0:
        q1 = load_tile(q_rows, q.seq, first_row, length_q, BLOCK, D0, D1, HEAD_DIM, True)
        do1 = load_tile(do_rows, grad_out.seq, first_row, length_q, BLOCK, D0, D1, HEAD_DIM, True)
    else:
        q1, do1 = 0.0, 0.0
    rows = first_row + tl.arange(0, BLOCK)
    position = first + tl.arange(0, BLOCK)
    lse_rows = queries_of(lse, batch, start_q, head)
    sums, deltas = load_statistics(lse_rows, queries_of(delta, batch, start_q, head), rows, length_q, True)
    bounds, place = (length_q, real_k), (batch, head, sequence_head)

    begin, _, near_begin, _, _, end = key_ranges(first, real_k, scores, BLOCK, BLOCK, CAUSAL)
    reach = tl.cast(scores.reach, tl.int32)
    if scores.window is None:
        begin = near_begin
        if not CAUSAL:
            counted_first = first_row // COUNTED_M * COUNTED_M + length_k - length_q
            _, _, begin, _, _, _ = key_ranges(counted_first, real_k, scores, COUNTED_M, COUNTED_N, CAUSAL)
            end = tl.minimum(end, tl.maximum(first + BLOCK - 1 + reach, begin))
    partial = partials + (tl.cast(batch, tl.int64) * blocks + block) * heads * (2 * reach + 1) + head * (2 * reach + 1)
    column, shift = tl.arange(0, BLOCK)[None, :], tl.arange(0, BLOCK)[:, None]
    source = (column + shift) % BLOCK
    wrapped = column + shift >= BLOCK
    unfinished = tl.zeros((BLOCK,), tl.float32)
    near, left, right = 0.0, 0.0, 0.0
    for n in tl.range(begin, end, BLOCK, num_stages=STAGES):
        k0 = load_tile(k_rows, k.seq, n, real_k, BLOCK, 0, D0, HEAD_DIM, True)
        v0 = load_tile(v_rows, v.seq, n, real_k, BLOCK, 0, D0, HEAD_DIM, True)
        if D1 > 0:
            k1 = load_tile(k_rows, k.seq, n, real_k, BLOCK, D0, D1, HEAD_DIM, True)
            v1 = load_tile(v_rows, v.seq, n, real_k, BLOCK, D0, D1, HEAD_DIM, True)
        else:
            k1, v1 = 0.0, 0.0
        ds, _capped = score_gradients(
            q0, q1, do0, do1, k0, k1, v0, v1, sums, deltas, rows, position, n, bounds, place, scores, dense, dropout,
            0.0, D1, BLOCK, CAUSAL, True, PRECISION,
        )  # fmt: skip
        sheared = tl.gather(ds, source, 1)
        complete = unfinished + tl.sum(tl.where(wrapped, sheared, 0.0), 0)
        near, left, right = _finish(complete, n - first - BLOCK, partial, reach, near, left, right, BLOCK)
        unfinished = tl.sum(tl.where(wrapped, 0.0, sheared), 0)
    if end > begin:
        last = begin + (end - 1 - begin) // BLOCK * BLOCK
        near, left, right = _finish(unfinished, last - first, partial, reach, near, left, right, BLOCK)
    if scores.window is None:
        total = 0.0
        if grad_lse.data is not None:
            given = tl.load(queries_of(grad_lse, batch, start_q, head) + rows, mask=rows < length_q, other=0.0)
            total = tl.sum(tl.where(sums < float("inf"), given, 0.0), 0)
        if far_sums.data is not None:
            counted = tl.load(queries_of(far_sums, batch, start_q, head) + rows, mask=rows < length_q, other=0.0)
            left += tl.sum(counted, 0)
            right = total - near - left
        else:
            left = total - near
    tl.store(partial, left)
    tl.store(partial + 2 * reach, right)
