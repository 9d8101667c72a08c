"""Decoding steps as CUDA graphs: captured at a few sizes when they are first met, replayed with new tokens and tables.

Launching a layer's kernels one by one takes a CPU longer than running them takes a GPU; a graph is one launch, from the
tokens drawn last to those drawn next. Its kernels read lengths, tables and slots from memory that stays where it is, so
one graph serves all batches up to its size and all lengths up to its width; sequences that are not there have no keys,
and their tokens are not stored.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import Batch
from engine.kv_cache import KVCache
from engine.step_tensors import StepBuffer, StepShape, StepTensors, step_shape
from engine.tensor_cache import Part, whole
from kernels.graph_sampling import GraphSampling, Plan
from kernels.sampling import Draw, SamplingBatch

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # beyond, multiples of the last
FIRST_WIDTH, WIDENING = 32, 4  # blocks of a table: the least, and how many times wider the next one is
MOST_GRAPHS = 64  # what requests ask of the sampler makes others; beyond these a step is launched kernel by kernel
CAPTURING = threading.Lock()


@dataclass(frozen=True)
class Step:
    """One size's memory, and what runs it. A replay leaves logits in ``logits``, or draws from them by ``sampling``."""

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
        self._steps: dict[tuple[StepShape, Plan | None], Step] = {}
        # One memory for what all graphs compute in, and one stream that they are captured on.
        self._pool = torch.cuda.graph_pool_handle() if captures else None
        self._stream = torch.cuda.Stream(device) if captures else None

    def forget(self) -> None:
        """Nothing of what has been captured holds any more."""
        self._steps.clear()

    def serve(self, batch: Batch) -> bool:
        return batch.decodes and bool((batch.wanted == 1).all())

    def size_of(self, batch: Batch) -> int:
        """How many rows the batch has with those that fill it up."""
        return min(_next_size(len(batch.rows)), max(self.cache.num_rows, len(batch.rows)))

    def logits(self, batch: Batch) -> Tensor:
        """Logits (sequences, vocab), good until the next call."""
        with self._on_device():
            logits = self._replay(self._step(batch, None, None), batch)
        assert logits is not None
        return logits[: len(batch.rows)]

    def draw(self, batch: Batch, sampling: SamplingBatch, plan: Plan) -> Draw:
        """The next tokens, by parameters for ``size_of`` rows that ``plan`` makes room for: all in one launch."""
        with self._on_device():
            step = self._step(batch, sampling, plan)
            assert step.sampling is not None
            step.sampling.fill(sampling)
            self._replay(step, batch)
            return step.sampling.draw()

    def _on_device(self) -> AbstractContextManager[object]:
        """Streams, events and Triton's launches are the current device's, which need not be the model's."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _replay(self, step: Step, batch: Batch) -> Tensor | None:
        tensors = step.buffer.fill(self.cache, batch)
        if step.graph is None:
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

    def _step(self, batch: Batch, sampling: SamplingBatch | None, plan: Plan | None) -> Step:
        shape = self._shape(batch)
        if (step := self._steps.get((shape, plan))) is None:
            step = self._prepare(shape, batch, sampling, plan)
            if len(self._steps) < MOST_GRAPHS:
                self._steps[shape, plan] = step
        return step

    def _shape(self, batch: Batch) -> StepShape:
        needed, sequences = step_shape(self.cache, batch), self.size_of(batch)
        width = FIRST_WIDTH
        while width < needed.width:
            width *= WIDENING
        return StepShape(sequences, sequences, sequences, min(width, self.cache.tables.shape[1]))

    def _prepare(
        self, shape: StepShape, batch: Batch, parameters: SamplingBatch | None, plan: Plan | None
    ) -> Step:  # fmt: skip
        """Memory for steps of a shape, and their graph, if there may be another."""
        buffer = StepBuffer(shape, self.device)
        sampling = None
        if parameters is not None and plan is not None:
            sampling = GraphSampling(parameters, plan, self.device)
        if self._stream is None or len(self._steps) >= MOST_GRAPHS:
            return Step(buffer, sampling, None, None)
        tensors = buffer.fill(self.cache, batch)
        # Kernels are compiled, and libraries take their workspaces, on a first run that is not captured. It writes what
        # the replay will write again, but for the tokens that both read: those it may not draw.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            logits = self.run(tensors, whole(tensors, 1))
            if sampling is not None:
                sampling.launch(logits)
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # What other threads do with the device meanwhile is no part of it, and no error; but one captures at a time.
        with CAPTURING, torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            logits = self._compute(tensors, sampling)
        return Step(buffer, sampling, graph, None if sampling is not None else logits)


def _next_size(count: int) -> int:
    if count <= SIZES[-1]:
        return SIZES[bisect_left(SIZES, count)]
    return -(-count // SIZES[-1]) * SIZES[-1]
