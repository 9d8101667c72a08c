"""The sampler's input for a step, kept from step to step while the batch stays the same."""

from __future__ import annotations

import operator

from engine.request import Sequence
from kernels.sampling import SamplingBatch


class SamplingColumns:
    """Builds ``SamplingBatch`` for the sequences of a step. Positions count generated tokens, so that a sequence draws
    the same numbers whatever else runs."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []
        self._batch: SamplingBatch | None = None

    def batch(self, sequences: list[Sequence]) -> SamplingBatch:
        penalties = any(sequence.request.params.has_penalties for sequence in sequences)
        same = len(sequences) == len(self._sequences) and all(map(operator.is_, sequences, self._sequences))
        if self._batch is None or penalties or not same:
            self._batch = _build(sequences, penalties)
            self._sequences = list(sequences)
        else:
            self._batch.position.add_(1)
        return self._batch


def _build(sequences: list[Sequence], penalties: bool) -> SamplingBatch:
    params = [sequence.request.params for sequence in sequences]
    return SamplingBatch.build(
        len(sequences),
        temperature=[p.temperature for p in params],
        top_k=[max(p.top_k, 0) for p in params],
        top_p=[p.top_p for p in params],
        min_p=[p.min_p for p in params],
        repetition_penalty=[p.repetition_penalty for p in params],
        presence_penalty=[p.presence_penalty for p in params],
        frequency_penalty=[p.frequency_penalty for p in params],
        seed=[sequence.seed for sequence in sequences],
        position=[len(sequence.token_ids) - sequence.num_prompt for sequence in sequences],
        num_logprobs=[-1 if p.logprobs is None else p.logprobs for p in params],
        prompt_ids=[_history(s, prompt=True) for s in sequences] if penalties else None,
        output_ids=[_history(s, prompt=False) for s in sequences] if penalties else None,
    )


def _history(sequence: Sequence, prompt: bool) -> list[int]:
    if not sequence.request.params.has_penalties:
        return []
    return sequence.request.prompt_token_ids if prompt else sequence.output_ids
