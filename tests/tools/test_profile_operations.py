"""What `python -m tools.profile OP` measures: tiny shapes, correct rows, failures that stop nothing else."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor

from tools.profile import attention, attention_shapes, ceilings, compare, measure, plot
from tools.profile.attention_shapes import SHAPES, Shape, shapes
from tools.profile.ceilings import Ceilings
from tools.profile.contenders import Contender, Problem, Work
from tools.profile.options import Options
from tools.profile.report import Report, read

CPU = torch.device("cpu")
LIMITS = Ceilings(CPU, {torch.float32: 1e11}, 1e10, 2e10)


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring this machine's takes longer than these tests."""
    monkeypatch.setattr(ceilings, "measure", lambda device, dtypes: LIMITS)


def options(**changes: object) -> Options:
    return Options(**({"against": ["eager"], "seconds": 0.001} | changes))  # type: ignore[arg-type]


def test_attention_is_measured_forward_and_backward_against_its_peers(tmp_path) -> None:
    names = ["1x24x2x16", "1x24x2x16-causal", "1x24x2x16-causal-t5", "2x7:24x2x16", "1x24x2x16-t5"]
    path = tmp_path / "a.json"
    report = attention.run(options(shapes=names, against=["eager", "math", "flash", "cudnn"], json=path))
    assert not report.failures
    assert [row["shape"] for row in report.rows[::12]] == names
    assert {row["mode"] for row in report.rows} == {"forward", "backward"}
    timed = [row for row in report.rows if row["ms"] is not None]
    assert {row["who"] for row in timed} == {"tandem native", "tandem torch", "eager", "math", "flash"}
    for row in timed:
        assert 0 < row["20%"] <= row["ms"] <= row["80%"]  # type: ignore[operator]
        assert 0 <= row["error"] < 1e-5  # type: ignore[operator]
        assert row["GFLOP/s"] == pytest.approx(row["flops"] / row["ms"] / 1e6)  # type: ignore[operator]
    assert all(row["x ours"] == 1 for row in timed if row["who"] == "tandem native")
    assert all(row["note"] for row in report.rows if row["who"] == "cudnn")
    assert read(path)["rows"] == report.rows


def test_attention_in_bfloat16_runs_on_the_backends_that_have_it() -> None:
    report = attention.run(options(shapes=["1x24x2x16"], dtypes=[torch.bfloat16], modes=["both"]))
    assert not report.failures
    assert [row["who"] for row in report.rows] == ["tandem torch", "eager"]


def test_the_work_of_attention_is_counted_as_papers_count_it() -> None:
    full, causal = Shape(4, 4096, 4096, 16, 128), Shape(4, 4096, 4096, 16, 128, causal=True)
    assert full.forward(2).flops == 4 * 4 * 16 * 4096**2 * 128
    assert causal.forward(2).flops == full.forward(2).flops / 2
    assert full.backward(2).flops == 2.5 * full.forward(2).flops
    assert full.forward(2).bytes == 4 * (4 * 4096 * 16 * 128 * 2)
    assert full.backward(2).bytes == 8 * (4 * 4096 * 16 * 128 * 2)
    cross = Shape(1, 64, 512, 12, 64)
    assert cross.forward(4).bytes == 4 * 12 * 64 * (2 * 64 + 2 * 512)


def test_the_grid_of_flash_attention_3_is_the_papers() -> None:
    grid = SHAPES["fa3"]
    assert len(grid) == 3 * 6 * 2
    assert {shape.batch * shape.seqlen_q for shape in grid} == {16384}
    assert {shape.heads * shape.head_dim for shape in grid} == {2048}


@pytest.mark.parametrize("preset", SHAPES)
def test_a_shapes_label_names_it(preset: str) -> None:
    for shape in SHAPES[preset]:
        assert shapes([shape.label], on_gpu=False) == [shape]


def test_a_cpu_and_a_gpu_have_shapes_of_their_own() -> None:
    assert shapes([], on_gpu=False) == SHAPES["small"]
    assert shapes([], on_gpu=True) == [*SHAPES["fa3"], *SHAPES["t5"]]


def test_peers_that_write_all_scores_are_left_out_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "memory", lambda device: 1000)
    report = attention.run(options(shapes=["1x24x2x16"], modes=["forward"], against=["eager", "flash"]))
    assert {row["who"]: bool(row["note"]) for row in report.rows} == {
        "tandem native": False,
        "tandem torch": False,
        "flash": False,
        "eager": True,
    }
    assert not report.failures


def test_the_limit_is_what_takes_longer() -> None:
    assert LIMITS.least_seconds(1e11, 1e9, torch.float32) == (1.0, "product")
    assert LIMITS.least_seconds(1e9, 1e10, torch.bfloat16) == (1.0, "copy")
    assert LIMITS.cells() == {"fp32 product GFLOP/s": 100.0, "copy GB/s": 10.0, "read GB/s": 20.0}


def test_ceilings_are_measured() -> None:
    assert 1e8 < ceilings.product(CPU, torch.float32, 64) < 1e14
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


@pytest.mark.parametrize("ours", [lambda x: 3 * x, refuse])
def test_ours_being_wrong_or_raising_is_a_failure(ours: object) -> None:
    report = rows_of(doubling(tandem_native=ours, peer=lambda x: x + x))
    assert len(report.failures) == 1
    assert "tandem native" in report.failures[0]
    assert report.rows[1]["ms"] is not None and report.rows[1]["x ours"] is None


def test_a_wrong_gradient_is_seen() -> None:
    report = rows_of(doubling(tandem_native=lambda x: x + x, peer=lambda x: x + x.detach()), mode="backward")
    assert [row["note"] for row in report.rows] == ["", "wrong"]


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


def test_shape_parsing_reads_queries_and_keys() -> None:
    assert attention_shapes.shapes(["2x3:5x4x8-t5"], True) == [Shape(2, 3, 5, 4, 8, t5=True)]
