"""Runs the model on one step's flattened batch: sources through the encoder, new tokens through the decoder."""

from __future__ import annotations

from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from engine.kv_cache import KVCache, Source
from engine.request import Request, Sequence
from engine.tensor_cache import CacheView, TensorStorage
from models.cache import Lengths
from models.transformer import DecoderOnly, EncoderDecoder


class Runner(Protocol):
    """What the engine asks of a model and its cache. Every method takes packed batches; nothing is padded."""

    cache: KVCache

    def encode(self, requests: list[Request]) -> None:
        """Runs the requests' sources through the encoder and stores what cross-attention reads of them."""
        ...

    def next_token_logits(self, sequences: list[Sequence]) -> Tensor:
        """Runs what the cache lacks; float32 logits (sequences, vocab) on the CPU, for the token after each of them."""
        ...

    def target_logprobs(self, sequences: list[Sequence]) -> Tensor:
        """Float32 log-probabilities (tokens, vocab) of every next token along the sequences, packed."""
        ...

    def take_seconds(self) -> dict[str, float]:
        """Seconds since the last call, by kind of operation; nothing where the runner keeps no time."""
        ...


class TorchRunner:
    """A model that torch runs, on any device, and a cache of tensors."""

    def __init__(
        self, model: DecoderOnly | EncoderDecoder, cache: KVCache, storage: TensorStorage, backend: str | None
    ) -> None:
        self.model, self.cache, self.storage, self.backend = model, cache, storage, backend

    def encode(self, requests: list[Request]) -> None:
        sources = [request.encoder_prompt_token_ids or [] for request in requests]
        hidden = self.encoder_hidden(sources)
        keys_values = cast(EncoderDecoder, self.model).cross_keys_values(hidden)
        slots = np.concatenate([self.cache.source_slots(source_of(request)) for request in requests])
        places = self.storage.slots_of(slots)
        for layer, (k, v) in enumerate(keys_values):
            self.storage.append(layer, k, v, places)

    def encoder_hidden(self, sources: list[list[int]]) -> Tensor:
        """The encoder's hidden states of several sources, packed (tokens, dim)."""
        lengths = np.array([len(source) for source in sources], dtype=np.int32)
        packed = Lengths(
            cu_seqlens=self._tensor(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)),
            max_seqlen=int(lengths.max()),
            backend=self.backend,
        )
        token_ids = self._tensor(np.concatenate([np.asarray(source, dtype=np.int64) for source in sources]))
        positions = self._tensor(np.concatenate([np.arange(length) for length in lengths]))
        return cast(EncoderDecoder, self.model).encode(token_ids, packed, positions=positions)

    def decode(self, sequences: list[Sequence]) -> tuple[Tensor, CacheView]:
        """Runs each sequence's tokens that the cache lacks; returns their hidden states (tokens, dim) and the view."""
        new = [sequence.token_ids[sequence.num_cached :] for sequence in sequences]
        counts = np.array([len(ids) for ids in new], dtype=np.int32)
        starts = np.array([sequence.num_cached for sequence in sequences], dtype=np.int32)
        rows = np.array([sequence.row.index for sequence in sequences if sequence.row is not None], dtype=np.int64)
        view = CacheView(self.cache, self.storage, rows, starts, counts, self.backend)
        token_ids = self._tensor(np.fromiter((i for ids in new for i in ids), dtype=np.int64, count=int(counts.sum())))
        hidden = self.model.decode(token_ids, view.positions, view)
        for sequence in sequences:
            sequence.num_cached = len(sequence.token_ids)
        return hidden, view

    def next_token_logits(self, sequences: list[Sequence]) -> Tensor:
        hidden, view = self.decode(sequences)
        return self.model.logits(hidden[view.last_tokens]).float().cpu()

    def target_logprobs(self, sequences: list[Sequence]) -> Tensor:
        return self.model.logits(self.decode(sequences)[0]).float().log_softmax(-1).cpu()

    def take_seconds(self) -> dict[str, float]:
        return {}

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.storage.device)


def source_of(request: Request) -> Source:
    """Where a request's source is in the cache."""
    row = request.sequences[0].row
    assert row is not None and row.source is not None
    return row.source
