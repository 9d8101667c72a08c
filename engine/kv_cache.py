"""The cache: one pool of blocks, made at start-up, for self- and cross-attention of every running sequence.

A row is a sequence's place in the tables: its tokens, the blocks that hold their keys and values, its source. It takes
blocks as it grows. Rows share full blocks of equal beginnings, and samples and beams also the one being filled, which
is copied before it is written. A source's keys and values are written once and read by every request that has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.block_pool import BlockPool, Known

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


@dataclass(eq=False)
class Source(Known):
    """A source's tokens and the blocks of its keys and values, ``encoded`` once they are written."""

    token_ids: list[int] = field(default_factory=list)
    encoded: bool = False


@dataclass(eq=False)
class Row:
    """A running sequence's place: its index in the tables, the blocks it holds, its source.

    The content of the first ``num_known`` blocks, which are full, is known to the pool; ``tip`` is what it knows of the
    last of them, which may be another block of the same content.
    """

    index: int
    source: Source | None
    blocks: list[int] = field(default_factory=list)
    num_known: int = 0
    tip: Known | None = None


@dataclass
class CacheCounts:
    """Tokens of prompts and sources asked for since the start, and those of them that were in the cache already."""

    prompt_tokens: int = 0
    prompt_hits: int = 0
    source_tokens: int = 0
    source_hits: int = 0


class KVCache:
    """Who holds which blocks of a storage: rows of the running sequences, and the sources of running requests."""

    def __init__(
        self, storage: Storage, max_num_seqs: int, max_model_len: int, enable_prefix_caching: bool = True
    ) -> None:
        self.storage, self.block_size, self.num_blocks = storage, storage.block_size, storage.num_blocks
        self.enable_prefix_caching = enable_prefix_caching
        self.pool = BlockPool(storage.num_blocks)
        width = self.blocks_for(max_model_len)
        self.tables: Table = np.zeros((max_num_seqs, width), dtype=np.int32)
        self.source_tables: Table = np.zeros((max_num_seqs, width), dtype=np.int32)
        self.source_lengths: Table = np.zeros(max_num_seqs, dtype=np.int32)
        self.tokens: Table = np.zeros((max_num_seqs, max_model_len), dtype=np.int32)
        self.counts = CacheCounts()
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._copies: list[tuple[int, int]] = []
        self._broken: set[int] = set()  # blocks to clear when their last holder drops them

    @property
    def num_rows(self) -> int:
        return len(self.tables)

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def take_source(self, token_ids: list[int]) -> Source | None:
        """The source of these tokens, one more time held: known, or new and to be encoded; None: there is no room."""
        known = self.find_source(token_ids)
        if known is not None:
            self.pool.hold(known.blocks)
            return known
        source = self.new_source(token_ids)
        if source is not None and self.enable_prefix_caching:
            self.pool.name(source)
        return source

    def find_source(self, token_ids: list[int]) -> Source | None:
        known = self.pool.find(("source", *token_ids)) if self.enable_prefix_caching else None
        assert known is None or isinstance(known, Source)
        return known

    def new_source(self, token_ids: list[int]) -> Source | None:
        """A source that nobody finds, to be encoded; None: there is no room."""
        if (count := self.blocks_for(len(token_ids))) > self.pool.num_available:
            return None
        return Source(("source", *token_ids), self.pool.take(count), token_ids=token_ids)

    def drop_source(self, source: Source) -> None:
        if not source.encoded and self.pool.holders[source.blocks[0]] == 1:
            self.pool.forget(source.blocks)
        self._drop(source.blocks)

    def open_row(self, source: Source | None) -> Row:
        """An empty row, reading ``source`` in cross-attention."""
        row = Row(self._free_rows.pop(), source, tip=source)
        if source is not None:
            self.source_tables[row.index, : len(source.blocks)] = source.blocks
            self.source_lengths[row.index] = len(source.token_ids)
        return row

    def close_row(self, row: Row) -> None:
        # The last block first: of a beginning that others may share, the start is kept longest.
        self._drop(row.blocks[::-1])
        row.blocks = []
        self._free_rows.append(row.index)

    def take_prefix(self, row: Row, token_ids: SequenceOf[int]) -> int:
        """Lets an empty row hold the blocks that are known of its tokens; returns how many tokens they hold.

        At least one token is left to run.
        """
        for known in self._known_prefix(row.tip, token_ids):
            self.pool.hold(known.blocks)
            row.blocks += known.blocks
            row.tip = known
        row.num_known = len(row.blocks)
        self.tables[row.index, : len(row.blocks)] = row.blocks
        return len(row.blocks) * self.block_size

    def count_held_prefix(self, source_ids: list[int] | None, token_ids: SequenceOf[int]) -> int:
        """How many blocks known of these tokens others hold now, so that sharing them takes nothing."""
        source = None if source_ids is None else self.find_source(source_ids)
        if source_ids is not None and source is None:
            return 0
        return sum(self.pool.holders[known.blocks[0]] > 0 for known in self._known_prefix(source, token_ids))

    def _known_prefix(self, before: Known | None, token_ids: SequenceOf[int]) -> Iterator[Known]:
        """The blocks known of the tokens, behind ``before``, as far as they go; at least one token is left."""
        size = self.block_size
        for start in range(0, len(token_ids) - size, size) if self.enable_prefix_caching else ():
            known = self.pool.find(_key(before, token_ids[start : start + size]))
            if known is None:
                return
            yield known
            before = known

    def grow(self, row: Row, start: int, end: int) -> bool:
        """Gives a row blocks for its tokens up to ``end`` that it may write from ``start`` on; False: no room for it.

        A block that others hold as well is replaced by a copy, which ``copy_shared`` makes. Only the first one written
        can be such a block: those behind it were taken by this row and are shared with none before they are full.
        """
        first, have = start // self.block_size, len(row.blocks)
        new = self.blocks_for(end) - have
        shared = first < have and self.pool.holders[row.blocks[first]] > 1
        if new <= 0 and not shared:
            return True
        new = max(new, 0)
        if new + shared > self.pool.num_available:
            return False
        taken = self.pool.take(new + shared)
        if shared:
            self._replace(row, first, taken.pop())
        row.blocks += taken
        self.tables[row.index, have : have + new] = taken
        return True

    def _replace(self, row: Row, at: int, copy: int) -> None:
        self._copies.append((row.blocks[at], copy))
        self._drop([row.blocks[at]])
        row.blocks[at] = copy
        self.tables[row.index, at] = copy

    def copy_shared(self) -> None:
        """Makes the copies that ``grow`` has promised."""
        if self._copies:
            sources, targets = np.array(self._copies, dtype=np.int32).T
            self.storage.copy(sources, targets)
            self._copies.clear()

    def remember(self, row: Row, token_ids: SequenceOf[int], end: int) -> None:
        """Lets others find the blocks that are full when the row's tokens up to ``end`` are written.

        They may count on them in the same step already: what they hold is written before it is read.
        """
        if not self.enable_prefix_caching:
            return
        size = self.block_size
        for at in range(row.num_known, end // size):
            known = Known(_key(row.tip, token_ids[at * size : (at + 1) * size]), [row.blocks[at]])
            row.tip = self.pool.name(known)
        row.num_known = max(row.num_known, end // size)

    def reorder(self, rows: SequenceOf[Row], parents: SequenceOf[int]) -> None:
        """Makes row i hold what row ``parents[i]`` holds, tokens included. These may be rows of many requests.

        What has one row to go to moves there as it is; only what goes to several has more holders than before.
        """
        if all(i == parent for i, parent in enumerate(parents)):
            return
        held: list[tuple[list[int], int, Known | None]] = []
        copied: list[Row] = []  # parents, for each child but the first
        moved: set[int] = set()
        for parent in parents:
            row = rows[parent]
            if parent in moved:
                copied.append(row)
            held.append((row.blocks.copy() if parent in moved else row.blocks, row.num_known, row.tip))
            moved.add(parent)
        # As many have no child; what they hold is lost.
        self._hold_instead([row for i, row in enumerate(rows) if i not in moved], copied)
        self._copy_tables(rows, parents)
        for row, (blocks, num_known, tip) in zip(rows, held, strict=True):
            row.blocks, row.num_known, row.tip = blocks, num_known, tip

    def _hold_instead(self, lost: list[Row], copied: list[Row]) -> None:
        """Drops what the lost rows hold and holds what the copied ones do, once more each.

        What one of each holds in the same place, as beams do their common beginning, is left alone.
        """
        width = max((len(row.blocks) for row in (*lost, *copied)), default=0)
        old, has_old = self._blocks_of(lost, width)
        new, has_new = self._blocks_of(copied, width)
        differs = (old != new) | (has_old != has_new)
        self.pool.hold(new[has_new & differs].tolist())
        self._drop(old[:, ::-1][(has_old & differs)[:, ::-1]].tolist())

    def _blocks_of(self, rows: list[Row], width: int) -> tuple[Table, NDArray[np.bool_]]:
        """The table of some rows, and which places of it are filled."""
        filled = np.array([len(row.blocks) for row in rows])[:, None] > np.arange(width)
        return self.tables[[row.index for row in rows], :width], filled

    def _copy_tables(self, rows: SequenceOf[Row], parents: SequenceOf[int]) -> None:
        targets = np.array([row.index for row in rows])
        sources = targets[parents]
        targets, sources = targets[(moves := targets != sources)], sources[moves]
        width = max(len(row.blocks) for row in rows)  # the tables may be far wider
        self.tables[targets, :width] = self.tables[sources, :width]
        self.tokens[targets, : width * self.block_size] = self.tokens[sources, : width * self.block_size]

    def discard(self, row: Row) -> None:
        """Takes what a row and its source hold for worthless, as when values are not finite: nobody will find it.

        It is zeroed when its last holder drops it, for attention multiplies what lies past a sequence's end by zero,
        which NaN would survive.
        """
        for blocks in (row.blocks, row.source.blocks if row.source is not None else ()):
            self.pool.forget(blocks)
            self._broken.update(blocks)

    def forget_all(self) -> None:
        """Lets nothing be found again, as when the model has changed; copies that were promised are not made."""
        self.pool.forget_all()
        self._copies.clear()

    def slots(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The slots, block * block_size + offset, of tokens at ``positions`` of the sequences in ``rows``."""
        blocks = self.tables[rows, positions // self.block_size].astype(np.int64)
        return blocks * self.block_size + positions % self.block_size

    def source_slots(self, source: Source) -> NDArray[np.int64]:
        """The slots of a source's tokens, which fill its blocks from their start."""
        places = np.arange(len(source.token_ids))
        blocks = np.asarray(source.blocks, dtype=np.int64)[places // self.block_size]
        return blocks * self.block_size + places % self.block_size

    def _drop(self, blocks: SequenceOf[int]) -> None:
        freed = self.pool.drop(blocks)
        if self._broken and (broken := self._broken.intersection(freed)):
            self.storage.clear(sorted(broken))
            self._broken -= broken


def _key(before: Known | None, token_ids: SequenceOf[int]) -> tuple[int, ...]:
    """What a full block holds: its tokens, behind the blocks, or the source, that come before it."""
    return (-1 if before is None else before.serial, *token_ids)
