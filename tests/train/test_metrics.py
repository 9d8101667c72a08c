from __future__ import annotations

from pathlib import Path

import pytest

from train.metrics import exact_match, keep_until, token_error_rate


def test_exact_match_takes_any_reference() -> None:
    assert exact_match(["a", "b", "c"], [["a"], ["x", "b"], ["d"]]) == pytest.approx(2 / 3)


def test_the_error_rate_counts_edits_against_the_nearest_reference() -> None:
    assert token_error_rate(["A B C"], [["A B C"]]) == 0
    assert token_error_rate(["A X"], [["A B C"]]) == pytest.approx(2 / 3)
    assert token_error_rate(["A B"], [["X Y Z", "A B"]]) == 0
    assert token_error_rate(["", "A"], [["A B"], ["A"]]) == pytest.approx(2 / 3)


def test_metrics_after_a_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    keep_until(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
