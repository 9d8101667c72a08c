"""The cache: one pool of blocks, made at start-up, for self- and cross-attention of every running sequence.

A row is a sequence's place in the block tables. Its blocks are reserved when it is admitted, enough for its longest
outcome, so that no step can run out. A source's keys and values are written once and shared by the request's samples.
The rows of one beam search pool their blocks: those that are full are shared by the beams that have them in common.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.attention_options import AttentionOptions
from kernels.paged_attention import append_to_cache, paged_attention
from models.config import TransformerConfig

Table = NDArray[np.int32]


@dataclass
class Source:
    """An encoded source's blocks, freed when its last sample is done."""

    length: int
    blocks: list[int]
    users: int = 0


@dataclass
class Row:
    """A running sequence's place: its index in the tables, its own blocks, its source."""

    index: int
    blocks: list[int] = field(default_factory=list)
    source: Source | None = None


class KVCache:
    """Keys and values of every layer: (num_blocks, layers, block_size, kv_heads, head_dim) each, in ``dtype``.

    A block's layers lie together, so that a short sequence touches few pages of memory however many layers there are.
    """

    def __init__(
        self, config: TransformerConfig, num_blocks: int, block_size: int, max_num_seqs: int, max_model_len: int,
        device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        assert config.kv_heads is not None and config.head_dim is not None
        self.layers = config.depth
        shape = (num_blocks, self.layers, block_size, config.kv_heads, config.head_dim)
        self.k, self.v = _zeros(shape, device, dtype), _zeros(shape, device, dtype)
        self.block_size, self.num_blocks, self.device = block_size, num_blocks, device
        width = -(-max_model_len // block_size)
        self.tables: Table = np.zeros((max_num_seqs, width), dtype=np.int32)
        self.source_tables: Table = np.zeros((max_num_seqs, width), dtype=np.int32)
        self.source_lengths: Table = np.zeros(max_num_seqs, dtype=np.int32)
        self._free_blocks = list(range(num_blocks - 1, -1, -1))
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))

    @staticmethod
    def bytes_per_block(config: TransformerConfig, block_size: int, dtype: torch.dtype) -> int:
        assert config.kv_heads is not None and config.head_dim is not None
        return 2 * config.depth * block_size * config.kv_heads * config.head_dim * dtype.itemsize

    @property
    def num_free_blocks(self) -> int:
        return len(self._free_blocks)

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def take_source(self, length: int) -> Source:
        return Source(length, self._take(self.blocks_for(length)))

    def take_row(self, num_tokens: int, source: Source | None) -> Row:
        """A row with blocks for ``num_tokens``, reading ``source`` in cross-attention."""
        row = Row(self._free_rows.pop(), self._take(self.blocks_for(num_tokens)), source)
        self.tables[row.index, : len(row.blocks)] = row.blocks
        if source is not None:
            source.users += 1
            self.source_tables[row.index, : len(source.blocks)] = source.blocks
            self.source_lengths[row.index] = source.length
        return row

    def release(self, row: Row, clear: bool = False) -> None:
        """Gives a row's blocks back; ``clear`` zeroes them, for a sequence whose values are not finite."""
        source = row.source
        blocks = list(row.blocks)
        if source is not None:
            source.users -= 1
            if source.users == 0:
                blocks += source.blocks
        if clear:
            self.k[blocks] = 0
            self.v[blocks] = 0
        self._free_blocks += blocks
        self._free_rows.append(row.index)

    def reorder(self, rows: list[Row], parents: NDArray[np.int64], length: int) -> None:
        """Makes row i go on from the ``length`` tokens that row ``parents[i]`` holds; the rows are all of one search's.

        A full block is never written again, so beams share it by naming it in their tables. The block being filled is
        a row's own, and copied. The rows' blocks suffice: together their tables name at most as many as they brought.
        """
        index = np.array([row.index for row in rows])
        full, partial = divmod(length, self.block_size)
        tables = self.tables[index]
        self.tables[index, :full] = tables[parents, :full]
        if partial:
            self._copy(tables[parents, full], tables[:, full])
        else:
            shared = set(self.tables[index, :full].flat)
            unused = (block for row in rows for block in row.blocks if block not in shared)
            self.tables[index, full] = list(itertools.islice(unused, len(rows)))

    def _copy(self, sources: Table, targets: Table) -> None:
        """Copies blocks, as if all at once: a target may be another's source."""
        moved = np.flatnonzero(sources != targets)
        if not len(moved):
            return
        source, target = (torch.from_numpy(b[moved].astype(np.int64)).to(self.device) for b in (sources, targets))
        self.k[target] = self.k[source]
        self.v[target] = self.v[source]

    def blocks_of(self, layer: int, tables: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All blocks of all layers, keys and values, and where among them a layer's blocks of ``tables`` are.

        tables are int32 (sequences, blocks), of the first layer: block b's is b * layers.
        """
        return self.k.flatten(0, 1), self.v.flatten(0, 1), tables + layer

    def append(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Writes new tokens' keys and values of a layer into their ``slots``, as ``slots_of`` numbers them."""
        append_to_cache(k, v, self.k.flatten(0, 1), self.v.flatten(0, 1), slots + layer * self.block_size)

    def slots_of(self, blocks: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first layer's slots of tokens at ``offsets`` in their blocks."""
        return blocks * (self.layers * self.block_size) + offsets

    def _source_slots(self, source: Source) -> NDArray[np.int64]:
        """The slots of a source's tokens, which fill its blocks from their start."""
        places = np.arange(source.length)
        blocks = np.asarray(source.blocks, dtype=np.int64)[places // self.block_size]
        return self.slots_of(blocks, places % self.block_size)

    def write_source(self, keys_values: list[tuple[Tensor, Tensor]], sources: list[Source]) -> None:
        """Stores every layer's cross-attention keys and values, packed in the order of ``sources``."""
        slots = torch.from_numpy(np.concatenate([self._source_slots(source) for source in sources])).to(self.device)
        for layer, (k, v) in enumerate(keys_values):
            self.append(layer, k, v, slots)

    def _take(self, count: int) -> list[int]:
        taken = self._free_blocks[len(self._free_blocks) - count :]
        del self._free_blocks[len(self._free_blocks) - count :]
        return taken


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


class CacheView:
    """The cache as one step's batch sees it: the protocol ``models.cache.Cache``.

    ``rows`` are the sequences' rows, each with ``starts`` tokens in the cache and ``counts`` new ones in this step.
    """

    def __init__(
        self,
        cache: KVCache,
        rows: NDArray[np.int64],
        starts: Table,
        counts: Table,
        backend: str | None,
    ) -> None:
        self.cache, self.backend = cache, backend
        ends = starts + counts
        offsets = np.concatenate(([0], np.cumsum(counts)))
        positions = np.concatenate([np.arange(s, e) for s, e in zip(starts, ends, strict=True)])
        blocks = cache.tables[np.repeat(rows, counts), positions // cache.block_size].astype(np.int64)
        self.slots = self._tensor(cache.slots_of(blocks, positions % cache.block_size))
        self.positions = self._tensor(positions)
        self.last_tokens = self._tensor(offsets[1:] - 1)
        # Runs of those that decode one token, and of newcomers with longer prompts: a backend that pads would
        # otherwise pad every one of the first to the longest of the others.
        cuts = [0, *(np.flatnonzero(np.diff(counts > 1)) + 1).tolist(), len(rows)]
        self.parts = [self._part(rows[a:b], ends[a:b], offsets[a : b + 1]) for a, b in itertools.pairwise(cuts)]

    def self_attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        self.cache.append(layer, k, v, self.slots)
        return self._attend(layer, q, options, source=False)

    def cross_attention(self, layer: int, q: Tensor, options: AttentionOptions) -> Tensor:
        return self._attend(layer, q, options, source=True)

    def _attend(self, layer: int, q: Tensor, options: AttentionOptions, *, source: bool) -> Tensor:
        mixed = [
            paged_attention(
                q[part.tokens],
                *self.cache.blocks_of(layer, part.source_tables if source else part.tables),
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

    def _part(self, rows: NDArray[np.int64], ends: Table, offsets: NDArray[np.int64]) -> Part:
        source_lengths = self.cache.source_lengths[rows]
        width, source_width = (self.cache.blocks_for(int(lengths.max())) for lengths in (ends, source_lengths))
        return Part(
            tokens=slice(int(offsets[0]), int(offsets[-1])),
            cu_seqlens=self._tensor((offsets - offsets[0]).astype(np.int32)),
            max_count=int(np.diff(offsets).max()),
            tables=self._tensor(self.cache.tables[rows, :width] * self.cache.layers),
            lengths=self._tensor(ends),
            source_tables=self._tensor(self.cache.source_tables[rows, :source_width] * self.cache.layers),
            source_lengths=self._tensor(source_lengths),
        )

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.cache.device)
