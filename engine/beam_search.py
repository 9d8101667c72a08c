"""Beam search over one request, without a model: its running beams, its finished hypotheses, and how they compare.

Step for step what transformers' ``generate(num_beams=...)`` computes (``GenerationMixin._beam_search``), in float32 and
with its constants, so that hypotheses, their order and their scores are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.beam_params import BeamSearchParams
from engine.beam_step import NOTHING, Candidates, Indices, Logprobs, NoContinuation, advance_together


@dataclass(frozen=True)
class Hypothesis:
    """A finished sequence. ``token_ids`` are the generated ones; ``ended`` says whether the last is an end token."""

    token_ids: list[int]
    cum_logprob: float
    score: float
    ended: bool


class BeamSearch:
    """The beams of one request: those running, best first, and the finished hypotheses, best first.

    Attributes:
        token_ids: of the running beams, prompt included; one list before the first step, then ``beam_width``. A step
            takes the lists on, and makes new ones only where several beams continue one.
        logprobs: float32 (beam_width,) of the running beams.
        num_candidates: how many of each beam's likeliest tokens a step takes, if there are so many: were every end
            token among them, there would still be beam_width others to go on with.
        bar: the score that a running beam has to beat to be worth going on with.
        done: nothing is left to do.
    """

    def __init__(
        self, params: BeamSearchParams, prompt_ids: list[int], max_length: int, eos_ids: tuple[int, ...]
    ) -> None:
        self.params, self.num_prompt, self.max_length = params, len(prompt_ids), max_length
        self.eos_ids = np.array(() if params.ignore_eos else eos_ids, dtype=np.int64)
        self.num_candidates = max(2, 1 + len(self.eos_ids)) * params.beam_width
        self.token_ids = [list(prompt_ids)]
        self.logprobs: Logprobs = np.full(params.beam_width, NOTHING, dtype=np.float32)
        self.logprobs[0] = 0.0
        # Greedy search takes the first hypothesis that ends, as transformers does with one beam.
        self.stops_when_full = params.early_stopping is True or params.beam_width == 1
        self.looks_ahead = params.early_stopping == "never" and params.length_penalty > 0
        self.finished: list[Hypothesis] = []
        self.bar = -np.inf
        self.done = False

    @property
    def length(self) -> int:
        """Of the running beams, prompt included."""
        return len(self.token_ids[0])

    @property
    def likeness(self) -> tuple[object, ...]:
        """Searches in which it is equal can take a step together."""
        return len(self.token_ids), self.params.beam_width, self.eos_ids.tobytes()

    def advance(self, logprobs: Logprobs, tokens: Indices, scores: Logprobs | None = None) -> list[int]:
        """Takes a step, given the best ``num_candidates`` of each beam, (beams, candidates), best first.

        ``scores`` (beams, vocab) are all log-probabilities, for a search that looks at others than the best. Returns
        the beam that each beam continues, its new token being its last in ``token_ids``. Raises NoContinuation when the
        log-probabilities are NaN or leave no token.
        """
        (parents,) = advance_together([self], logprobs[None], tokens[None])
        if isinstance(parents, NoContinuation):
            raise parents
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

    def keep_finished(self, best: Candidates) -> None:
        """Adds those of the ``beam_width`` best candidates that stop; the rest are there only to go on with."""
        scores = best.logprobs / np.float32(self._penalty(self.length + 1))
        for i in np.flatnonzero(best.stops[: self.params.beam_width]):
            if best.logprobs[i] > NOTHING / 2:
                token_ids = [*self.token_ids[best.parents[i]][self.num_prompt :], int(best.tokens[i])]
                found = Hypothesis(token_ids, float(best.logprobs[i]), float(scores[i]), bool(best.ended[i]))
                self.finished.append(found)
        self.finished.sort(key=lambda found: -found.score)
        del self.finished[self.params.num_kept :]
        if len(self.finished) == self.params.num_kept:
            self.bar = np.inf if self.stops_when_full else self.finished[-1].score

    @property
    def hoped_penalty(self) -> float:
        """At the length at which the best running beam would score best: "never" looks ahead, others do not."""
        return self._penalty(self.max_length if self.looks_ahead else self.length)

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
