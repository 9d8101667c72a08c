"""`linear` on a GPU: layers of few rows by the precision of their weights, against torch's in halves (cuBLAS).

What is timed is a CUDA graph of one call after the other, each with a weight of its own, as a model's layers have: more
bytes in all than the L2 cache holds, and without the host's time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.quantization import QuantizedWeight
from kernels.weight_only_linear import FLOAT8_CAPABILITY, DeviceWeight, weight_only_linear
from tools.profile import ceilings, launches
from tools.profile.contenders import OURS
from tools.profile.machine import Cell
from tools.profile.measure import TOLERANCE, worst_error
from tools.profile.options import Options
from tools.profile.report import Report, Table
from tools.profile.timing import Timing, interleaved

KEYS = ("shape", "who")
MEASURE = ("us", "20%", "80%")
PEER = "eager"
PRECISIONS = ("int8", "int4", "int4-minimums", "fp8", "bf16")
ROWS = (1, 8, 16, 64)
LAYERS = ((4096, 4096), (4096, 11008), (11008, 4096))
SHAPES = {
    "decode": [(rows, *layer) for layer in LAYERS for rows in ROWS],
    "head": [(rows, 4096, 128_256) for rows in ROWS],
}
COLD_BYTES = 200 << 20  # of weights that a graph reads: four times an H100's L2 cache
COPIES = (4, 64)
DTYPE = torch.bfloat16
SECONDS = 0.1  # for each contender, at most

Size = tuple[int, int, int]  # rows, inputs, outputs
Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """Layers that differ in their numbers alone, the bytes of one's weight, and the floats of the first's."""

    layers: list[Layer]
    nbytes: int
    floats: Tensor


def run(options: Options, sizes: Sequence[Size]) -> Report:
    """A row for each size and contender; the tests of what they compute come first."""
    device = torch.device("cuda")
    limits = ceilings.measure(device, [DTYPE])
    names = [_label(size) for size in sizes]
    times = {name: ["0.00123"] for name in MEASURE}
    table = Table({"shape": names, "who": [f"{OURS} int4-minimums"], **times})
    report = Report("linear", KEYS, MEASURE, path=options.json, ceilings=limits.cells(), table=table)
    report.start()
    for (inputs, outputs), group in itertools.groupby(sizes, key=lambda size: size[1:]):
        everyone = contenders(inputs, outputs, device, options.precisions or _precisions(), options.against)
        for size in group:
            _measure(report, size, everyone, limits.copy, min(options.seconds, SECONDS))
    return report


def contenders(
    inputs: int, outputs: int, device: torch.device, precisions: Sequence[str], against: Sequence[str] | None
) -> dict[str, Contender]:
    """Ours in each precision, and torch's layer in halves unless ``against`` leaves it out."""
    backend = None if device.type == "cuda" else "triton"
    everyone = {}
    for precision in precisions:
        weights = [
            packed(precision, inputs, outputs, device) for _ in range(_copies(precision, inputs * outputs, device))
        ]
        layers = [_ours(weight, backend) for weight in weights]
        everyone[f"{OURS} {precision}"] = Contender(layers, weights[0].nbytes, weights[0].dequantize(torch.float32))
    if against is None or PEER in against:
        copies = _copies("bf16", inputs * outputs, device)
        floats = [_random(outputs, inputs, device).to(DTYPE) for _ in range(copies)]
        everyone[PEER] = Contender([_theirs(weight) for weight in floats], floats[0].nbytes, floats[0].float())
    return everyone


def packed(precision: str, inputs: int, outputs: int, device: torch.device) -> DeviceWeight:
    """A random weight whose products are of about the size of their rows."""
    size = 0.5 * inputs**-0.5
    if precision == "int8":
        values = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=device)
        weight: QuantizedWeight | Tensor = QuantizedWeight(values, torch.full((outputs,), size / 64, device=device))
    elif precision.startswith("int4"):
        values = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=device)
        scales = torch.full((outputs, inputs // 32), size / 4, dtype=torch.float16, device=device)
        weight = QuantizedWeight(values, scales, -8 * scales if precision.endswith("minimums") else None)
    else:
        weight = _random(outputs, inputs, device)
    return DeviceWeight.pack(weight, device, DTYPE, float8=precision == "fp8")


def _random(outputs: int, inputs: int, device: torch.device) -> Tensor:
    return torch.randn(outputs, inputs, device=device) / inputs**0.5


def _ours(weight: DeviceWeight, backend: str | None) -> Layer:
    return lambda x: weight_only_linear(x, weight, backend=backend)


def _theirs(weight: Tensor) -> Layer:
    return lambda x: F.linear(x, weight)


def _copies(precision: str, weights: int, device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    bits = {"int8": 8, "fp8": 8, "bf16": 16}.get(precision, 4)
    least, most = COPIES
    return min(most, max(least, COLD_BYTES * 8 // (weights * bits)))


def _precisions() -> list[str]:
    has_float8 = torch.cuda.get_device_capability() >= FLOAT8_CAPABILITY
    return [name for name in PRECISIONS if has_float8 or name != "fp8"]


def _label(size: Size) -> str:
    return "x".join(map(str, size))


def error_of(contender: Contender, x: Tensor) -> float:
    """Of the first layer's result, against the float32 product of the numbers its weight stands for."""
    return worst_error([contender.layers[0](x)], [F.linear(x.float(), contender.floats)])


def _measure(report: Report, size: Size, everyone: dict[str, Contender], copy: float, seconds: float) -> None:
    rows, inputs, outputs = size
    x = torch.randn(rows, inputs, device="cuda").to(DTYPE)
    cells: dict[str, dict[str, Cell]] = {}
    graphs: dict[str, Callable[[], object]] = {}
    for name, contender in everyone.items():
        cells[name] = {"shape": _label(size), "who": name, **dict.fromkeys((*MEASURE, "TB/s", "% of copy", "x eager"))}
        cells[name] |= dict.fromkeys(("error", *launches.COLUMNS))
        if name.startswith(OURS):
            with launches.described(cells[name]):
                contender.layers[0](x)
        cells[name]["error"] = error = error_of(contender, x)
        cells[name]["note"] = "" if error <= TOLERANCE[DTYPE] else "wrong"
        if error <= TOLERANCE[DTYPE]:
            graphs[name] = _graph(contender.layers, x)
        elif name.startswith(OURS):
            report.failures.append(f"{_label(size)}, {name}: wrong")
    timings = interleaved(graphs, seconds, torch.device("cuda")) if graphs else {}
    for name, row in cells.items():
        if name in timings:
            moved = everyone[name].nbytes + DTYPE.itemsize * rows * (inputs + outputs)
            _fill(row, timings[name], len(everyone[name].layers), moved, copy)
            row["x eager"] = _ratio(timings, everyone, name)
        report.add(row)


def _fill(row: dict[str, Cell], timing: Timing, calls: int, moved: int, copy: float) -> None:
    times = (timing.median, timing.low, timing.high)
    row |= {name: 1e6 * time / calls for name, time in zip(MEASURE, times, strict=True)}
    rate = moved * calls / timing.median
    row["TB/s"], row["% of copy"] = rate / 1e12, 100 * rate / copy


def _ratio(timings: dict[str, Timing], everyone: dict[str, Contender], name: str) -> float | None:
    """How many times faster than torch's layer a call is."""
    if PEER not in timings:
        return None
    ours, theirs = (timings[who].median / len(everyone[who].layers) for who in (name, PEER))
    return theirs / ours


def _graph(layers: list[Layer], x: Tensor) -> Callable[[], object]:
    """One call of each layer, captured."""
    for layer in layers[:2]:
        layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            layer(x)
    return graph.replay
