"""Columns of numbers, one entry a row, and histories: what the calls of the sampler take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

Number = int | float
Column = Number | Sequence[Number] | Tensor
TokenLists = Sequence[Sequence[int]]


def column(name: str, value: Column, rows: int, dtype: torch.dtype) -> Tensor:
    """One number for all rows, or one a row, as a contiguous CPU tensor (rows,); ValueError for anything else."""
    try:
        tensor = torch.as_tensor(value)
        fits = tensor.dtype is not torch.bool and (dtype.is_floating_point or not tensor.is_floating_point())
        fits = fits or tensor.numel() == 0  # the empty list is of floats
        if fits and tensor.ndim <= 1:
            return tensor.to("cpu", dtype).expand(rows).contiguous()
    except (TypeError, ValueError, RuntimeError):
        pass
    kind = "number" if dtype.is_floating_point else "integer"
    raise ValueError(f"{name} must be one {kind} or {rows} of them, got {value!r}")


def histories(token_lists: Iterable[Sequence[int]]) -> dict[str, Tensor]:
    """Each row's list in a buffer of its own: the columns `history_ids`, `history_starts` and `history_lengths`."""
    lists = list(token_lists)
    lengths = [len(ids) for ids in lists]
    return {
        "history_ids": torch.tensor(list(chain.from_iterable(lists)), dtype=torch.int32),
        "history_starts": torch.tensor(list(accumulate(lengths, initial=0))[:-1], dtype=torch.int64),
        "history_lengths": torch.tensor(lengths, dtype=torch.int32),
    }


def arrays(columns: dict[str, Any]) -> dict[str, Any]:
    """The memory of CPU tensors by name, for the C++ to check and to keep; ValueError for anything else."""
    for name, value in columns.items():
        if not isinstance(value, Tensor) or value.device.type != "cpu":
            raise ValueError(f"{name} must be a CPU tensor, got {_describe(value)}")
    return {name: value.detach().numpy() for name, value in columns.items()}


def floats(name: str, scores: Tensor) -> Any:
    """The memory of a float32 CPU tensor; ValueError for any other."""
    if scores.dtype is not torch.float32 or scores.device.type != "cpu":
        raise ValueError(f"{name} must be a float32 CPU tensor, got {_describe(scores)}")
    return scores.detach().numpy()


def thread_count(num_threads: int | None) -> int:
    return torch.get_num_threads() if num_threads is None else num_threads


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} on {value.device}"
    return type(value).__name__
