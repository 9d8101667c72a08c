"""The engine: schedule, run, sample, deliver."""

from __future__ import annotations

import logging
import time

import torch
from torch import Tensor

from engine.batch import Batch, Table
from engine.beam_requests import advance_searches
from engine.detokenize import deliver
from engine.flight import Flight, Outlets
from engine.grammar_masks import accept_token, masks_of
from engine.grammar_state import GrammarError
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
from kernels.sampling import Draw, SampleResult, draw, edit_logits
from models.tokenizer import Tokenizer

LOGGER = logging.getLogger(__name__)
# Of the sampler's errors the one that does not say that the model is broken.
NOTHING_LEFT = "no token is left to choose: every logit is -inf"


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
        self._flight: Flight | None = None  # the step before, if its results have yet to come
        self._stepping, self._to_abort = False, list[Request]()

    def add_request(self, request: Request) -> None:
        if self.weights_may_change and not self.scheduler.has_unfinished:
            self.cache.forget_all()
            self.runner.follow_weights()
        self.scheduler.add(request)

    def has_unfinished_requests(self) -> bool:
        return self.scheduler.has_unfinished

    def abort(self, request: Request) -> None:
        """Ends a request and frees what it holds; one that is not in progress is passed over.

        Called from within a step, as by a request's callable, it takes place at the step's end.
        """
        if self._stepping:
            self._to_abort.append(request)
        elif self.scheduler.abort(request):
            _tell([request])

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Runs one step; returns the requests that got something, finished ones included (none when idle)."""
        self.clock.start()
        self._stepping = True
        try:
            changed = self._step()
        except BaseException:
            self._flight = None
            _tell(self.scheduler.recover())
            raise
        finally:
            self._stepping = False
            self.clock.pause()
        _tell(changed)
        while self._to_abort:
            self.abort(self._to_abort.pop())
        return changed

    def _step(self) -> list[Request]:
        flight, self._flight = self._flight, None
        changed: list[Request] = []
        if flight is not None and not (flight.may_be_followed and self.scheduler.has_room_ahead):
            changed, flight = self._land(flight), None
        following = self._launch(flight)
        if flight is not None:
            changed = self._land(flight)
        if following is None or self._drawn is not None:
            self._flight = following
            return changed
        return self._land(following)

    @property
    def _drawn(self) -> Tensor | None:
        """Where tokens wait for the next step, if it is sent before they arrive; whoever guesses has to see them."""
        return self.runner.drawn if self.speculation is None else None

    def _launch(self, before: Flight | None) -> Flight | None:
        """Schedules a step and sets it going, behind the one ``before`` it, whose tokens may be pending."""
        if self.speculation is not None:
            self.speculation.guess(self.scheduler.live)
        schedule = self.scheduler.schedule()
        if not schedule.sequences:
            return None
        if (flight := self._decode(schedule, before)) is not None:
            return flight
        outlets = self._outlets(schedule, logits := self._run(schedule, before))
        flight = Flight(schedule, outlets)
        if outlets.samples:
            flight.draw = self._draw(outlets, _picked(logits, outlets.rows))
        if outlets.searches:
            flight.logits = logits
        return flight

    def _land(self, flight: Flight) -> list[Request]:
        """Takes a step's results to those they are for; returns whom it carried on."""
        outlets = flight.outlets
        waited_for = [sequence.request for sequence in outlets.samples if sequence.row is not None]
        if flight.draw is not None:
            outlets.num_sampled = self._deliver_all(outlets, flight.draw)
        searches = [request for request in outlets.searches if not request.finished]  # others were aborted since
        if searches and flight.logits is not None:
            rows = [row for request in searches for row in outlets.searches[request]]
            self._advance(searches, _picked(flight.logits, rows).float())
        each = dict.fromkeys([*waited_for, *(s.request for s in outlets.scored), *outlets.searches])
        changed = [request for request in each if self.scheduler.find(request.request_id) is request]  # not aborted
        self.scheduler.retire(changed)
        self._count(flight.schedule, outlets)
        return changed

    def _count(self, schedule: Schedule, outlets: Outlets) -> None:
        """Takes note of what a step has done, and in what time."""
        tokens = outlets.num_sampled + sum(len(request.live) for request in outlets.searches)
        seconds = self.clock.stop(tokens)
        if self.speculation is not None and schedule.only_decodes:
            self.speculation.cost.add(sum(schedule.counts), seconds)

    def metrics(self) -> EngineMetrics:
        return self.clock.metrics(self.scheduler, self.speculation)

    def check_source(self, token_ids: list[int]) -> None:
        """Raises ValueError for a source that not even an empty cache could hold."""
        if (needed := self.cache.blocks_for(len(token_ids))) > self.cache.num_blocks:
            raise ValueError(
                f"the source needs {needed} cache blocks and the engine has {self.cache.num_blocks}: raise "
                "kv_cache_memory_bytes"
            )

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

    def _run(self, schedule: Schedule, before: Flight | None) -> Tensor:
        """Logits of the tokens that the schedule wants them of, packed."""
        self.cache.copy_shared()
        if schedule.sources:
            self.runner.encode(schedule.sources)
        logits = self.runner.logits(_batch(schedule, self.cache.tokens, before))
        for source in schedule.sources:
            source.encoded = True
        for sequence, count in zip(schedule.sequences, schedule.counts, strict=True):
            sequence.num_cached += count
        return logits

    def _decode(self, schedule: Schedule, before: Flight | None) -> Flight | None:
        """The step, if it is one token of each sequence and the runner draws the next ones itself; else None."""
        sequences = schedule.sequences
        if not schedule.only_decodes or not all(sequence.is_plain for sequence in sequences):
            return None
        batch = _batch(schedule, self.cache.tokens, before)
        if (size := self.runner.num_drawn(batch)) is None:
            return None
        lengths = [sequence.length for sequence in sequences]
        rows = [sequence.row.index for sequence in sequences if sequence.row is not None]
        self.cache.copy_shared()
        drawn = self.runner.draw(batch, self.columns.batch(sequences, lengths, rows, size))
        if drawn is None:
            return None
        for sequence in sequences:
            sequence.num_cached += 1
            sequence.request.forked = True
        self._expect(sequences)
        return Flight(schedule, Outlets(sequences, lengths), drawn)

    def _expect(self, sequences: list[Sequence]) -> None:
        """Takes note of tokens that have been drawn, where they are not waited for."""
        if self._drawn is not None:
            for sequence in sequences:
                sequence.num_pending += 1

    def _outlets(self, schedule: Schedule, logits: Tensor) -> Outlets:
        outlets, start = Outlets(), 0
        for sequence, wanted in zip(schedule.sequences, schedule.wanted, strict=True):
            if wanted:
                self._assign(outlets, sequence, logits, start, start + wanted)
                start += wanted
        return outlets

    def _assign(self, outlets: Outlets, sequence: Sequence, logits: Tensor, start: int, end: int) -> None:
        """Finds out what a sequence's logits, in the rows from ``start`` to ``end``, are for."""
        request = sequence.request
        if request.scored is not None and not request.all_scored:
            add_scores(sequence, logits[start:end].float(), self.tokenizer, self.num_threads)
            outlets.scored.append(sequence)
            if request.only_scores and request.all_scored and sequence.finish_reason is None:
                sequence.finish("stop")
        if sequence.num_lacking > 0 or sequence.finish_reason is not None:
            return
        if request.beams is not None:
            outlets.searches.setdefault(request, []).append(end - 1)
        else:
            places = range(len(sequence.draft) + 1)
            sampled = [sequence for _ in places] if request.forked else self._fork(request)
            outlets.samples += sampled
            outlets.lengths += [sequence.length + (i if sequence.draft else 0) for i in range(len(sampled))]
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

    def _draw(self, outlets: Outlets, logits: Tensor) -> Draw:
        """Draws the next token of each sample, and those behind its draft's."""
        sequences, lengths = outlets.samples, outlets.lengths
        start = time.perf_counter()
        masks = masks_of(sequences, logits.shape[1])
        edits = self.rules.edits(sequences, lengths, logits.shape[1], masks)
        processed = any(sequence.request.params.logits_processors for sequence in sequences)
        if processed or edits is not None:
            logits = logits.float()  # half precision would round what is done to them
        if processed:
            process_logits(sequences, logits)
        if edits is not None:
            edit_logits(logits, edits, num_threads=self.num_threads)
        rows = [sequence.row.index for sequence in sequences if sequence.row is not None]
        drawn = draw(logits, self.columns.batch(sequences, lengths, rows), num_threads=self.num_threads)
        if self._drawn is not None:
            self._drawn[: len(sequences)] = drawn.token_ids
        self._expect(sequences)
        self._sampling += time.perf_counter() - start
        return drawn

    def _deliver_all(self, outlets: Outlets, drawn: Draw) -> int:
        """Delivers a step's samples as they arrive; returns how many tokens those of them that go on got."""
        sequences, lengths = outlets.samples, outlets.lengths
        start = time.perf_counter()
        result = drawn.result()
        self._sampling += time.perf_counter() - start
        token_ids, i, delivered = result.token_ids.tolist(), 0, 0
        while i < len(sequences):
            sequence, end = sequences[i], i + 1 + len(sequences[i].draft)
            sequence.num_pending = max(sequence.num_pending - 1, 0)
            if sequence.row is not None:  # else it has come to its end since
                self.cache.tokens[sequence.row.index, lengths[i:end]] = token_ids[i:end]
                delivered += self._deliver(sequence, result, token_ids, i, end)
            i = end
        return delivered

    def _advance(self, searches: list[Request], logits: Tensor) -> None:
        """Takes a step of every search."""
        beams = [sequence for request in searches for sequence in request.live]
        edits = self.beam_rules.edits(beams, [len(sequence.token_ids) for sequence in beams], logits.shape[1])
        advance_searches(searches, logits, edits, self.cache, self.num_threads)

    def _deliver(self, sequence: Sequence, result: SampleResult, token_ids: list[int], start: int, end: int) -> int:
        """Gives a sequence the tokens drawn in the rows from ``start`` on, as long as its draft was right before them.

        Returns how many.
        """
        if not sequence.draft:
            self._deliver_token(sequence, result, token_ids[start], start)
            return int(sequence.error is None)
        draft, sequence.draft = sequence.draft, []
        right = delivered = 0
        for i in range(start, end):
            self._deliver_token(sequence, result, token_ids[i], i)
            if sequence.error is not None:
                break
            delivered += 1
            was_right = i - start < len(draft) and token_ids[i] == draft[i - start]
            right += was_right
            if not was_right or sequence.finish_reason is not None:
                break
        if self.speculation is not None:
            self.speculation.judge(sequence, right, len(draft))
            sequence.num_cached = len(sequence.token_ids) - 1  # what was drafted wrongly is written over
        return delivered

    def _deliver_token(self, sequence: Sequence, result: SampleResult, token_id: int, row: int) -> None:
        if sequence.finish_reason is not None:  # its callable, or its grammar, has failed
            return
        if (error := result.errors[row]) is not None:
            sequence.finish("error", error=error)
            sequence.broken = error != NOTHING_LEFT
            return
        if sequence.request.params.logprobs is not None:
            sequence.add_logprobs(token_id, result, row, self.tokenizer)
        try:
            is_complete = accept_token(sequence, token_id)
        except GrammarError as refused:  # what its own mask has allowed
            sequence.finish("error", error=str(refused))
            return
        sequence.token_ids.append(token_id)
        deliver(sequence, token_id, is_complete)

    def take_seconds(self) -> dict[str, float]:
        """Seconds since the last call, by what they went into: sampling, and what the runner tells apart."""
        seconds, self._sampling = self._sampling, 0.0
        return {**self.runner.take_seconds(), "sampling": seconds}


def _tell(requests: list[Request]) -> None:
    """Stamps what has happened to requests, and tells those who listen; what goes wrong there is theirs to see to."""
    now = time.perf_counter()
    for request in requests:
        if request.metrics.first_token_time is None and request.has_output:
            request.metrics.first_token_time = now
        if request.finished:
            request.metrics.finished_time = now
        if request.on_change is None:
            continue
        try:
            request.on_change(request)
        except Exception:
            LOGGER.exception("a listener of request %s has failed", request.request_id)


def _batch(schedule: Schedule, tokens: Table, before: Flight | None) -> Batch:
    rows = [sequence.row.index for sequence in schedule.sequences if sequence.row is not None]
    starts = [sequence.num_cached for sequence in schedule.sequences]
    drawn = None
    if before is not None:
        places = before.places
        drawn = [places[sequence] if sequence.num_pending else -1 for sequence in schedule.sequences]
    return Batch.of(tokens, rows, starts, schedule.counts, schedule.wanted, drawn)


def _picked(logits: Tensor, rows: list[int]) -> Tensor:
    """The rows in this order; the logits themselves where those are all of them."""
    return logits if rows == list(range(len(logits))) else logits[rows]
