"""A model that is a hash: its logits change with every token it reads, in whatever blocks of the cache those lie.

What a token leaves in the cache depends on all tokens before it and on the source, as keys and values do; the logits
are computed from what the cache holds of the whole sequence. So a block that is shared, copied, recomputed or freed
wrongly changes the output.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Batch
from engine.engine import Engine
from engine.kv_cache import KVCache, Source, Table
from engine.prompts import PromptReader
from kernels.sampling import Draw, SamplingBatch
from models.config import TransformerConfig
from models.generation import GenerationConfig

VOCAB = 24
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class HashStorage:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.values = np.zeros((num_blocks, block_size), dtype=np.uint64)

    def copy(self, sources: Table, targets: Table) -> None:
        self.values[targets] = self.values[sources]

    def clear(self, blocks: list[int]) -> None:
        self.values[blocks] = 0


class HashRunner:
    """``fails``: a token that gives NaN wherever it is read."""

    def __init__(self, cache: KVCache, storage: HashStorage, fails: int | None = None) -> None:
        self.cache, self.storage, self.fails = cache, storage, fails
        self.num_tokens = self.num_encoded = 0
        self.drawn: Tensor | None = None

    def encode(self, sources: list[Source], *, wants_hidden: bool = False) -> list[Tensor]:
        for source in sources:
            assert not source.encoded
            ids = np.array(source.token_ids, dtype=np.uint64)
            total = mixed(ids * (np.arange(len(ids), dtype=np.uint64) + np.uint64(3)))
            self._flat[self.cache.source_slots(source)] = ids * MULTIPLIER + total
            self.num_encoded += len(ids)
        return []

    def logits(self, batch: Batch) -> Tensor:
        slots = self.cache.slots(batch.rows_of_tokens, batch.positions)
        logits = np.empty((len(batch.token_ids), VOCAB), dtype=np.float32)
        self.num_tokens += len(slots)
        token_ids = batch.token_ids
        if self.drawn is not None:
            token_ids = np.where(batch.drawn_tokens < 0, token_ids, self.drawn.numpy()[batch.drawn_tokens])
        for i, (row, position, token_id) in enumerate(
            zip(batch.rows_of_tokens, batch.positions, token_ids, strict=True)
        ):
            before = self._flat[self.cache.slots(np.full(position, row), np.arange(position))]
            source = self._flat[self._source_slots(row)]
            self._flat[slots[i]] = mixed(np.array([token_id, mixed(before), mixed(source)], dtype=np.uint64))
            logits[i] = logits_of(mixed(np.append(before, self._flat[slots[i]])))
            if self.fails is not None:
                logits[i, self.fails] -= 3  # rarely drawn
            if token_id == self.fails:
                logits[i] = np.nan
        return torch.from_numpy(logits[batch.selected])

    def num_drawn(self, batch: Batch) -> int | None:
        return None

    def draw(self, batch: Batch, sampling: SamplingBatch) -> Draw | None:
        return None

    def follow_weights(self) -> None:
        pass

    def take_seconds(self) -> dict[str, float]:
        return {}

    @property
    def _flat(self) -> NDArray[np.uint64]:
        return self.storage.values.reshape(-1)

    def _source_slots(self, row: int) -> NDArray[np.int64]:
        places = np.arange(self.cache.source_lengths[row])
        size = self.cache.block_size
        return self.cache.source_tables[row, places // size].astype(np.int64) * size + places % size


def mixed(values: NDArray[np.uint64]) -> np.uint64:
    """One number that depends on every value and its place."""
    weights = (np.arange(len(values), dtype=np.uint64) * np.uint64(2) + np.uint64(1)) * MULTIPLIER
    return np.bitwise_xor.reduce((values ^ (values >> np.uint64(29))) * weights, initial=np.uint64(17))


def logits_of(state: np.uint64) -> NDArray[np.float32]:
    parts = (np.arange(1, VOCAB + 1, dtype=np.uint64) * MULTIPLIER) ^ state
    parts = (parts ^ (parts >> np.uint64(31))) * MULTIPLIER
    return (parts >> np.uint64(40)).astype(np.float32) / 2**22


def hash_engine(
    num_blocks: int, block_size: int, max_num_seqs: int, max_model_len: int, budget: int, fails: int | None = None,
    enable_prefix_caching: bool = True, ahead: bool = False,
) -> Engine:  # fmt: skip
    """``ahead``: steps are sent before the tokens of those before them have arrived, as on a GPU."""
    storage = HashStorage(num_blocks, block_size)
    cache = KVCache(storage, max_num_seqs, max_model_len, enable_prefix_caching)
    runner = HashRunner(cache, storage, fails)
    runner.drawn = torch.zeros(max_num_seqs, dtype=torch.int64) if ahead else None
    return Engine(runner, None, budget, 1)


def reader(architecture: str, max_model_len: int) -> PromptReader:
    config = TransformerConfig(
        architecture=architecture, vocab_size=VOCAB, target_vocab_size=VOCAB, dim=8, depth=1, heads=1
    )  # type: ignore[arg-type]
    return PromptReader(config, GenerationConfig(), None, max_model_len)
