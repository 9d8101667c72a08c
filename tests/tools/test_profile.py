"""The profiling command: what it prints, what it refuses."""

from __future__ import annotations

import json

import pytest

from tests.tools.profiling import ROOT, profile
from tools.profile import load
from tools.profile.__main__ import command
from tools.profile.options import Options
from tools.profile.report import Report, Table, read
from tools.profile.timing import interleaved


def test_functions_are_timed_in_turns_and_summarised_by_median_and_spread():
    calls: list[str] = []
    timings = interleaved({"a": lambda: calls.append("a"), "b": lambda: sum(range(3000))}, seconds=0.01)
    assert set(timings) == {"a", "b"}
    assert timings["a"].chunks == timings["b"].chunks >= 9
    assert timings["a"].low <= timings["a"].median <= timings["a"].high < timings["b"].median
    assert len(calls) > timings["a"].chunks


def test_a_table_grows_line_by_line_and_names_its_columns_when_they_change():
    table = Table({"name": ["longest"]})
    rows = [{"name": "x", "us": 1.5}, {"name": "longest", "us": 250.0}, {"name": "y", "us": None}, {"ratio": 3.25}]
    lines = [line for row in rows for line in table.lines(row)]
    assert lines == ["name      us", "x        1.5", "longest  250", "y          -", "", "ratio", " 3.25"]


def test_a_report_ends_with_one_line_of_json(tmp_path, capsys):
    report = Report("sampling", ("what",), ("us", "20%", "80%"), hidden=("bytes",), path=tmp_path / "out.json")
    report.start()
    report.failures.append("it broke")
    report.add({"what": "a", "us": 1.5, "20%": 1.0, "80%": 2.0, "bytes": 4})
    report.finish()
    lines = capsys.readouterr().out.splitlines()
    assert "bytes" not in "".join(lines[:-1])
    last = json.loads(lines[-1])
    assert last["rows"] == [{"what": "a", "us": 1.5, "20%": 1.0, "80%": 2.0, "bytes": 4}]
    assert last["failures"] == ["it broke"]
    assert read(tmp_path / "out.json") == last


def test_a_run_that_is_cut_short_leaves_the_rows_it_had(tmp_path):
    report = Report("sampling", ("what",), ("us", "20%", "80%"), path=tmp_path / "out.json")
    report.start()
    assert read(tmp_path / "out.json")["rows"] == []
    report.add({"what": "a", "us": 1.5, "20%": 1.0, "80%": 2.0})
    assert len(read(tmp_path / "out.json")["rows"]) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]


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
        ("sampling", "--mode", "forward"),
        ("attention", "--mode", "sideways"),
        ("attention", "--dtype", "fp8"),
        ("attention", "--against", "eager,nobody"),
        ("attention", "--against", "eager,none"),
        ("attention", "--shape", "4x0x2x64"),
        ("attention", "--shape", "4x64"),
        ("attention", "--seconds", "soon"),
        ("attention", "--seconds", "-1"),
        ("attention", "--threads", "5000"),
        ("attention", "--json", "/no/such/folder/file.json"),
        ("attention", "--plot", "/no/such/folder/file.png"),
        ("attention", "--json", "/dev/null"),
        ("engine", "--shape", "gpt3"),
        ("engine", "--precision", "fp64"),
        ("engine", "--prompt", "0"),
        ("engine", "--beams", "1,2"),
        ("sampling", "--beams", "2"),
        ("compare", "/no/such/file.json"),
        ("compare", "pyproject.toml", "pyproject.toml"),
        ("compare", "--seconds", "/no/such/file.json"),
        ("plot", "pyproject.toml", "out.png"),
    ],
    ids=" ".join,
)
def test_what_it_does_not_know_is_refused_in_one_line(arguments, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert command(list(arguments)) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1
    assert any(name in output.err for argument in arguments[1:] or arguments for name in argument.split(","))


def test_the_command_ends_with_the_code_of_its_error():
    result = profile("resampling")
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1


def test_loading_is_measured_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = load.Shape("gpt2", {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 200, "n_positions": 64})
    monkeypatch.setattr(load, "SHAPES", {"tiny": tiny})
    monkeypatch.setattr(load, "ROUNDS", 1)
    report = load.run(Options(against=["transformers"], precisions=["fp32", "int8"], seconds=0.1))
    assert not report.failures  # the same first token
    assert [row["who"] for row in report.rows] == ["tandem", "tandem int8", "transformers"]
    assert all(0 < float(row["first token s"] or 0) < 60 for row in report.rows)


def test_a_peer_that_is_not_there_is_one_line() -> None:
    result = profile("load", "--shape", "gpt2", "--against", "ctranslate2", "--peer-python", "/bin/false")
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("tools.profile: ctranslate2 could not be measured")
