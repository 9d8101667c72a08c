"""The sampler's input for a step, kept from step to step while the batch stays the same."""

from __future__ import annotations

import operator

import numpy as np
import torch
from numpy.typing import NDArray

from engine.request import Sequence
from kernels.sampling import SamplingBatch


class SamplingColumns:
    """Builds ``SamplingBatch`` for the rows of a step. Positions count generated tokens, so that a sequence draws the
    same numbers whatever else runs. Histories are read where they lie, in ``tokens``, int32 (rows, positions)."""

    def __init__(self, tokens: NDArray[np.int32]) -> None:
        self._width, self._tokens = tokens.shape[1], torch.from_numpy(tokens.reshape(-1))
        self._sequences: list[Sequence] = []
        self._places: tuple[list[int], list[int]] = ([], [])
        self._batch: SamplingBatch | None = None

    def batch(self, sequences: list[Sequence], lengths: list[int], rows: list[int]) -> SamplingBatch:
        """Of the token after the first ``lengths`` of each sequence, in its row; it counts until the next call."""
        same = (rows, lengths) == self._places and all(map(operator.is_, sequences, self._sequences))
        if self._batch is None or not same:
            self._batch = self._build(sequences, rows, lengths)
            self._sequences = list(sequences)
        else:
            self._batch.position.add_(1)
            self._batch.history_lengths.add_(1)
        self._places = rows, [length + 1 for length in lengths]
        return self._batch

    def _build(self, sequences: list[Sequence], rows: list[int], lengths: list[int]) -> SamplingBatch:
        params = [sequence.request.params for sequence in sequences]
        prompts = [sequence.num_prompt for sequence in sequences]
        return SamplingBatch.build(
            len(sequences),
            temperature=[p.temperature for p in params],
            top_k=[max(p.top_k, 0) for p in params],
            top_p=[p.top_p for p in params],
            min_p=[p.min_p for p in params],
            typical_p=[p.typical_p for p in params],
            repetition_penalty=[p.repetition_penalty for p in params],
            presence_penalty=[p.presence_penalty for p in params],
            frequency_penalty=[p.frequency_penalty for p in params],
            seed=[sequence.seed for sequence in sequences],
            position=[length - prompt for length, prompt in zip(lengths, prompts, strict=True)],
            num_logprobs=[-1 if p.logprobs is None else p.logprobs for p in params],
            history=(
                self._tokens,
                torch.tensor(rows, dtype=torch.int64) * self._width,
                torch.tensor(lengths, dtype=torch.int32),
                torch.tensor(prompts, dtype=torch.int32),
            ),
        )
