"""Runs a model that is a program of the C++ core: one call a step, over a cache laid out for the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Batch
from engine.kv_cache import KVCache, Source, Table
from kernels.cached_attention import CacheFormat
from kernels.sampling import Draw, SamplingBatch
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


class NativeRunner:
    """A native model and its cache: see ``engine.runner.Runner``."""

    drawn: Tensor | None = None

    def __init__(self, model: NativeModel, cache: KVCache, storage: NativeStorage, num_threads: int | None) -> None:
        self.model, self.cache, self.storage = model, cache, storage
        self.num_threads = num_threads or torch.get_num_threads()
        self.vocab_size = model.config.target_vocab_size or model.config.vocab_size

    def encode(self, sources: list[Source], *, wants_hidden: bool = False) -> list[Tensor]:
        hidden: list[Tensor] = []
        for first, end in _whole_runs([len(source.token_ids) for source in sources]):
            hidden += self._encode(sources[first:end], wants_hidden)
        return hidden

    def _encode(self, sources: list[Source], wants_hidden: bool) -> list[Tensor]:
        assert self.model.encode is not None
        lengths = [len(source.token_ids) for source in sources]
        out = np.empty((sum(lengths) if wants_hidden else 0, self.model.config.dim), dtype=np.float32)
        self.model.encode.run(
            np.concatenate([np.asarray(source.token_ids, dtype=np.int64) for source in sources]),
            np.concatenate([np.arange(length) for length in lengths]), _offsets(lengths),
            np.concatenate([self.cache.source_slots(source) for source in sources]),
            None, None, None, None, self.storage.blocks, np.arange(len(out)), out, self.num_threads,
        )  # fmt: skip
        return list(torch.from_numpy(out).split(lengths)) if wants_hidden else []

    def logits(self, batch: Batch) -> Tensor:
        logits = np.empty((int(batch.wanted.sum()), self.vocab_size), dtype=np.float32)
        done = 0
        for part in batch.slices(MAX_TOKENS):
            end = done + len(part.selected)
            self._decode(part, logits[done:end])
            done = end
        return torch.from_numpy(logits)

    def num_drawn(self, batch: Batch) -> int | None:
        return None

    def draw(self, batch: Batch, sampling: SamplingBatch) -> Draw | None:
        return None

    def follow_weights(self) -> None:
        """They are packed: what the model learns later is not seen."""

    def take_seconds(self) -> dict[str, float]:
        programs = [program for program in (self.model.decode, self.model.encode) if program is not None]
        kinds = zip(*(program.take_seconds() for program in programs), strict=True)
        return dict(zip(("linear", "attention", "other"), map(sum, kinds), strict=True))

    def _decode(self, batch: Batch, out: NDArray[np.float32]) -> None:
        cache, rows = self.cache, batch.rows
        source_lengths = cache.source_lengths[rows]
        self.model.decode.run(
            batch.token_ids, batch.positions, batch.offsets, cache.slots(batch.rows_of_tokens, batch.positions),
            batch.ends, self._tables(cache.tables, rows, batch.ends), source_lengths,
            self._tables(cache.source_tables, rows, source_lengths), self.storage.blocks, batch.selected, out,
            self.num_threads,
        )  # fmt: skip

    def _tables(self, tables: Table, rows: NDArray[np.int64], lengths: Table) -> Table:
        return tables[rows, : self.cache.blocks_for(int(lengths.max()))]


def _offsets(counts: list[int]) -> Table:
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
