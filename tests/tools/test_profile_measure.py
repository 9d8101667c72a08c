"""How a problem is measured: ceilings, errors, failures that stop nothing else, the clock of a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.tools.profiling import CPU, LIMITS, options
from tools.profile import (
    ceilings,
    launches,
    measure,
    timing,
)
from tools.profile.attention_shapes import Shape
from tools.profile.contenders import Contender, Problem, Work
from tools.profile.report import Report

pytestmark = pytest.mark.usefixtures("cpu_of_known_ceilings")


def test_the_limit_is_what_takes_longer() -> None:
    assert LIMITS.least_seconds(Work(1e11, 1e9), torch.float32) == (1.0, "product")
    assert LIMITS.least_seconds(Work(1e9, 1e10), torch.bfloat16) == (1.0, "copy")
    assert LIMITS.least_seconds(Work(1e9, 1e10, reads=True), torch.float32) == (0.5, "read")
    assert LIMITS.cells() == {"fp32 product GFLOP/s": 100.0, "copy GB/s": 10.0, "read GB/s": 20.0}


def test_ceilings_are_measured() -> None:
    assert 1e6 < ceilings.product(CPU, torch.float32, 64) < 1e14
    assert 1e7 < ceilings.copy(CPU, 1 << 20) < 1e13
    assert 1e7 < ceilings.read(1 << 20) < 1e13


def doubling(**contenders: object) -> Problem:
    """A problem whose right answer is twice its input."""
    made = {name: Contender(function) for name, function in contenders.items()}  # type: ignore[arg-type]
    x = torch.linspace(-1, 1, 64).requires_grad_()
    named = {name.replace("_", " "): contender for name, contender in made.items()}
    return Problem(torch.float32, (x,), lambda x: 2 * x, named, Work(1, 2), Work(1, 2))


def rows_of(problem: Problem, mode: str = "forward") -> Report:
    label = Shape(1, 1, 1, 1, 1)
    return measure.measure("doubling", [label], lambda *_: problem, options(modes=[mode]), rate="B")


def refuse(x: Tensor) -> Tensor:
    raise NotImplementedError("not for this shape. Ask again later")


def test_a_peer_that_raises_has_a_row_with_its_reason_and_stops_nothing() -> None:
    report = rows_of(doubling(refusing=refuse, tandem_torch=lambda x: x + x))
    assert [(row["who"], row["ms"] is None, row["note"]) for row in report.rows] == [
        ("refusing", True, "not for this shape"),
        ("tandem torch", False, ""),
    ]
    assert not report.failures


@pytest.mark.parametrize(
    "wrong", [lambda x: 2.01 * x, lambda x: x * math.nan, lambda x: torch.where(x > 0.99, 3 * x, 2 * x)]
)
def test_a_wrong_answer_has_its_error_and_no_time(wrong: object) -> None:
    report = rows_of(doubling(peer=wrong))
    (row,) = report.rows
    assert row["ms"] is None and row["note"] == "wrong" and not float(row["error"] or 0) <= 1e-3
    assert not report.failures


def test_an_error_may_be_twice_that_of_the_formula_in_the_same_dtype() -> None:
    def rough(x: Tensor) -> Tensor:
        return 2 * x * (1 if x.dtype is torch.float64 else 1.01)

    given = dataclasses.replace(doubling(same=rough, worse=lambda x: 2.05 * x), reference=rough)
    assert [row["note"] for row in rows_of(given).rows] == ["", "wrong"]


@pytest.mark.parametrize("ours", [lambda x: 3 * x, refuse])
def test_ours_being_wrong_or_raising_is_a_failure(ours: object) -> None:
    report = rows_of(doubling(tandem_native=ours, peer=lambda x: x + x))
    assert len(report.failures) == 1
    assert "tandem native" in report.failures[0]
    assert report.rows[1]["ms"] is not None and report.rows[1]["x ours"] is None


def test_a_wrong_gradient_is_seen() -> None:
    report = rows_of(doubling(tandem_native=lambda x: x + x, peer=lambda x: x + x.detach()), mode="backward")
    assert [row["note"] for row in report.rows] == ["", "wrong"]


class FakeEvent:
    """A GPU's event, on the host's clock."""

    def __init__(self, enable_timing: bool) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: FakeEvent) -> float:
        return (other.time - self.time) * 1e3


@pytest.fixture
def gpu_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(timing.torch, "empty", lambda size, dtype, device: empty(1 << 20, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.usefixtures("gpu_of_the_host")
def test_a_gpus_time_is_between_its_events_after_a_flush() -> None:
    samples = timing.interleaved(
        {"fast": lambda: None, "slow": lambda: time.sleep(0.002)}, seconds=0.01, device=torch.device("cuda")
    )
    assert samples["fast"].median < 0.001 < 0.002 <= samples["slow"].median < 0.02
    assert samples["fast"].chunks == samples["slow"].chunks >= 9


@pytest.mark.usefixtures("gpu_of_the_host")
def test_a_call_that_is_slow_to_queue_gets_flushes_to_hide_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = timing.CudaClock()
    asked: list[int] = []
    monkeypatch.setattr(clock, "_seconds", lambda flushes, function: asked.append(flushes) or 1e-3)
    for function in (lambda: None, lambda: time.sleep(0.01)):
        clock.sampler(function)()
    assert asked[0] == asked[2] == 0  # of the flush itself
    assert asked[1] == 1
    assert 15 <= asked[3] < 100


def test_what_kernels_take_is_the_worst_of_those_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    target = pytest.importorskip("kernels.gpu.target")
    small, large = (
        SimpleNamespace(n_regs=r, n_spills=s, metadata=SimpleNamespace(shared=1024, num_warps=4))
        for r, s in ((40, 8), (168, 0))
    )
    monkeypatch.setattr(launches, "launches", lambda: contextlib.nullcontext([small, large]))
    monkeypatch.setattr(target, "architecture", lambda: "sm90")
    row: dict[str, object] = {}
    with launches.described(row):  # type: ignore[arg-type]
        pass
    assert row == {"registers": 168, "spills": 8, "occupancy": 3}
