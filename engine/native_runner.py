"""Runs a model that is a program of the C++ core: one call a step, over a cache laid out for the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kv_cache import KVCache, Table
from engine.request import Request, Sequence
from engine.runner import source_of
from kernels.cached_attention import CacheFormat
from models.native import NativeModel

# Long prompts are cut into slices of so many tokens: the program's memory is small, and its rows stay in the cache.
MAX_TOKENS = 512
ALIGNMENT = 64


class NativeStorage:
    """Blocks of bytes, laid out as csrc/cache_pages.h says: (num_blocks, layers * layer_bytes)."""

    def __init__(self, layers: int, cache_format: CacheFormat, num_blocks: int) -> None:
        self.num_blocks, self.block_size = num_blocks, cache_format.block_size
        width = layers * cache_format.layer_bytes
        try:
            # numpy leaves the pages untouched until they are used.
            memory = np.zeros(num_blocks * width + ALIGNMENT, dtype=np.uint8)
        except MemoryError:
            raise ValueError(
                f"no memory for a cache of {num_blocks * width} bytes: lower kv_cache_memory_bytes"
            ) from None
        start = -memory.ctypes.data % ALIGNMENT
        self.blocks = memory[start : start + num_blocks * width].reshape(num_blocks, width)

    def copy(self, sources: Table, targets: Table) -> None:
        self.blocks[targets] = self.blocks[sources]

    def clear(self, blocks: list[int]) -> None:
        self.blocks[blocks] = 0


@dataclass(frozen=True)
class Slice:
    """Tokens of some sequences, in the order of a batch: from ``starts`` on, ``counts`` of each."""

    sequences: NDArray[np.int64]
    starts: Table
    counts: Table


class NativeRunner:
    """A native model and its cache: see ``engine.runner.Runner``."""

    def __init__(self, model: NativeModel, cache: KVCache, storage: NativeStorage, num_threads: int | None) -> None:
        self.model, self.cache, self.storage = model, cache, storage
        self.num_threads = num_threads or torch.get_num_threads()
        self.vocab_size = model.config.target_vocab_size or model.config.vocab_size

    def encode(self, requests: list[Request]) -> None:
        sources = [request.encoder_prompt_token_ids or [] for request in requests]
        for first, end in _whole_runs([len(source) for source in sources]):
            slots = np.concatenate([self.cache.source_slots(source_of(request)) for request in requests[first:end]])
            self._encode(sources[first:end], slots)

    def _encode(self, sources: list[list[int]], slots: NDArray[np.int64]) -> None:
        assert self.model.encode is not None
        lengths = [len(source) for source in sources]
        self.model.encode.run(
            np.concatenate([np.asarray(source, dtype=np.int64) for source in sources]),
            np.concatenate([np.arange(length) for length in lengths]), _offsets(np.asarray(lengths)), slots,
            None, None, None, None, self.storage.blocks, NOTHING, np.empty((0, self.model.config.dim), np.float32),
            self.num_threads,
        )  # fmt: skip

    def next_token_logits(self, sequences: list[Sequence]) -> Tensor:
        logits = np.empty((len(sequences), self.vocab_size), dtype=np.float32)
        done = 0
        for part in self._slices(sequences):
            ends = np.fromiter((len(sequences[i].token_ids) for i in part.sequences), np.int32, len(part.sequences))
            last = (np.cumsum(part.counts) - 1)[part.starts + part.counts == ends]
            self._decode(sequences, part, last, logits[done : done + len(last)])
            done += len(last)
        self._mark_cached(sequences)
        return torch.from_numpy(logits)

    def target_logprobs(self, sequences: list[Sequence]) -> Tensor:
        count = sum(len(sequence.token_ids) - sequence.num_cached for sequence in sequences)
        logits = np.empty((count, self.vocab_size), dtype=np.float32)
        done = 0
        for part in self._slices(sequences):
            tokens = int(part.counts.sum())
            self._decode(sequences, part, np.arange(tokens), logits[done : done + tokens])
            done += tokens
        self._mark_cached(sequences)
        return torch.from_numpy(logits).log_softmax(-1)

    def take_seconds(self) -> dict[str, float]:
        programs = [program for program in (self.model.decode, self.model.encode) if program is not None]
        kinds = zip(*(program.take_seconds() for program in programs), strict=True)
        return dict(zip(("linear", "attention", "other"), map(sum, kinds), strict=True))

    def _decode(
        self, sequences: list[Sequence], part: Slice, selected: NDArray[np.int64], out: NDArray[np.float32]
    ) -> None:
        chosen = [sequences[i] for i in part.sequences]
        rows = np.fromiter(
            (sequence.row.index for sequence in chosen if sequence.row is not None), np.int64, len(chosen)
        )
        ends = part.starts + part.counts
        offsets = _offsets(part.counts)
        if offsets[-1] == len(chosen):
            positions = part.starts.astype(np.int64)
            token_ids = np.fromiter(
                (sequence.token_ids[start] for sequence, start in zip(chosen, part.starts.tolist(), strict=True)),
                np.int64, len(chosen),
            )  # fmt: skip
        else:
            spans = list(zip(part.starts.tolist(), ends.tolist(), strict=True))
            positions = np.concatenate([np.arange(start, end) for start, end in spans])
            token_ids = np.concatenate(
                [np.asarray(sequence.token_ids[start:end], np.int64)
                 for sequence, (start, end) in zip(chosen, spans, strict=True)]
            )  # fmt: skip
        slots = self.cache.slots(np.repeat(rows, part.counts), positions)
        source_lengths = self.cache.source_lengths[rows]
        self.model.decode.run(
            token_ids, positions, offsets, slots, ends, self._tables(self.cache.tables, rows, ends), source_lengths,
            self._tables(self.cache.source_tables, rows, source_lengths), self.storage.blocks, selected, out,
            self.num_threads,
        )  # fmt: skip

    def _tables(self, tables: Table, rows: NDArray[np.int64], lengths: Table) -> Table:
        return tables[rows, : self.cache.blocks_for(int(lengths.max()))]

    def _slices(self, sequences: list[Sequence]) -> Iterator[Slice]:
        """What the cache lacks of the sequences, in order, MAX_TOKENS at a time."""
        pieces: list[tuple[int, int, int]] = []
        room = MAX_TOKENS
        for i, sequence in enumerate(sequences):
            start, end = sequence.num_cached, len(sequence.token_ids)
            while start < end:
                count = min(room, end - start)
                pieces.append((i, start, count))
                start, room = start + count, room - count
                if room == 0:
                    yield _slice(pieces)
                    pieces, room = [], MAX_TOKENS
        if pieces:
            yield _slice(pieces)

    def _mark_cached(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            sequence.num_cached = len(sequence.token_ids)


NOTHING = np.empty(0, dtype=np.int64)


def _slice(pieces: list[tuple[int, int, int]]) -> Slice:
    columns = np.asarray(pieces, dtype=np.int64).T
    return Slice(np.ascontiguousarray(columns[0]), columns[1].astype(np.int32), columns[2].astype(np.int32))


def _offsets(counts: NDArray[np.integer]) -> Table:
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int32)


def _whole_runs(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """First and end of runs of sequences that have MAX_TOKENS tokens together, or are one that is longer."""
    first, tokens = 0, 0
    for i, length in enumerate(lengths):
        if i > first and tokens + length > MAX_TOKENS:
            yield first, i
            first, tokens = i, 0
        tokens += length
    if lengths:
        yield first, len(lengths)
