"""The sampler's input for a step, kept from step to step while the batch stays the same."""

from __future__ import annotations

import operator

import numpy as np
import torch
from numpy.typing import NDArray

from engine.request import Sequence
from engine.sampling import SamplingParams
from kernels.sampling import SamplingBatch

GREEDY = SamplingParams(temperature=0)


class SamplingColumns:
    """Builds ``SamplingBatch`` for the rows of a step. Positions count generated tokens, so that a sequence draws the
    same numbers whatever else runs. Histories are read where they lie, in ``tokens``, int32 (rows, positions)."""

    def __init__(self, tokens: NDArray[np.int32]) -> None:
        self._width, self._tokens = tokens.shape[1], torch.from_numpy(tokens.reshape(-1))
        self._sequences: list[Sequence] = []
        self._places: tuple[list[int], list[int]] = ([], [])
        self._batch: SamplingBatch | None = None

    def batch(
        self, sequences: list[Sequence], lengths: list[int], rows: list[int], size: int | None = None
    ) -> SamplingBatch:
        """Of the token after the first ``lengths`` of each sequence, in its row; it counts until the next call.

        Rows up to ``size`` that are no sequence's take the likeliest token.
        """
        size = size or len(sequences)
        same = (rows, lengths) == self._places and all(map(operator.is_, sequences, self._sequences))
        if self._batch is None or not same or self._batch.rows != size:
            self._batch = self._build(sequences, rows, lengths, size - len(sequences))
            self._sequences = list(sequences)
        else:
            self._batch.position.add_(1)
            self._batch.history_lengths.add_(1)
        self._places = rows, [length + 1 for length in lengths]
        return self._batch

    def _build(self, sequences: list[Sequence], rows: list[int], lengths: list[int], gaps: int) -> SamplingBatch:
        params = [sequence.request.params for sequence in sequences] + [GREEDY] * gaps
        prompts = [sequence.num_prompt for sequence in sequences] + [0] * gaps
        rows, lengths = rows + [0] * gaps, lengths + [0] * gaps
        return SamplingBatch.build(
            len(params),
            temperature=[p.temperature for p in params],
            top_k=[max(p.top_k, 0) for p in params],
            top_p=[p.top_p for p in params],
            min_p=[p.min_p for p in params],
            typical_p=[p.typical_p for p in params],
            repetition_penalty=[p.repetition_penalty for p in params],
            presence_penalty=[p.presence_penalty for p in params],
            frequency_penalty=[p.frequency_penalty for p in params],
            seed=[sequence.seed for sequence in sequences] + [0] * gaps,
            position=[length - prompt for length, prompt in zip(lengths, prompts, strict=True)],
            num_logprobs=[-1 if p.logprobs is None else p.logprobs for p in params],
            history=(
                self._tokens,
                torch.tensor(rows, dtype=torch.int64) * self._width,
                torch.tensor(lengths, dtype=torch.int32),
                torch.tensor(prompts, dtype=torch.int32),
            ),
        )
