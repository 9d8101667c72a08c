"""Two runs compared, and rows drawn."""

from __future__ import annotations

import sys

import pytest

from tests.tools.profiling import options
from tools.profile import (
    attention,
    compare,
    plot,
)
from tools.profile.report import Report

pytestmark = pytest.mark.usefixtures("cpu_of_known_ceilings")


def test_two_runs_are_compared_row_by_row(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    times = [[(2.0, 1.9, 2.1), (5.0, 4.0, 6.0), (3.0, 2.9, 3.1)], [(1.0, 0.9, 1.1), (5.5, 4.5, 6.5), (4.0, 3.9, 4.1)]]
    for path, run in zip(paths, times, strict=True):
        report = Report("attention", ("who",), path=path)
        report.start()
        for who, (median, low, high) in zip(("faster", "same", "slower"), run, strict=True):
            report.add({"who": who, "ms": median, "20%": low, "80%": high})
        report.add({"who": f"only {path.stem}", "ms": 1.0, "20%": 1.0, "80%": 1.0})
        report.add({"who": "untimed", "ms": None, "20%": None, "80%": None})
    capsys.readouterr()
    assert compare.main([str(path) for path in paths]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[4:7]] == [
        ["faster", "2", "1", "0.5", "faster"],
        ["same", "5", "5.5", "1.1"],
        ["slower", "3", "4", "1.33", "slower"],
    ]
    assert lines[-1] == "2 of 3 rows changed; 3 are in one file only or have no time in one"


def test_runs_of_different_operations_are_not_compared(tmp_path) -> None:
    for name in ("attention", "norm"):
        Report(name, path=tmp_path / name).start()
    with pytest.raises(ValueError, match="measured"):
        compare.main([str(tmp_path / "attention"), str(tmp_path / "norm")])


def test_rows_are_drawn(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "a.json"
    attention.run(options(shapes=["1x24x2x16"], json=path))
    assert plot.main([str(path), str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_matplotlib_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="need matplotlib"):
        plot.library()
