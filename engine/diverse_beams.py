"""Diverse beam search: groups of beams, each a search of its own that is put off from what those before it choose.

The penalties add up in a beam's log-probability, as they did in transformers' ``num_beam_groups``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from engine.beam_params import BeamSearchParams
from engine.beam_search import BeamSearch, Hypothesis, common_prefix
from engine.beam_step import Indices, Logprobs


class DiverseBeamSearch:
    """As ``engine.beam_search.BeamSearch``, of all groups' beams side by side."""

    def __init__(
        self, params: BeamSearchParams, prompt_ids: list[int], max_length: int, eos_ids: tuple[int, ...]
    ) -> None:
        self.params, self.num_prompt, self.max_length = params, len(prompt_ids), max_length
        self.width = params.beam_width // params.num_beam_groups
        own = replace(
            params, beam_width=self.width, num_beam_groups=1, diversity_penalty=0.0, num_return_sequences=None
        )  # fmt: skip
        self.groups = [BeamSearch(own, prompt_ids, max_length, eos_ids) for _ in range(params.num_beam_groups)]
        self.token_ids = [list(prompt_ids)]
        # As many of a beam's best may be penalised as other groups have beams.
        self.num_candidates = self.groups[0].num_candidates + params.beam_width

    @property
    def length(self) -> int:
        return len(self.token_ids[0])

    @property
    def done(self) -> bool:
        return all(group.done for group in self.groups)

    def advance(self, logprobs: Logprobs, tokens: Indices, scores: Logprobs | None = None) -> list[int]:
        parents: list[int] = []
        chosen: Counter[int] = Counter()
        first = len(logprobs) == 1  # the prompt's row stands for all
        for i, group in enumerate(self.groups):
            rows = slice(0, 1) if first else slice(i * self.width, (i + 1) * self.width)
            if group.done:  # its beams go along, for nothing
                parents += [0] * self.width if first else range(rows.start, rows.stop)
                group.token_ids = [[*ids, int(row[0])] for ids, row in zip(group.token_ids, tokens[rows], strict=True)]
                continue
            own = group.advance(*self._put_off(logprobs[rows], tokens[rows], chosen, group.num_candidates))
            parents += [rows.start + parent for parent in own]
            chosen.update(ids[-1] for ids in group.token_ids)
        self.token_ids = [ids for group in self.groups for ids in group.token_ids]
        return parents

    def _put_off(
        self, logprobs: Logprobs, tokens: Indices, chosen: Counter[int], count: int
    ) -> tuple[Logprobs, Indices]:
        """The best ``count`` of each beam once the chosen tokens are penalised."""
        if not chosen:
            return logprobs[:, :count], tokens[:, :count]
        times = np.array([[chosen[token] for token in row] for row in tokens.tolist()], dtype=np.float32)
        penalised = logprobs - np.float32(self.params.diversity_penalty) * times
        order = np.argsort(-penalised, axis=1, kind="stable")[:, :count]
        return np.take_along_axis(penalised, order, 1), np.take_along_axis(tokens, order, 1)

    def settled(self) -> list[int]:
        if self.done:
            found = self.hypotheses()
            return found[0].token_ids if found else []
        return common_prefix([group.settled() for group in self.groups])

    def hypotheses(self) -> list[Hypothesis]:
        found = [each for group in self.groups for each in group.hypotheses()]
        return sorted(found, key=lambda each: -each.score)[: self.params.num_returned]
