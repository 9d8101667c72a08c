"""Edits of rows of scores on a GPU, in place: what csrc/logit_edits.cpp does, in its order.

All columns come in one copy. Penalties, n-gram bans and biases are launches of their own, as each must be complete
before the next; forcing and masking share the last pass. What no row asks for is not launched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from kernels.gpu.penalties import CHUNK, penalise
from kernels.gpu.sampling_columns import packed_histories

if TYPE_CHECKING:
    from kernels.logit_edits import LogitEdits

WORDS = 128  # of a mask a program, 32 scores each
Ints = NDArray[np.int32]


@triton.jit
def _ban_repeated(x_ptr, rows_ptr, ids_ptr, starts_ptr, lengths_ptr, sizes_ptr, stride, CHUNK: tl.constexpr):
    """Bans what completes an n-gram that the history holds: a program takes a chunk of the places where one starts."""
    entry = tl.program_id(1)
    length = tl.load(lengths_ptr + entry)
    size = tl.load(sizes_ptr + entry)
    first = tl.program_id(0) * CHUNK
    if (size > 0) & (size <= length) & (first <= length - size):
        ids_ptr += tl.load(starts_ptr + entry)
        place = first + tl.arange(0, CHUNK)
        same = place <= length - size
        for i in range(0, size - 1):
            last = tl.load(ids_ptr + (length - size + 1 + i))
            same &= tl.load(ids_ptr + place + i, mask=same, other=-1) == last
        token = tl.load(ids_ptr + place + (size - 1), mask=same, other=0)
        row = tl.load(rows_ptr + entry).to(tl.int64)
        tl.store(x_ptr + row * stride + token, float("-inf"), mask=same)


@triton.jit
def _add_biases(x_ptr, rows_ptr, starts_ptr, ids_ptr, values_ptr, stride, REPEATED: tl.constexpr, CHUNK: tl.constexpr):
    """Adds each row's biases. A token that has several gets them one by one, in order, from its first."""
    entry = tl.program_id(1)
    start, end = tl.load(starts_ptr + entry), tl.load(starts_ptr + entry + 1)
    place = start + tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    token = tl.load(ids_ptr + place, mask=place < end, other=0)
    mask = place < end
    at = x_ptr + tl.load(rows_ptr + entry).to(tl.int64) * stride + token
    score = tl.load(at, mask=mask, other=0.0)
    if REPEATED:
        for i in range(start, end):
            same = token == tl.load(ids_ptr + i)
            mask &= (same == 0) | (place <= i)
            score = tl.where(same, score + tl.load(values_ptr + i), score)
    else:
        score += tl.load(values_ptr + place, mask=mask, other=0.0)
    tl.store(at, score, mask=mask)


@triton.jit
def _find_nan(x_ptr, rows_ptr, forced_ptr, nan_ptr, stride, vocab, CHUNK: tl.constexpr):
    """Notes which rows that are to be forced hold NaN."""
    entry = tl.program_id(1)
    if tl.load(forced_ptr + entry) >= 0:
        row = tl.load(rows_ptr + entry).to(tl.int64)
        column = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + row * stride + column, mask=column < vocab, other=0.0)
        if tl.max((x != x).to(tl.int32), axis=0) > 0:
            tl.store(nan_ptr + entry, 1)


@triton.jit
def _force_and_mask(
    x_ptr, rows_ptr, forced_ptr, nan_ptr, mask_ptr, words_ptr, stride, vocab, num_words, WORDS: tl.constexpr
):  # fmt: skip
    entry = tl.program_id(1)
    forced, mask = tl.load(forced_ptr + entry), tl.load(mask_ptr + entry)
    forces = (forced >= 0) & (tl.load(nan_ptr + entry) == 0)
    if forces | (mask >= 0):
        row = tl.load(rows_ptr + entry).to(tl.int64)
        word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
        column = word[:, None] * 32 + tl.arange(0, 32)[None, :]
        x = tl.load(x_ptr + row * stride + column, mask=(column < vocab) & (forces == 0), other=float("-inf"))
        x = tl.where(forces & (column == forced), 0.0, x)
        bits = tl.load(
            words_ptr + mask.to(tl.int64) * num_words + word, mask=(mask >= 0) & (word < num_words), other=-1
        )
        x = tl.where(((bits[:, None] >> tl.arange(0, 32)[None, :]) & 1) == 0, float("-inf"), x)
        tl.store(x_ptr + row * stride + column, x, mask=column < vocab)


class _Edits(NamedTuple):
    """Checked edits, ready to be sent: int32 columns, and what is to be launched."""

    columns: dict[str, Ints]
    longest: int  # history
    penalties: bool
    ngrams: bool
    most_biases: int  # of a row
    repeated: bool  # a token has several
    forces: bool
    masks: bool


def edit_logits(scores: Tensor, edits: LogitEdits) -> None:
    """As ``kernels.logit_edits.edit_logits``, of float32 scores (rows, vocab) on the device."""
    e = _read(scores, edits)
    count = len(e.columns["rows"])
    if not count:
        return
    device = _upload(e.columns, scores.device)
    rows, stride, vocab = device["rows"], scores.stride(0), scores.shape[1]
    history = device["history_ids"], device["history_starts"], device["history_lengths"]
    if e.penalties and e.longest:
        repetition = device["repetition_penalty"].view(torch.float32)
        penalise(scores, scores, rows, (*history, None), (repetition, None, None), None, e.longest)
    if e.ngrams and e.longest:
        _ban_repeated[(triton.cdiv(e.longest, CHUNK), count)](
            scores, rows, *history, device["no_repeat_ngram_size"], stride, CHUNK=CHUNK, num_warps=2
        )
    if e.most_biases:
        _add_biases[(triton.cdiv(e.most_biases, 128), count)](
            scores, rows, device["bias_offsets"], device["bias_ids"], device["bias_values"].view(torch.float32),
            stride, REPEATED=e.repeated, CHUNK=128, num_warps=4,
        )  # fmt: skip
    if e.forces:
        _find_nan[(triton.cdiv(vocab, 4096), count)](
            scores, rows, device["forced"], device["nan"], stride, vocab, CHUNK=4096, num_warps=4
        )
    if e.forces or e.masks:
        _force_and_mask[(triton.cdiv(vocab, 32 * WORDS), count)](
            scores, rows, device["forced"], device["nan"], device["mask"], device["masks"], stride, vocab,
            edits.masks.shape[1], WORDS=WORDS, num_warps=4,
        )  # fmt: skip


def _upload(columns: dict[str, Ints], device: torch.device) -> dict[str, Tensor]:
    """The columns on the device, in one copy that is not waited for; each starts at 16 bytes."""
    sizes = [-(-column.size // 4) * 4 for column in columns.values()]
    host = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
    memory = host.numpy()
    start, places = 0, []
    for column, size in zip(columns.values(), sizes, strict=True):
        memory[start : start + column.size] = column.reshape(-1)
        places.append((start, column.size))
        start += size
    sent = host.to(device, non_blocking=True)
    return {name: sent[at : at + size] for name, (at, size) in zip(columns, places, strict=True)}


def _read(scores: Tensor, edits: LogitEdits) -> _Edits:
    """What the edits ask for now. Raises what csrc/logit_edits.cpp does: their columns may have changed."""
    rows, vocab = edits.rows.numpy(), scores.shape[1]
    _check_rows(rows, scores.shape[0])
    penalty, sizes = edits.repetition_penalty.numpy(), edits.no_repeat_ngram_size.numpy()
    forced, mask = edits.forced.numpy(), edits.mask.numpy()
    offsets = _offsets(edits)
    bias_ids = edits.bias_ids.numpy()
    read = torch.from_numpy((penalty != 1) | (sizes > 0))
    ids, starts, lengths, longest = packed_histories(
        edits.history_ids, edits.history_starts, edits.history_lengths, read
    )
    masks, begins = edits.masks.numpy(), starts.numpy()
    for i, row in enumerate(rows.tolist()):
        if mask[i] >= len(masks):
            raise ValueError(f"mask must be a row of masks, got {mask[i]} in row {row}")
        _check_tokens("bias_ids", bias_ids[offsets[i] : offsets[i + 1]], vocab, row)
        _check_tokens("forced", np.maximum(forced[i : i + 1], 0), vocab, row)
        _check_tokens("history_ids", ids[begins[i] : begins[i] + int(lengths[i])], vocab, row)
        if mask[i] >= 0 and masks.shape[1] < -(-vocab // 32):
            raise ValueError(
                f"masks must have a bit for each of {vocab} tokens, got {masks.shape[1]} words in row {row}"
            )
    biases = np.diff(offsets)
    taken = bias_ids[offsets[0] : offsets[-1]]
    owners = np.repeat(np.arange(len(rows)), biases)
    masked = bool((mask >= 0).any())
    columns: dict[str, Any] = {
        "rows": rows, "repetition_penalty": penalty.view(np.int32), "no_repeat_ngram_size": sizes,
        "bias_offsets": offsets - offsets[0], "bias_ids": taken,
        "bias_values": edits.bias_values.numpy()[offsets[0] : offsets[-1]].view(np.int32), "forced": forced,
        "mask": mask, "nan": np.zeros(len(rows), np.int32), "history_ids": ids, "history_starts": begins,
        "history_lengths": lengths.numpy(), "masks": masks if masked else masks[:0],
    }  # fmt: skip
    return _Edits(
        columns=columns,
        longest=longest,
        penalties=bool((penalty != 1).any()),
        ngrams=bool((sizes > 0).any()),
        most_biases=int(biases.max(initial=0)),
        repeated=len(np.unique(owners * vocab + taken)) < len(taken),
        forces=bool((forced >= 0).any()),
        masks=masked,
    )


def _offsets(edits: LogitEdits) -> NDArray[np.int64]:
    """Where the rows' biases begin, and the last ends, never falling nor beyond what there are."""
    inside = edits.bias_offsets.numpy().clip(0, edits.bias_ids.shape[0])
    return np.maximum.accumulate(inside)


def _check_rows(rows: NDArray[np.int64], count: int) -> None:
    for row in rows[(rows < 0) | (rows >= count)].tolist():
        raise ValueError(f"rows must be below the {count} rows of the scores, got {row}")
    values, times = np.unique(rows, return_counts=True)
    for row in values[times > 1].tolist():
        raise ValueError(f"rows must be distinct, got {row} twice")


def _check_tokens(field: str, ids: Ints, vocab: int, row: int) -> None:
    for token in ids[(ids < 0) | (ids >= vocab)].tolist():
        raise ValueError(f"{field} must be below the vocabulary of {vocab}, got {token} in row {row}")
