"""Sampling on a GPU in a CUDA graph, from a cold L2 cache: greedy, unfiltered, and with all filters.

What limits it is reading the logits once, at the bandwidth of a copy. The peer "torch" filters by a sort of the
vocabulary and draws by exponential noise, as vLLM does where it has no kernel of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.sampling import SamplingBatch, sample
from tools.profile import ceilings
from tools.profile.machine import Cell
from tools.profile.report import Report
from tools.profile.timing import captured, interleaved

SHAPES = {"32k": ((1, 32_768),), "50k": ((32, 50_257),), "128k": ((1, 131_072), (128, 131_072))}
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "unfiltered": {"temperature": 0.8},
    "top_k, top_p, min_p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
}


def torch_sample(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """The next tokens by torch's own operations."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if min_p > 0:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), -torch.inf)
    if top_k > 0 or top_p < 1:
        ascending, ids = logits.sort(dim=-1)
        if top_k > 0:
            ascending = ascending.masked_fill(ascending < ascending[:, -top_k, None], -torch.inf)
        if top_p < 1:
            outside = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
            outside[:, -1] = False
            ascending = ascending.masked_fill(outside, -torch.inf)
        logits = ascending.scatter(-1, ids, ascending)
    probabilities = logits.softmax(-1, dtype=torch.float32)
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


def run(shapes: list[str], seconds: float, report: Report) -> None:
    """Rows for all shapes and parameters; a failed check is among the report's failures."""
    device = torch.device("cuda")
    bandwidth = ceilings.copy(device, ceilings.GPU_COPY)
    report.ceilings["copy GB/s"] = round(bandwidth / 1e9, 1)
    for shape in shapes or SHAPES:
        for rows, vocab in SHAPES[shape]:
            logits = 2 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))
            for what, params in PARAMS.items():
                report.add(_measure(what, params, logits, bandwidth, seconds, report.failures))


def _measure(
    what: str, params: dict[str, Any], logits: Tensor, bandwidth: float, seconds: float, failures: list[str]
) -> dict[str, Cell]:
    from kernels.gpu.sampling import launch
    from kernels.gpu.sampling_columns import upload

    rows, vocab = logits.shape
    batch = SamplingBatch.build(rows, seed=range(rows), **params)
    on_gpu = logits.to("cuda")
    different = int((sample(on_gpu, batch).token_ids != sample(logits, batch).token_ids).sum())
    if different > rows // 100:
        failures.append(f"{what} at vocabulary {vocab}, batch {rows}: {different} tokens are not the CPU's")
    columns = upload(batch, on_gpu.device)
    runs = {
        "ours": captured(lambda: launch(on_gpu, columns)),
        "torch": captured(lambda: torch_sample(on_gpu, **params)),
    }
    timings = interleaved(runs, seconds, on_gpu.device)
    ours = timings["ours"]
    return {
        "what": what, "vocab": vocab, "batch": rows, "ms": ours.median * 1e3, "20%": ours.low * 1e3,
        "80%": ours.high * 1e3, "% of one read": 100 * on_gpu.nbytes / bandwidth / ours.median,
        "torch ms": timings["torch"].median * 1e3, "x torch": timings["torch"].median / ours.median,
    }  # fmt: skip
