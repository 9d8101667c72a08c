"""Tuning of the weight-only layers: what is tried, what is refused, and what the table is afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from kernels.backend import TRITON_DEVICE
from kernels.gpu import weight_only_configs as configs
from kernels.gpu.weight_only_configs import Config, Entry
from tests.tools.profiling import profile
from tools.profile import tune_linear as tune
from tools.profile.report import Report

OWN = Config(8, 16, 64, 2, 2, deep=True, resident=2, ahead=1024)
WIDER, STEPS = replace(OWN, deep=False), replace(OWN, block_k=128)
ENTRY = Entry("sm90", "int8", 8, OWN)
DEVICE = TRITON_DEVICE or "cpu"


@pytest.mark.parametrize("entry", [entry for entry in configs.entries() if entry.kind != "float32"], ids=tune.label)
def test_an_entrys_own_config_is_tried_first_and_none_twice(entry: Entry) -> None:
    tried = tune.candidates(entry)
    assert tried[0] == entry.config
    assert len(set(tried)) == len(tried) >= 6
    assert all(config.deep or config.block_n * config.warps >= 64 for config in tried)
    early = {config.ahead > 0 for config in tried}
    assert early == ({False} if entry.architecture == "sm80" else {False, True})


def test_entries_are_chosen_by_name_or_kind() -> None:
    table = [entry for entry in configs.entries() if entry.architecture == "sm90"]
    names = [tune.label(entry) for entry in tune.chosen(["int8-16", "half"], table)]
    assert names == ["int8-16", "half-8", "half-16", "half-32", "half-64"]
    assert {entry.kind for entry in tune.chosen([], table)} == {"int8", "int4", "int4-minimums", "fp8"}
    with pytest.raises(ValueError, match="unknown entry"):
        tune.chosen(["int3"], table)


class Clock:
    """Says what a call takes with each config, at each size."""

    def __init__(self, seconds: dict[Config, tuple[float, float]]) -> None:
        self.seconds = seconds
        self.size = 0

    def __call__(self, calls: Sequence[Callable[[], object]]) -> float:
        for call in calls:
            call()
        config = configs.choose("int8", 8, False)
        self.size += 1
        return self.seconds[config][(self.size - 1) % 2]


def outcome(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[Config, tuple[float, float]], failed: dict[Config, str]
) -> tuple[Entry, Report]:
    """What tuning comes to on real launches of a small layer, interpreted where there is no GPU."""
    monkeypatch.setattr(tune, "candidates", lambda entry: [OWN, WIDER, STEPS])
    monkeypatch.setattr(configs, "architecture", lambda: "sm90")
    weights = [[tune.random_weight("int8", inputs, 40, DEVICE)] for inputs in (128, 256)]
    for (weight,) in weights:
        weight.values.random_(-127, 128)
    report = Report("tune", ("entry",))
    reasons = {("int8-8", config): reason for config, reason in failed.items()}
    return tune.tuned(ENTRY, [ENTRY], weights, reasons, Clock(seconds), report), report


def test_the_least_geometric_mean_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    best, report = outcome(monkeypatch, {OWN: (4e-6, 4e-6), WIDER: (9e-6, 1e-6), STEPS: (5e-6, 3e-6)}, {})
    assert best == replace(ENTRY, config=WIDER)
    (row,) = report.rows
    assert (row["entry"], row["tried"], row["note"]) == ("int8-8", 3, "")
    assert (row["before us"], row["us"]) == (pytest.approx(4), pytest.approx(3))
    assert row["4096x4096"] == "4.0 to 9.0"
    assert not report.failures


def test_what_is_no_faster_or_failed_to_compile_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    best, report = outcome(monkeypatch, {OWN: (4e-6, 4e-6), STEPS: (4e-6, 3.99e-6)}, {WIDER: "OutOfResources"})
    assert best == ENTRY
    assert report.rows[0]["note"] == f"{tune.shown(WIDER)}: OutOfResources"


def test_a_wrong_candidate_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = tune.results
    errors = iter((0, 9, 0))

    def results(*arguments: Any) -> tuple[list[torch.Tensor], int]:
        tensors, spills = right(*arguments)
        error = next(errors)
        return [tensor + error for tensor in tensors], spills

    monkeypatch.setattr(tune, "results", results)
    best, report = outcome(monkeypatch, {OWN: (4e-6, 4e-6), STEPS: (2e-6, 2e-6)}, {})
    assert best.config == STEPS
    assert report.rows[0]["note"] == f"{tune.shown(WIDER)}: wrong"


def test_an_entry_whose_own_config_does_not_run_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    best, report = outcome(monkeypatch, {}, {OWN: "PTXASError"})
    assert best == ENTRY
    assert report.failures == ["int8-8: its own config does not run: PTXASError"]
    assert not report.rows


def test_candidates_are_compiled_by_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    odd = replace(OWN, block_k=48)  # no power of two
    failed = tune.compile_all([(ENTRY, OWN), (ENTRY, odd)], "sm90", 132)
    assert list(failed) == [("int8-8", odd)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("linear", "--tune"), "--tune needs a GPU"),
        (("linear", "--tune", "--seconds", "1"), "--tune of linear takes no --seconds"),
        (("linear", "--tune", "--table", "/nowhere/table.json"), "there is no such folder"),
        (("linear", "--table", "table.json"), "--table belongs to --tune"),
    ],
    ids=str,
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="tunes there")
def test_what_it_does_not_take_is_one_sentence(arguments: tuple[str, ...], said: str) -> None:
    result = profile(*arguments)
    assert result.returncode == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1
