"""A step of many beam searches at once, in arrays over all that are alike: log-probabilities in, the next beams out.

Each search goes where it would go alone, bit for bit: rows of the arrays never meet, and where there is something to do
for one of them alone, as when a hypothesis ends, that search does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from engine.beam_search import BeamSearch

# The log-probability of a beam there is not: all but the first before the first step, ended ones afterwards.
NOTHING = -1e9
Logprobs = NDArray[np.float32]
Indices = NDArray[np.int64]


class NoContinuation(Exception):
    """No beam of a request can go on: its rules leave no token, or its logits are ``not_finite``."""

    def __init__(self, not_finite: bool) -> None:
        why = "the model gave no finite logits" if not_finite else "the generation rules leave no token"
        super().__init__(why)
        self.not_finite = not_finite


@dataclass(frozen=True)
class Candidates:
    """A step's likeliest continuations of all beams, best first: (searches, candidates) each, or one search's alone.

    ``stops`` marks those that cannot go on: those that ``ended`` with an end token, or all at the length limit.
    """

    logprobs: Logprobs
    parents: Indices
    tokens: Indices
    ended: NDArray[np.bool_]
    stops: NDArray[np.bool_]

    def at(self, keep: int | NDArray[np.bool_] | None) -> Candidates:
        """Those of one of the searches; some of one's alone; or, for None, one's alone as those of several."""
        return Candidates(
            self.logprobs[keep], self.parents[keep], self.tokens[keep], self.ended[keep], self.stops[keep]
        )  # fmt: skip

    @property
    def running(self) -> Logprobs:
        """Their log-probabilities as beams to go on with, where those that stop are nothing."""
        return self.logprobs + self.stops.astype(np.float32) * np.float32(NOTHING)


def advance_together(
    searches: Sequence[BeamSearch], logprobs: Logprobs, tokens: Indices
) -> list[list[int] | NoContinuation]:  # fmt: skip
    """Takes a step of searches of equal ``likeness``, given the best ``num_candidates`` of each of their beams.

    ``logprobs`` and ``tokens`` are (searches, beams, candidates), best first. Returns, of each search, the beam that
    each of its beams continues; or why it cannot go on, and then leaves it as it was.
    """
    sums = sums_of(searches, logprobs)
    errors = failures(logprobs, sums)
    if errors:
        able = [i for i in range(len(searches)) if i not in errors]
        moves = iter(_advance([searches[i] for i in able], sums[able], tokens[able]) if able else ())
        return [errors[i] if i in errors else next(moves) for i in range(len(searches))]
    return [*_advance(searches, sums, tokens)]


def _advance(searches: Sequence[BeamSearch], sums: Logprobs, tokens: Indices) -> list[list[int]]:
    best = _likeliest(searches, sums, tokens)
    width = searches[0].params.beam_width
    for i in np.flatnonzero(best.stops[:, :width].any(axis=1)).tolist():
        searches[i].keep_finished(best.at(i))
    return go_on(searches, best, np.argsort(-best.running, axis=1, kind="stable")[:, :width])


def sums_of(searches: Sequence[BeamSearch], logprobs: Logprobs) -> Logprobs:
    """The log-probabilities of whole beams with each token behind them: (searches, beam_width, candidates)."""
    before = np.concatenate([search.logprobs for search in searches]).reshape(len(searches), -1, 1)
    # The prompt's one row stands for every beam, of which all but the first are NOTHING.
    return logprobs + before


def failures(logprobs: Logprobs, sums: Logprobs) -> dict[int, NoContinuation]:
    """Which searches cannot go on, and why: their log-probabilities are NaN, or leave no token."""
    unable = np.flatnonzero(~np.isfinite(sums.max(axis=(1, 2)))).tolist()
    return {i: NoContinuation(not_finite=bool(np.isnan(logprobs[i]).any())) for i in unable}


def _likeliest(searches: Sequence[BeamSearch], sums: Logprobs, tokens: Indices) -> Candidates:
    one, (num, beams, count) = searches[0], tokens.shape
    flat = sums.reshape(num, -1)
    best = np.argsort(-flat, axis=1, kind="stable")[:, : one.num_candidates]
    every = np.arange(num)[:, None]
    parents = best // count % beams
    chosen = tokens[every, parents, best % count]
    ended = (chosen[..., None] == one.eos_ids).any(axis=-1)
    last = np.array([search.length + 1 >= search.max_length for search in searches])
    return Candidates(flat[every, best], parents, chosen, ended, ended | last[:, None])


def go_on(searches: Sequence[BeamSearch], best: Candidates, chosen: Indices) -> list[list[int]]:
    """Goes on with the ``chosen`` candidates, (searches, up to beam_width), best first; returns their parents."""
    width, found = searches[0].params.beam_width, chosen.shape[1]
    every = np.arange(len(searches))[:, None]
    logprobs = np.full((len(searches), width), NOTHING, dtype=np.float32)
    logprobs[:, :found] = best.running[every, chosen]
    chosen = filled(chosen, width)
    parents: list[list[int]] = best.parents[every, chosen].tolist()
    tokens = best.tokens[every, chosen].tolist()
    for search, sums, own, new in zip(searches, logprobs, parents, tokens, strict=True):
        search.logprobs, search.token_ids = sums, _grown(search.token_ids, own, new)
    ends = best.stops.all(axis=1) | ~_can_improve(searches, logprobs[:, 0])
    for search, done in zip(searches, ends.tolist(), strict=True):
        search.done = done
    return parents


def filled(chosen: Indices, width: int) -> Indices:
    """As many as there are beams; those that are missing, which are NOTHING, repeat the last."""
    missing = width - chosen.shape[1]
    return np.concatenate([chosen, np.repeat(chosen[:, -1:], missing, axis=1)], axis=1) if missing else chosen


def _grown(lists: list[list[int]], parents: list[int], tokens: list[int]) -> list[list[int]]:
    """Each parent's list with a token behind it. A list is copied only for a parent's second child, and the next."""
    grown: list[list[int]] = []
    taken: set[int] = set()
    for parent in parents:
        grown.append(lists[parent].copy() if parent in taken else lists[parent])
        taken.add(parent)
    for ids, token in zip(grown, tokens, strict=True):
        ids.append(token)
    return grown


def _can_improve(searches: Sequence[BeamSearch], best: Logprobs) -> NDArray[np.bool_]:
    """Whether the best running beam of each may still end up among the finished ones: transformers' rules."""
    penalties = np.array([search.hoped_penalty for search in searches], dtype=np.float32)
    hopes = np.full(len(best), -np.inf, dtype=np.float32)
    np.divide(best, penalties, out=hopes, where=best > NOTHING / 2)
    return hopes > np.array([search.bar for search in searches], dtype=np.float32)
