"""The cache: one pool of blocks, made at start-up, for self- and cross-attention of every running sequence.

A row is a sequence's place in the block tables. Its blocks are reserved when it is admitted, enough for its longest
outcome, so that no step can run out. A source's keys and values are written once and shared by the request's samples.
The rows of one beam search pool their blocks: those that are full are shared by the beams that have them in common.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.int32]


class Storage(Protocol):
    """The memory of the blocks, all layers of a block together, so that a short sequence touches few pages of it."""

    num_blocks: int
    block_size: int

    def copy(self, sources: Table, targets: Table) -> None:
        """Copies blocks, as if all at once: a target may be another's source."""
        ...

    def clear(self, blocks: list[int]) -> None:
        """Fills blocks with zeros."""
        ...


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
    """Who holds which blocks of a storage: rows of the running sequences, and their sources."""

    def __init__(self, storage: Storage, max_num_seqs: int, max_model_len: int) -> None:
        self.storage, self.block_size, self.num_blocks = storage, storage.block_size, storage.num_blocks
        width = -(-max_model_len // self.block_size)
        self.tables: Table = np.zeros((max_num_seqs, width), dtype=np.int32)
        self.source_tables: Table = np.zeros((max_num_seqs, width), dtype=np.int32)
        self.source_lengths: Table = np.zeros(max_num_seqs, dtype=np.int32)
        self._free_blocks = list(range(self.num_blocks - 1, -1, -1))
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))

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
            self.storage.clear(blocks)
        self._free_blocks += blocks
        self._free_rows.append(row.index)

    def reorder(self, rows: list[Row], parents: NDArray[np.int64], length: int) -> None:
        """Makes row i go on from the ``length`` tokens that row ``parents[i]`` holds; the rows are all of one search's.

        A full block is never written again, so beams share it by naming it in their tables. The block being filled is
        a row's own, and copied. The rows' blocks suffice: together their tables name at most as many as they brought.
        """
        index = np.array([row.index for row in rows])
        full, partial = divmod(length, self.block_size)
        tables = self.tables[index, : full + 1]
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
        self.storage.copy(sources[moved], targets[moved])

    def source_slots(self, source: Source) -> NDArray[np.int64]:
        """The slots, block * block_size + offset, of a source's tokens, which fill its blocks from their start."""
        places = np.arange(source.length)
        blocks = np.asarray(source.blocks, dtype=np.int64)[places // self.block_size]
        return blocks * self.block_size + places % self.block_size

    def slots(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The slots of tokens at ``positions`` of the sequences in ``rows``, one a token."""
        blocks = self.tables[rows, positions // self.block_size].astype(np.int64)
        return blocks * self.block_size + positions % self.block_size

    def _take(self, count: int) -> list[int]:
        taken = self._free_blocks[len(self._free_blocks) - count :]
        del self._free_blocks[len(self._free_blocks) - count :]
        return taken
