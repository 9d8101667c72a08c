"""Tuning: what is tried, what is refused, and what the table is afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from kernels.gpu import attention_configs as configs
from kernels.gpu.attention_configs import Config, Entry
from tests.tools.profiling import profile
from tools.profile import tune
from tools.profile.report import Report

OWN = Config(128, 64, 4, 3, 2, descriptors=True)
ENTRY = Entry("forward", "sm90", 16, 64, (), OWN)


def test_an_entrys_own_config_is_tried_first_and_none_twice() -> None:
    tried = tune.candidates(ENTRY)
    assert tried[0] == OWN
    assert len(set(tried)) == len(tried) > 20
    assert all(config.descriptors and not config.one_pass for config in tried)
    assert any(config.one_pass for config in tune.candidates(Entry("keys", "sm90", 16, 64, (), OWN)))
    assert all(c.block_m == c.block_n for c in tune.candidates(Entry("bias_gradient", "sm90", 16, 64, (), OWN))[1:])


def test_entries_are_called_by_what_they_are_for() -> None:
    assert tune.label(ENTRY) == "forward-64"
    assert tune.label(Entry("keys", "sm80", 32, 128, ("bias", "softcap"), OWN)) == "keys-128-fp32-bias-softcap"
    labels = [(tune.label(entry), entry.architecture) for entry in configs.entries()]
    assert len(set(labels)) == len(labels)


def test_a_candidate_that_spills_or_errs_is_refused() -> None:
    right = [torch.randn(4, 4)]
    assert tune.refusal(right, right, 0, is_new=True) == ""
    assert tune.refusal(right, right, 500, is_new=True) == "spills 500 bytes"
    assert tune.refusal(right, right, 500, is_new=False) == ""
    assert tune.refusal([*right, torch.empty(0)], [*right, torch.empty(0)], 0, is_new=True) == ""
    assert tune.refusal([right[0] + 1], right, 0, is_new=True) == "wrong"
    assert tune.refusal([right[0] * torch.nan], right, 0, is_new=True) == "wrong"


class Clock:
    """Says what each candidate takes, in turn."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = iter(seconds)

    def sampler(self, function: Callable[[], object]) -> Callable[[], float]:
        seconds = next(self.seconds)
        return lambda: seconds


@pytest.mark.parametrize("kernel", ["forward", "keys", "queries", "bias_gradient"])
def test_the_fastest_candidate_that_is_right_becomes_the_entrys(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On real launches, interpreted at a small size, whose tiles no table changes."""
    monkeypatch.setattr(tune, "TOKENS", 20)
    monkeypatch.setattr(tune, "SEQLEN", 20)
    monkeypatch.setattr(tune, "WIDTH", 16)
    own, slower, faster = Config(64, 64, 4, 3, 2), Config(64, 64, 4, 2, 2), Config(64, 64, 8, 3, 2)
    monkeypatch.setattr(tune, "candidates", lambda entry: [own, slower, faster])
    entry = Entry(kernel, "sm90", 16, 16, ("bias",) if kernel == "queries" else (), own)
    report = Report("tune", ("entry", "config"))
    best = tune.tuned(entry, [entry], Clock(2.0, 3.0, 1.0), 0.0, report)  # type: ignore[arg-type]
    assert best == replace(entry, config=faster)
    assert [(row["ms"], row["note"]) for row in report.rows] == [(2e3, ""), (3e3, ""), (1e3, "")]


def test_an_entry_whose_own_config_does_not_run_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def call() -> tuple[torch.Tensor, ...]:
        raise MemoryError

    monkeypatch.setattr(tune, "representative", lambda entry: call)
    report = Report("tune", ("entry", "config"))
    assert tune.tuned(ENTRY, [ENTRY], Clock(), 0.0, report) == ENTRY  # type: ignore[arg-type]
    assert report.failures == ["forward-64: its own config does not run: MemoryError"]
    assert len(report.rows) == 1


def test_a_table_is_saved_as_it_is_read(tmp_path: Path) -> None:
    rows = configs.entries()
    configs.save(rows, tmp_path / "table.json")
    assert configs.entries(tmp_path / "table.json") == rows
    assert (tmp_path / "table.json").read_text() == configs.TABLE.read_text()


def test_another_table_holds_inside_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "architecture", lambda: "sm90")
    configs.choose.cache_clear()
    before = configs.choose("forward", 16, 64, ())
    other = Config(32, 32, 4, 1, 1)
    with configs.instead_of([Entry("forward", "sm90", 16, 64, (), other)]):
        assert configs.choose("forward", 16, 64, ()) == other
        assert configs.choose("forward", 16, 128, ()) == configs._small(2048)
    assert configs.choose("forward", 16, 64, ()) == before
    configs.choose.cache_clear()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("norm", "--tune"), "--tune is for attention"),
        (("attention", "--tune", "--against", "flash"), "--tune takes no --against"),
        (("attention", "--tune"), "--tune needs a GPU"),
    ],
    ids=str,
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="tunes there")
def test_what_it_does_not_take_is_one_sentence(arguments: tuple[str, ...], said: str) -> None:
    result = profile(*arguments)
    assert result.returncode == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1
