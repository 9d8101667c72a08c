"""Guesses of a smaller model, which decodes ahead with a cache of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import Batch
from engine.kv_cache import Row
from engine.request import Sequence
from engine.runner import Runner
from engine.sampling_batch import SamplingColumns
from kernels.sampling import sample


@dataclass
class Follower:
    """A sequence in the draft model's cache: of its tokens there, ``num_cached`` have run."""

    row: Row
    num_cached: int = 0


class DraftModel:
    """A drafter (``engine.speculation.Drafter``). Its guesses are drawn as the sequence's own tokens would be, with the
    same parameters and random numbers, so that a draft model as good as the model itself is always right."""

    def __init__(self, runner: Runner, max_model_len: int, num_threads: int | None) -> None:
        self.runner, self.cache, self.num_threads = runner, runner.cache, num_threads
        self.max_model_len = max_model_len
        self.columns = SamplingColumns(self.cache.tokens)
        self._followers: dict[Sequence, Follower] = {}

    def kinds(self, sequences: list[Sequence]) -> list[int | None]:
        for sequence in [known for known in self._followers if known.row is None]:  # finished, or sent back
            self._close(sequence)
        return [0 if self._follows(sequence) else None for sequence in sequences]

    def propose(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        self._encode(sequences)
        drafts: list[list[int]] = [[] for _ in sequences]
        for ahead in range(max(most)):
            active = [i for i, count in enumerate(most) if count > ahead and self._grow(sequences[i], ahead)]
            if not active:
                break
            for i, token_id in zip(active, self._next([sequences[i] for i in active], ahead), strict=True):
                drafts[i].append(token_id)
        return drafts

    def _follows(self, sequence: Sequence) -> bool:
        """Sees to it that the cache has a place for the sequence, and that its tokens there are the sequence's."""
        if len(sequence.token_ids) >= self.max_model_len - 1:
            return False
        if sequence not in self._followers:
            source_ids = sequence.request.encoder_prompt_token_ids
            if self.cache.num_free_rows == 0 or len(source_ids or ()) > self.max_model_len:
                return False
            source = None if source_ids is None else self.cache.take_source(source_ids)
            if source is None and source_ids is not None:
                return False
            self._followers[sequence] = Follower(self.cache.open_row(source))
        follower = self._followers[sequence]
        own = self.cache.tokens[follower.row.index]
        known = min(follower.num_cached, len(sequence.token_ids) - 1)
        wrong = (own[:known] != torch.tensor(sequence.token_ids[:known], dtype=torch.int32).numpy()).nonzero()[0]
        follower.num_cached = int(wrong[0]) if len(wrong) else known
        own[: len(sequence.token_ids)] = sequence.token_ids
        return True

    def _grow(self, sequence: Sequence, ahead: int) -> bool:
        follower, length = self._followers[sequence], len(sequence.token_ids) + ahead
        return length < self.max_model_len and self.cache.grow(follower.row, follower.num_cached, length)

    def _encode(self, sequences: list[Sequence]) -> None:
        sources = [self._followers[sequence].row.source for sequence in sequences]
        new = list(dict.fromkeys(source for source in sources if source is not None and not source.encoded))
        if new:
            self.runner.encode(new)
            for source in new:
                source.encoded = True

    def _next(self, sequences: list[Sequence], ahead: int) -> list[int]:
        """The token after each sequence's own and the ``ahead`` that were guessed."""
        followers = [self._followers[sequence] for sequence in sequences]
        rows = [follower.row.index for follower in followers]
        lengths = [len(sequence.token_ids) + ahead for sequence in sequences]
        starts = [follower.num_cached for follower in followers]
        counts = [length - start for length, start in zip(lengths, starts, strict=True)]
        logits: Tensor = self.runner.logits(Batch.of(self.cache.tokens, rows, starts, counts, [1] * len(rows)))
        result = sample(logits, self.columns.batch(sequences, lengths, rows), num_threads=self.num_threads)
        self.cache.tokens[rows, lengths] = result.token_ids
        for follower, length in zip(followers, lengths, strict=True):
            follower.num_cached = length
        return [max(token_id, 0) for token_id in result.token_ids.tolist()]  # -1, an error, guesses nothing right

    def _close(self, sequence: Sequence) -> None:
        row = self._followers.pop(sequence).row
        source = row.source
        self.cache.close_row(row)
        if source is not None:
            self.cache.drop_source(source)
