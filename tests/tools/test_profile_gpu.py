"""`engine --workload gpu`: published shapes made in place, figures of whole batches, each judged before it is timed."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from models import build_model
from tests.tools.profiling import CPU, options
from tools.profile import ceilings, gpu
from tools.profile.gpu_check import Output
from tools.profile.gpu_peers import peer_answers
from tools.profile.gpu_shapes import SHAPES, GpuShape

SMALL = {"vocab_size": 300}
TINY = {
    "flan-t5-xl": {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2},
    "bart-large-cnn": {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    },
    "t5-base": {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2},
    "phi-1.5": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
}  # fmt: skip


def tiny(name: str) -> GpuShape:
    shape = SHAPES[name]
    published = {beams: dict(list(found.items())[:1]) for beams, found in shape.published.items()}
    return dataclasses.replace(
        shape, values={**shape.values, **TINY[name], **SMALL}, lengths=(5, 9), new_tokens=8, beam_tokens=6,
        published=published,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SHAPES", {name: tiny(name) for name in SHAPES})
    monkeypatch.setattr(gpu, "default_device", lambda: CPU)
    monkeypatch.setattr(ceilings, "copy", lambda device, size: 1e10)


def test_every_shape_is_judged_and_timed(tmp_path: Path) -> None:
    report = gpu.run(options(against=[], rounds=2, seconds=60.0, json=tmp_path / "rows.json"))
    assert report.failures == []
    assert [(row["shape"], row["beams"], row["batch"]) for row in report.rows] == [
        ("flan-t5-xl", 1, 32), ("bart-large-cnn", 1, 32), ("t5-base", 1, 1), ("t5-base", 4, 1), ("phi-1.5", 1, 1),
        ("gpt2", 1, 1),
    ]  # fmt: skip
    for row in report.rows:
        assert (row["who"], row["precision"], row["note"], row["x ours"]) == ("tandem", "fp32", "", 1)
        assert float(row["worst"] or 0) < 1e-3
        assert row["% same"] == (100 if row["beams"] == 1 else None)
        assert all(float(row[name] or 0) > 0 for name in ("tokens/s", "low", "high", "first ms", "limit ms"))
        if row["published"]:
            assert row["x published"] == pytest.approx(float(row["tokens/s"] or 0) / int(row["published"]))
    assert [row["published"] for row in report.rows] == [3312, 12611, None, 671, None, None]
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 6


def test_a_precision_that_cannot_run_and_time_that_is_over_are_rows_that_say_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = gpu.run(options(against=[], shapes=["gpt2"], precisions=["int8", "fp32"], batches=[1, 2], seconds=1e-9))
    assert [row["precision"] for row in report.rows] == ["int8", "int8", "fp32", "fp32"]
    assert all("quantised" in str(row["note"]) for row in report.rows[:2])
    assert all("no time" in str(row["note"]) for row in report.rows[2:])
    assert len(report.failures) == 4 and report.failures[0].startswith("gpt2, int8, 1 beams, batch 1: ")


def test_wrong_tokens_have_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    generate = gpu.Ours.generate

    def wrong(self: gpu.Ours, case: gpu.Case, new_tokens: int) -> list[Output]:
        found = generate(self, case, new_tokens)
        found[0].token_ids[-1] = 299 - found[0].token_ids[-1]
        return found

    monkeypatch.setattr(gpu.Ours, "generate", wrong)
    report = gpu.run(options(against=[], shapes=["gpt2"], seconds=60.0))
    (row,) = report.rows
    assert (row["tokens/s"], row["note"]) == (None, "wrong")
    assert float(row["% same"] or 0) < 100
    (failure,) = report.failures
    assert "tokens are off by" in failure


@pytest.mark.parametrize("shape", ["gpt2", "t5-base"])
def test_transformers_is_timed_beside_ours_in_a_process_of_its_own(shape: str) -> None:
    report = gpu.run(options(against=["transformers"], shapes=[shape], rounds=1, batches=[2], seconds=100.0))
    assert report.failures == []
    peers = [row for row in report.rows if row["who"] != "tandem"]
    assert [(row["who"], row["beams"]) for row in peers] == [("transformers", 1), ("transformers compiled", 1)]
    for row in peers:
        assert row["note"] == ""
        assert float(row["tokens/s"] or 0) > 0 and float(row["x ours"] or 0) > 0


def test_a_peer_without_time_or_that_fails_is_noted_for_every_case(tmp_path: Path) -> None:
    asked = {"cases": [{}, {}]}
    (sleeper := tmp_path / "python").write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    slow = list(peer_answers(asked, str(sleeper), 0.1))
    assert [(answer.who, answer.case, answer.seconds) for answer in slow] == [
        ("transformers", 0, None), ("transformers", 1, None),
        ("transformers compiled", 0, None), ("transformers compiled", 1, None),
    ]  # fmt: skip
    assert {answer.note for answer in slow} == {"no answer within 0.1 s"}
    broken = list(peer_answers(asked, sys.executable, 60))
    assert all(answer.seconds is None and "KeyError" in answer.note for answer in broken)


def test_the_shapes_are_the_published_models() -> None:
    flan, bart, phi = (SHAPES[name].config for name in ("flan-t5-xl", "bart-large-cnn", "phi-1.5"))
    assert (flan.activation, flan.tie_embeddings, flan.head_dim, flan.output_scale) == ("geglu_new", False, 64, 1.0)
    assert (bart.norm_place, bart.tie_embeddings, bart.head_bias, bart.position_offset) == ("post", True, True, 2)
    assert (phi.rotary_dim, phi.parallel_residual, phi.head_bias, phi.head_dim) == (32, True, True, 64)
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in build_model(SHAPES[name].config).parameters()) for name in SHAPES}
    assert {name: round(size / 1e6) for name, size in sizes.items()} == {
        "flan-t5-xl": 2850, "bart-large-cnn": 406, "t5-base": 223, "phi-1.5": 1418, "gpt2": 124,
    }  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_search_on_a_model_of_its_depth_does_not_repeat_one_token(name: str) -> None:
    depths = {"num_layers", "encoder_layers", "decoder_layers", "num_hidden_layers", "n_layer"}
    published = SHAPES[name].values
    deep = {key: value for key, value in published.items() if key in depths}
    shape = dataclasses.replace(tiny(name), new_tokens=40)
    shape = dataclasses.replace(shape, values={**shape.values, **deep}, published={1: {1: None}})
    measuring = gpu.Measuring(name, shape, CPU, 1e10, options(), gpu.Report("engine gpu"))
    ((case,),) = measuring.cases("fp32")
    (first,) = gpu.Ours(shape, CPU, [case]).generate(case, 40)
    assert len(set(first.token_ids)) > 8
