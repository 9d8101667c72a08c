"""Runs the model on one step's flattened batch: sources through the encoder, new tokens through the decoder."""

from __future__ import annotations

from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch
from engine.decode_graphs import DecodeGraphs
from engine.kv_cache import KVCache, Source
from engine.step_tensors import StepBuffer, StepTensors, step_shape
from engine.tensor_cache import CacheView, Part, TensorStorage, runs, whole
from kernels.graph_sampling import Plan, plan_of
from kernels.sampling import Draw, SamplingBatch
from models.cache import Lengths
from models.transformer import DecoderOnly, EncoderDecoder


class Runner(Protocol):
    """What the engine asks of a model and its cache. Every method takes packed batches; nothing is padded.

    Attributes:
        drawn: int64 (any,), where the engine puts the tokens drawn last, for a batch that names them by their place;
            None: a batch has to have all tokens in its table.
    """

    cache: KVCache
    drawn: Tensor | None

    def encode(self, sources: list[Source], *, wants_hidden: bool = False) -> list[Tensor]:
        """Runs sources through the encoder and stores what cross-attention reads of them.

        Returns each one's hidden states, float32 (tokens, dim) on the CPU, or nothing where they are not wanted.
        """
        ...

    def logits(self, batch: Batch) -> Tensor:
        """Runs a batch's tokens; logits (wanted tokens, vocab), of the token after each of them.

        float32 on the CPU, or the model's dtype on its device, where they are good until the next call.
        """
        ...

    def num_drawn(self, batch: Batch) -> int | None:
        """For how many rows ``draw`` wants parameters, the batch's own first; None: it does not draw for this batch."""
        ...

    def draw(self, batch: Batch, sampling: SamplingBatch) -> Draw | None:
        """Runs a batch's tokens and draws the next ones; None, and nothing is done, where ``sampling`` is beyond it."""
        ...

    def follow_weights(self) -> None:
        """Takes note of weights that have been put elsewhere since, by someone who shares the model."""
        ...

    def take_seconds(self) -> dict[str, float]:
        """Seconds since the last call, by kind of operation; nothing where the runner keeps no time."""
        ...


class TorchRunner:
    """A model that torch runs, on any device, and a cache of tensors.

    Where the cache's attention reads sequences of any lengths together, as Triton's does, a step is one part; and then
    the steps in which every sequence decodes one token are ``graphs``'s, if there are any.
    """

    def __init__(
        self, model: DecoderOnly | EncoderDecoder, cache: KVCache, storage: TensorStorage, *, ragged: bool
    ) -> None:
        self.model, self.cache, self.storage, self.ragged = model, cache, storage, ragged
        self.drawn: Tensor | None = None
        self.graphs: DecodeGraphs | None = None
        self._places: tuple[int, ...] = ()  # of the weights, which graphs read where they were
        self._planned: tuple[SamplingBatch, Plan | None] | None = None  # the last one's, which often comes again

    def encode(self, sources: list[Source], *, wants_hidden: bool = False) -> list[Tensor]:
        hidden = self.encoder_hidden([source.token_ids for source in sources])
        keys_values = cast(EncoderDecoder, self.model).cross_keys_values(hidden)
        slots = self._tensor(np.concatenate([self.cache.source_slots(source) for source in sources]))
        for layer, (k, v) in enumerate(keys_values):
            self.storage.append(layer, k, v, slots)
        if not wants_hidden:
            return []
        return list(hidden.float().cpu().split([len(source.token_ids) for source in sources]))

    def encoder_hidden(self, sources: list[list[int]]) -> Tensor:
        """The encoder's hidden states of several sources, packed (tokens, dim)."""
        lengths = np.array([len(source) for source in sources], dtype=np.int32)
        packed = Lengths(
            cu_seqlens=self._tensor(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)),
            max_seqlen=int(lengths.max()),
            backend=self.storage.backend,
        )
        token_ids = self._tensor(np.concatenate([np.asarray(source, dtype=np.int64) for source in sources]))
        positions = self._tensor(np.concatenate([np.arange(length) for length in lengths]))
        return cast(EncoderDecoder, self.model).encode(token_ids, packed, positions=positions)

    def logits(self, batch: Batch) -> Tensor:
        if self.graphs is not None and self.graphs.serve(batch):
            return self.graphs.logits(batch)
        tensors = StepBuffer(step_shape(self.cache, batch), self.storage.device).fill(self.cache, batch)
        parts = whole(tensors, int(batch.counts.max())) if self.ragged else runs(tensors, batch, self.cache)
        return self.run(tensors, parts)

    def num_drawn(self, batch: Batch) -> int | None:
        return self.graphs.size_of(batch) if self.graphs is not None and self.graphs.serve(batch) else None

    def draw(self, batch: Batch, sampling: SamplingBatch) -> Draw | None:
        if self._planned is None or self._planned[0] is not sampling:
            self._planned = sampling, plan_of(sampling)
        plan = self._planned[1]
        return None if self.graphs is None or plan is None else self.graphs.draw(batch, sampling, plan)

    def follow_weights(self) -> None:
        places = tuple(weight.data_ptr() for weight in self.model.parameters())
        if self.graphs is not None and places != self._places:
            self.graphs.forget()
        self._places = places

    def run(self, tensors: StepTensors, parts: list[Part]) -> Tensor:
        """Logits (selected, vocab) of a step whose input is on the device."""
        token_ids = tensors.token_ids
        if self.drawn is not None:
            drawn = self.drawn[tensors.drawn.clamp(min=0)].clamp(min=0)  # -1 is of a row that could not be sampled
            token_ids = torch.where(tensors.drawn < 0, token_ids, drawn)
        view = CacheView(self.storage, tensors.slots, parts)
        hidden = self.model.decode(token_ids, tensors.positions, view)
        if len(tensors.selected) < len(hidden):  # else all are
            hidden = hidden[tensors.selected]
        logits = self.model.logits(hidden)
        return logits.float() if self.storage.device.type == "cpu" else logits

    def take_seconds(self) -> dict[str, float]:
        return {}

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.storage.device)
