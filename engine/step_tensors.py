"""One step's integers on the model's device: tokens, places and tables, sent there in one copy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Batch
from engine.kv_cache import KVCache

ALIGNMENT = 16  # bytes: what a kernel's wide loads want of every array
NOWHERE = -1  # the slot of a token that is only there to fill a batch up
Shape = tuple[int, ...]
Integers = NDArray[np.int32] | NDArray[np.int64]


@dataclass(frozen=True)
class StepShape:
    """How much room a step's tensors have; ``tokens`` is at least ``sequences``."""

    sequences: int
    tokens: int
    selected: int
    width: int  # blocks of a table

    def fields(self) -> dict[str, tuple[type, Shape]]:
        """The tensors of ``StepTensors``, in the order in which they lie."""
        tables = (self.sequences, self.width)
        return {
            "token_ids": (np.int64, (self.tokens,)),
            "positions": (np.int64, (self.tokens,)),
            "slots": (np.int64, (self.tokens,)),
            "drawn": (np.int64, (self.tokens,)),
            "selected": (np.int64, (self.selected,)),
            "cu_seqlens": (np.int32, (self.sequences + 1,)),
            "lengths": (np.int32, (self.sequences,)),
            "source_lengths": (np.int32, (self.sequences,)),
            "tables": (np.int32, tables),
            "source_tables": (np.int32, tables),
        }


@dataclass(frozen=True)
class StepTensors:
    """What a step reads besides weights and cache; sequences past the batch's own have no tokens and no keys.

    Attributes:
        token_ids, positions, slots: int64 (tokens,); slots as ``append_to_cache`` takes them.
        drawn: int64 (tokens,): where among the tokens drawn last this one is, which has not left the device; -1: it is
            in ``token_ids``.
        selected: int64 (selected,): the tokens whose logits are wanted.
        cu_seqlens, lengths, tables: as ``paged_attention`` takes them. source_lengths, source_tables: for the source.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    drawn: Tensor
    selected: Tensor
    cu_seqlens: Tensor
    lengths: Tensor
    source_lengths: Tensor
    tables: Tensor
    source_tables: Tensor


def step_shape(cache: KVCache, batch: Batch) -> StepShape:
    """As much room as the batch takes."""
    longest = max(int(batch.ends.max()), int(cache.source_lengths[batch.rows].max()))
    return StepShape(len(batch.rows), int(batch.offsets[-1]), len(batch.selected), cache.blocks_for(longest))


class StepBuffer:
    """The memory of a step's tensors on a device, which later steps of the same shape may use again."""

    def __init__(self, shape: StepShape, device: torch.device) -> None:
        self.shape, self.fields = shape, shape.fields()
        self._starts: dict[str, int] = {}
        size = 0
        for name, (dtype, dims) in self.fields.items():
            self._starts[name] = size
            size += -(-math.prod(dims) * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT
        self._bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self.tensors = StepTensors(**{name: self._part(self._bytes, name) for name in self.fields})

    def fill(self, cache: KVCache, batch: Batch) -> StepTensors:
        """Sends a batch there, behind whatever the device still has to do with the one before."""
        on_host = self._bytes.device.type == "cpu"
        # Pinned memory comes from torch's own pool, which gives it out again when the copy has been made.
        host = self._bytes if on_host else torch.empty(len(self._bytes), dtype=torch.uint8, pin_memory=True)
        self._write({name: self._part(host, name).numpy() for name in self.fields}, cache, batch)
        if not on_host:
            self._bytes.copy_(host, non_blocking=True)
        return self.tensors

    def _part(self, memory: Tensor, name: str) -> Tensor:
        dtype, dims = self.fields[name]
        start, size = self._starts[name], math.prod(dims) * np.dtype(dtype).itemsize
        return memory[start : start + size].view(torch.int64 if dtype is np.int64 else torch.int32).view(dims)

    def _write(self, arrays: Mapping[str, Integers], cache: KVCache, batch: Batch) -> None:
        rows, tokens, sequences, width = batch.rows, int(batch.offsets[-1]), len(batch.rows), self.shape.width
        given: dict[str, Integers] = {
            "token_ids": batch.token_ids,
            "positions": batch.positions,
            "slots": cache.slots(batch.rows_of_tokens, batch.positions),
            "drawn": batch.drawn_tokens,
            "selected": batch.selected,
            "lengths": batch.ends,
            "source_lengths": cache.source_lengths[rows],
            "tables": cache.tables[rows, :width],
            "source_tables": cache.source_tables[rows, :width],
        }
        for name, values in given.items():
            arrays[name][: len(values)] = values
            arrays[name][len(values) :] = NOWHERE if name in ("slots", "drawn") else 0
        arrays["cu_seqlens"][: sequences + 1] = batch.offsets
        arrays["cu_seqlens"][sequences + 1 :] = tokens
