"""The gradient of T5's relative bias: the scores' gradients summed along diagonals, in a band around p = j.

A distance of reach or more shares its number with all farther ones, so only tiles that a diagonal with |j - p| <
reach crosses need their sums apart: a few a block of queries, whatever the sequence's length. A tile is sheared in
registers so that its diagonals become columns, which are then summed. Two neighbouring tiles share half of their
diagonals: what one leaves unfinished the next completes, and each finished sum is written once, to a place of its
block's own. Whole far tiles are not visited: the kernel for dq, which is there anyway, adds those up.

(A query's gradients over all its keys add up to nothing, so far sums could be had from the near ones. But that sum is
only as exact as the output that was rounded to half precision, and all of its error would be theirs.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.attention_backward import load_statistics, score_gradients
from kernels.gpu.attention_scores import VARYING, key_ranges, load_tile, locate, per_query, rows_of


@triton.jit
def _finish(sums, diagonal, partial, reach, left, right, BLOCK: tl.constexpr):
    """Writes BLOCK finished sums, of distances ``diagonal`` on, and adds those of far ones up."""
    distance = diagonal + tl.arange(0, BLOCK)
    tl.store(partial + distance + reach, sums, mask=(distance < reach) & (distance > -reach))
    left += tl.sum(tl.where(distance <= -reach, sums, 0.0), 0)
    right += tl.sum(tl.where(distance >= reach, sums, 0.0), 0)
    return left, right


@triton.jit
def _gradients(
    q0, q1, do0, do1, k, v, k_stride, v_stride, sums, deltas, rows, position, n, bounds, place, scores, dense, dropout,
    D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The scores' gradients of a tile at key ``n``, masked."""
    _length_q, length_k = bounds
    k0 = load_tile(k, k_stride, n, length_k, BLOCK, 0, D0, HEAD_DIM, True)
    v0 = load_tile(v, v_stride, n, length_k, BLOCK, 0, D0, HEAD_DIM, True)
    if D1 > 0:
        k1 = load_tile(k, k_stride, n, length_k, BLOCK, D0, D1, HEAD_DIM, True)
        v1 = load_tile(v, v_stride, n, length_k, BLOCK, D0, D1, HEAD_DIM, True)
    else:
        k1, v1 = 0.0, 0.0
    ds, _capped = score_gradients(
        q0, q1, do0, do1, k0, k1, v0, v1, sums, deltas, rows, position, n, bounds, place, scores, dense, dropout, 0.0,
        D1, BLOCK, CAUSAL, True, PRECISION,
    )  # fmt: skip
    return ds


@triton.jit(do_not_specialize=VARYING)
def attention_bias_gradient_kernel(
    q, k, v, grad_out, lse, delta, partials, lengths, seqlen_q, seqlen_k, query_stride, scores, dense, dropout, heads,
    groups, blocks,
    D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    COUNTED_M: tl.constexpr, COUNTED_N: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One block of queries' share: ``partials`` is float32 (batch, blocks, heads, 2 * reach + 1), zeros before.

    Takes the tiles that the kernel for dq did not count: its own are of COUNTED_M queries and COUNTED_N keys, multiples
    of BLOCK.
    """
    program = tl.program_id(0)
    block, sequence_head = program % blocks, program // blocks
    batch, head = sequence_head // heads, sequence_head % heads
    start_q, start_k, length_q, length_k, real_k = locate(lengths, batch, seqlen_q, seqlen_k)
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
    place_q = per_query(lengths, batch, heads, head, start_q, query_stride)
    rows, position = first_row + tl.arange(0, BLOCK), first + tl.arange(0, BLOCK)
    sums, deltas = load_statistics(lse + place_q, delta + place_q, rows, length_q, True)
    bounds, place = (length_q, real_k), (batch, head, sequence_head)

    counted = first_row // COUNTED_M * COUNTED_M + length_k - length_q
    b0, _b1, b2, b3, b4, b5 = key_ranges(counted, real_k, scores, COUNTED_M, COUNTED_N, CAUSAL)
    begin = b0 if scores.window is not None else b2
    # Past far tiles that were counted, only a tail is left, at distances that are far as well.
    end = tl.where(b4 > b3, b3, b5)
    reach = tl.cast(scores.reach, tl.int32)
    partial = partials + ((tl.cast(batch, tl.int64) * blocks + block) * heads + head) * (2 * reach + 1)
    column, shift = tl.arange(0, BLOCK)[None, :], tl.arange(0, BLOCK)[:, None]
    source = (column + shift) % BLOCK
    wrapped = column + shift >= BLOCK
    unfinished = tl.zeros((BLOCK,), tl.float32)
    left, right = 0.0, 0.0
    for n in tl.range(begin, end, BLOCK, num_stages=STAGES):
        ds = _gradients(
            q0, q1, do0, do1, k_rows, v_rows, k.seq, v.seq, sums, deltas, rows, position, n, bounds, place, scores,
            dense, dropout, D0, D1, HEAD_DIM, BLOCK, CAUSAL, PRECISION,
        )  # fmt: skip
        sheared = tl.gather(ds, source, 1)
        complete = unfinished + tl.sum(tl.where(wrapped, sheared, 0.0), 0)
        left, right = _finish(complete, n - first - BLOCK, partial, reach, left, right, BLOCK)
        unfinished = tl.sum(tl.where(wrapped, 0.0, sheared), 0)
    if end > begin:
        last = begin + (end - 1 - begin) // BLOCK * BLOCK
        left, right = _finish(unfinished, last - first, partial, reach, left, right, BLOCK)
    for n in tl.range(tl.where(b4 > b3, b4, b5), b5, BLOCK, num_stages=1):
        ds = _gradients(
            q0, q1, do0, do1, k_rows, v_rows, k.seq, v.seq, sums, deltas, rows, position, n, bounds, place, scores,
            dense, dropout, D0, D1, HEAD_DIM, BLOCK, CAUSAL, PRECISION,
        )  # fmt: skip
        right += tl.sum(tl.sum(ds, 1), 0)
    tl.store(partial, left)
    tl.store(partial + 2 * reach, right)
