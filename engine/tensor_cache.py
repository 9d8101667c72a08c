"""The cache as torch's tensors, for models that torch runs, and one step's view of it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

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


class LayerCache(NamedTuple):
    """A layer's share: (num_blocks, block_size, kv_heads, head_dim) twice, and without head_dim the scales of int8."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None


class TensorStorage:
    """Keys and values as tensors, (num_blocks, layers, block_size, kv_heads, head_dim) each, in ``dtype``.

    int8 has scales beside it, float32 (num_blocks, layers, block_size, kv_heads); float8_e4m3fn has none. ``backend``
    is what attention over them and the append are asked to run on, None for the best there is.
    """

    def __init__(
        self, config: TransformerConfig, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype,
        backend: str | None = None,
    ) -> None:  # fmt: skip
        assert config.kv_heads is not None and config.head_dim is not None
        self.block_size, self.num_blocks, self.device, self.backend = block_size, num_blocks, device, backend
        heads = (num_blocks, config.depth, block_size, config.kv_heads)
        self.k, self.v = (_zeros((*heads, config.head_dim), device, dtype) for _ in range(2))
        self.k_scale = self.v_scale = None
        if dtype == torch.int8:
            self.k_scale, self.v_scale = (_zeros(heads, device, torch.float32) for _ in range(2))

    @staticmethod
    def bytes_per_block(config: TransformerConfig, block_size: int, dtype: torch.dtype) -> int:
        assert config.kv_heads is not None and config.head_dim is not None
        a_head = config.head_dim * dtype.itemsize + (torch.float32.itemsize if dtype == torch.int8 else 0)
        return 2 * config.depth * block_size * config.kv_heads * a_head

    def copy(self, sources: Table, targets: Table) -> None:
        source, target = (torch.from_numpy(blocks.astype(np.int64)).to(self.device) for blocks in (sources, targets))
        for memory in self._memory():
            memory[target] = memory[source]

    def clear(self, blocks: list[int]) -> None:
        for memory in self._memory():
            memory[blocks] = 0

    def append(
        self, layer: int, k: Tensor, v: Tensor, slots: Tensor, q: Tensor | None = None, rotary: Angles | None = None
    ) -> None:
        """Writes new tokens' keys and values of a layer into their ``slots``, block * block_size + offset.

        With ``rotary``, keys are turned on their way, and q in place.
        """
        cos, sin = rotary or (None, None)
        cache = self.layer(layer)
        append_to_cache(
            k, v, cache.k, cache.v, slots,
            k_scale=cache.k_scale, v_scale=cache.v_scale, cos=cos, sin=sin, q=q, backend=self.backend,
        )  # fmt: skip

    def layer(self, layer: int) -> LayerCache:
        scales = (None if x is None else x[:, layer] for x in (self.k_scale, self.v_scale))
        return LayerCache(self.k[:, layer], self.v[:, layer], *scales)

    def _memory(self) -> list[Tensor]:
        """All that a block consists of, as tensors that torch can index."""
        # Of float8 there is no such kernel everywhere; its bytes are moved as well.
        parts = [x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x for x in (self.k, self.v)]
        return parts + [x for x in (self.k_scale, self.v_scale) if x is not None]


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
        cache = self.storage.layer(layer)
        mixed = [
            paged_attention(
                q[part.tokens],
                cache.k,
                cache.v,
                part.source_tables if source else part.tables,
                part.source_lengths if source else part.lengths,
                part.cu_seqlens,
                max_seqlen_q=part.max_count,
                causal=not source,
                k_scale=cache.k_scale,
                v_scale=cache.v_scale,
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
    count = math.prod(shape) * dtype.itemsize
    if device.type != "cpu":
        return torch.zeros(count, device=device, dtype=torch.uint8).view(dtype).view(shape)
    try:
        return torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(dtype).view(shape)
    except MemoryError:
        raise ValueError(f"no memory for a cache of {2 * count} bytes: lower kv_cache_memory_bytes") from None
