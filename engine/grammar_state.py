"""A compiled grammar and where one sequence stands in it: the tokens that may come next, as bits."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.grammar_vocabulary import GrammarVocabulary, Mask

# What matching may take of the engine's time: an ambiguous grammar takes more with every token.
FREE_SECONDS, SECONDS_A_TOKEN = 1.0, 0.02


class GrammarError(ValueError):
    """A sequence cannot go on under its grammar."""


class AmbiguousGrammarError(GrammarError):
    """Matching takes too long: there are too many ways to read the text."""


@dataclass(frozen=True, eq=False)
class CompiledGrammar:
    """A grammar for the tokens of one model. ``handle`` is ``xgrammar.CompiledGrammar``."""

    handle: Any
    vocabulary: GrammarVocabulary

    @property
    def num_bytes(self) -> int:
        return int(self.handle.memory_size_bytes)

    def state(self) -> GrammarState:
        """Of a sequence that has no token yet."""
        import xgrammar

        return GrammarState(self, xgrammar.GrammarMatcher(self.handle))


class GrammarState:
    """Where one sequence stands in its grammar.

    Attributes:
        token_ids: those accepted.
    """

    def __init__(self, grammar: CompiledGrammar, matcher: Any) -> None:
        self.grammar, self._vocabulary, self._matcher = grammar, grammar.vocabulary, matcher
        self.token_ids: list[int] = []
        self._spent = 0.0

    def fill_mask(self, mask: Mask) -> None:
        """Sets bit i % 32 of word i // 32 where token i may come next, and clears all others.

        The bits of end tokens are set where the text may end. ``mask`` is int32 (ceil(vocab_size / 32),), contiguous.
        Raises GrammarError where no token may follow: behind an end token, and where the vocabulary cannot spell what
        the grammar wants; AmbiguousGrammarError once matching has taken more than a second and 20 ms a token.
        """
        if mask.shape != self._vocabulary.anywhere.shape or mask.dtype != np.int32:
            raise ValueError(f"a mask must be int32 {self._vocabulary.anywhere.shape}, got {mask.dtype} {mask.shape}")
        if self._matcher.is_terminated():
            raise GrammarError("no token can follow the end token")
        self._fill(mask)
        if self._spent > FREE_SECONDS + SECONDS_A_TOKEN * len(self.token_ids):
            tokens, seconds = len(self.token_ids), self._spent
            raise AmbiguousGrammarError(f"the grammar is too ambiguous: {tokens} tokens took {seconds:.1f} s")
        if not mask.any():
            raise GrammarError("the vocabulary has no token that the grammar allows here")

    def accept(self, token_id: int) -> None:
        """Goes on by a token. Raises GrammarError, and stays where it is, for one that is not allowed."""
        if not self._may_stand(token_id) or not self._timed(lambda: self._matcher.accept_token(token_id)):
            raise GrammarError(f"the grammar does not allow token {token_id} here")
        self.token_ids.append(token_id)

    @property
    def finished(self) -> bool:
        """Whether nothing but an end token can follow."""
        if self._matcher.is_terminated():
            return True
        if not self._matcher.is_completed():
            return False
        mask = np.empty_like(self._vocabulary.anywhere)
        self._fill(mask)
        return not (mask & ~self._vocabulary.ends).any()

    def _fill(self, mask: Mask) -> None:
        mask[:] = -1  # the library leaves a mask alone that would be all ones
        self._timed(lambda: self._matcher.fill_next_token_bitmask(mask[None]))
        mask &= self._vocabulary.place(self.token_ids)

    def _may_stand(self, token_id: int) -> bool:
        place = self._vocabulary.place(self.token_ids)
        return 0 <= token_id < self._vocabulary.size and bool(place[token_id // 32] >> token_id % 32 & 1)

    def _timed(self, step: Callable[[], bool]) -> bool:
        """Its own time only, as the machine may be busy with something else."""
        start = time.thread_time()
        result = step()
        self._spent += time.thread_time() - start
        return result
