"""The engine: schedule, run, sample, deliver."""

from __future__ import annotations

import itertools
import time

import torch

from engine.beam_requests import advance_searches
from engine.detokenize import deliver
from engine.logits_rules import apply_to_samples
from engine.request import Request, Sequence
from engine.runner import Runner
from engine.sampling_batch import SamplingColumns
from engine.scheduler import Schedule, Scheduler
from kernels.sampling import SampleResult, sample
from models.tokenizer import Tokenizer


class Engine:
    """Runs requests to their end, a step at a time; requests join and leave between steps."""

    def __init__(
        self, runner: Runner, tokenizer: Tokenizer | None, max_num_batched_tokens: int, num_threads: int | None
    ) -> None:
        self.tokenizer, self.num_threads = tokenizer, num_threads
        self.runner, self.cache = runner, runner.cache
        self.scheduler = Scheduler(self.cache, max_num_batched_tokens)
        self.columns = SamplingColumns()
        self.request_ids = itertools.count()
        self._sampling = 0.0

    def add_request(self, request: Request) -> None:
        self.scheduler.add(request)

    def has_unfinished_requests(self) -> bool:
        return self.scheduler.has_unfinished

    def abort(self, request_id: str) -> None:
        self.scheduler.abort(request_id)

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Adds a token to every scheduled sequence; returns them, finished ones included (none when idle)."""
        schedule = self.scheduler.schedule()
        samples, beams = schedule.sequences, [beam for request in schedule.searches for beam in request.live]
        if not samples and not beams:
            return []
        logits = self._run(schedule, samples + beams)
        if samples:
            apply_to_samples(samples, logits)
            self._deliver(samples, self._sample(samples, logits[: len(samples)]))
        if beams:
            advance_searches(schedule.searches, logits[len(samples) :], self.cache)
        self.scheduler.retire()
        return samples + beams

    def _run(self, schedule: Schedule, sequences: list[Sequence]) -> torch.Tensor:
        encoded = [request for request in schedule.requests if request.encoder_prompt_token_ids is not None]
        if encoded:
            self.runner.encode(encoded)
        return self.runner.next_token_logits(sequences)

    def take_seconds(self) -> dict[str, float]:
        """Seconds since the last call, by what they went into: sampling, and what the runner tells apart."""
        seconds, self._sampling = self._sampling, 0.0
        return {**self.runner.take_seconds(), "sampling": seconds}

    def _sample(self, sequences: list[Sequence], logits: torch.Tensor) -> SampleResult:
        batch = self.columns.batch(sequences)
        start = time.perf_counter()
        result = sample(logits, batch, num_threads=self.num_threads)
        self._sampling += time.perf_counter() - start
        return result

    def _deliver(self, sequences: list[Sequence], result: SampleResult) -> None:
        for i, (sequence, token_id) in enumerate(zip(sequences, result.token_ids.tolist(), strict=True)):
            if (error := result.errors[i]) is not None:
                sequence.finish("error", error=error)
                continue
            if sequence.request.params.logprobs is not None:
                sequence.add_logprobs(token_id, result, i, self.tokenizer)
            sequence.token_ids.append(token_id)
            deliver(sequence, token_id)
