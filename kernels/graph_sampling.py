"""A sampler whose input stays where it is on the device, so that a CUDA graph can hold its launches."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import TRITON_DEVICE
from kernels.gpu.sampling_columns import Plan, upload
from kernels.sampling import Draw, SamplingBatch, draw_of

if TRITON_DEVICE is not None:
    from kernels.gpu import sampling as gpu

__all__ = ["GraphSampling", "Plan", "plan_of"]

REPORTED = (0, 8, 32, 128)  # log-probabilities of a row that there is room for: a graph for every number would be many


def plan_of(batch: SamplingBatch) -> Plan | None:
    """What a graph for a batch takes of the sampler; None: what no graph can hold, histories of any length."""
    plan = Plan.of(batch)
    if plan.penalties:
        return None
    return plan._replace(num_top=next((room for room in REPORTED if room >= plan.num_top), plan.num_top))


class GraphSampling:
    """Draws from logits (rows, vocab) by a batch's parameters, again and again.

    ``fill`` brings the parameters of a batch of as many rows that the plan makes room for; ``launch``, which a graph
    may hold, draws by them; ``draw`` is what the last launch drew.
    """

    def __init__(self, batch: SamplingBatch, plan: Plan, device: torch.device) -> None:
        self._batch, self._columns = batch, upload(batch, device, plan=plan)
        self._result: gpu.DeviceResult | None = None

    def fill(self, batch: SamplingBatch) -> None:
        # A greedy row's position says nothing, and nothing else of a batch changes.
        if batch is not self._batch or self._columns.plan.draws:
            self._columns.refill(batch)
            self._batch = batch

    def launch(self, logits: Tensor) -> Tensor:
        """Token ids, int64 (rows,), on the device."""
        self._result = gpu.launch(logits, self._columns)
        return self._result.token_ids

    def draw(self) -> Draw:
        """Asks for the results on the CPU, which whoever wants them waits for."""
        assert self._result is not None
        return draw_of(self._result)
