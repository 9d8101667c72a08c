"""The engine: schedule, run, sample, deliver."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.batch import Batch, Table
from engine.beam_requests import advance_searches
from engine.detokenize import deliver
from engine.kv_cache import Source
from engine.logits_rules import edits_of
from engine.metrics import EngineMetrics, StepClock
from engine.request import Request, Sequence
from engine.runner import Runner
from engine.sampling_batch import SamplingColumns
from engine.scheduler import Schedule, Scheduler
from engine.token_scores import add_scores
from kernels.sampling import SampleResult, edit_logits, sample
from models.tokenizer import Tokenizer


@dataclass
class Outlets:
    """What a step's logits are for: the sequences to sample, and searches, with their rows; what has been scored."""

    samples: list[Sequence] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    searches: dict[Request, list[int]] = field(default_factory=dict)
    scored: list[Sequence] = field(default_factory=list)


class Engine:
    """Runs requests to their end, a step at a time; requests join and leave between steps.

    Where ``weights_may_change`` while it is idle, the cache keeps nothing from before.
    """

    def __init__(
        self, runner: Runner, tokenizer: Tokenizer | None, max_num_batched_tokens: int, num_threads: int | None
    ) -> None:
        self.tokenizer, self.num_threads = tokenizer, num_threads
        self.weights_may_change = False
        self.runner, self.cache = runner, runner.cache
        self.scheduler = Scheduler(self.cache, max_num_batched_tokens)
        self.columns = SamplingColumns(self.cache.tokens)
        self.clock = StepClock()
        self._sampling = 0.0

    def add_request(self, request: Request) -> None:
        if self.weights_may_change and not self.scheduler.has_unfinished:
            self.cache.forget_all()
        self.scheduler.add(request)

    def has_unfinished_requests(self) -> bool:
        return self.scheduler.has_unfinished

    def abort(self, request_id: str) -> None:
        request = self.scheduler.abort(request_id)
        if request is not None:
            _tell([request])

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Runs one step; returns the requests that got something, finished ones included (none when idle)."""
        self.clock.start()
        schedule = self.scheduler.schedule()
        if not schedule.sequences:
            return []
        logits = self._run(schedule)
        outlets = self._outlets(schedule, logits)
        if outlets.samples:
            self._sample(outlets.samples, _picked(logits, outlets.rows))
        if outlets.searches:
            rows = [row for each in outlets.searches.values() for row in each]
            advance_searches(list(outlets.searches), _picked(logits, rows), self.cache, self.num_threads)
        changed = list(dict.fromkeys([*(s.request for s in outlets.samples + outlets.scored), *outlets.searches]))
        self.scheduler.retire(changed)
        self.clock.stop(len(outlets.samples) + sum(len(request.live) for request in outlets.searches))
        _tell(changed)
        return changed

    def metrics(self) -> EngineMetrics:
        return self.clock.metrics(self.scheduler)

    @torch.inference_mode()
    def encode(self, sources: list[list[int]]) -> list[Tensor]:
        """Hidden states, float32 (tokens, dim), of the first of these sources: as many as a step and the cache take.

        Where others hold the cache it takes a step for them instead, and returns none.
        """
        taken: list[Source] = []
        room = self.scheduler.max_num_batched_tokens
        for token_ids in sources:
            if (taken and len(token_ids) > room) or (source := self.cache.new_source(token_ids)) is None:
                break
            taken.append(source)
            room -= len(token_ids)
        if not taken:
            self.step()
            return []
        try:
            return self.runner.encode(taken)
        finally:
            for source in taken:
                self.cache.drop_source(source)

    def _run(self, schedule: Schedule) -> Tensor:
        """Logits of the tokens that the schedule wants them of, packed."""
        try:
            self.cache.copy_shared()
            if schedule.sources:
                self.runner.encode(schedule.sources)
            logits = self.runner.logits(_batch(schedule, self.cache.tokens))
        except BaseException:
            self.cache.forget_all()  # it counts on what has not been written
            raise
        for source in schedule.sources:
            source.encoded = True
        for sequence, count in zip(schedule.sequences, schedule.counts, strict=True):
            sequence.num_cached += count
        return logits

    def _outlets(self, schedule: Schedule, logits: Tensor) -> Outlets:
        outlets, start = Outlets(), 0
        for sequence, wanted in zip(schedule.sequences, schedule.wanted, strict=True):
            if wanted:
                self._sort(outlets, sequence, logits, start, start + wanted)
                start += wanted
        return outlets

    def _sort(self, outlets: Outlets, sequence: Sequence, logits: Tensor, start: int, end: int) -> None:
        """Finds out what a sequence's logits, in the rows from ``start`` to ``end``, are for."""
        request = sequence.request
        if request.scored is not None and len(request.scores) < request.scored[1] - request.scored[0]:
            add_scores(sequence, logits[start:end], self.tokenizer)
            outlets.scored.append(sequence)
        if sequence.num_lacking or sequence.finish_reason is not None:
            return
        if request.only_scores:
            sequence.finish("stop")
        elif request.beams is not None:
            outlets.searches.setdefault(request, []).append(end - 1)
        else:
            sampled = [sequence] if request.forked else self._fork(request)
            outlets.samples += sampled
            outlets.rows += [end - 1] * len(sampled)

    def _fork(self, request: Request) -> list[Sequence]:
        """Gives all samples what the first has: the prompt's keys and values."""
        request.forked = True
        first = request.sequences[0]
        if len(request.sequences) > 1:
            rows = [sequence.row for sequence in request.sequences if sequence.row is not None]
            self.cache.reorder(rows, [0] * len(rows))
            for sequence in request.sequences:
                sequence.num_cached = first.num_cached
        return request.sequences

    def _sample(self, sequences: list[Sequence], logits: Tensor) -> None:
        lengths = [len(sequence.token_ids) for sequence in sequences]
        start = time.perf_counter()
        edits = edits_of(sequences, lengths, self.cache.tokens, logits.shape[1])
        if edits is not None:
            edit_logits(logits, edits, num_threads=self.num_threads)
        result = sample(logits, self.columns.batch(sequences, lengths), num_threads=self.num_threads)
        self._sampling += time.perf_counter() - start
        rows = [sequence.row.index for sequence in sequences if sequence.row is not None]
        self.cache.tokens[rows, lengths] = result.token_ids
        self._deliver(sequences, result)

    def _deliver(self, sequences: list[Sequence], result: SampleResult) -> None:
        for i, (sequence, token_id) in enumerate(zip(sequences, result.token_ids.tolist(), strict=True)):
            if (error := result.errors[i]) is not None:
                sequence.finish("error", error=error)
                continue
            if sequence.request.params.logprobs is not None:
                sequence.add_logprobs(token_id, result, i, self.tokenizer)
            sequence.token_ids.append(token_id)
            deliver(sequence, token_id)

    def take_seconds(self) -> dict[str, float]:
        """Seconds since the last call, by what they went into: sampling, and what the runner tells apart."""
        seconds, self._sampling = self._sampling, 0.0
        return {**self.runner.take_seconds(), "sampling": seconds}


def _tell(requests: list[Request]) -> None:
    """Stamps what has happened to requests, and tells those who listen."""
    now = time.perf_counter()
    for request in requests:
        if request.metrics.first_token_time is None and request.forked:
            request.metrics.first_token_time = now
        if request.finished:
            request.metrics.finished_time = now
        if request.on_change is not None:
            request.on_change(request)


def _batch(schedule: Schedule, tokens: Table) -> Batch:
    rows = [sequence.row.index for sequence in schedule.sequences if sequence.row is not None]
    starts = [sequence.num_cached for sequence in schedule.sequences]
    return Batch.of(tokens, rows, starts, schedule.counts, schedule.wanted)


def _picked(logits: Tensor, rows: list[int]) -> Tensor:
    """The rows in this order; the logits themselves where those are all of them."""
    return logits if rows == list(range(len(logits))) else logits[rows]
