"""Columns of numbers, one entry a row, and histories: what the calls of the sampler take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from kernels.backend import TRITON_DEVICE, TRITON_DTYPES, choose

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


def pick(operation: str, scores: Tensor, backend: str | None) -> str:
    """The backend of a choice among scores: `native` for the CPU's, `triton` for a GPU's, and interpreted if asked."""
    on_gpu = ("triton",) if scores.device.type == TRITON_DEVICE else ()
    serves = on_gpu if scores.is_cuda and on_gpu else ("native", *on_gpu)
    return choose(operation, serves, backend, has=("native", "triton"))


def check_rows(name: str, scores: Tensor, *, writes: bool = False) -> None:
    """Raises ValueError for what the Triton kernels do not take as rows of scores; to write, float32 rows apart."""
    dtypes = (torch.float32,) if writes else TRITON_DTYPES
    if scores.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be of {allowed}, got {_describe(scores)}")
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ValueError(f"{name} must have the shape (rows, vocab), vocab at least 1, got {tuple(scores.shape)}")
    if scores.shape[1] > 1 and scores.stride(1) != 1:
        raise ValueError(f"{name} must have contiguous rows, got strides {scores.stride()}")
    if writes and scores.shape[0] > 1 and scores.stride(0) < scores.shape[1]:
        raise ValueError(f"{name} must have rows that do not overlap, got strides {scores.stride()}")


def on_device_of(scores: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(scores.device) if scores.is_cuda else nullcontext()


def thread_count(num_threads: int | None) -> int:
    return torch.get_num_threads() if num_threads is None else num_threads


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} on {value.device}"
    return type(value).__name__
