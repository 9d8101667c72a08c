"""Beam search whose hypotheses contain given words.

Each beam also considers the tokens that a word would need next, however unlikely, and the beams to go on with are taken
in turn from those that have come equally far with the words, so that likelier ones without them do not crowd them out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from engine.beam_params import BeamSearchParams
from engine.beam_search import BeamSearch
from engine.beam_step import Candidates, Indices, Logprobs, failures, filled, go_on, sums_of

Word = tuple[int, ...]


@dataclass(frozen=True)
class Progress:
    """How far a beam has come: the words that are still missing, and how much of which one its last tokens are."""

    missing: tuple[Word, ...]
    word: Word = ()
    matched: int = 0

    def wanted(self) -> set[int]:
        """The tokens that would bring it on."""
        return {self.word[self.matched]} if self.word else {word[0] for word in self.missing}

    def after(self, token_id: int) -> Progress:
        if self.word and self.word[self.matched] == token_id:
            return self._grown(self.word, self.matched + 1)
        for word in self.missing:
            if word[0] == token_id:
                return self._grown(word, 1)
        return replace(self, word=(), matched=0)

    def _grown(self, word: Word, matched: int) -> Progress:
        if matched < len(word):
            return replace(self, word=word, matched=matched)
        missing = list(self.missing)
        missing.remove(word)
        return Progress(tuple(missing))

    @property
    def left(self) -> int:
        """How many tokens are still needed."""
        return sum(map(len, self.missing)) - self.matched


class ConstrainedBeamSearch(BeamSearch):
    """As ``BeamSearch``; no hypothesis ends before it has all ``words``."""

    def __init__(
        self, params: BeamSearchParams, prompt_ids: list[int], max_length: int, eos_ids: tuple[int, ...],
        words: tuple[Word, ...],
    ) -> None:  # fmt: skip
        super().__init__(params, prompt_ids, max_length, eos_ids)
        self._progress = [Progress(words)]
        self._after: list[Progress] = []  # of the step's candidates
        self._ends = set(self.eos_ids.tolist())

    def advance(self, logprobs: Logprobs, tokens: Indices, scores: Logprobs | None = None) -> list[int]:
        assert scores is not None
        if error := failures(logprobs[None], sums_of([self], logprobs[None])):
            raise error[0]
        best = self._candidates(tokens, scores)
        self.keep_finished(best)
        (parents,) = go_on([self], best.at(None), self._chosen(best.running)[None])
        return parents

    def _candidates(self, tokens: Indices, scores: Logprobs) -> Candidates:
        """Every beam's best, not just the best of all, and what words need; but for ends that come too early."""
        entries: dict[tuple[int, int], float] = {}
        for parent, progress in enumerate(self._progress):
            for token in {*tokens[parent].tolist(), *progress.wanted()}:
                if not (token in self._ends and progress.missing):
                    entries[parent, token] = float(np.float32(scores[parent, token]) + self.logprobs[parent])
        places = sorted(entries, key=lambda place: -entries[place])
        self._after = [self._progress[parent].after(token) for parent, token in places]
        ended = np.array([token in self._ends for _, token in places], dtype=bool)
        return Candidates(
            np.array([entries[place] for place in places], dtype=np.float32),
            np.array([parent for parent, _ in places], dtype=np.int64),
            np.array([token for _, token in places], dtype=np.int64),
            ended, ended | (self.length + 1 >= self.max_length),
        )  # fmt: skip

    def keep_finished(self, best: Candidates) -> None:
        """Of those with all words as in any search; at the length limit also others, if there is nothing better."""
        whole = np.array([not progress.missing for progress in self._after], dtype=bool)
        if whole.any():
            super().keep_finished(best.at(whole))
        elif not self.finished:
            super().keep_finished(best)

    def _chosen(self, running: Logprobs) -> Indices:
        """In turn the best of those that lack the fewest tokens, the next fewest, and so on; then by likelihood."""
        banks: dict[int, list[int]] = {}
        for i in np.argsort(-running, kind="stable").tolist():
            banks.setdefault(self._after[i].left, []).append(i)
        order = [banks[left] for left in sorted(banks)]
        turns = [bank[turn] for turn in range(len(running)) for bank in order if turn < len(bank)]
        chosen = np.array(sorted(turns[: self.params.beam_width], key=lambda i: -running[i]), dtype=np.int64)
        self._progress = [self._after[i] for i in filled(chosen[None], self.params.beam_width)[0]]
        return chosen
