"""Decoding steps as CUDA graphs: captured at a few sizes when they are first met, replayed with new tokens and tables.

Launching a layer's kernels one by one takes a CPU longer than running them takes a GPU; a graph is one launch. Its
kernels read lengths, tables and slots from memory that stays where it is, so one graph serves all batches up to its
size and all lengths up to its width; sequences that are not there have no keys, and their tokens are not stored.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import Batch
from engine.kv_cache import KVCache
from engine.step_tensors import StepBuffer, StepShape, StepTensors, step_shape
from engine.tensor_cache import Part, whole

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # beyond, multiples of the last
FIRST_WIDTH, WIDENING = 32, 4  # blocks of a table: the least, and how many times wider the next one is


@dataclass(frozen=True)
class Step:
    """One size's memory, and what runs it: ``logits`` is where a replay leaves them."""

    buffer: StepBuffer
    graph: torch.cuda.CUDAGraph | None
    logits: Tensor | None


class DecodeGraphs:
    """Runs steps in which every sequence decodes one token.

    ``run`` makes logits (tokens, vocab) of tensors on the device. Unless it ``captures``, as on a CPU, it is called
    anew for each step, on the same padded batches.
    """

    def __init__(
        self, run: Callable[[StepTensors, list[Part]], Tensor], cache: KVCache, device: torch.device, *, captures: bool
    ) -> None:
        self.run, self.cache, self.device, self.captures = run, cache, device, captures
        self._steps: dict[StepShape, Step] = {}
        self._pool = torch.cuda.graph_pool_handle() if captures else None  # one memory for what all graphs compute in

    def serve(self, batch: Batch) -> bool:
        return batch.decodes and bool((batch.wanted == 1).all())

    def logits(self, batch: Batch) -> Tensor:
        """Logits (sequences, vocab), good until the next call."""
        shape = self._shape(batch)
        if (step := self._steps.get(shape)) is None:
            step = self._steps[shape] = self._prepare(shape, batch)
        tensors = step.buffer.fill(self.cache, batch)
        if step.graph is None or step.logits is None:
            return self.run(tensors, whole(tensors, 1))[: len(batch.rows)]
        step.graph.replay()
        return step.logits[: len(batch.rows)]

    def _shape(self, batch: Batch) -> StepShape:
        needed = step_shape(self.cache, batch)
        sequences = min(_next_size(needed.sequences), max(self.cache.num_rows, needed.sequences))
        width = FIRST_WIDTH
        while width < needed.width:
            width *= WIDENING
        return StepShape(sequences, sequences, sequences, min(width, self.cache.tables.shape[1]))

    def _prepare(self, shape: StepShape, batch: Batch) -> Step:
        """Memory for steps of a shape, and their graph."""
        buffer = StepBuffer(shape, self.device)
        if not self.captures:
            return Step(buffer, None, None)
        tensors = buffer.fill(self.cache, batch)
        # Kernels are compiled, and libraries take their workspaces, on a first run that is not captured. It writes what
        # the replay will write again.
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.run(tensors, whole(tensors, 1))
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self.run(tensors, whole(tensors, 1))
        return Step(buffer, graph, logits)


def _next_size(count: int) -> int:
    if count <= SIZES[-1]:
        return SIZES[bisect_left(SIZES, count)]
    return -(-count // SIZES[-1]) * SIZES[-1]
