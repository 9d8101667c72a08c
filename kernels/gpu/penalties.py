"""Penalties of the tokens that a row holds already: each distinct token of its history once, without atomics.

A program takes a chunk of a history and reads all of it: a token's first place writes its score, the others nothing.
That is quadratic in the length, and still nothing beside a pass over a vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.row_blocks import block_sums, order_key

CHUNK = 64


@triton.jit
def _penalise(
    x_ptr, out_ptr, rows_ptr, ids_ptr, starts_ptr, lengths_ptr, prompts_ptr, repetition_ptr, presence_ptr,
    frequency_ptr, bad_ptr, stride, out_stride, vocab, CHUNK: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(1)
    row = entry.to(tl.int64) if rows_ptr is None else tl.load(rows_ptr + entry).to(tl.int64)
    length = tl.load(lengths_ptr + entry)
    first = tl.program_id(0) * CHUNK
    if first < length:
        ids_ptr += tl.load(starts_ptr + entry)
        place = first + tl.arange(0, CHUNK)
        token = tl.load(ids_ptr + place, mask=place < length, other=0)
        inside = (token >= 0) & (token < vocab)
        if bad_ptr is not None:  # noqa: SIM102, known when compiled
            if tl.max(1 - inside.to(tl.int32), axis=0) > 0:
                tl.store(bad_ptr + entry, 1)
        prompt = 0 if prompts_ptr is None else tl.load(prompts_ptr + entry)
        seen = tl.zeros([CHUNK], tl.int32)  # before
        occurrences = tl.zeros([CHUNK], tl.int32)  # in the output
        for start in range(0, length, CHUNK):
            other_place = start + tl.arange(0, CHUNK)
            other = tl.load(ids_ptr + other_place, mask=other_place < length, other=-1)
            same = token[:, None] == other[None, :]
            seen += tl.sum((same & (other_place[None, :] < place[:, None])).to(tl.int32), axis=1)
            occurrences += tl.sum((same & (other_place[None, :] >= prompt)).to(tl.int32), axis=1)
        mask = (place < length) & inside & (seen == 0)
        score = tl.load(x_ptr + row * stride + token, mask=mask, other=0.0).to(tl.float32)
        repetition = tl.load(repetition_ptr + entry)
        score = tl.where(score > 0, tl.div_rn(score, tl.zeros([CHUNK], tl.float32) + repetition), score * repetition)
        if frequency_ptr is not None:
            score -= tl.load(frequency_ptr + entry) * occurrences.to(tl.float32)
            score = tl.where(occurrences > 0, score - tl.load(presence_ptr + entry), score)
        tl.store(out_ptr + row * out_stride + token, score, mask=mask)


@triton.jit
def _rescan(
    copy_ptr, ids_ptr, starts_ptr, lengths_ptr, keys_ptr, weights_ptr, scales_ptr, vocab, blocks,
    B: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What ``row_blocks.scan`` says of the blocks in which tokens of the history lie; equals write the same."""
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths_ptr + row)
    first = tl.program_id(0) * CHUNK
    if first < length:
        place = first + tl.arange(0, CHUNK)
        token = tl.load(ids_ptr + tl.load(starts_ptr + row) + place, mask=place < length, other=-1)
        real = (token >= 0) & (token < vocab)
        block = tl.where(real, token, 0) // B
        column = block[:, None] * B + tl.arange(0, B)[None, :]
        x = tl.load(copy_ptr + row * vocab + column, mask=real[:, None] & (column < vocab), other=float("-inf"))
        tops = tl.max(order_key(x), axis=1)
        at = row * blocks + block
        tl.store(keys_ptr + at, tops, mask=real)
        if weights_ptr is not None:
            tl.store(weights_ptr + at, block_sums(x, tops, tl.load(scales_ptr + row)), mask=real)


def penalise(
    x: Tensor, out: Tensor, rows: Tensor | None, history: tuple[Tensor, Tensor, Tensor, Tensor | None],
    penalties: tuple[Tensor, Tensor | None, Tensor | None], bad: Tensor | None, longest: int,
) -> None:  # fmt: skip
    """Writes to ``out`` (rows, vocab), float32, which may be x, the penalised scores of the tokens of each history.

    Args:
        rows: of x, an entry each; None: the entries are all rows, in order.
        history: int32 ids, and int32 starts, lengths and prompts' lengths an entry.
        penalties: repetition, presence and frequency an entry; or the first alone.
        bad: int32 an entry, which becomes 1 where an id lies outside the vocabulary.
        longest: no history is longer.
    """
    ids, starts, lengths, prompts = history
    # Products must be rounded before they are subtracted, as on the CPU.
    _penalise[(triton.cdiv(longest, CHUNK), lengths.shape[0])](
        x, out, rows, ids, starts, lengths, prompts, *penalties, bad, x.stride(0), out.stride(0), x.shape[1],
        CHUNK=CHUNK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def rescan(
    copy: Tensor, history: tuple[Tensor, Tensor, Tensor, Tensor | None], keys: Tensor,
    weights: tuple[Tensor, Tensor] | None, block: int, longest: int,
) -> None:  # fmt: skip
    """Brings ``keys``, and ``weights`` with the rows' scales, up to date with what ``penalise`` has made of a copy."""
    ids, starts, lengths, _ = history
    into, scales = (None, None) if weights is None else weights
    _rescan[(triton.cdiv(longest, CHUNK), lengths.shape[0])](
        copy, ids, starts, lengths, keys, into, scales, copy.shape[1], keys.shape[1],
        B=block, CHUNK=CHUNK, num_warps=8,
    )  # fmt: skip
