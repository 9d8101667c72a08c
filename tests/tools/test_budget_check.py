"""What breaks a kernel's budget, and how budgets are written down."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tools.profile import budget_check
from tools.profile.__main__ import command
from tools.profile.budget import occupancy

KERNEL = {
    "case": "norm/a", "kernel": "k", "architecture": "sm90", "warps": 4, "registers": 100, "spills": 0, "shared": 1024,
    "occupancy": 4, "HGMMA": 8, "HMMA": 0, "UTMALDG": 2, "serialized": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(budget_check, "CASES", {"norm/a": None, "rotary/b": None})
    monkeypatch.setattr(budget_check, "AMD_CASES", ())
    monkeypatch.setattr(budget_check, "BUDGETS", tmp_path / "budgets.json")


def compiling(monkeypatch: pytest.MonkeyPatch, *kernels: dict[str, object]) -> None:
    monkeypatch.setattr(budget_check, "compile_all", lambda names: (dict(kernel) for kernel in kernels))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"registers": 108}, None),
        ({"registers": 109}, "109 registers, 100 in the budget"),
        ({"spills": 4}, "spills 4 bytes, 0 in the budget"),
        ({"occupancy": 3}, "3 blocks a multiprocessor, 4 in the budget"),
        ({"occupancy": 5}, None),
        ({"serialized": True}, "its wgmma became serialized"),
        ({"HGMMA": 0}, "its wgmma is gone"),
        ({"HGMMA": 4, "HMMA": 2, "UTMALDG": 0}, None),
    ],
)
def test_a_breach_says_what_is_over(change: dict[str, object], words: str | None) -> None:
    assert budget_check.breach(KERNEL | change, KERNEL) == ([] if words is None else [words])


def test_a_spill_needs_a_reason() -> None:
    budget = KERNEL | {"spills": 8}
    assert "no reason" in budget_check.breach(KERNEL | {"spills": 8}, budget)[0]
    assert budget_check.breach(KERNEL | {"spills": 8}, budget | {"reason": "float32 in three passes"}) == []


def test_a_kernel_that_does_not_fit_a_multiprocessor_is_a_breach_whatever_was_recorded() -> None:
    assert budget_check.breach(KERNEL | {"occupancy": 0}, KERNEL | {"occupancy": 0})


def test_updating_records_what_was_found_and_keeps_reasons_and_other_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    other, spilling = KERNEL | {"case": "rotary/b"}, KERNEL | {"spills": 8}
    compiling(monkeypatch, KERNEL, KERNEL, other)
    assert budget_check.run(None, update=False, path=None).failures
    assert not budget_check.run(None, update=True, path=None).failures
    assert list(budget_check.load()["sm90"]) == ["norm/a: k", "norm/a: k 2", "rotary/b: k"]
    assert not budget_check.run(None, update=False, path=None).failures

    compiling(monkeypatch, spilling)
    (failure,) = budget_check.run("norm", update=True, path=None).failures
    assert "no reason" in failure
    recorded = json.loads(budget_check.BUDGETS.read_text())
    assert list(recorded["sm90"]) == ["norm/a: k", "rotary/b: k"]
    recorded["sm90"]["norm/a: k"]["reason"] = "it is float32"
    budget_check.save(recorded)
    assert not budget_check.run("norm", update=True, path=None).failures
    assert budget_check.load()["sm90"]["norm/a: k"]["reason"] == "it is float32"


def test_a_budget_without_its_kernel_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling(monkeypatch, KERNEL, KERNEL)
    budget_check.run(None, update=True, path=None)
    compiling(monkeypatch, KERNEL)
    assert "was not compiled" in budget_check.run(None, update=False, path=None).failures[0]
    assert not budget_check.run("rotary", update=False, path=None).failures


def test_a_kernel_that_does_not_compile_is_a_failure_and_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling(monkeypatch, KERNEL, {"case": "rotary/b", "architecture": "gfx942", "error": "it broke"})
    assert "it broke" in budget_check.run(None, update=True, path=None).failures[0]
    assert not budget_check.BUDGETS.exists()


def test_a_worker_that_dies_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    kernels = list(budget_check.compile_all(["norm/a"]))
    assert [kernel["architecture"] for kernel in kernels] == ["sm80", "sm90"]
    assert all("code 1" in kernel["error"] for kernel in kernels)


@pytest.mark.parametrize(
    "arguments",
    [
        ("load", "--budget"),
        ("--budget", "--shape", "x"),
        ("--budget", "--dtype", "bf16"),
        ("--update",),
        ("--budget", "--json", "/no/such/folder/file.json"),
    ],
    ids=" ".join,
)
def test_options_that_a_budget_does_not_have_are_refused(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(list(arguments)) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1


def test_occupancy_is_what_registers_shared_memory_and_warps_leave() -> None:
    assert occupancy("sm90", 168, 0, 4) == 3
    assert occupancy("sm90", 32, 100 << 10, 4) == 2
    assert occupancy("sm90", 32, 0, 8) == 8
    assert occupancy("sm80", 32, 200 << 10, 8) == 0
