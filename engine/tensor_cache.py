"""The cache as torch's tensors, for models that torch runs, and one step's view of it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch
from engine.kv_cache import KVCache, Table
from engine.step_tensors import StepTensors
from kernels.attention_options import AttentionOptions
from kernels.paged_attention import append_to_cache, paged_attention
from models.cache import Angles
from models.config import TransformerConfig


@dataclass(frozen=True)
class Part:
    """Some consecutive sequences of a step, as ``paged_attention`` takes them; ``tokens`` are theirs in the batch."""

    tokens: slice
    cu_seqlens: Tensor
    max_count: int
    tables: Tensor
    lengths: Tensor
    source_tables: Tensor
    source_lengths: Tensor


def whole(tensors: StepTensors, max_count: int) -> list[Part]:
    """All sequences of a step as one part."""
    t = tensors
    return [Part(slice(None), t.cu_seqlens, max_count, t.tables, t.lengths, t.source_tables, t.source_lengths)]


def runs(tensors: StepTensors, batch: Batch, cache: KVCache) -> list[Part]:
    """Runs of those that decode one token, and of newcomers with longer prompts.

    A backend that pads would otherwise pad every one of the first to the longest of the others.
    """
    cuts = [0, *(np.flatnonzero(np.diff(batch.counts > 1)) + 1).tolist(), len(batch.rows)]
    source_lengths = cache.source_lengths[batch.rows]

    def part(a: int, b: int) -> Part:
        first, last = int(batch.offsets[a]), int(batch.offsets[b])
        width, source_width = (cache.blocks_for(int(lengths[a:b].max())) for lengths in (batch.ends, source_lengths))
        return Part(
            tokens=slice(first, last),
            cu_seqlens=tensors.cu_seqlens[a : b + 1] - first,
            max_count=int(batch.counts[a:b].max()),
            tables=tensors.tables[a:b, :width],
            lengths=tensors.lengths[a:b],
            source_tables=tensors.source_tables[a:b, :source_width],
            source_lengths=tensors.source_lengths[a:b],
        )

    return [part(a, b) for a, b in itertools.pairwise(cuts)]


class TensorStorage:
    """Keys and values as tensors, (num_blocks, layers, block_size, kv_heads, head_dim) each, in ``dtype``.

    ``backend`` is what attention over them and the append are asked to run on, None for the best there is.
    """

    def __init__(
        self, config: TransformerConfig, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype,
        backend: str | None = None,
    ) -> None:  # fmt: skip
        assert config.kv_heads is not None and config.head_dim is not None
        self.block_size, self.num_blocks, self.device, self.backend = block_size, num_blocks, device, backend
        shape = (num_blocks, config.depth, block_size, config.kv_heads, config.head_dim)
        self.k, self.v = _zeros(shape, device, dtype), _zeros(shape, device, dtype)

    @staticmethod
    def bytes_per_block(config: TransformerConfig, block_size: int, dtype: torch.dtype) -> int:
        assert config.kv_heads is not None and config.head_dim is not None
        return 2 * config.depth * block_size * config.kv_heads * config.head_dim * dtype.itemsize

    def copy(self, sources: Table, targets: Table) -> None:
        source, target = (torch.from_numpy(blocks.astype(np.int64)).to(self.device) for blocks in (sources, targets))
        self.k[target] = self.k[source]
        self.v[target] = self.v[source]

    def clear(self, blocks: list[int]) -> None:
        self.k[blocks] = 0
        self.v[blocks] = 0

    def append(
        self, layer: int, k: Tensor, v: Tensor, slots: Tensor, q: Tensor | None = None, rotary: Angles | None = None
    ) -> None:
        """Writes new tokens' keys and values of a layer into their ``slots``, block * block_size + offset.

        With ``rotary``, keys are turned on their way, and q in place.
        """
        cos, sin = rotary or (None, None)
        append_to_cache(
            k, v, self.k[:, layer], self.v[:, layer], slots, cos=cos, sin=sin, q=q, backend=self.backend
        )  # fmt: skip


class CacheView:
    """The cache as one step's batch sees it: the protocol ``models.cache.Cache``."""

    def __init__(self, storage: TensorStorage, slots: Tensor, parts: list[Part]) -> None:
        self.storage, self.slots, self.parts = storage, slots, parts

    def self_attention(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, rotary: Angles | None
    ) -> Tensor:
        self.storage.append(layer, k, v, self.slots, None if rotary is None else q, rotary)
        return self._attend(layer, q, options, source=False)

    def cross_attention(self, layer: int, q: Tensor, options: AttentionOptions) -> Tensor:
        return self._attend(layer, q, options, source=True)

    def _attend(self, layer: int, q: Tensor, options: AttentionOptions, *, source: bool) -> Tensor:
        mixed = [
            paged_attention(
                q[part.tokens],
                self.storage.k[:, layer],
                self.storage.v[:, layer],
                part.source_tables if source else part.tables,
                part.source_lengths if source else part.lengths,
                part.cu_seqlens,
                max_seqlen_q=part.max_count,
                causal=not source,
                backend=self.storage.backend,
                **options,
            )
            for part in self.parts
        ]
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros, not empty: attention multiplies what lies past a sequence's end by zero, which NaN would survive.

    On a CPU numpy leaves the pages untouched until they are used, which torch does not.
    """
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    count = math.prod(shape) * dtype.itemsize
    try:
        return torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(dtype).view(shape)
    except MemoryError:
        raise ValueError(f"no memory for a cache of {2 * count} bytes: lower kv_cache_memory_bytes") from None
