"""`tools.profile engine`: who takes part, what is held against what, and what is said of those that cannot."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models import checkpoint
from models.layers import Linear
from tests.tools.profiling import GPT2, T5, options
from tools.profile import ceilings, checkpoints, compare, engine, plot, workers
from tools.profile.__main__ import command
from tools.profile.checkpoints import make_checkpoint
from tools.profile.engine_field import Case, Contender, Field, Sample, Samples
from tools.profile.engine_limit import Limit, Model, Rates
from tools.profile.engine_rows import SHARES, best_peer, rows_of, shares
from tools.profile.engine_tokens import TRUSTED, failures_of

RATES = Rates(fp32=1e10, int8=8e10)
CASE = Case("tiny", prompt=5, beams=1, batch=2, new_tokens=8)
OURS = Contender("tandem", "fp32")


def limit_of(weights: int) -> Limit:
    return Limit(Model(False, 300, weights), RATES, {"fp32": 1e9, "int8": 1e9, "int4": 1e9})


def samples(*decode: float, tokens: int = 0) -> Samples:
    return Samples([[100] * 5] * 2, [Sample(0.25, seconds, 0.5, [[tokens] * 8] * 2) for seconds in decode])


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "REST", 0)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SHAPES": {"gpt2": GPT2, "t5": T5}, "NEW_TOKENS": 12, "ROUNDS": 2}.items():
        monkeypatch.setattr(engine, name, value)
    monkeypatch.setattr(Rates, "measure", lambda: RATES)
    monkeypatch.setattr(ceilings, "read", lambda size: 1e9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    make_checkpoint(GPT2, path := tmp_path_factory.mktemp("checkpoint"))
    return path


@pytest.fixture
def field(folder: Path, tmp_path: Path) -> Iterator[Field]:
    """transformers and we, with the tiny GPT-2."""
    field = Field(seq2seq=False, threads=1, beams=1, sequences=2, peer_python=sys.executable)
    for contender in (OURS, TRUSTED):
        field.enter(contender, folder, tmp_path)
    yield field
    field.close()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("shape", "beams"), [("gpt2", 1), ("t5", 3)])
def test_decoding_is_measured_beside_transformers_and_gives_its_tokens(shape: str, beams: int) -> None:
    chosen = options(
        against=["transformers"], shapes=[shape], batches=[1, 2], precisions=["fp32"], prompt=7, beams=beams
    )
    report = engine.run(chosen)
    assert report.failures == []
    assert [(row["batch"], row["who"]) for row in report.rows] == [
        (batch, who) for batch in (1, 2) for who in ("tandem", "transformers")
    ]
    for row in report.rows:
        assert (row["shape"], row["precision"], row["prompt"], row["beams"]) == (shape, "fp32", 7, beams)
        if row["tokens/s"] is None:  # so small a model's step may be
            assert "lost in what the rounds differ by" in str(row["note"])
            continue
        assert row["% same"] == 100
        shares = [row[name] for name in SHARES]
        if row["who"] == "tandem":
            assert None not in shares  # how large each is would be noise
        else:
            assert shares == [None] * 5
        assert row["note"] == ""
        assert all(float(row[name] or 0) > 0 for name in ("tokens/s", "prefill ms", "% of limit"))


def test_our_tokens_fail_where_transformers_would_not_have_chosen_them(field: Field) -> None:
    seen = field.measure(engine.make_prompts(CASE, 300), CASE.new_tokens, rounds=1)
    assert failures_of(CASE, field, seen) == []
    right = seen[OURS].tokens[1][3]
    seen[OURS].tokens[1][3] = 299 - right
    (failure,) = failures_of(CASE, field, seen)
    assert "tokens are not transformers'" in failure and "standard deviations below the best logit" in failure


def test_who_cannot_open_a_model_keeps_a_row_that_says_why(tmp_path: Path) -> None:
    field = Field(seq2seq=False, threads=1, beams=1, sequences=2, peer_python=sys.executable)
    field.enter(OURS, tmp_path / "nowhere", tmp_path)
    assert field.workers == {}
    (row,) = rows_of(CASE, field, {}, limit_of(1000))
    assert row["tokens/s"] is None
    assert "nowhere" in str(row["note"])
    (failure,) = failures_of(CASE, field, {})
    assert failure.startswith("tiny, batch 2: tandem fp32 could not be measured: ") and "nowhere" in failure


def test_a_row_holds_the_median_against_the_best_peer_and_the_limit(tmp_path: Path) -> None:
    field = Field(seq2seq=False, threads=1, beams=1, sequences=2, peer_python="")
    field.contenders = [OURS, TRUSTED]
    seen = {OURS: samples(0.5, 0.25, 1.0), TRUSTED: samples(1.0, tokens=1)}
    ours, theirs = rows_of(CASE, field, seen, limit_of(5_000_000))
    assert (ours["tokens/s"], ours["low"], ours["high"]) == (28, 14, 56)  # 2 sequences of 7 tokens after the first
    assert (ours["x best peer"], theirs["x best peer"]) == (2, 1)
    assert (ours["limit"], ours["% of limit"]) == ("read, 1 GB/s", pytest.approx(100 * 28 * 0.02 / 2))
    assert (ours["prefill ms"], ours["% same"], theirs["% same"], ours["% others"]) == (250, 0, 100, 50)


def test_what_no_kind_of_work_accounts_for_is_pythons() -> None:
    seen = Samples([[100] * 5] * 2)
    kinds = {"linear": 0.5, "attention": 0.2, "other": 0.1, "sampling": 0.1}
    seen.add(
        {
            "seconds": [1.0, 2.0],
            "others": 0,
            "tokens": [],
            "spent": [dict.fromkeys(kinds, 1.0), {k: 1 + s for k, s in kinds.items()}],
        }
    )
    assert list(shares(seen).values()) == pytest.approx([50, 20, 10, 10, 10])
    assert shares(samples(1.0)) == {}


def test_the_quietest_rounds_count_whatever_their_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    field = Field(seq2seq=False, threads=1, beams=1, sequences=2, peer_python="")
    asked: list[Contender] = []

    def ask(contender: Contender, **request: Any) -> dict[str, Any]:
        asked.append(contender)
        return {
            "seconds": [1, 1 + len(asked)],
            "spent": [{}, {}],
            "others": 0.0 if len(asked) in (4, 6) else 0.5,
            "tokens": [[0]],
        }

    monkeypatch.setattr(field, "ask", ask)
    monkeypatch.setattr(field, "workers", {OURS: None})
    seen = field.measure([[1]], 2, rounds=2)
    assert len(asked) == 6
    assert (seen[OURS].decode, seen[OURS].others) == ((5, 4, 6), 0)
    asked.extend([OURS] * 10)
    noisy = field.measure([[1]], 2, rounds=2)
    assert (len(asked), noisy[OURS].others) == (16 + 7, 0.5)


def test_our_int4_is_held_against_int8_where_nobody_has_int4() -> None:
    int8, int4 = Contender("ctranslate2", "int8"), Contender("openvino", "int4")
    seen = {int8: samples(1.0), Contender("openvino", "int8", "bf16"): samples(0.5), TRUSTED: samples(0.1)}
    assert best_peer(CASE, "int4", seen) == best_peer(CASE, "int8", seen) == 28
    assert best_peer(CASE, "int4", {**seen, int4: samples(2.0)}) == 7
    assert best_peer(CASE, "int8", {TRUSTED: samples(0.1)}) is None


def test_openvino_runs_compressed_weights_with_both_of_its_precisions() -> None:
    chosen = options(against=list(engine.PEERS), precisions=["fp32", "int8", "int4"])
    assert [(each.label, each.precision) for each in engine.contenders(chosen)] == [
        ("tandem", "fp32"), ("transformers", "fp32"), ("ctranslate2", "fp32"), ("openvino", "fp32"),
        ("tandem", "int8"), ("ctranslate2", "int8"), ("openvino", "int8"), ("openvino bf16", "int8"),
        ("tandem", "int4"), ("openvino", "int4"), ("openvino bf16", "int4"),
    ]  # fmt: skip


def test_a_step_reads_the_weights_of_the_decoder_and_the_head_or_multiplies_by_them(tmp_path: Path) -> None:
    make_checkpoint(T5, tmp_path)
    model = Model.read(tmp_path)
    # q, k, v and out of itself; q and out across; two layers of the feed-forward; the head.
    assert (model.seq2seq, model.vocab_size) == (True, 300)
    assert model.weights == 4 * 32 * 32 + 2 * 32 * 32 + 2 * 32 * 64 + 300 * 32
    assert sum(isinstance(module, Linear) for module in checkpoint.load(tmp_path)[0].decoder.modules()) == 7
    assert limit_of(1000).least_seconds("int4", 1) == (pytest.approx(0.5625e-6), "read, 1 GB/s")
    assert limit_of(1000).least_seconds("fp32", 100) == (pytest.approx(2e-5), "product")
    assert limit_of(1000).least_seconds("int8", 100) == (pytest.approx(2.5e-6), "product")


def test_reading_is_measured_with_as_many_bytes_as_the_weights_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "read", lambda size: float(size))
    assert Limit.measure(Model(False, 300, 1000), RATES, ["fp32", "int4"]).reads == {"fp32": 4000, "int4": 562}


def test_the_shapes_are_the_published_models() -> None:
    assert set(checkpoints.SHAPES) == {"gpt2", "t5-base", "t5-small", "marian"}
    marian = checkpoints.SHAPES["marian"]
    assert marian.special["<pad>"] == marian.config["vocab_size"] - 1


def test_a_peer_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["engine", "--shape", "gpt2", "--against", "openvino"]) == 2
    assert capsys.readouterr().err.startswith("tools.profile: openvino could not be measured under ")
    assert command(["engine", "--against", "openvino", "--peer-python", "/bin/false"]) == 2


def test_more_tokens_a_second_are_faster_and_are_drawn(tmp_path: Path) -> None:
    row: dict[str, Any] = {"shape": "gpt2", "precision": "fp32", "batch": 1, "who": "tandem"}
    measure = {"tokens/s": 10.0, "low": 9.0, "high": 11.0}
    before: compare.Run = {"keys": list(row), "measure": list(measure), "rows": [row | measure]}
    after = before | {"rows": [row | {"tokens/s": 20.0, "low": 19.0, "high": 21.0}]}
    assert [row["changed"] for row in compare.compared(before, after)[0]] == ["faster"]
    assert [row["changed"] for row in compare.compared(after, before)[0]] == ["slower"]
    failed = row | {"who": "openvino", "tokens/s": None}
    plot.draw("engine", [*before["rows"], failed], {}, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000
