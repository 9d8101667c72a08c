"""A sampler's columns on the device: one buffer, filled on the CPU and copied at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from kernels.sampling import SamplingBatch

GREEDY_BELOW = 1e-5  # as in csrc/sampling.cpp
WIDE = ("seed", "position", "floor", "top_p", "typical_p")
NARROW = (
    "scale", "repetition_penalty", "presence_penalty", "frequency_penalty", "top_k", "num_logprobs", "history_starts",
    "history_lengths", "prompt_lengths",
)  # fmt: skip


class Plan(NamedTuple):
    """Which parts of sampling a batch takes; what it does not take is not compiled, nor launched."""

    draws: bool  # a row is not greedy
    whole: bool  # the weights of whole rows are summed
    filters: bool
    typical: bool
    penalties: bool
    logprobs: bool
    num_top: int  # of log-probabilities, the most of a row

    @classmethod
    def of(cls, batch: SamplingBatch) -> Plan:
        drawn = batch.temperature >= GREEDY_BELOW
        typical = drawn & (batch.typical_p < 1)
        bounded = (batch.top_k > 0) | (batch.min_p > 0)
        filtered = bounded | (batch.top_p < 1) | (batch.typical_p < 1)
        most = int(batch.num_logprobs.max()) if batch.rows else -1
        return cls(
            draws=bool(drawn.any()),
            whole=bool((drawn & ~bounded & ((batch.top_p < 1) | (batch.typical_p == 1))).any()),
            filters=bool((drawn & filtered).any()),
            typical=bool(typical.any()),
            penalties=bool(_penalised(batch).any()),
            logprobs=most >= 0,
            num_top=max(most, 0),
        )


@dataclass(eq=False)
class DeviceColumns:
    """Columns of a ``SamplingBatch``, one entry a row, as the kernels read them: views of one buffer on the device.

    The buffer has room for histories of ``capacity`` ids in all; none may be longer than ``longest``, which launches
    are sized by. ``refill`` puts another batch of as many rows in its place, for a captured graph.
    """

    plan: Plan
    rows: int
    capacity: int
    longest: int
    buffer: Tensor  # int64
    columns: dict[str, Tensor] = field(init=False, repr=False)
    history_ids: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        wide, narrow = _sections(self.buffer, self.rows)
        floats = ("scale", "repetition_penalty", "presence_penalty", "frequency_penalty")
        self.columns = {name: column.view(torch.float64) for name, column in zip(WIDE, wide, strict=True)}
        self.columns |= {name: self.columns[name].view(torch.int64) for name in ("seed", "position")}
        for i, name in enumerate(NARROW):
            column = narrow[i * self.rows : (i + 1) * self.rows]
            self.columns[name] = column.view(torch.float32) if name in floats else column
        self.history_ids = narrow[len(NARROW) * self.rows :]

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    @property
    def history(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.history_ids, self["history_starts"], self["history_lengths"], self["prompt_lengths"]

    def refill(self, batch: SamplingBatch) -> None:
        """The columns of another batch; a copy that the device makes in its own time, of memory of its own.

        Raises ValueError where the batch takes parts of sampling that this one did not, or more room.
        """
        histories = _histories(batch)
        plan = Plan.of(batch)
        fits = batch.rows == self.rows and len(histories[0]) <= self.capacity and histories[3] <= self.longest
        if not fits or any(a > b for a, b in zip(plan, self.plan, strict=True)):
            raise ValueError(
                f"columns hold {self.rows} rows, histories of {self.capacity} ids, none longer than {self.longest}, "
                f"and what {self.plan} says, got {batch.rows} rows, {len(histories[0])} ids, {histories[3]} and {plan}"
            )
        self._copy(batch, histories)

    def _copy(self, batch: SamplingBatch, histories: tuple[NDArray[np.int32], Tensor, Tensor, int]) -> None:
        host = torch.empty(self.buffer.shape, dtype=torch.int64, pin_memory=self.buffer.is_cuda)
        _fill(host, batch, histories)
        self.buffer.copy_(host, non_blocking=True)


def upload(
    batch: SamplingBatch, device: torch.device, *, plan: Plan | None = None, capacity: int = 0, longest: int = 0
) -> DeviceColumns:
    """The columns of a batch on the device, in one copy that is not waited for.

    ``plan``, ``capacity`` and ``longest`` make room for what other batches take, beyond what this one does.
    """
    histories = _histories(batch)
    room = max(capacity, len(histories[0]))
    words = len(WIDE) * batch.rows + (len(NARROW) * batch.rows + room + 1) // 2
    buffer = torch.empty(words, dtype=torch.int64, device=device)
    columns = DeviceColumns(plan or Plan.of(batch), batch.rows, room, max(longest, histories[3]), buffer)
    columns._copy(batch, histories)
    return columns


def _sections(buffer: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    wide = len(WIDE) * rows
    return buffer[:wide].view(len(WIDE), rows), buffer[wide:].view(torch.int32)


def _fill(host: Tensor, batch: SamplingBatch, histories: tuple[NDArray[np.int32], Tensor, Tensor, int]) -> None:
    ids, starts, lengths, _ = histories
    wide, narrow = (section.numpy() for section in _sections(host, batch.rows))
    temperature = batch.temperature.numpy()
    greedy = temperature < np.float32(GREEDY_BELOW)
    with np.errstate(divide="ignore", invalid="ignore"):
        # As in csrc/sampling.cpp: the logit of min_p lies so far from the largest.
        floor = temperature.astype(np.float64) * np.log(batch.min_p.numpy().astype(np.float64))
        scale = np.where(greedy, np.float32(0), np.float32(1) / temperature)
    wide[0], wide[1] = batch.seed.numpy(), batch.position.numpy()
    doubles = wide[2:].view(np.float64)
    doubles[0] = np.where(batch.min_p.numpy() > 0, floor, -np.inf)
    doubles[1], doubles[2] = batch.top_p.numpy(), batch.typical_p.numpy()
    columns: tuple[Any, ...] = (
        scale, batch.repetition_penalty.numpy(), batch.presence_penalty.numpy(), batch.frequency_penalty.numpy(),
        batch.top_k.numpy(), batch.num_logprobs.numpy(), starts.numpy(), lengths.numpy(), batch.prompt_lengths.numpy(),
    )  # fmt: skip
    for i, column in enumerate(columns):
        narrow[i * batch.rows : (i + 1) * batch.rows] = column if column.dtype == np.int32 else column.view(np.int32)
    at = len(NARROW) * batch.rows
    narrow[at : at + len(ids)] = ids


def _penalised(batch: SamplingBatch) -> Tensor:
    return (batch.repetition_penalty != 1) | (batch.presence_penalty != 0) | (batch.frequency_penalty != 0)


def _histories(batch: SamplingBatch) -> tuple[NDArray[np.int32], Tensor, Tensor, int]:
    """The histories of rows with a penalty, packed: ids, starts and lengths, int32, and the longest length.

    The batch's columns may have changed since they were checked: what lies outside its buffer is not followed.
    """
    return packed_histories(batch.history_ids, batch.history_starts, batch.history_lengths, _penalised(batch))


def packed_histories(
    ids: Tensor, starts: Tensor, lengths: Tensor, read: Tensor
) -> tuple[NDArray[np.int32], Tensor, Tensor, int]:
    size = ids.shape[0]
    begins = starts.clamp(0, size)
    counts = torch.minimum(lengths.long().clamp(min=0), size - begins) * read
    source = ids.numpy()
    pieces = [
        source[begin : begin + count] for begin, count in zip(begins.tolist(), counts.tolist(), strict=True) if count
    ]
    packed = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
    longest = int(counts.max()) if len(counts) else 0
    return packed, (counts.cumsum(0) - counts).int(), counts.int(), longest
