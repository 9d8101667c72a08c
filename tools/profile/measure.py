"""Measures problems: every contender is held against the reference, and those that agree are timed in turns."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from tools.profile import ceilings, launches
from tools.profile.ceilings import NAMES, Ceilings
from tools.profile.contenders import OURS, Contender, Outputs, Problem
from tools.profile.machine import Cell, default_device
from tools.profile.options import Options
from tools.profile.report import Report, Table
from tools.profile.timing import Timing, interleaved

OPTIONS = ("shape", "mode", "dtype", "plot")  # what an operation that is measured here takes
KEYS = ("shape", "dtype", "mode", "who")
HIDDEN = ("flops", "bytes")
# Of the reference's scale; beyond it, an error may still be up to twice that of the formula in the same dtype.
# int8: of products whose operands are both rounded to it.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.int8: 3e-2}
NOTE_LENGTH = 70

Run = Callable[[], object]


class Shape(Protocol):
    @property
    def label(self) -> str: ...


ShapeT = TypeVar("ShapeT", bound=Shape)


def measure(
    operation: str,
    shapes: Sequence[ShapeT],
    problem: Callable[[ShapeT, torch.device, torch.dtype], Problem],
    options: Options,
    rate: str,
    modes: Sequence[str] = ("forward", "backward"),
) -> Report:
    """Rows for all shapes, dtypes, modes and contenders.

    rate: what a row's speed counts, "FLOP" or "B". modes: those measured unless the options say.
    """
    device = default_device()
    dtypes = options.dtypes or [torch.bfloat16 if device.type == "cuda" else torch.float32]
    modes = options.modes or modes
    limits = ceilings.measure(device, dtypes)
    times = {name: ["0.00123"] for name in ("ms", "20%", "80%")}
    table = Table({"shape": [shape.label for shape in shapes], "mode": modes, "who": ["tandem native"], **times})
    report = Report(operation, KEYS, hidden=HIDDEN, path=options.json, ceilings=limits.cells(), table=table)
    report.start()
    for shape in shapes:
        for dtype in dtypes:
            torch.compiler.reset()  # its graphs are for one shape; too many would make it give up
            torch.manual_seed(0)
            given = problem(shape, device, dtype)
            for mode in modes:
                _Group(shape.label, given, mode, limits, rate).measure(report, options.seconds)
            del given  # memory for the next one
    return report


class _Group:
    """The contenders of one problem in one mode."""

    def __init__(self, label: str, problem: Problem, mode: str, limits: Ceilings, rate: str) -> None:
        self.label, self.problem, self.mode, self.limits, self.rate = label, problem, mode, limits, rate

    def measure(self, report: Report, seconds: float) -> None:
        self.upstream, expected = expected_results(self.problem, self.mode)
        rows, runs = {}, {}
        for name, contender in self.problem.contenders.items():
            if self.mode not in contender.modes:
                continue
            rows[name] = row = self._row(name)
            if run := self._checked(row, contender, expected):
                runs[name] = run
        timings = interleaved(runs, seconds, self.limits.device) if runs else {}
        ours = next((timing for name, timing in timings.items() if name.startswith(OURS)), None)
        for name, row in rows.items():
            if name in timings:
                self._fill(row, timings[name], ours)
            elif name.startswith(OURS):
                report.failures.append(", ".join(f"{row[key]}" for key in KEYS) + f": {row['note']}")
            report.add(row)

    def _row(self, name: str) -> dict[str, Cell]:
        """A row before it is measured, with all columns in their order."""
        work = self.problem.work(self.mode)
        prefix, _ = self.limits.unit
        measured = ("ms", "20%", "80%", f"{prefix}{self.rate}/s", "% of limit", "limit", "x ours", "error")
        on_the_gpu = launches.COLUMNS if self.limits.device.type == "cuda" else ()
        return {
            "shape": self.label,
            "dtype": NAMES[self.problem.dtype],
            "mode": self.mode,
            "who": name,
            **dict.fromkeys((*measured, *on_the_gpu)),
            "limit": self.limits.least_seconds(work, self.problem.dtype)[1],
            "note": "",
            "flops": work.flops,
            "bytes": work.bytes,
        }

    def _checked(self, row: dict[str, Cell], contender: Contender, expected: list[Tensor]) -> Run | None:
        """What to time, or None, with the reason in the row: it does not run here or does not compute the same."""
        try:
            with _quiet(), self._described(row):
                found = results(contender, self.problem, self.mode, self.upstream)
            error = worst_error(found, expected)
            del found
            row["error"] = error
            if not error <= TOLERANCE[self.problem.dtype] and not error <= 2 * self._formula_error(expected):
                row["note"] = "wrong"
                return None
            with _quiet():
                run = timed(contender, self.problem, self.mode, self.upstream)
                run()
            return run
        except Exception as error:  # whatever a peer may raise: it has a row that says so, and the others go on
            row["note"] = reason(error)
            return None

    def _formula_error(self, expected: list[Tensor]) -> float:
        formula = Contender(self.problem.reference)
        return worst_error(results(formula, self.problem, self.mode, self.upstream), expected)

    def _described(self, row: dict[str, Cell]) -> contextlib.AbstractContextManager[None]:
        ours_on_gpu = str(row["who"]).startswith(f"{OURS} triton") and self.limits.device.type == "cuda"
        return launches.described(row) if ours_on_gpu else contextlib.nullcontext()

    def _fill(self, row: dict[str, Cell], timing: Timing, ours: Timing | None) -> None:
        prefix, unit = self.limits.unit
        work = self.problem.work(self.mode)
        done = work.flops if self.rate == "FLOP" else work.bytes
        least, _ = self.limits.least_seconds(work, self.problem.dtype)
        row["ms"], row["20%"], row["80%"] = (t * 1e3 for t in (timing.median, timing.low, timing.high))
        row[f"{prefix}{self.rate}/s"] = done / timing.median / unit
        row["% of limit"] = 100 * least / timing.median
        row["x ours"] = timing.median / ours.median if ours else None


def expected_results(problem: Problem, mode: str) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Upstream gradients, which the dtype measured can hold, and what the reference gives in a higher precision."""
    precision = torch.float64 if problem.dtype is torch.float32 else torch.float32
    inputs = tuple(
        x.detach().to(precision).requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in problem.inputs
    )
    with torch.set_grad_enabled(mode != "forward"):
        outputs = as_tuple(problem.reference(*inputs))
    upstream = tuple(
        torch.randn_like(x).to(problem.dtype).to(precision) if x.dim() else x.new_ones(()) for x in outputs
    )
    expected = [] if mode == "backward" else list(outputs)
    if mode != "forward":
        expected += torch.autograd.grad(outputs, _differentiable(inputs), upstream)
    return upstream, [x.detach() for x in expected]


def results(contender: Contender, problem: Problem, mode: str, upstream: tuple[Tensor, ...]) -> list[Tensor]:
    """What the contender gives for what ``expected_results`` returns."""
    inputs = _inputs(problem, mode)
    outputs = as_tuple(contender.function(*contender.prepare(*inputs)))
    found = [] if mode == "backward" else list(outputs)
    if mode != "forward":
        found += torch.autograd.grad(outputs, _differentiable(inputs), _alike(upstream, outputs))
    return found


def timed(contender: Contender, problem: Problem, mode: str, upstream: tuple[Tensor, ...]) -> Run:
    """The call to time. A backward pass alone runs again and again on one graph."""
    function, arguments = contender.function, contender.prepare(*_inputs(problem, mode))
    if mode == "forward":
        return lambda: function(*arguments)
    wanted = _differentiable(arguments)
    if mode == "backward":
        outputs = as_tuple(function(*arguments))
        gradients = _alike(upstream, outputs)
        return lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True)
    gradients = _alike(upstream, as_tuple(function(*arguments)))

    def both() -> object:
        outputs = as_tuple(function(*arguments))
        return outputs, torch.autograd.grad(outputs, wanted, gradients)

    return both


def worst_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The worst of all tensors: largest difference by largest value, or norm of the difference by norm, if worse.

    The norm sees what the largest value hides, rows that are all small and all wrong.
    """
    errors = []
    for mine, true in zip(found, expected, strict=True):
        difference = mine.detach().to(true.dtype) - true
        errors.append(difference.abs().max() / true.abs().max().clamp(min=1e-30))
        errors.append(difference.norm() / true.norm().clamp(min=1e-30))
    return float(torch.stack(errors).max())  # NaN if any is


def reason(error: Exception) -> str:
    """The first sentence of an exception, shortened."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith(" raised:")]
    line = lines[0].strip().split(". ")[0] if lines else type(error).__name__
    return line if len(line) <= NOTE_LENGTH else line[: NOTE_LENGTH - 3] + "..."


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _inputs(problem: Problem, mode: str) -> tuple[Tensor, ...]:
    """A forward pass alone is one that no gradient will be asked of."""
    return tuple(x.detach() for x in problem.inputs) if mode == "forward" else problem.inputs


def _alike(upstream: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(gradient.to(output.dtype) for gradient, output in zip(upstream, outputs, strict=True))


def _differentiable(values: tuple[Any, ...]) -> list[Tensor]:
    return [x for x in values if isinstance(x, Tensor) and x.requires_grad]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings in which torch explains what a back end of its does not do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
