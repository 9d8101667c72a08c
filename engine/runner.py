"""Runs the model on one step's flattened batch: sources through the encoder, new tokens through the decoder."""

from __future__ import annotations

from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch
from engine.kv_cache import KVCache, Source
from engine.tensor_cache import CacheView, TensorStorage
from models.cache import Lengths
from models.transformer import DecoderOnly, EncoderDecoder


class Runner(Protocol):
    """What the engine asks of a model and its cache. Every method takes packed batches; nothing is padded."""

    cache: KVCache

    def encode(self, sources: list[Source], *, wants_hidden: bool = False) -> list[Tensor]:
        """Runs sources through the encoder and stores what cross-attention reads of them.

        Returns each one's hidden states, float32 (tokens, dim) on the CPU, or nothing where they are not wanted.
        """
        ...

    def logits(self, batch: Batch) -> Tensor:
        """Runs a batch's tokens; float32 logits (wanted tokens, vocab) on the CPU, of the token after each of them."""
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

    def encode(self, sources: list[Source], *, wants_hidden: bool = False) -> list[Tensor]:
        hidden = self.encoder_hidden([source.token_ids for source in sources])
        keys_values = cast(EncoderDecoder, self.model).cross_keys_values(hidden)
        slots = np.concatenate([self.cache.source_slots(source) for source in sources])
        places = self.storage.slots_of(slots)
        for layer, (k, v) in enumerate(keys_values):
            self.storage.append(layer, k, v, places)
        if not wants_hidden:
            return []
        return list(hidden.float().cpu().split([len(source.token_ids) for source in sources]))

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

    def hidden(self, batch: Batch) -> Tensor:
        """The decoder's hidden states of a batch's tokens, (tokens, dim)."""
        view = CacheView(self.cache, self.storage, batch, self.backend)
        return self.model.decode(self._tensor(batch.token_ids), view.positions, view)

    def logits(self, batch: Batch) -> Tensor:
        hidden = self.hidden(batch)
        return self.model.logits(hidden[self._tensor(batch.selected)]).float().cpu()

    def take_seconds(self) -> dict[str, float]:
        return {}

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.storage.device)
