"""From examples to batches: one global plan an epoch, from (seed, epoch), that every rank strides.

The plan depends on nothing else, so a run resumes at any update by skipping to it, with any number of workers.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from models.generation import GenerationConfig

IGNORED = -100  # the label that no loss counts
POOL = 128  # batches sorted by length together: enough to waste little padding, few enough to stay random

Plan = list[NDArray[np.int64]]


class Example(NamedTuple):
    """Token ids of one example; plain text has no ``source``, and its ``target`` is a window and the next token."""

    source: Sequence[int] | None
    target: Sequence[int] | NDArray[np.int64]


@dataclass
class Batch:
    """Right-padded token ids, int64. ``source_lengths`` is None where no source is padded (or there is none).

    input_ids (batch, seqlen) goes into the decoder, labels (batch, seqlen) are what it should say, IGNORED in padding.
    """

    source_ids: Tensor | None
    source_lengths: Tensor | None
    input_ids: Tensor
    labels: Tensor
    num_target_tokens: int
    num_tokens: int  # source and target tokens, without padding: what throughput counts

    def to(self, device: torch.device) -> Batch:
        return self if device.type == "cpu" else self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> Batch:
        moved: dict[str, Any] = {name: move(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def silenced(self) -> Batch:
        """The same batch with nothing to learn: what a rank without work takes part with."""
        return replace(self, labels=torch.full_like(self.labels, IGNORED), num_target_tokens=0, num_tokens=0)


class Collate:
    """Pads examples into a Batch, lengths rounded up to ``multiple`` within ``max_seqlen``.

    Targets begin and end with the model's tokens for that. Index -1 stands for a silenced batch.
    """

    def __init__(
        self, examples: Sequence[Example], multiple: int = 1, max_seqlen: int = sys.maxsize,
        generation: GenerationConfig | None = None,
    ) -> None:  # fmt: skip
        self.examples, self.multiple, self.max_seqlen = examples, multiple, max_seqlen
        self.tokens = generation or GenerationConfig()

    def __call__(self, indices: Sequence[int]) -> Batch:
        silent = indices[0] < 0
        batch = self.collate([self.examples[max(index, 0)] for index in indices])
        return batch.silenced() if silent else batch

    def collate(self, examples: Sequence[Example]) -> Batch:
        if examples[0].source is None:
            windows = torch.tensor(np.stack([example.target for example in examples]), dtype=torch.int64)
            count = windows[:, 1:].numel()
            return Batch(None, None, windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), count, count)
        start, end = self.tokens.start_id, self.tokens.eos_ids[0]
        assert start is not None
        sources = [list(example.source or ()) or [end] for example in examples]
        inputs = [[start, *example.target] for example in examples]
        labels = [[*example.target, end] for example in examples]
        lengths = torch.tensor([len(source) for source in sources])
        pad = self.tokens.pad_id or 0  # any token would do: nothing attends to it
        source_ids = self._pad(sources, pad)
        count = sum(map(len, labels))
        padded = bool((lengths < source_ids.shape[1]).any())
        return Batch(source_ids, lengths if padded else None, self._pad(inputs, pad), self._pad(labels, IGNORED),
                     count, count + int(lengths.sum()))  # fmt: skip

    def _pad(self, rows: list[list[int]], value: int) -> Tensor:
        width = min(-(-max(map(len, rows)) // self.multiple) * self.multiple, self.max_seqlen)
        return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def lengths_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """(examples, 2): target and source lengths."""
    return np.array([(len(e.target) + 1, len(e.source or ())) for e in examples], dtype=np.int64).reshape(-1, 2)


def plan_epoch(
    lengths: NDArray[np.int64], seed: int, epoch: int, batch_size: int, max_tokens: int | None = None
) -> Plan:
    """Batches of example indices: shuffled, gathered by length within pools, shuffled again.

    Each holds ``batch_size`` examples or, with ``max_tokens``, as many as that budget of padded tokens takes.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    pool = POOL * (batch_size if max_tokens is None else max(1, max_tokens // max(1, int(lengths.sum(1).mean()))))
    batches: Plan = []
    for start in range(0, len(order), pool):
        chunk = order[start : start + pool]
        chunk = chunk[np.lexsort((lengths[chunk, 1], lengths[chunk, 0]))]
        batches += _cut(chunk, lengths[chunk], batch_size, max_tokens)
    return [batches[i] for i in rng.permutation(len(batches))]


def _cut(chunk: NDArray[np.int64], lengths: NDArray[np.int64], batch_size: int, max_tokens: int | None) -> Plan:
    if max_tokens is None:
        return [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    batches, start, widest = [], 0, np.zeros(2, dtype=np.int64)
    for i in range(len(chunk)):
        wider = np.maximum(widest, lengths[i])
        if i > start and wider.sum() * (i + 1 - start) > max_tokens:
            batches.append(chunk[start:i])
            start, wider = i, lengths[i]
        widest = wider
    return [*batches, chunk[start:]]


def plan_validation(lengths: NDArray[np.int64], batch_size: int, max_tokens: int | None = None) -> Plan:
    """Batches of all examples by length, of the size that training's have."""
    order = np.lexsort((lengths[:, 1], lengths[:, 0]))
    return _cut(order, lengths[order], batch_size, max_tokens)


def updates_in(plan: Plan, batches_per_update: int) -> int:
    return -(-len(plan) // batches_per_update)


def share_of(plan: Plan, rank: int, world_size: int, accumulation: int, first_update: int = 0) -> list[list[int]]:
    """This rank's batches from ``first_update`` on, ``accumulation`` an update; [-1] where the plan has run out."""
    per_update = world_size * accumulation
    total = updates_in(plan, per_update) * per_update
    mine = range(first_update * per_update + rank, total, world_size)
    return [plan[i].tolist() if i < len(plan) else [-1] for i in mine]


def load_batches(
    collate: Collate, indices: list[list[int]], num_workers: int, pin_memory: bool = False
) -> Iterator[Batch]:
    """The batches, in order, prepared by worker processes (0: by this one)."""
    # The loader draws a seed from its generator: one of its own leaves the global one, which dropout uses, alone.
    loader: DataLoader[Batch] = DataLoader(
        indices,  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),
    )
    return iter(loader)


def _ignore_signals(worker: int) -> None:
    # The trainer decides when to stop; a worker that dies first would look like a crash.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
