"""Decoding steps as CUDA graphs: captured at a few sizes when they are first met, replayed with new tokens and tables.

Launching a layer's kernels one by one takes a CPU longer than running them takes a GPU; a graph is one launch, from the
tokens drawn last to those drawn next. Its kernels read lengths, tables and slots from memory that stays where it is, so
one graph serves all batches up to its size and all lengths up to its width; sequences that are not there have no keys,
and their tokens are not stored.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import Batch
from engine.kv_cache import KVCache
from engine.step_tensors import StepBuffer, StepShape, StepTensors, step_shape
from engine.tensor_cache import Part, whole
from kernels.graph_sampling import GraphSampling
from kernels.sampling import Draw, SamplingBatch

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # beyond, multiples of the last
FIRST_WIDTH, WIDENING = 32, 4  # blocks of a table: the least, and how many times wider the next one is


@dataclass(frozen=True)
class Step:
    """One size's memory, and what runs it. ``logits`` is where a replay leaves them, ``sampling`` draws from them."""

    buffer: StepBuffer
    sampling: GraphSampling | None
    graph: torch.cuda.CUDAGraph | None
    logits: Tensor | None


class DecodeGraphs:
    """Runs steps in which every sequence decodes one token.

    ``run`` makes logits (tokens, vocab) of tensors on the device; ``drawn`` takes the tokens drawn from them. Unless it
    ``captures``, as on a CPU, ``run`` is called anew for each step, on the same padded batches.
    """

    def __init__(
        self, run: Callable[[StepTensors, list[Part]], Tensor], cache: KVCache, device: torch.device,
        drawn: Tensor | None, *, captures: bool,
    ) -> None:  # fmt: skip
        self.run, self.cache, self.device, self.drawn, self.captures = run, cache, device, drawn, captures
        self._steps: dict[tuple[StepShape, Hashable | None], Step] = {}
        self._pool = torch.cuda.graph_pool_handle() if captures else None  # one memory for what all graphs compute in

    def serve(self, batch: Batch) -> bool:
        return batch.decodes and bool((batch.wanted == 1).all())

    def size_of(self, batch: Batch) -> int:
        """How many rows the batch has with those that fill it up."""
        return min(_next_size(len(batch.rows)), max(self.cache.num_rows, len(batch.rows)))

    def logits(self, batch: Batch) -> Tensor:
        """Logits (sequences, vocab), good until the next call."""
        step = self._step(batch, None, None)
        logits = self._replay(step, batch)
        return logits[: len(batch.rows)]

    def draw(self, batch: Batch, sampling: SamplingBatch, plan: Hashable) -> Draw:
        """The next tokens, by parameters for ``size_of`` rows, of which ``plan`` is the plan: all in one launch."""
        step = self._step(batch, sampling, plan)
        assert step.sampling is not None
        step.sampling.fill(sampling)
        self._replay(step, batch)
        return step.sampling.draw()

    def _replay(self, step: Step, batch: Batch) -> Tensor:
        tensors = step.buffer.fill(self.cache, batch)
        if step.graph is None or step.logits is None:
            return self._compute(tensors, step.sampling)
        step.graph.replay()
        return step.logits

    def _compute(self, tensors: StepTensors, sampling: GraphSampling | None) -> Tensor:
        logits = self.run(tensors, whole(tensors, 1))
        if sampling is not None:
            token_ids = sampling.launch(logits)
            if self.drawn is not None:
                self.drawn[: len(token_ids)] = token_ids
        return logits

    def _step(self, batch: Batch, sampling: SamplingBatch | None, plan: Hashable | None) -> Step:
        shape = self._shape(batch)
        if (step := self._steps.get((shape, plan))) is None:
            step = self._steps[shape, plan] = self._prepare(shape, batch, sampling)
        return step

    def _shape(self, batch: Batch) -> StepShape:
        needed, sequences = step_shape(self.cache, batch), self.size_of(batch)
        width = FIRST_WIDTH
        while width < needed.width:
            width *= WIDENING
        return StepShape(sequences, sequences, sequences, min(width, self.cache.tables.shape[1]))

    def _prepare(self, shape: StepShape, batch: Batch, parameters: SamplingBatch | None) -> Step:
        """Memory for steps of a shape, and their graph."""
        buffer = StepBuffer(shape, self.device)
        sampling = None if parameters is None else GraphSampling(parameters, self.device)
        if not self.captures:
            return Step(buffer, sampling, None, None)
        tensors = buffer.fill(self.cache, batch)
        # Kernels are compiled, and libraries take their workspaces, on a first run that is not captured. It writes what
        # the replay will write again, but for the tokens that both read: those it may not draw.
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            logits = self.run(tensors, whole(tensors, 1))
            if sampling is not None:
                sampling.launch(logits)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # What other threads do with the device in the meantime is no part of it, and no error.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._compute(tensors, sampling)
        return Step(buffer, sampling, graph, logits)


def _next_size(count: int) -> int:
    if count <= SIZES[-1]:
        return SIZES[bisect_left(SIZES, count)]
    return -(-count // SIZES[-1]) * SIZES[-1]
