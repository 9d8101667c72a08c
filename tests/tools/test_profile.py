"""The profiling command: what it prints, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.profile import load
from tools.profile.__main__ import Options
from tools.profile.report import Report, table
from tools.profile.timing import interleaved

ROOT = Path(__file__).resolve().parents[2]


def profile(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.profile", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_functions_are_timed_in_turns_and_summarised_by_median_and_spread():
    calls: list[str] = []
    timings = interleaved({"a": lambda: calls.append("a"), "b": lambda: sum(range(3000))}, seconds=0.01)
    assert set(timings) == {"a", "b"}
    assert timings["a"].chunks == timings["b"].chunks >= 9
    assert timings["a"].low <= timings["a"].median <= timings["a"].high < timings["b"].median
    assert len(calls) > timings["a"].chunks


def test_a_table_has_every_column_of_every_row():
    text = table([{"name": "x", "us": 1.5}, {"name": "longer", "us": 250.0, "ratio": 3.25}])
    assert text.splitlines() == ["name     us  ratio", "x       1.5      -", "longer  250   3.25"]


def test_a_report_ends_with_one_line_of_json(tmp_path):
    report = Report("sampling", [{"us": 1.5}], failures=["it broke"])
    last = json.loads(report.text().splitlines()[-1])
    assert last["rows"] == [{"us": 1.5}]
    assert last["failures"] == ["it broke"]
    report.save(tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == last


def test_sampling_is_measured_and_written_to_a_file(tmp_path):
    path = tmp_path / "out.json"
    result = profile("sampling", "--shape", "32k", "--batch", "2", "--seconds", "0.01", "--json", str(path))
    assert result.returncode == 0, result.stderr
    assert "threads" in result.stdout.splitlines()[0]
    rows = json.loads(path.read_text())["rows"]
    assert [row["what"] for row in rows] == ["top_k, top_p", "greedy"]
    assert rows[0]["us/row"] > 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("resampling",),
        ("sampling", "--against", "nobody"),
        ("sampling", "--shape", "7k"),
        ("sampling", "--batch", "x"),
    ],
    ids=" ".join,
)
def test_a_name_it_does_not_know_is_refused_in_one_line(arguments):
    result = profile(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert arguments[-1] in result.stderr


def test_loading_is_measured_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = load.Shape("gpt2", {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 200, "n_positions": 64})
    monkeypatch.setattr(load, "SHAPES", {"tiny": tiny})
    monkeypatch.setattr(load, "ROUNDS", 1)
    report = load.run(Options(against=["transformers"], shapes=[], batches=[], seconds=0.1))
    assert not report.failures  # the same first token
    assert [row["who"] for row in report.rows] == ["tandem", "transformers"]
    assert all(0 < float(row["first token s"] or 0) < 60 for row in report.rows)


def test_a_peer_that_is_not_there_is_one_line() -> None:
    result = profile("load", "--shape", "gpt2", "--against", "ctranslate2", "--peer-python", "/bin/false")
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("tools.profile: ctranslate2 could not be measured")
