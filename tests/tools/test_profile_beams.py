"""`engine --workload beams`: sources of different lengths, transformers' hypotheses, one copy of what they read."""

from __future__ import annotations

import pytest

from tests.tools.profiling import T5, options
from tools.profile import beams, engine, workers
from tools.profile.engine_field import Case, Contender, Sample, Samples


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "REST", 0)
    monkeypatch.setattr(engine, "SHAPES", {"t5": T5})
    monkeypatch.setattr(beams, "NEW_TOKENS", 4)
    monkeypatch.setattr(beams, "WIDTHS", (1, 2, 3))


def test_searches_find_transformers_hypotheses_and_hold_their_sources_once() -> None:
    report = beams.run(options(against=["transformers"], shapes=["t5"], batches=[2], beams=3, rounds=1))
    assert report.failures == []
    assert [(row["who"], row["beams"]) for row in report.rows] == [
        ("tandem", 3), ("transformers", 3), *(("tandem's cache", width) for width in (1, 2, 3)),
    ]  # fmt: skip
    ours, theirs, *held = report.rows
    for row in (ours, theirs):
        assert (row["% equal"], row["note"]) == (100, "")
        assert float(row["tokens/s"] or 0) > 0
    assert ours["x ours"] == 1
    assert len({row["source blocks"] for row in held}) == 1
    assert float(held[0]["source MiB"] or 0) > 0
    assert float(held[0]["other blocks"] or 0) < float(held[2]["other blocks"] or 0)


def test_speed_is_of_whole_searches_and_equal_hypotheses_are_equal_throughout() -> None:
    case = Case("tiny", prompt=100, beams=4, batch=2, new_tokens=8)
    ours = Samples([], [Sample(0.25, 0.75, 0.5, [[1, 2], [3, 4]]), Sample(0.5, 1.5, 0.5, [])])
    cells = beams.figures(case, ours)
    assert (cells["tokens/s"], cells["low"], cells["high"], cells["% others"]) == (12, 8, 16, 50)
    theirs = Samples([], [Sample(1, 1, 0, [[1, 2], [3, 5]])])
    assert beams.equal_share(ours, theirs) == 0.5


def test_sources_held_more_than_once_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert beams.uneven("tiny, fp32", [7, 7, 7]) == []
    (failure,) = beams.uneven("tiny, fp32", [7, 14, 28])
    assert failure == "tiny, fp32: wider searches hold more of their sources: 7, 14, 28 blocks"


def test_a_precision_of_ours_that_does_not_run_keeps_a_row_that_says_why() -> None:
    field = engine.Field(True, 1, 4, 2, "")
    ours = Contender("tandem", "fp32")
    field.failed[ours] = "no room"
    row = beams.row(Case("tiny", 100, 4, 2, 8), ours, field, {})
    assert (row["tokens/s"], row["note"]) == (None, "no room")
