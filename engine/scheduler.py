"""Who runs in the next step: everyone who is decoding, and newcomers while there is room."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from engine.kv_cache import KVCache
from engine.request import Request, Sequence


@dataclass
class Schedule:
    """One step's samples and beam searches; of the requests behind them the new ones, whose sources come first."""

    sequences: list[Sequence]
    searches: list[Request]
    requests: list[Request]


class Scheduler:
    """First come, first served. A request is admitted whole, when its longest outcome fits into free blocks."""

    def __init__(self, cache: KVCache, max_num_batched_tokens: int) -> None:
        self.cache, self.max_num_batched_tokens = cache, max_num_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Sequence] = []
        self.searching: list[Request] = []

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running or self.searching)

    def blocks_needed(self, request: Request) -> int:
        source = self.cache.blocks_for(len(request.encoder_prompt_token_ids or ()))
        return source + sum(self.cache.blocks_for(sequence.max_length) for sequence in request.sequences)

    def check(self, request: Request) -> None:
        """Raises ValueError for a request that even an empty engine could not hold."""
        blocks, rows = self.blocks_needed(request), len(request.sequences)
        rows_are = "n" if request.beams is None else "beam_width"
        if blocks > self.cache.num_blocks:
            raise ValueError(
                f"the request needs {blocks} cache blocks and the engine has {self.cache.num_blocks}: lower max_tokens "
                f"or {rows_are}, or raise kv_cache_memory_bytes"
            )
        if rows > len(self.cache.tables):
            raise ValueError(f"{rows_are} is {rows}, more than max_num_seqs {len(self.cache.tables)}")

    def add(self, request: Request) -> None:
        self.check(request)
        self.waiting.append(request)

    def schedule(self) -> Schedule:
        """The next step: everyone who is running, and newcomers while there is room and budget for their prompts."""
        admitted: list[Request] = []
        tokens = 0
        while self.waiting and self._fits(self.waiting[0]):
            cost = _prefill_tokens(self.waiting[0])
            if admitted and tokens + cost > self.max_num_batched_tokens:
                break
            tokens += cost
            admitted.append(self._admit(self.waiting.popleft()))
        return Schedule(self.running, self.searching, admitted)

    def retire(self) -> None:
        """Frees what finished sequences hold."""
        for sequence in self._holding_rows():
            if sequence.finish_reason is not None and sequence.row is not None:
                self.cache.release(sequence.row, clear=sequence.error is not None)
                sequence.row = None
        self.running = [sequence for sequence in self.running if sequence.row is not None]
        self.searching = [request for request in self.searching if not request.finished]

    def abort(self, request_id: str) -> None:
        """Ends a request, waiting or running."""
        for request in self.waiting:
            if request.request_id == request_id:
                for sequence in request.sequences:
                    sequence.finish("abort")
        self.waiting = deque(request for request in self.waiting if request.request_id != request_id)
        for sequence in self._holding_rows():
            if sequence.request.request_id == request_id:
                sequence.finish("abort")
        self.retire()

    def _holding_rows(self) -> Iterator[Sequence]:
        yield from self.running
        for request in self.searching:
            yield from request.sequences

    def _fits(self, request: Request) -> bool:
        enough_rows = len(request.sequences) <= self.cache.num_free_rows
        return enough_rows and self.blocks_needed(request) <= self.cache.num_free_blocks

    def _admit(self, request: Request) -> Request:
        source = None
        if request.encoder_prompt_token_ids is not None:
            source = self.cache.take_source(len(request.encoder_prompt_token_ids))
        for sequence in request.sequences:
            sequence.row = self.cache.take_row(sequence.max_length, source)
        if request.beams is None:
            self.running += request.sequences
        else:
            self.searching.append(request)
        return request


def _prefill_tokens(request: Request) -> int:
    return len(request.encoder_prompt_token_ids or ()) + sum(len(s.token_ids) for s in request.live)
