"""Guesses of a smaller model, which decodes ahead with a cache of its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.batch import Batch
from engine.kv_cache import Row
from engine.request import Sequence
from engine.runner import Runner
from engine.sampling_batch import SamplingColumns
from kernels.sampling import sample


@dataclass
class DraftRow:
    """A sequence in the draft model's cache: of its tokens there ``num_cached`` have run, and ``num_agreed`` are known
    to be the sequence's; those behind were guesses."""

    row: Row
    num_cached: int = 0
    num_agreed: int = 0


class DraftModel:
    """A drafter (``engine.speculation.Drafter``). Its guesses are drawn as the sequence's own tokens would be, with the
    same parameters and random numbers, so that a draft model as good as the model itself is always right."""

    def __init__(self, runner: Runner, max_model_len: int, num_threads: int | None) -> None:
        self.runner, self.cache, self.num_threads = runner, runner.cache, num_threads
        self.max_model_len = max_model_len
        self.columns = SamplingColumns(self.cache.tokens)
        self._rows: dict[Sequence, DraftRow] = {}

    def kinds(self, sequences: list[Sequence]) -> list[int | None]:
        for sequence in [known for known in self._rows if known.row is None]:  # finished, or sent back
            self._close(sequence)
        return [0 if self._has_row(sequence) else None for sequence in sequences]

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

    def _has_row(self, sequence: Sequence) -> bool:
        """Sees to it that the cache has a place for the sequence, and that its tokens there are the sequence's."""
        if len(sequence.token_ids) >= self.max_model_len - 1:
            return False
        if sequence not in self._rows:
            source_ids = sequence.request.encoder_prompt_token_ids
            if self.cache.num_free_rows == 0 or len(source_ids or ()) > self.max_model_len:
                return False
            source = None if source_ids is None else self.cache.take_source(source_ids)
            if source is None and source_ids is not None:
                return False
            self._rows[sequence] = DraftRow(self.cache.open_row(source))
        drafted = self._rows[sequence]
        own, start, end = self.cache.tokens[drafted.row.index], drafted.num_agreed, len(sequence.token_ids)
        agreed = start
        while agreed < min(drafted.num_cached, end - 1) and own[agreed] == sequence.token_ids[agreed]:
            agreed += 1
        drafted.num_cached, drafted.num_agreed = min(drafted.num_cached, agreed), end
        own[start:end] = sequence.token_ids[start:]
        return True

    def _grow(self, sequence: Sequence, ahead: int) -> bool:
        drafted, length = self._rows[sequence], len(sequence.token_ids) + ahead
        return length < self.max_model_len and self.cache.grow(drafted.row, drafted.num_cached, length)

    def _encode(self, sequences: list[Sequence]) -> None:
        sources = [self._rows[sequence].row.source for sequence in sequences]
        new = list(dict.fromkeys(source for source in sources if source is not None and not source.encoded))
        if new:
            self.runner.encode(new)
            for source in new:
                source.encoded = True

    def _next(self, sequences: list[Sequence], ahead: int) -> list[int]:
        """The token after each sequence's own and the ``ahead`` that were guessed."""
        places = [self._rows[sequence] for sequence in sequences]
        rows = [place.row.index for place in places]
        lengths = [len(sequence.token_ids) + ahead for sequence in sequences]
        starts = [place.num_cached for place in places]
        counts = [length - start for length, start in zip(lengths, starts, strict=True)]
        logits: Tensor = self.runner.logits(Batch.of(self.cache.tokens, rows, starts, counts, [1] * len(rows)))
        result = sample(logits, self.columns.batch(sequences, lengths, rows), num_threads=self.num_threads)
        self.cache.tokens[rows, lengths] = result.token_ids
        for place, length in zip(places, lengths, strict=True):
            place.num_cached = length
        return [max(token_id, 0) for token_id in result.token_ids.tolist()]  # -1, an error, guesses nothing right

    def _close(self, sequence: Sequence) -> None:
        row = self._rows.pop(sequence).row
        source = row.source
        self.cache.close_row(row)
        if source is not None:
            self.cache.drop_source(source)
