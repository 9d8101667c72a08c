"""`linear --tune`: times candidates for the entries of the weight-only layers' table, and keeps what is faster.

All candidates are compiled first, by a process a core, into Triton's cache on disk. Then each is timed in a CUDA graph
of one call after the other, each with a weight of its own, and has to give the result of the entry's own config; the
best is what has the least geometric mean over the sizes. A kind of weight is made once for all of its entries.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.backend import TRITON_DEVICE
from kernels.weight_only_linear import FLOAT8, DeviceWeight, weight_only_linear
from tools.profile.budget import compile_for, launches
from tools.profile.machine import Cell
from tools.profile.options import known
from tools.profile.report import Report, Table
from tools.profile.timing import in_graphs
from tools.profile.tune import refusal

if TYPE_CHECKING:
    from kernels.gpu.weight_only_configs import Config, Entry

SIZES = ((4096, 4096), (4096, 11008))  # inputs and outputs
COLD_BYTES = 200 << 20  # of weights that a graph reads: four times an H100's L2 cache
SECONDS = 0.005  # for each candidate and size
GAIN = 1.01  # a smaller one is noise
DTYPE = torch.bfloat16

# Outputs and inputs of a warp, warps, stages and resident programs: of warps that share out the inputs, by bits,
DEEP = {
    4: ((32, 128, 8, 3, 2), (32, 64, 8, 4, 3), (16, 128, 8, 4, 3), (16, 256, 8, 3, 2), (32, 128, 4, 4, 4),
        (64, 64, 8, 3, 2)),
    8: ((32, 64, 8, 4, 3), (16, 128, 8, 3, 3), (16, 64, 8, 5, 4), (32, 128, 8, 3, 2), (32, 128, 4, 4, 4),
        (64, 64, 8, 3, 2)),
    16: ((32, 64, 4, 4, 3), (32, 64, 8, 3, 2), (16, 64, 8, 4, 3), (16, 128, 8, 3, 2), (32, 128, 4, 3, 2)),
}  # fmt: skip
# and of those that share out the outputs.
WIDE = (
    (32, 128, 2, 3, 4), (16, 64, 8, 4, 2), (16, 128, 8, 3, 2), (32, 64, 4, 4, 2), (16, 64, 4, 4, 4), (32, 128, 4, 3, 2),
)  # fmt: skip
FEW_ROWS = 16  # up to which warps may share out the inputs

Timer = Callable[[Sequence[Callable[[], object]]], float]  # seconds of one call


def run(names: list[str], path: Path | None, table_path: Path | None) -> Report:
    """A row an entry; the table is saved after each. Raises ValueError for unknown names, or without a GPU."""
    if TRITON_DEVICE != "cuda":
        raise ValueError("--tune needs a GPU that the kernels run on")
    from kernels.gpu import weight_only_configs as configs
    from kernels.gpu.target import architecture, multiprocessors

    table = configs.entries()
    wanted = chosen(names, [entry for entry in table if entry.architecture == architecture()])
    report = Report("tune", ("entry",), ("us",) * 3, path=path, table=Table({"entry": list(map(label, wanted))}))
    report.start()
    trials = [(entry, config) for entry in wanted for config in candidates(entry)]
    failed = compile_all(trials, architecture(), multiprocessors())
    for _, entries in itertools.groupby(wanted, key=lambda entry: entry.kind):
        weights: list[list[DeviceWeight]] = []
        for entry in entries:
            weights = weights or [weights_of(entry.kind, *size) for size in SIZES]
            best = tuned(entry, table, weights, failed, timed, report)
            table = [best if other is entry else other for other in table]
            configs.save(table, table_path or configs.TABLE)
    return report


def chosen(names: list[str], entries: list[Entry]) -> list[Entry]:
    """Those called "int8-16" or of a kind "int8"; all integers and floats of eight bits unless given."""
    halves = [entry for entry in entries if entry.kind != "float32"]
    known("entry", names, [*map(label, halves), *(entry.kind for entry in halves)])
    if not names:
        return [entry for entry in halves if entry.kind != "half"]
    return [entry for entry in halves if label(entry) in names or entry.kind in names]


def label(entry: Entry) -> str:
    return f"{entry.kind}-{entry.rows}"


def shown(config: Config) -> str:
    return (
        f"{config.block_m}x{config.block_n}x{config.block_k}, {config.warps} warps "
        f"{'deep' if config.deep else 'wide'}, {config.stages} stages, {config.resident} resident, {config.ahead} ahead"
        + ", narrow"
        * config.narrow
    )


def candidates(entry: Entry) -> list[Config]:
    """The entry's own config first, then others worth a try."""
    from kernels.gpu.weight_only_configs import Config

    own = entry.config
    bits = {"int4": 4, "int4-minimums": 4, "half": 16}.get(entry.kind, 8)
    deep = DEEP[bits] if entry.rows <= FEW_ROWS else DEEP[bits][4:5] if entry.rows <= 2 * FEW_ROWS else ()
    wide = WIDE[:1] if entry.rows <= FEW_ROWS else WIDE
    tiles = [(*tile, True) for tile in deep] + [(*tile, False) for tile in wide]
    first = [
        Config(entry.rows, n, k, warps, stages, is_deep, resident, own.ahead)
        for n, k, warps, stages, resident, is_deep in tiles
    ]
    if entry.rows <= FEW_ROWS:
        first += [replace(config, narrow=not config.narrow) for config in (own, first[0])]
    if entry.architecture == "sm80":
        return list(dict.fromkeys([own, *first]))
    others = [replace(config, ahead=ahead) for config in (own, first[1]) for ahead in (0, 4 * (own.ahead or 256))]
    return list(dict.fromkeys([own, *first, *others]))


def weights_of(kind: str, inputs: int, outputs: int, device: str = "cuda") -> list[DeviceWeight]:
    """As many as a graph should read."""
    first = random_weight(kind, inputs, outputs, device)
    return [first, *(random_weight(kind, inputs, outputs, device) for _ in range(COLD_BYTES // first.nbytes))]


def random_weight(kind: str, inputs: int, outputs: int, device: str) -> DeviceWeight:
    """One whose products are of about the size of their rows; on the CPU one of any numbers at all, made at once."""

    def integers(low: int, high: int, dtype: torch.dtype, *shape: int) -> Tensor:
        empty = torch.empty(shape, dtype=dtype, device=device)
        return empty if device == "cpu" else empty.random_(low, high)

    size = inputs**-0.5
    scales = minimums = None
    if kind.startswith("int4"):
        values = integers(-(1 << 31), (1 << 31) - 1, torch.int32, -(-inputs // 256) * 4, outputs, 8)
        scales = torch.full((-(-inputs // 256), outputs, 8), size / 4, dtype=torch.float16, device=device)
        minimums = -8 * scales if kind.endswith("minimums") else None
    elif kind in ("int8", "fp8"):
        values = integers(-127, 128, torch.int8, outputs, inputs)
        scales = torch.full((outputs,), size / 64, device=device)
        if kind == "fp8":
            values = values.view(FLOAT8) if device == "cpu" else values.float().to(FLOAT8)
    else:
        values = torch.empty(outputs, inputs, dtype=DTYPE, device=device)
        values = values if device == "cpu" else values.normal_(0, size)
    counters = torch.zeros(4096, dtype=torch.int32, device=device)
    return DeviceWeight(values, scales, minimums, counters, outputs, inputs, DTYPE)


def compile_all(
    trials: list[tuple[Entry, Config]], architecture: str, multiprocessors: int
) -> dict[tuple[str, Config], str]:
    """Fills Triton's cache, a process a core; what candidates do not compile, by their entry's label, and why."""
    context = multiprocessing.get_context("spawn")
    workers = min(len(os.sched_getaffinity(0)), len(trials))
    with ProcessPoolExecutor(workers, context, compile_for, (architecture,)) as pool:
        reasons = list(pool.map(_compile, trials, itertools.repeat(multiprocessors)))
    return {(label(entry), config): reason for (entry, config), reason in zip(trials, reasons, strict=True) if reason}


def _compile(trial: tuple[Entry, Config], multiprocessors: int) -> str:
    """In a worker. Returns why it cannot be, or nothing."""
    from kernels.gpu import weight_only_configs as configs
    from kernels.gpu import weight_only_linear as gpu

    gpu.multiprocessors = configs.multiprocessors = lambda: multiprocessors  # type: ignore[assignment]
    entry, config = trial
    with using([entry], config), launches(compile_only=True):
        for size in SIZES:
            weight = random_weight(entry.kind, *size, "cpu")
            x = torch.empty(entry.rows, weight.in_features, dtype=DTYPE)
            try:
                gpu.linear(x, weight, None, "none", False, None, DTYPE)
            except Exception as error:  # what the compiler cannot do: one candidate less
                return type(error).__name__
    return ""


def using(table: Iterable[Entry], config: Config, entry: Entry | None = None):  # type: ignore[no-untyped-def]
    """The table, with the config in the place of the entry's own; of the one entry there is, unless given."""
    from kernels.gpu import weight_only_configs as configs

    return configs.instead_of(
        [replace(other, config=config) if entry is None or other is entry else other for other in table]
    )


def tuned(
    entry: Entry, table: list[Entry], weights: Sequence[Sequence[DeviceWeight]],
    failed: dict[tuple[str, Config], str], timer: Timer, report: Report,
) -> Entry:  # fmt: skip
    """The entry with the fastest config that is right. weights: some of each size."""
    rows = [torch.randn(entry.rows, some[0].in_features).to(some[0].device, DTYPE) for some in weights]
    best, refused = entry, []
    expected: list[Tensor] = []
    times: dict[Config, list[float]] = {}
    for config in candidates(entry):
        note = failed.get((label(entry), config), "")
        if not note:
            try:
                with using(table, config, entry):
                    found, spills = results(rows, weights)
                    expected = expected or found
                    note = refusal(found, expected, spills, config != entry.config)
                    if not note:
                        times[config] = [timer(calls) for calls in calls_of(rows, weights)]
                        if mean(times[config]) * GAIN < mean(times[best.config]):
                            best = replace(entry, config=config)
            except Exception as error:  # too many resources: one candidate less
                note = type(error).__name__
        if note:
            refused.append(f"{shown(config)}: {note}")
        if entry.config not in times:  # nothing to hold the others against
            report.failures.append(f"{label(entry)}: its own config does not run: {note}")
            return entry
    report.add(row(entry, best, times, refused))
    return best


def row(entry: Entry, best: Entry, times: dict[Config, list[float]], refused: list[str]) -> dict[str, Cell]:
    """Before and after, each size's times among them, and what was tried in vain."""
    before, after = times[entry.config], times[best.config]
    cells: dict[str, Cell] = {"entry": label(entry), "before us": 1e6 * mean(before), "us": 1e6 * mean(after)}
    for (inputs, outputs), old, new in zip(SIZES, before, after, strict=True):
        cells[f"{inputs}x{outputs}"] = f"{1e6 * old:.1f} to {1e6 * new:.1f}"
    return cells | {"config": shown(best.config), "tried": len(times), "note": "; ".join(refused)}


def mean(times: Sequence[float]) -> float:
    """The geometric one."""
    return math.prod(times) ** (1 / len(times))


def results(rows: list[Tensor], weights: Sequence[Sequence[DeviceWeight]]) -> tuple[list[Tensor], int]:
    """Of each size's first layer, and the most bytes that a thread of its kernel spills."""
    with launches() as kernels:
        found = [weight_only_linear(x, some[0], backend="triton") for x, some in zip(rows, weights, strict=True)]
    return found, max((getattr(kernel, "n_spills", 0) for kernel in kernels), default=0)


def calls_of(rows: list[Tensor], weights: Sequence[Sequence[DeviceWeight]]) -> Iterator[list[Callable[[], object]]]:
    for x, some in zip(rows, weights, strict=True):
        yield [lambda x=x, weight=weight: weight_only_linear(x, weight, backend="triton") for weight in some]  # type: ignore[misc]


def timed(calls: Sequence[Callable[[], object]]) -> float:
    return in_graphs({"it": calls}, SECONDS, torch.device("cuda"))["it"].median
