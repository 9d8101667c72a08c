"""Blocks of the cache: who holds them, and which are kept although nobody does, because their content is known.

A block has any number of holders: sequences that share what they have in common, samples of one prompt, beams. Content
that has a key (a full block's tokens and those before them; a whole source) is found again under it, and stays when
its last holder has gone until its room is needed, least recently used first. Keys are compared, not just hashed: no two
contents are ever taken for each other.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

_serials = itertools.count()


@dataclass(eq=False)
class Known:
    """Blocks of known content, all held and dropped together: one of a sequence's, or all of a source's."""

    key: Hashable
    blocks: list[int]
    serial: int = field(default_factory=lambda: next(_serials))  # never used again, unlike a block's number


class BlockPool:
    """The blocks 0 to ``num_blocks``. ``num_available``: those that ``take`` can give, idle known ones included."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.holders = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._known: dict[Hashable, Known] = {}
        self._known_of: dict[int, Known] = {}
        self._idle: OrderedDict[Known, None] = OrderedDict()  # without holders, least recently used first
        self._num_idle = 0  # blocks of theirs

    @property
    def num_available(self) -> int:
        return len(self._free) + self._num_idle

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_available

    def take(self, count: int) -> list[int]:
        """``count`` blocks of no content, each with one holder; there must be as many available."""
        while len(self._free) < count:
            self._evict(next(iter(self._idle)))
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        for block in taken:
            self.holders[block] = 1
        return taken

    def hold(self, blocks: Iterable[int]) -> None:
        """One more holder of each."""
        for block in blocks:
            if self.holders[block] == 0:
                self._idle.pop(self._known_of[block], None)
                self._num_idle -= 1
            self.holders[block] += 1

    def drop(self, blocks: Iterable[int]) -> list[int]:
        """One holder less of each; returns those that are free now, whose content is lost."""
        freed = []
        for block in blocks:
            self.holders[block] -= 1
            if self.holders[block]:
                continue
            if (known := self._known_of.get(block)) is None:
                freed.append(block)
            else:
                self._idle[known] = None
                self._num_idle += 1
        self._free += freed
        return freed

    def find(self, key: Hashable) -> Known | None:
        return self._known.get(key)

    def name(self, known: Known) -> Known:
        """Makes held blocks findable; returns what is found under the key from now on: the first that had it."""
        found = self._known.setdefault(known.key, known)
        if found is known:
            self._known_of |= dict.fromkeys(known.blocks, known)
        return found

    def forget(self, blocks: Iterable[int]) -> None:
        """Makes the content of blocks that are held unknown."""
        for block in blocks:
            if (known := self._known_of.get(block)) is not None:
                self._unname(known)

    def forget_all(self) -> None:
        """Makes all content unknown."""
        while self._idle:
            self._evict(next(iter(self._idle)))
        self._known.clear()
        self._known_of.clear()

    def _evict(self, known: Known) -> None:
        del self._idle[known]
        self._num_idle -= len(known.blocks)
        self._unname(known)
        self._free += known.blocks

    def _unname(self, known: Known) -> None:
        del self._known[known.key]
        for block in known.blocks:
            del self._known_of[block]
