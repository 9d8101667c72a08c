"""The cache as torch's tensors, for models that torch runs, and one step's view of it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Batch
from engine.kv_cache import KVCache, Table
from kernels.attention_options import AttentionOptions
from kernels.paged_attention import append_to_cache, paged_attention
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


class TensorStorage:
    """Keys and values as tensors, (num_blocks, layers, block_size, kv_heads, head_dim) each, in ``dtype``."""

    def __init__(
        self, config: TransformerConfig, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        assert config.kv_heads is not None and config.head_dim is not None
        self.layers, self.block_size, self.num_blocks, self.device = config.depth, block_size, num_blocks, device
        shape = (num_blocks, self.layers, block_size, config.kv_heads, config.head_dim)
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

    def blocks_of(self, layer: int, tables: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All blocks of all layers, keys and values, and where among them a layer's blocks of ``tables`` are.

        tables are int32 (sequences, blocks), of the first layer: block b's is b * layers.
        """
        return self.k.flatten(0, 1), self.v.flatten(0, 1), tables + layer

    def append(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Writes new tokens' keys and values of a layer into their ``slots``, as ``slots_of`` numbers them."""
        append_to_cache(k, v, self.k.flatten(0, 1), self.v.flatten(0, 1), slots + layer * self.block_size)

    def slots_of(self, slots: NDArray[np.int64]) -> Tensor:
        """Where the first layer has the slots that the cache numbers without regard to layers."""
        blocks, offsets = np.divmod(slots, self.block_size)
        return torch.from_numpy(blocks * (self.layers * self.block_size) + offsets).to(self.device)


class CacheView:
    """The cache as one step's batch sees it: the protocol ``models.cache.Cache``."""

    def __init__(self, cache: KVCache, storage: TensorStorage, batch: Batch, backend: str | None) -> None:
        self.cache, self.storage, self.backend = cache, storage, backend
        self.slots = storage.slots_of(cache.slots(batch.rows_of_tokens, batch.positions))
        self.positions = self._tensor(batch.positions)
        # Runs of those that decode one token, and of newcomers with longer prompts: a backend that pads would
        # otherwise pad every one of the first to the longest of the others.
        cuts = [0, *(np.flatnonzero(np.diff(batch.counts > 1)) + 1).tolist(), len(batch.rows)]
        self.parts = [
            self._part(batch.rows[a:b], batch.ends[a:b], batch.offsets[a : b + 1]) for a, b in itertools.pairwise(cuts)
        ]

    def self_attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        self.storage.append(layer, k, v, self.slots)
        return self._attend(layer, q, options, source=False)

    def cross_attention(self, layer: int, q: Tensor, options: AttentionOptions) -> Tensor:
        return self._attend(layer, q, options, source=True)

    def _attend(self, layer: int, q: Tensor, options: AttentionOptions, *, source: bool) -> Tensor:
        mixed = [
            paged_attention(
                q[part.tokens],
                *self.storage.blocks_of(layer, part.source_tables if source else part.tables),
                part.source_lengths if source else part.lengths,
                part.cu_seqlens,
                max_seqlen_q=part.max_count,
                causal=not source,
                backend=self.backend,
                **options,
            )
            for part in self.parts
        ]
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

    def _part(self, rows: NDArray[np.int64], ends: Table, offsets: Table) -> Part:
        source_lengths = self.cache.source_lengths[rows]
        width, source_width = (self.cache.blocks_for(int(lengths.max())) for lengths in (ends, source_lengths))
        return Part(
            tokens=slice(int(offsets[0]), int(offsets[-1])),
            cu_seqlens=self._tensor((offsets - offsets[0]).astype(np.int32)),
            max_count=int(np.diff(offsets).max()),
            tables=self._tensor(self.cache.tables[rows, :width] * self.storage.layers),
            lengths=self._tensor(ends),
            source_tables=self._tensor(self.cache.source_tables[rows, :source_width] * self.storage.layers),
            source_lengths=self._tensor(source_lengths),
        )

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.storage.device)


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
