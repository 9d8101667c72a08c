"""One step's input, flattened: the new tokens of all its sequences side by side, nothing padded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.int32]
Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Batch:
    """Tokens of some sequences, from ``starts`` on, ``counts`` of each; the last ``wanted`` of each give logits.

    Attributes:
        tokens: int32 (rows, positions), the table of all tokens. rows: int64 (sequences,), of the table.
        starts, counts, wanted: int32 (sequences,).
        drawn: int64 (sequences,), where among the tokens drawn last a sequence's only one is that the table lacks yet;
            -1, or None for all: the table has them.
    """

    tokens: Table
    rows: Indices
    starts: Table
    counts: Table
    wanted: Table
    drawn: Indices | None = None

    @classmethod
    def of(
        cls, tokens: Table, rows: list[int], starts: list[int], counts: list[int], wanted: list[int],
        drawn: list[int] | None = None,
    ) -> Batch:  # fmt: skip
        columns = np.array((starts, counts, wanted), dtype=np.int32)
        places = None if drawn is None else np.array(drawn, dtype=np.int64)
        return cls(tokens, np.array(rows, dtype=np.int64), columns[0], columns[1], columns[2], places)

    @cached_property
    def token_ids(self) -> Indices:
        """int64 (tokens,), a sequence's side by side, in the order of ``rows``."""
        return self.tokens[self.rows_of_tokens, self.positions].astype(np.int64)

    @cached_property
    def drawn_tokens(self) -> Indices:
        """int64 (tokens,): ``drawn`` of a sequence's last token, -1 for others."""
        places = np.full(int(self.offsets[-1]), -1, dtype=np.int64)
        if self.drawn is not None:
            places[self.offsets[1:] - 1] = self.drawn
        return places

    @cached_property
    def ends(self) -> Table:
        return self.starts + self.counts

    @cached_property
    def offsets(self) -> Table:
        """int32 (sequences + 1,): where each sequence's tokens begin."""
        return _offsets(self.counts)

    @cached_property
    def rows_of_tokens(self) -> Indices:
        return self.rows if self.decodes else np.repeat(self.rows, self.counts)

    @cached_property
    def positions(self) -> Indices:
        """int64 (tokens,), of each token in its sequence."""
        return self.starts.astype(np.int64) if self.decodes else _ranges(self.starts, self.counts)

    @cached_property
    def selected(self) -> Indices:
        """int64, ascending: the tokens whose logits are wanted."""
        return _ranges(self.offsets[1:] - self.wanted, self.wanted)

    @cached_property
    def decodes(self) -> bool:
        """Whether every sequence has one token."""
        return bool((self.counts == 1).all())

    def slices(self, most: int) -> Iterator[Batch]:
        """The batch in pieces of ``most`` tokens."""
        total = int(self.offsets[-1])
        if total <= most:
            yield self
            return
        for begin in range(0, total, most):
            yield self._between(begin, min(begin + most, total))

    def _between(self, begin: int, end: int) -> Batch:
        """The tokens from ``begin`` to ``end``."""
        first = np.maximum(self.offsets[:-1], begin)
        last = np.minimum(self.offsets[1:], end)
        part = last > first
        counts = (last - first)[part]
        starts = (self.starts + first - self.offsets[:-1])[part]
        wanted = np.clip(last - (self.offsets[1:] - self.wanted), 0, last - first)[part]
        return Batch(self.tokens, self.rows[part], starts, counts, wanted)


def _offsets(counts: Table) -> Table:
    offsets = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def _ranges(starts: Table, counts: Table) -> Indices:
    """start, start + 1, ... of each start, as many as its count."""
    if (counts == 1).all():
        return starts.astype(np.int64)
    before = np.repeat(_offsets(counts)[:-1], counts)
    return np.repeat(starts, counts).astype(np.int64) + np.arange(len(before)) - before
