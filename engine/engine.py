"""The engine: schedule, run, sample, deliver."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.batch import Batch, Table
from engine.beam_requests import advance_searches
from engine.detokenize import deliver
from engine.grammar_masks import accept_token, masks_of
from engine.kv_cache import Source
from engine.logits_processors import process_logits
from engine.logits_rules import RuleColumns
from engine.metrics import EngineMetrics, StepClock
from engine.request import Request, Sequence
from engine.runner import Runner
from engine.sampling_batch import SamplingColumns
from engine.scheduler import Schedule, Scheduler
from engine.speculation import Speculation
from engine.token_scores import add_scores
from kernels.sampling import SampleResult, edit_logits, sample
from models.tokenizer import Tokenizer


@dataclass
class Outlets:
    """What a step's logits are for: the sequences to sample, and searches, with their rows; what has been scored."""

    samples: list[Sequence] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # of the samples, each behind so many of its tokens and its draft
    num_sampled: int = 0  # tokens that came of it
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
        self.rules, self.beam_rules = RuleColumns(self.cache.tokens), RuleColumns(self.cache.tokens)
        self.clock = StepClock()
        self.speculation: Speculation | None = None
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
        if self.speculation is not None:
            self.speculation.guess(self.scheduler.live)
        schedule = self.scheduler.schedule()
        if not schedule.sequences:
            return []
        try:
            outlets = self._outlets(schedule, logits := self._run(schedule))
            if outlets.samples:
                outlets.num_sampled = self._sample(outlets, _picked(logits, outlets.rows))
            if outlets.searches:
                rows = [row for each in outlets.searches.values() for row in each]
                self._advance(list(outlets.searches), _picked(logits, rows))
        except BaseException:
            self._recover(schedule)
            raise
        changed = list(dict.fromkeys([*(s.request for s in outlets.samples + outlets.scored), *outlets.searches]))
        self.scheduler.retire(changed)
        self._count(schedule, outlets)
        _tell(changed)
        return changed

    def _count(self, schedule: Schedule, outlets: Outlets) -> None:
        """Takes note of what the step has done, and in what time."""
        tokens = outlets.num_sampled + sum(len(request.live) for request in outlets.searches)
        seconds = self.clock.stop(tokens)
        if self.speculation is not None and schedule.only_decodes:
            self.speculation.cost.add(sum(schedule.counts), seconds)

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
            return self.runner.encode(taken, wants_hidden=True)
        finally:
            for source in taken:
                self.cache.drop_source(source)

    def _run(self, schedule: Schedule) -> Tensor:
        """Logits of the tokens that the schedule wants them of, packed."""
        self.cache.copy_shared()
        if schedule.sources:
            self.runner.encode(schedule.sources)
        logits = self.runner.logits(_batch(schedule, self.cache.tokens))
        for source in schedule.sources:
            source.encoded = True
        for sequence, count in zip(schedule.sequences, schedule.counts, strict=True):
            sequence.num_cached += count
        return logits

    def _recover(self, schedule: Schedule) -> None:
        """After a step that failed on its way: who goes on takes it again."""
        self.cache.forget_all()  # it counts on what may not have been written
        for sequence in schedule.sequences:
            sequence.draft = []
            sequence.num_cached = min(sequence.num_cached, len(sequence.token_ids) - 1)

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
        if sequence.num_lacking > 0 or sequence.finish_reason is not None:
            return
        if request.only_scores:
            sequence.finish("stop")
        elif request.beams is not None:
            outlets.searches.setdefault(request, []).append(end - 1)
        else:
            places = range(len(sequence.draft) + 1)
            sampled = [sequence for _ in places] if request.forked else self._fork(request)
            outlets.samples += sampled
            outlets.lengths += [len(sequence.token_ids) + (i if sequence.draft else 0) for i in range(len(sampled))]
            outlets.rows += list(range(start, end)) if sequence.draft else [end - 1] * len(sampled)

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

    def _sample(self, outlets: Outlets, logits: Tensor) -> int:
        """Draws the next token of each sample, and those behind its draft's; returns how many are delivered."""
        sequences, lengths = outlets.samples, outlets.lengths
        start = time.perf_counter()
        if any(sequence.request.params.logits_processors for sequence in sequences):
            process_logits(sequences, logits)
        masks = masks_of(sequences, logits.shape[1])
        edits = self.rules.edits(sequences, lengths, logits.shape[1], masks)
        if edits is not None:
            edit_logits(logits, edits, num_threads=self.num_threads)
        rows = [sequence.row.index for sequence in sequences if sequence.row is not None]
        result = sample(logits, self.columns.batch(sequences, lengths, rows), num_threads=self.num_threads)
        self._sampling += time.perf_counter() - start
        self.cache.tokens[rows, lengths] = result.token_ids
        token_ids, i, delivered = result.token_ids.tolist(), 0, 0
        while i < len(sequences):
            end = i + 1 + len(sequences[i].draft)
            delivered += self._deliver(sequences[i], result, token_ids, i, end)
            i = end
        return delivered

    def _advance(self, searches: list[Request], logits: Tensor) -> None:
        """Takes a step of every search."""
        beams = [sequence for request in searches for sequence in request.live]
        edits = self.beam_rules.edits(beams, [len(sequence.token_ids) for sequence in beams], logits.shape[1])
        advance_searches(searches, logits, edits, self.cache, self.num_threads)

    def _deliver(self, sequence: Sequence, result: SampleResult, token_ids: list[int], start: int, end: int) -> int:
        """Gives a sequence the tokens drawn in the rows from ``start`` on, as long as they are those of its draft."""
        draft, sequence.draft = sequence.draft, []
        for i in range(start, end):
            if sequence.finish_reason is None and (error := result.errors[i]) is not None:
                sequence.finish("error", error=error)
            if sequence.finish_reason is not None:
                end = i
                break
            token_id = token_ids[i]
            if sequence.request.params.logprobs is not None:
                sequence.add_logprobs(token_id, result, i, self.tokenizer)
            is_complete = accept_token(sequence, token_id)
            sequence.token_ids.append(token_id)
            deliver(sequence, token_id, is_complete)
            if i - start == len(draft) or token_id != draft[i - start]:
                end = i + 1
                break
        if draft and self.speculation is not None:
            # The last token came of the model alone.
            self.speculation.judge(sequence, max(0, end - start - 1), len(draft))
            sequence.num_cached = len(sequence.token_ids) - 1
        return end - start

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
