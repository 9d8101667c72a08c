"""Who runs in the next step: everyone who is decoding, and newcomers while there is room."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from engine.kv_cache import KVCache
from engine.request import Request, Sequence


@dataclass
class Schedule:
    """One step's sequences, and the requests among them that are new: their sources are to be encoded first."""

    sequences: list[Sequence]
    requests: list[Request]


class Scheduler:
    """First come, first served. A request is admitted whole, when its longest outcome fits into free blocks."""

    def __init__(self, cache: KVCache, max_num_batched_tokens: int) -> None:
        self.cache, self.max_num_batched_tokens = cache, max_num_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Sequence] = []

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def blocks_needed(self, request: Request) -> int:
        source = self.cache.blocks_for(len(request.encoder_prompt_token_ids or ()))
        return source + sum(self.cache.blocks_for(sequence.max_length) for sequence in request.sequences)

    def check(self, request: Request) -> None:
        """Raises ValueError for a request that even an empty engine could not hold."""
        blocks, rows = self.blocks_needed(request), len(request.sequences)
        if blocks > self.cache.num_blocks:
            raise ValueError(
                f"the request needs {blocks} cache blocks and the engine has {self.cache.num_blocks}: lower max_tokens "
                "or n, or raise kv_cache_memory_bytes"
            )
        if rows > len(self.cache.tables):
            raise ValueError(f"n is {rows}, more than max_num_seqs {len(self.cache.tables)}")

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
        return Schedule(self.running, admitted)

    def retire(self) -> None:
        """Frees what finished sequences hold."""
        for sequence in self.running:
            if sequence.finish_reason is not None and sequence.row is not None:
                self.cache.release(sequence.row, clear=sequence.error is not None)
                sequence.row = None
        self.running = [sequence for sequence in self.running if sequence.row is not None]

    def abort(self, request_id: str) -> None:
        """Ends a request, waiting or running."""
        for request in self.waiting:
            if request.request_id == request_id:
                for sequence in request.sequences:
                    sequence.finish("abort")
        self.waiting = deque(request for request in self.waiting if request.request_id != request_id)
        for sequence in self.running:
            if sequence.request.request_id == request_id:
                sequence.finish("abort")
        self.retire()

    def _fits(self, request: Request) -> bool:
        enough_rows = len(request.sequences) <= self.cache.num_free_rows
        return enough_rows and self.blocks_needed(request) <= self.cache.num_free_blocks

    def _admit(self, request: Request) -> Request:
        source = None
        if request.encoder_prompt_token_ids is not None:
            source = self.cache.take_source(len(request.encoder_prompt_token_ids))
        for sequence in request.sequences:
            sequence.row = self.cache.take_row(sequence.max_length, source)
        self.running += request.sequences
        return request


def _prefill_tokens(request: Request) -> int:
    return len(request.encoder_prompt_token_ids or ()) + sum(len(s.token_ids) for s in request.sequences)
