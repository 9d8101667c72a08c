"""Edits of rows of scores before a choice is made from them: of logits, or of a beam's log-probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kernels.backend import TRITON_DEVICE
from kernels.columns import (
    Column,
    TokenLists,
    arrays,
    check_rows,
    column,
    floats,
    histories,
    on_device_of,
    pick,
    thread_count,
)  # fmt: skip
from kernels.extension import _C

if TRITON_DEVICE is not None:
    from kernels.gpu import logit_edits as gpu

Bias = Mapping[int, float] | Iterable[tuple[int, float]]


@dataclass(frozen=True, eq=False)
class LogitEdits:
    """What `edit_logits` does to n rows of scores, as contiguous CPU tensors of exactly these dtypes, in this order.

    Raises ValueError, naming the field, what is allowed and the row, when made. Values may be changed in place between
    calls (`edits.history_lengths.add_(1)`); for other rows or more biases, make new edits.
    """

    rows: Tensor  # int64 (n,): which rows of the scores; distinct
    repetition_penalty: (
        Tensor  # float32 (n,), > 0: of tokens of the history divides scores, multiplies negative; 1 is off
    )
    no_repeat_ngram_size: Tensor  # int32 (n,): bans what would complete an n-gram that the history holds; 0 is off
    bias_offsets: Tensor  # int64 (n + 1,): where in the next two a row's biases begin
    bias_ids: Tensor  # int32 (biases,)
    bias_values: Tensor  # float32 (biases,), finite or -inf: added, so that -inf bans
    forced: Tensor  # int32 (n,): the one token left, with score 0, except in a row that holds NaN; -1 is off
    mask: Tensor  # int32 (n,): which of masks; -1 is off
    masks: Tensor  # int32 (m, >= vocab / 32): bit i % 32 of word i / 32 allows token i; others become -inf
    history_ids: Tensor  # int32 (any,): holds every row's history
    history_starts: Tensor  # int64 (n,): where in it a row's begins
    history_lengths: Tensor  # int32 (n,)
    _native: _C.LogitEdits = field(init=False, repr=False)

    def __post_init__(self) -> None:
        columns = arrays({f.name: getattr(self, f.name) for f in fields(self) if f.init})
        object.__setattr__(self, "_native", _C.LogitEdits(columns))

    @classmethod
    def build(
        cls,
        rows: Sequence[int] | Tensor,
        *,
        repetition_penalty: Column = 1.0,
        no_repeat_ngram_size: Column = 0,
        bias: Sequence[Bias] | None = None,
        forced: Column = -1,
        mask: Column = -1,
        masks: Tensor | None = None,
        token_ids: TokenLists | None = None,
        history: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> LogitEdits:
        """Edits of these rows from one number for all of them or one each.

        `bias` holds for each row what to add, by token or as pairs, and `token_ids` its history, copied; `history` is
        instead the tensors `history_ids`, `history_starts` and `history_lengths`, kept as they are, like `masks`.
        """
        n = len(rows)
        if history is None:
            places = histories(_each(n, "token_ids", token_ids))
        elif token_ids is None:
            places = dict(zip(("history_ids", "history_starts", "history_lengths"), history, strict=True))
        else:
            raise ValueError("history must come alone, without token_ids")
        return cls(
            rows=column("rows", rows, n, torch.int64),
            repetition_penalty=column("repetition_penalty", repetition_penalty, n, torch.float32),
            no_repeat_ngram_size=column("no_repeat_ngram_size", no_repeat_ngram_size, n, torch.int32),
            **_biases(_each(n, "bias", bias)),
            forced=column("forced", forced, n, torch.int32),
            mask=column("mask", mask, n, torch.int32),
            masks=torch.empty(0, 0, dtype=torch.int32) if masks is None else masks,
            **places,
        )


def edit_logits(
    scores: Tensor, edits: LogitEdits, *, num_threads: int | None = None, backend: str | None = None
) -> None:
    """Changes the rows of `scores` that `edits` names, in place; float32 (rows, vocab), contiguous rows.

    In this order: repetition penalty (each distinct token once), n-gram ban, bias, forced token, mask; a later one
    overrides an earlier one. Backends: `native` on a CPU (`num_threads` defaults to torch's; a row is done by one
    thread, alike on every CPU path) and `triton` on a GPU, to the same bits; what is off there is not launched.
    A forced or masked row takes a pass or two over it, bound by memory; the others what their history and biases take,
    bound by reaching scattered scores. Autograd is not told.

    Raises ValueError, before anything is written, if shapes, strides, dtype or device do not fit, or naming the row if
    it is not among the scores, holds a token outside the vocabulary, or has a mask narrower than that.
    """
    if pick("edit_logits", scores, backend) == "triton":
        check_rows("scores", scores, writes=True)
        with on_device_of(scores):
            gpu.edit_logits(scores.detach(), edits)
        return
    _C.edit_logits(floats("scores", scores), edits._native, thread_count(num_threads))


def _each(n: int, name: str, values: Sequence[Any] | None) -> Sequence[Any]:
    if values is not None and len(values) != n:
        raise ValueError(f"{name} must hold one entry for each of {n} rows, got {len(values)}")
    return [()] * n if values is None else values


def _biases(biases: Sequence[Bias]) -> dict[str, Tensor]:
    pairs = [list(bias.items() if isinstance(bias, Mapping) else bias) for bias in biases]
    flat = [pair for row in pairs for pair in row]
    return {
        "bias_offsets": torch.tensor(list(accumulate(map(len, pairs), initial=0)), dtype=torch.int64),
        "bias_ids": column("bias", [token for token, _ in flat], len(flat), torch.int32),
        "bias_values": column("bias", [value for _, value in flat], len(flat), torch.float32),
    }
