"""Guesses change how fast tokens come, and never which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine import LLM, BeamSearchParams, SamplingParams
from engine.draft_model import DraftModel
from engine.prompt_lookup import NgramIndex
from engine.speculation import Speculation, StepCost
from models import DecoderOnly, EncoderDecoder
from models.checkpoint import save
from tests.conftest import tiny_model

ARCHITECTURES = pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])
NGRAM = {"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
PARAMS = [
    SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=0.7, seed=5, max_tokens=33, ignore_eos=True, logprobs=0),
    SamplingParams(temperature=1.0, seed=6, n=3, top_k=5, max_tokens=20),
    SamplingParams(temperature=0, max_tokens=30, repetition_penalty=1.1, frequency_penalty=0.2, no_repeat_ngram_size=3),
    SamplingParams(temperature=0, max_tokens=25, min_tokens=20, stop_token_ids=[7, 9], presence_penalty=0.5),
    SamplingParams(temperature=0.5, seed=1, max_tokens=None, ignore_eos=True),
]


def prompts() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {"prompt_token_ids": torch.randint(4, 12, (n,), generator=generator).tolist()} for n in (9, 20, 5, 14, 3, 17)
    ]


def outputs(llm: LLM, params: Any = PARAMS) -> list[Any]:
    return [output.outputs for output in llm.generate(prompts(), params, use_tqdm=False)]


def model_of(architecture: str, seed: int = 0) -> DecoderOnly | EncoderDecoder:
    shape = {"positions": "rotary"} if architecture == "decoder_only" else {}
    return tiny_model(architecture, seed, **shape)


def always_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepCost, "of_a_row", lambda self, rows: 1e-9)


@ARCHITECTURES
def test_looked_up_guesses_change_no_token(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    always_guess(monkeypatch)
    plain = LLM.from_model(model_of(architecture), None, backend="native")
    llm = LLM.from_model(model_of(architecture), None, backend="native", speculative_config=NGRAM)
    assert outputs(llm) == outputs(plain)
    speculation = llm.engine.speculation
    assert isinstance(speculation, Speculation) and speculation.num_right > 20
    assert llm.get_metrics().num_steps < plain.get_metrics().num_steps
    small = LLM.from_model(
        model_of(architecture), None, backend="native", speculative_config=NGRAM, max_num_seqs=4,
        max_num_batched_tokens=9, kv_cache_memory_bytes=12 * llm.engine.cache.storage.blocks.shape[1],  # type: ignore[attr-defined]
    )  # fmt: skip
    assert outputs(small) == outputs(plain)
    assert not any(small.engine.cache.pool.holders)


@ARCHITECTURES
@pytest.mark.parametrize("same", [True, False])
def test_a_draft_models_guesses_change_no_token(
    architecture: str, same: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    always_guess(monkeypatch)
    save(tmp_path, model_of(architecture, 0 if same else 1), None)
    config = {"model": tmp_path, "num_speculative_tokens": 3}
    llm = LLM.from_model(model_of(architecture), None, backend="native", speculative_config=config)
    plain = LLM.from_model(model_of(architecture), None, backend="native")
    assert outputs(llm) == outputs(plain)
    assert llm.beam_search(prompts(), BeamSearchParams(2)) == plain.beam_search(prompts(), BeamSearchParams(2))
    speculation = llm.engine.speculation
    assert speculation is not None and speculation.num_guessed > 50
    if same:  # but for the rules, which bind the model alone
        assert speculation.num_right > 0.9 * speculation.num_guessed
        assert llm.get_metrics().num_steps < 0.5 * plain.get_metrics().num_steps
    llm.generate(prompts()[0], PARAMS[0], use_tqdm=False)
    assert isinstance(speculation.drafter, DraftModel)
    assert len(speculation.drafter._rows) == 1  # of those before nothing is left


def test_a_guess_that_is_not_worth_its_time_is_not_made() -> None:
    """The price of a row is what it adds to a step; a model whose guesses are wrong stops guessing."""
    cost = StepCost()
    assert 0.1 < cost.of_a_row(1) < 0.2
    for rows in [1, 2, 4, 8] * 20:
        cost.add(rows, 0.010 + 0.001 * rows)
    assert cost.of_a_row(1) == pytest.approx(1 / 11, rel=0.05)
    assert cost.of_a_row(30) == pytest.approx(1 / 40, rel=0.05)

    llm = LLM.from_model(model_of("decoder_only"), None, backend="native", speculative_config=NGRAM)
    llm.engine.runner.logits = lambda batch: torch.randn(int(batch.wanted.sum()), 60)  # type: ignore[method-assign]
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    llm.generate([{"prompt_token_ids": [5, 6, 7]}] * 40, params, use_tqdm=False)
    speculation = llm.engine.speculation
    assert speculation is not None
    assert speculation.num_guessed < 0.05 * 40 * 50


def test_the_longest_run_is_looked_up() -> None:
    index = NgramIndex(1, 3)
    index.extend([1, 2, 3, 9, 2, 3, 8, 1, 2, 3])
    size, end = index.match() or (0, 0)
    assert (size, end) == (3, 3)
    assert index.following(end, 4) == [9, 2, 3, 8]
    index.extend([8])
    assert index.match() == (3, 7)
    index.extend([8, 8])
    size, end = index.match() or (0, 0)
    assert index.following(end, 3) == [8, 8, 8]  # a run of one goes on
    index.extend([40])
    assert index.match() is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"method": "eagle"}, "ngram or draft_model"), ({"method": "draft_model"}, "model"), ([], "dict"),
        ({"method": "ngram", "model": "x"}, "model"), ({"num_speculative_tokens": 0}, "num_speculative_tokens"),
        ({"prompt_lookup_min": 9, "prompt_lookup_max": 2}, "prompt_lookup_min"), ({"tokens": 3}, "tokens"),
        ({"model": 5}, "folder"), ({"model": object()}, "folder"),
    ],
)  # fmt: skip
def test_a_wrong_config_is_a_sentence(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM.from_model(model_of("decoder_only"), None, speculative_config=config)


def test_a_draft_model_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    save(tmp_path, tiny_model("decoder_only", vocab_size=61), None)
    with pytest.raises(ValueError, match="vocabulary"):
        LLM.from_model(model_of("decoder_only"), None, speculative_config={"model": tmp_path})
