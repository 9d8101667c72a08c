"""Beam search over one request, without a model: log-probabilities in, the next step's beams out.

Step for step what transformers' ``generate(num_beams=...)`` computes (``GenerationMixin._beam_search``), in float32 and
with its constants, so that hypotheses, their order and their scores are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.beam_params import BeamSearchParams

# The log-probability of a beam there is not: all but the first before the first step, ended ones afterwards.
NOTHING = -1e9


class NoContinuation(Exception):
    """No beam of a request can go on: its rules leave no token, or its logits are ``not_finite``."""

    def __init__(self, not_finite: bool) -> None:
        why = "the model gave no finite logits" if not_finite else "the generation rules leave no token"
        super().__init__(why)
        self.not_finite = not_finite


@dataclass(frozen=True)
class Hypothesis:
    """A finished sequence. ``token_ids`` are the generated ones; ``ended`` says whether the last is an end token."""

    token_ids: list[int]
    cum_logprob: float
    score: float
    ended: bool


Logprobs = NDArray[np.float32]


@dataclass(frozen=True)
class Candidates:
    """A step's likeliest continuations of all beams, best first: (candidates,) each.

    ``stops`` marks those that cannot go on: those that ``ended`` with an end token, or all at the length limit.
    """

    logprobs: Logprobs
    parents: NDArray[np.int64]
    tokens: NDArray[np.int64]
    ended: NDArray[np.bool_]
    stops: NDArray[np.bool_]

    def where(self, keep: NDArray[np.bool_]) -> Candidates:
        return Candidates(
            self.logprobs[keep], self.parents[keep], self.tokens[keep], self.ended[keep], self.stops[keep]
        )  # fmt: skip


class BeamSearch:
    """The beams of one request: those running, best first, and the finished hypotheses, best first.

    Attributes:
        token_ids: of the running beams, prompt included; one list before the first step, then ``beam_width``.
        logprobs: float32 (beam_width,) of the running beams.
        num_candidates: how many of each beam's likeliest tokens a step takes, if there are so many: were every end
            token among them, there would still be beam_width others to go on with.
        done: nothing is left to do.
    """

    def __init__(
        self, params: BeamSearchParams, prompt_ids: list[int], max_length: int, eos_ids: tuple[int, ...]
    ) -> None:
        self.params, self.num_prompt, self.max_length = params, len(prompt_ids), max_length
        self.eos_ids = np.array(() if params.ignore_eos else eos_ids, dtype=np.int64)
        self.num_candidates = max(2, 1 + len(self.eos_ids)) * params.beam_width
        self.token_ids = [list(prompt_ids)]
        self.logprobs: NDArray[np.float32] = np.full(params.beam_width, NOTHING, dtype=np.float32)
        self.logprobs[0] = 0.0
        # Greedy search takes the first hypothesis that ends, as transformers does with one beam.
        self.stops_when_full = params.early_stopping is True or params.beam_width == 1
        self.finished: list[Hypothesis] = []
        self.done = False

    @property
    def length(self) -> int:
        """Of the running beams, prompt included."""
        return len(self.token_ids[0])

    def advance(
        self, logprobs: Logprobs, tokens: NDArray[np.int64], scores: Logprobs | None = None
    ) -> list[int]:  # fmt: skip
        """Takes a step, given the best ``num_candidates`` of each beam, (beams, candidates), best first.

        ``scores`` (beams, vocab) are all log-probabilities, for a search that looks at others than the best. Returns
        the beam that each beam continues, its new token being its last in ``token_ids``. Raises NoContinuation when the
        log-probabilities are NaN or leave no token.
        """
        best = self._candidates(logprobs, tokens, scores)
        self._keep_finished(best)
        running = best.logprobs + best.stops.astype(np.float32) * np.float32(NOTHING)
        chosen = self._chosen(best, running)
        self.logprobs = np.full(self.params.beam_width, NOTHING, dtype=np.float32)
        self.logprobs[: len(chosen)] = running[chosen]
        chosen = self._filled(chosen)
        parents: list[int] = best.parents[chosen].tolist()
        new = best.tokens[chosen].tolist()
        self.token_ids = [[*self.token_ids[parent], token] for parent, token in zip(parents, new, strict=True)]
        self.done = bool(best.stops.all()) or not self._can_improve()
        return parents

    def settled(self) -> list[int]:
        """The generated tokens that are sure to begin the best hypothesis: all that may win have them."""
        if self.done:
            found = self.hypotheses()
            return found[0].token_ids if found else []
        beams = zip(self.token_ids, self.logprobs[: len(self.token_ids)], strict=True)
        alive = [token_ids[self.num_prompt :] for token_ids, own in beams if own > NOTHING / 2]
        return common_prefix([*alive, *(found.token_ids for found in self.finished)])

    def hypotheses(self) -> list[Hypothesis]:
        """The best ``num_return_sequences``; fewer where there are not so many different ones."""
        return [found for found in self.finished if found.cum_logprob > NOTHING / 2][: self.params.num_returned]

    def _filled(self, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
        """As many as there are beams; those that are missing, which are NOTHING, repeat the last."""
        return np.append(chosen, np.repeat(chosen[-1:], self.params.beam_width - len(chosen)))

    def _chosen(self, best: Candidates, running: Logprobs) -> NDArray[np.int64]:
        """Which candidates to go on with, best first, given their log-probabilities as running ones."""
        return np.argsort(-running, kind="stable")[: self.params.beam_width]

    def _candidates(self, logprobs: Logprobs, tokens: NDArray[np.int64], scores: Logprobs | None) -> Candidates:
        beams, count = logprobs.shape
        # The prompt's one row stands for every beam, of which all but the first are NOTHING.
        sums = (logprobs + self.logprobs[:, None]).ravel()
        best = np.argsort(-sums, kind="stable")[: self.num_candidates]
        if not np.isfinite(sums[best[0]]) or np.isnan(logprobs).any():
            raise NoContinuation(not_finite=bool(np.isnan(logprobs).any()))
        parents = best // count % beams
        chosen = tokens[parents, best % count]
        ended = np.isin(chosen, self.eos_ids)
        return Candidates(sums[best], parents, chosen, ended, ended | (self.length + 1 >= self.max_length))

    def _keep_finished(self, best: Candidates) -> None:
        """Adds those of the ``beam_width`` best candidates that stop; the rest are there only to go on with."""
        if not best.stops[: self.params.beam_width].any():
            return
        scores = best.logprobs / np.float32(self._penalty(self.length + 1))
        for i in np.flatnonzero(best.stops[: self.params.beam_width]):
            if best.logprobs[i] > NOTHING / 2:
                token_ids = [*self.token_ids[best.parents[i]][self.num_prompt :], int(best.tokens[i])]
                found = Hypothesis(token_ids, float(best.logprobs[i]), float(scores[i]), bool(best.ended[i]))
                self.finished.append(found)
        self.finished.sort(key=lambda found: -found.score)
        del self.finished[self.params.num_kept :]

    def _can_improve(self) -> bool:
        """Whether the best running beam may still end up among the finished ones: transformers' rules."""
        full = len(self.finished) == self.params.num_kept
        if full and self.stops_when_full:
            return False
        worst = self.finished[-1].score if full else -np.inf
        is_alive = self.logprobs[0] > NOTHING / 2
        return bool(is_alive and self.logprobs[0] / np.float32(self._penalty(self._hoped_length())) > worst)

    def _hoped_length(self) -> int:
        """The length at which the best running beam would score best: "never" looks ahead, others do not."""
        looks_ahead = self.params.early_stopping == "never" and self.params.length_penalty > 0
        return self.max_length if looks_ahead else self.length

    def _penalty(self, length: int) -> float:
        """What a log-probability is divided by at this length, prompt included."""
        return float((length - self.num_prompt) ** self.params.length_penalty)


def common_prefix(lists: list[list[int]]) -> list[int]:
    """The longest beginning that all of some lists have."""
    if not lists:
        return []
    low, high = min(lists), max(lists)
    for i, token_id in enumerate(low):
        if i >= len(high) or high[i] != token_id:
            return low[:i]
    return low
