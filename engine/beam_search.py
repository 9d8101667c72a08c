"""Beam search over one request, without a model: log-probabilities in, the next step's beams out.

Step for step what transformers' ``generate(num_beams=...)`` computes (``GenerationMixin._beam_search``), in float32 and
with its constants, so that hypotheses, their order and their scores are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.beam_params import BeamSearchParams
from kernels.sampling import top_k

# The log-probability of a beam there is not: all but the first before the first step, ended ones afterwards.
NOTHING = -1e9


class NoContinuation(Exception):
    """No beam of a request can go on; the message says why."""


@dataclass(frozen=True)
class Hypothesis:
    """A finished sequence. ``token_ids`` are the generated ones; ``ended`` says whether the last is an end token."""

    token_ids: list[int]
    cum_logprob: float
    score: float
    ended: bool


@dataclass(frozen=True)
class Candidates:
    """A step's likeliest continuations of all beams, best first: (candidates,) each.

    ``stops`` marks those that cannot go on: those that ``ended`` with an end token, or all at the length limit.
    """

    logprobs: Tensor
    parents: Tensor
    tokens: Tensor
    ended: Tensor
    stops: Tensor


class BeamSearch:
    """The beams of one request: those running, best first, and the finished hypotheses, best first.

    Attributes:
        token_ids: int64 (rows, length) of the running beams, prompt included; one row before the first step, then
            ``beam_width``.
        logprobs: float32 (beam_width,) of the running beams.
        done: nothing is left to do.
    """

    def __init__(
        self, params: BeamSearchParams, prompt_ids: list[int], max_length: int, eos_ids: tuple[int, ...]
    ) -> None:
        self.params, self.num_prompt, self.max_length = params, len(prompt_ids), max_length
        self.eos_ids = torch.tensor(() if params.ignore_eos else eos_ids, dtype=torch.int64)
        self.token_ids = torch.tensor([prompt_ids], dtype=torch.int64)
        self.logprobs = torch.full((params.beam_width,), NOTHING)
        self.logprobs[0] = 0.0
        # Greedy search takes the first hypothesis that ends, as transformers does with one beam.
        self.stops_when_full = params.early_stopping is True or params.beam_width == 1
        self.finished: list[Hypothesis] = []
        self.done = False

    def advance(self, log_probs: Tensor) -> Tensor:
        """Takes a step, given float32 log-probabilities (rows, vocab) of the token after each row of ``token_ids``.

        Returns int64 (beam_width,): the row that each beam continues, its new token being its last in ``token_ids``.
        Raises NoContinuation when the log-probabilities are NaN or leave no token.
        """
        best = self._candidates(log_probs)
        self._keep_finished(best)
        logprobs = best.logprobs + best.stops * NOTHING
        chosen = logprobs.topk(self.params.beam_width).indices
        parents = best.parents[chosen]
        self.logprobs = logprobs[chosen]
        self.token_ids = torch.cat([self.token_ids[parents], best.tokens[chosen][:, None]], dim=1)
        self.done = bool(best.stops.all()) or not self._can_improve()
        return parents

    def hypotheses(self) -> list[Hypothesis]:
        """The best ``num_return_sequences``; fewer where there are not so many different ones."""
        return [found for found in self.finished if found.cum_logprob > NOTHING / 2][: self.params.num_returned]

    def _candidates(self, log_probs: Tensor) -> Candidates:
        width, (rows, vocab) = self.params.beam_width, log_probs.shape
        # Were every end token among the best of every beam, there would still be beam_width others to go on with.
        wanted = max(2, 1 + len(self.eos_ids)) * width
        best, ids = top_k(log_probs, count := min(wanted, vocab))
        # The prompt's one row stands for every beam, of which all but the first are NOTHING.
        logprobs, at = (best.expand(width, count) + self.logprobs[:, None]).flatten().topk(wanted)
        if not logprobs[0].isfinite():
            why = "the generation rules leave no token" if logprobs[0] < 0 else "the model gave no finite logits"
            raise NoContinuation(why)
        parents = at // count % rows
        tokens = ids[parents, at % count]
        ended = torch.isin(tokens, self.eos_ids)
        stops = ended | (self.token_ids.shape[1] + 1 >= self.max_length)
        return Candidates(logprobs, parents, tokens, ended, stops)

    def _keep_finished(self, best: Candidates) -> None:
        """Adds those of the ``beam_width`` best candidates that stop; the rest are there only to go on with."""
        scores = best.logprobs / self._penalty(self.token_ids.shape[1] + 1)
        for i, stops in enumerate(best.stops[: self.params.beam_width].tolist()):
            if stops and scores[i] > NOTHING:
                token_ids = [*self.token_ids[best.parents[i], self.num_prompt :].tolist(), int(best.tokens[i])]
                found = Hypothesis(token_ids, float(best.logprobs[i]), float(scores[i]), bool(best.ended[i]))
                self.finished.append(found)
        self.finished.sort(key=lambda found: -found.score)
        del self.finished[self.params.num_kept :]

    def _can_improve(self) -> bool:
        """Whether the best running beam may still end up among the finished ones: transformers' rules."""
        full = len(self.finished) == self.params.num_kept
        if full and self.stops_when_full:
            return False
        worst = self.finished[-1].score if full else NOTHING
        return bool(self.logprobs[0] / self._penalty(self._hoped_length()) > worst)

    def _hoped_length(self) -> int:
        """The length at which the best running beam would score best: "never" looks ahead, others do not."""
        looks_ahead = self.params.early_stopping == "never" and self.params.length_penalty > 0
        return self.max_length if looks_ahead else self.token_ids.shape[1]

    def _penalty(self, length: int) -> float:
        """What a log-probability is divided by at this length, prompt included."""
        return float((length - self.num_prompt) ** self.params.length_penalty)
