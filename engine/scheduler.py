"""Who runs in the next step, and with how many tokens: those that decode, then prompts and sources that are read."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.kv_cache import KVCache, Source
from engine.request import Request, Sequence


@dataclass
class Schedule:
    """One step: the sources to encode, and the sequences with the number of tokens to run and of logits wanted."""

    sources: list[Source] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)

    only_decodes: bool = True  # no sources, and no prompts but their last tokens

    def add(self, sequence: Sequence, count: int) -> None:
        self.only_decodes = self.only_decodes and count == 1 + len(sequence.draft)
        self.sequences.append(sequence)
        self.counts.append(count)
        start = sequence.num_cached
        self.wanted.append(_wanted(sequence, start, start + count))


def _wanted(sequence: Sequence, start: int, end: int) -> int:
    """Of how many of the tokens from ``start`` to ``end`` the logits are wanted: the last of them."""
    request, drafted = sequence.request, len(sequence.draft)
    to_choose = 1 + drafted if end == sequence.length + drafted else 0
    if request.scored is None or request.all_scored:
        return to_choose
    first = request.scored[0] - 1 + len(request.scores)  # whose next token is to be scored
    return max(to_choose, end - max(start, first), 0)


class Scheduler:
    """By priority, then first come, first served.

    A request is admitted when there are rows for all its samples or beams and blocks for all its tokens so far. Its
    prompt is then read in pieces, as many tokens a step as ``max_num_batched_tokens`` leaves beside those that decode.
    When blocks run out, the last in order gives back what it holds and waits; it goes on later from its tokens.
    """

    def __init__(self, cache: KVCache, max_num_batched_tokens: int) -> None:
        self.cache, self.max_num_batched_tokens = cache, max_num_batched_tokens
        self.running: list[Request] = []
        self.num_preemptions = 0
        self._requests: dict[str, Request] = {}  # all that are not finished
        self._waiting: list[tuple[tuple[int, int], Request]] = []  # a heap; aborted ones leave it when they come first
        self._arrivals = 0

    @property
    def num_waiting(self) -> int:
        return len(self._requests) - len(self.running)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    def check(self, request: Request) -> None:
        """Raises ValueError for a request that even an empty engine could not hold."""
        source = self.cache.blocks_for(len(request.encoder_prompt_token_ids or ()))
        blocks = source + sum(self.cache.blocks_for(sequence.max_length) for sequence in request.sequences)
        rows, rows_are = len(request.sequences), "n" if request.beams is None else "beam_width"
        if blocks > self.cache.num_blocks:
            raise ValueError(
                f"the request needs {blocks} cache blocks and the engine has {self.cache.num_blocks}: lower max_tokens "
                f"or {rows_are}, or raise kv_cache_memory_bytes"
            )
        if rows > self.cache.num_rows:
            raise ValueError(f"{rows_are} is {rows}, more than max_num_seqs {self.cache.num_rows}")

    def add(self, request: Request) -> None:
        """Queues a request. Raises ValueError for one that could never run, or a second one of its id."""
        self.check(request)
        if request.request_id in self._requests:
            raise ValueError(f"a request {request.request_id!r} is in progress already")
        self._requests[request.request_id] = request
        request.arrival = self._arrivals
        self._arrivals += 1
        heapq.heappush(self._waiting, (request.order, request))

    def find(self, request_id: str) -> Request | None:
        """The request of this id that is in progress."""
        return self._requests.get(request_id)

    def abort(self, request: Request) -> bool:
        """Ends a request, waiting or running, and frees what it holds; False: it was not in progress."""
        if self._requests.get(request.request_id) is not request:
            return False
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                sequence.finish("abort")
        self.retire([request])
        if len(self._waiting) > 2 * self.num_waiting + 16:
            self._waiting = [entry for entry in self._waiting if not entry[1].finished]
            heapq.heapify(self._waiting)
        return True

    def retire(self, requests: Iterable[Request]) -> None:
        """Frees what the finished sequences of these requests hold."""
        for request in requests:
            finished = request.finished
            for sequence in request.sequences:
                if sequence.row is not None and (finished or sequence.finish_reason is not None):
                    if sequence.broken:
                        self.cache.discard(sequence.row)
                    self._close(sequence)
            if finished and self._requests.get(request.request_id) is request:
                del self._requests[request.request_id]
                self._release_source(request)
                if request in self.running:
                    self.running.remove(request)

    @property
    def has_room_ahead(self) -> bool:
        """Whether no request will have to give way in the next step: each sequence may want a block, and a copy."""
        return self.cache.pool.num_available >= 2 * len(self.live)

    @property
    def live(self) -> list[Sequence]:
        """The sequences of all running requests that run in each step."""
        return [sequence for request in self.running for sequence in request.live]

    def schedule(self) -> Schedule:
        """The next step; without sequences where nothing is left to do, or all had to give way."""
        schedule = Schedule()
        made_room = self._make_room()
        prompts = self._add_decodes(schedule)
        # However many decode, prompts go on.
        least = max(1, min(self.cache.block_size, self.max_num_batched_tokens // 2))
        room = max(self.max_num_batched_tokens - len(schedule.sequences), least)
        for sequence in prompts:
            room -= self._schedule_prompt(schedule, sequence, room)
        if not made_room:
            self._admit(schedule, room)
        if not schedule.sequences and not all(sequence.num_pending for sequence in self.live):
            raise RuntimeError("the scheduler has requests that run and nothing for them to do")
        return schedule

    def recover(self) -> list[Request]:
        """After a step that failed on its way, which may not have written what others count on: all begin anew.

        What was pending is drawn again. Returns those that have come to their end in it.
        """
        self.cache.forget_all()
        for request in self.running:
            for sequence in request.sequences:
                sequence.num_pending = 0
            if request.beams is not None and request.beams.length > request.num_prompt:
                request.forked = True
                for sequence, token_ids in zip(request.sequences, request.beams.token_ids, strict=True):
                    sequence.token_ids = token_ids
        finished = [request for request in self.running if request.finished]
        self.retire(list(self.running))
        while self.running:
            self._preempt()
        return finished

    def _make_room(self) -> bool:
        """Gives all who run blocks for their tokens; returns whether others had to give way for them."""
        before, i = self.num_preemptions, 0
        while i < len(self.running):
            request = self.running[i]
            if self._has_room(request) or all(self._grow(sequence) for sequence in request.live):
                i += 1
            else:
                self._preempt()  # the last, which may be this one
        return self.num_preemptions > before

    def _add_decodes(self, schedule: Schedule) -> list[Sequence]:
        """Adds the sequences that have one token to run, and their drafts; returns those that have more."""
        prompts: list[Sequence] = []
        decoding: list[Sequence] = []
        for request in self.running:
            live = request.live
            lacking = [sequence.num_lacking for sequence in live]
            long = [sequence for sequence, lacks in zip(live, lacking, strict=True) if lacks > 1]
            prompts += long
            if request.beams is None or not long:  # beams take a step together
                pairs = zip(live, lacking, strict=True)
                decoding += [sequence for sequence, lacks in pairs if lacks == 1 and not sequence.ends_by_length]
        for sequence in decoding:
            self._add(schedule, sequence, 1 + self._accept_draft(sequence))
        return prompts

    def _accept_draft(self, sequence: Sequence) -> int:
        """Puts a sequence's draft behind its tokens, if there is room for it; returns how many tokens it has."""
        if not sequence.draft:
            return 0
        row, length = sequence.row, len(sequence.token_ids)
        assert row is not None
        end = length + len(sequence.draft)
        if not self.cache.grow(row, sequence.num_cached, end):
            sequence.draft = []
            return 0
        self.cache.tokens[row.index, length:end] = sequence.draft
        return len(sequence.draft)

    def _has_room(self, request: Request) -> bool:
        """Whether a request surely lacks nothing, its only sequence sharing no block that it still writes."""
        first = request.sequences[0]
        have = 0 if first.row is None else len(first.row.blocks) * self.cache.block_size
        return len(request.sequences) == 1 and first.length <= have

    def _grow(self, sequence: Sequence) -> bool:
        """Sees to it that the sequence's tokens have blocks; False: there is no room."""
        assert sequence.row is not None
        return self.cache.grow(sequence.row, sequence.num_cached, sequence.length)

    def _schedule_prompt(self, schedule: Schedule, sequence: Sequence, room: int) -> int:
        """Adds what fits of the tokens that the cache lacks; returns how many."""
        together = sequence.request.beams is not None and sequence.request.forked
        count = min(sequence.num_lacking - together, room)
        if count > 0:
            self._add(schedule, sequence, count)
        return max(count, 0)

    def _add(self, schedule: Schedule, sequence: Sequence, count: int) -> None:
        schedule.add(sequence, count)
        assert sequence.row is not None
        end = min(sequence.num_cached + count, len(sequence.token_ids))  # not a draft, nor what is pending
        if end - sequence.row.num_known * self.cache.block_size >= self.cache.block_size:
            self.cache.remember(sequence.row, sequence.token_ids, end)

    def _admit(self, schedule: Schedule, room: int) -> None:
        """Lets the first of those that wait in, as long as there is room for them and tokens left in this step."""
        # Those that run will each want another block soon: who is let in without them is the next to be sent back.
        reserve = len(self.live)
        while self._waiting and room > 0:
            request = self._waiting[0][1]
            if request.finished:  # aborted
                heapq.heappop(self._waiting)
                continue
            unread = self._unread(request)
            # A source is read in one piece; the first of a step may be longer than the step.
            if (schedule.sources and unread > room) or not self._open(request, reserve):
                return
            reserve += len(request.live)
            heapq.heappop(self._waiting)
            insort(self.running, request, key=lambda each: each.order)
            if not request.counted:
                self._count(request)
            if request.source is not None and not request.source.encoded and request.source not in schedule.sources:
                schedule.sources.append(request.source)
                schedule.only_decodes = False
                room = max(room - unread, 1)
            live = request.live
            if all(sequence.num_lacking == 1 for sequence in live):  # they were sent back, and all is still there
                room -= len(live)
                for sequence in live:
                    self._add(schedule, sequence, 1)
                continue
            for sequence in live:
                room -= self._schedule_prompt(schedule, sequence, room)

    def _count(self, request: Request) -> None:
        """Takes note of what the cache had of a request when it was first let in."""
        counts, request.counted = self.cache.counts, True
        counts.prompt_tokens += request.num_prompt
        counts.prompt_hits += request.sequences[0].num_cached
        if request.source is not None:
            counts.source_tokens += len(request.source.token_ids)
            counts.source_hits += len(request.source.token_ids) if request.source.encoded else 0

    def _unread(self, request: Request) -> int:
        """How many of the source's tokens the encoder would have to read."""
        source = request.encoder_prompt_token_ids
        return 0 if source is None or self.cache.find_source(source) is not None else len(source)

    def _open(self, request: Request, reserve: int) -> bool:
        """Takes rows and blocks for all tokens of a request and leaves ``reserve``; False, and nothing is taken, where
        there are too few."""
        sequences = [sequence for sequence in request.sequences if sequence.finish_reason is None]
        if len(sequences) > self.cache.num_free_rows or not self._may_fit(request, reserve):
            return False
        if request.encoder_prompt_token_ids is not None:
            request.source = self.cache.take_source(request.encoder_prompt_token_ids)
            if request.source is None:
                return False
        for sequence in sequences:
            sequence.row = self.cache.open_row(request.source)
        fits = all(self._fill(sequence) for sequence in request.live) and self.cache.pool.num_available >= reserve
        if not fits:
            self._close_all(request)
        return fits

    def _may_fit(self, request: Request, reserve: int) -> bool:
        """Whether it is worth trying, which may cost others what is kept of them; the only one always is."""
        if not self.running:
            return True
        needed = self.cache.blocks_for(self._unread(request)) + reserve
        for sequence in request.live:
            needed += self.cache.blocks_for(len(sequence.token_ids))
            needed -= self.cache.count_held_prefix(request.encoder_prompt_token_ids, self._shareable(sequence))
        return needed <= self.cache.pool.num_available

    def _shareable(self, sequence: Sequence) -> list[int]:
        """The tokens that may be found in the cache: those to be scored have to run."""
        request = sequence.request
        if request.scored is None or request.all_scored:
            return sequence.token_ids
        return sequence.token_ids[: request.scored[0] + len(request.scores)]

    def _fill(self, sequence: Sequence) -> bool:
        """Gives an empty row its tokens, the blocks that are known of them and room for the rest; False: too little."""
        row, token_ids = sequence.row, sequence.token_ids
        assert row is not None
        sequence.num_cached = self.cache.take_prefix(row, self._shareable(sequence))
        if not self._grow(sequence):
            return False
        self.cache.tokens[row.index, : len(token_ids)] = token_ids
        return True

    def _preempt(self) -> None:
        """Takes everything from the running request that is last in order, and lets it wait."""
        request = self.running.pop()
        self._close_all(request)
        self.num_preemptions += 1
        heapq.heappush(self._waiting, (request.order, request))

    def _close_all(self, request: Request) -> None:
        for sequence in request.sequences:
            if sequence.row is not None:
                self._close(sequence)
        self._release_source(request)

    def _close(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        sequence.draft = []
        self.cache.close_row(sequence.row)
        sequence.row, sequence.num_cached = None, 0

    def _release_source(self, request: Request) -> None:
        if request.source is not None:
            self.cache.drop_source(request.source)
            request.source = None
