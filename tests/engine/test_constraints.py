"""What a request may ask of its tokens: biases, allowed and bad ones, callables; what its prompt was worth."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from engine import LLM, BeamSearchParams, SamplingParams
from engine.engine import NOTHING_LEFT
from kernels.sampling import SamplingBatch, sample
from models import EncoderDecoder
from models.tokenizer import Tokenizer
from tests.conftest import tiny_model
from tests.engine.llms import llm_of

ARCHITECTURES = pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])
PROMPT = {"prompt_token_ids": [5, 6, 7, 8]}
OTHERS = [{"prompt_token_ids": [9, 10]}, {"prompt_token_ids": [30] * 20}]


def engine(architecture: str, **options: Any) -> LLM:
    return llm_of(tiny_model(architecture), **options)


def tokens(llm: LLM, **params: Any) -> list[int]:
    """The output's tokens, of a batch with strangers, who come to no harm."""
    own = SamplingParams(**({"temperature": 0.0, "max_tokens": 12, "ignore_eos": True} | params))
    plain = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    alone = [output.outputs[0].token_ids for output in llm.generate(OTHERS, plain, use_tqdm=False)]
    first, *others = llm.generate([PROMPT, *OTHERS], [own, plain, plain], use_tqdm=False)
    assert [output.outputs[0].token_ids for output in others] == alone
    return first.outputs[0].token_ids


@ARCHITECTURES
def test_a_bias_makes_a_token_come_or_stay_away(architecture: str) -> None:
    llm = engine(architecture)
    assert set(tokens(llm, logit_bias={17: 100.0})) == {17}
    free = tokens(llm)
    assert free[0] not in tokens(llm, logit_bias={free[0]: -100})


@ARCHITECTURES
def test_only_allowed_tokens_come(architecture: str) -> None:
    drawn = tokens(engine(architecture), allowed_token_ids=[11, 31, 32, 59], temperature=20.0, seed=1)
    assert set(drawn) <= {11, 31, 32, 59}
    assert len(set(drawn)) > 1


@ARCHITECTURES
def test_typical_sampling_of_almost_no_mass_takes_one_token(architecture: str) -> None:
    llm = engine(architecture)
    assert tokens(llm, typical_p=1e-6, temperature=1.0, seed=1) == tokens(llm, typical_p=1e-6, temperature=1.0, seed=2)
    assert tokens(llm, temperature=1.0, seed=1) != tokens(llm, temperature=1.0, seed=2)


def test_bad_words_never_come(tokenizer: Tokenizer) -> None:
    model = tiny_model("decoder_only", vocab_size=tokenizer.vocab_size)
    llm = llm_of(model, tokenizer)
    params: dict[str, Any] = {"temperature": 3.0, "max_tokens": 60, "ignore_eos": True, "n": 8, "seed": 3}
    free = [c.text for c in llm.generate("a", SamplingParams(**params), use_tqdm=False)[0].outputs]
    word = free[0][5:7]
    bound = llm.generate("a", SamplingParams(**params, bad_words=[word, "q"]), use_tqdm=False)[0].outputs
    assert not any(word in c.text or "q" in c.text for c in bound)


@ARCHITECTURES
def test_processors_change_logits(architecture: str) -> None:
    seen: list[tuple[list[int], ...]] = []

    def only(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append((prompt, output))
        return torch.where(torch.arange(len(logits), device=logits.device) == 20 + len(output), 0.0, -math.inf)

    def add(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits[40] += 1000
        return logits

    llm = engine(architecture)
    assert tokens(llm, logits_processors=[only], max_tokens=4) == [20, 21, 22, 23]
    assert seen[2] == ([1] if architecture == "encoder_decoder" else PROMPT["prompt_token_ids"], [20, 21])
    assert tokens(llm, logits_processors=(add,), max_tokens=3) == [40] * 3
    assert tokens(llm, logits_processors=[add], max_tokens=3, logit_bias={40: -1e30})[0] != 40  # rules come after


@ARCHITECTURES
@pytest.mark.parametrize("kind", ["raises", "shape", "nothing", "nan"])
def test_a_processor_that_fails_ends_its_own_request(architecture: str, kind: str) -> None:
    def fail(output: list[int], logits: torch.Tensor) -> Any:
        if len(output) < 3:
            return logits
        if kind == "raises":
            raise KeyError("lost")
        return {"shape": logits[:5], "nothing": None, "nan": logits * math.nan}[kind]

    llm = engine(architecture)
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logits_processors=[fail])
    free = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    output, *others = llm.generate([PROMPT, PROMPT, *OTHERS], [params, free, free, free], use_tqdm=False)
    assert output.outputs[0].finish_reason == "error"
    assert len(output.outputs[0].token_ids) == 3
    assert {"raises": "fail raised KeyError", "nan": "NaN"}.get(kind, "must return a tensor") in str(
        output.outputs[0].error
    )
    assert all(len(other.outputs[0].token_ids) == 9 for other in others)
    assert not any(llm.engine.cache.pool.holders)
    assert llm.generate(PROMPT, free, use_tqdm=False)[0].outputs == others[0].outputs


@ARCHITECTURES
@torch.no_grad()
def test_prompt_log_probabilities_are_the_models(architecture: str) -> None:
    model = tiny_model(architecture)
    ids = [5, 9, 7, 30, 9, 9, 12, 40, 5, 5, 6, 17, 20]
    prompt: Any = {"prompt_token_ids": ids}
    if isinstance(model, EncoderDecoder):
        prompt = {"encoder_prompt": PROMPT, "decoder_prompt": prompt}
        ids = [1, *ids]
        logits = model(torch.tensor([PROMPT["prompt_token_ids"]]), torch.tensor([ids]))[0]
    else:
        logits = model(torch.tensor([ids]))[0]
    expected = logits.log_softmax(-1)
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2, ignore_eos=True, n=2)
    for options in ({}, {"max_num_batched_tokens": 5, "max_num_seqs": 4}):
        llm = llm_of(model, **options)
        for _ in range(2):  # what is cached has no logits
            output = llm.generate(prompt, params, use_tqdm=False)[0]
            first, *rest = output.prompt_logprobs or []
            assert first is None and len(rest) == len(ids) - 1
            for i, entry in enumerate(rest):
                assert entry is not None
                assert entry[ids[i + 1]].logprob == pytest.approx(float(expected[i, ids[i + 1]]), abs=1e-4)
                best = expected[i].topk(2)
                assert [t for t, e in entry.items() if e.rank <= 2] == best.indices.tolist()
                assert entry[ids[i + 1]].rank == 1 + int((expected[i] > expected[i, ids[i + 1]]).sum())
            assert len(output.outputs) == 2 and output.outputs[0].token_ids[0] == int(expected[-1].argmax())


def test_a_prompt_of_one_token_has_no_log_probabilities() -> None:
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2)
    assert engine("encoder_decoder").generate(PROMPT, params, use_tqdm=False)[0].prompt_logprobs == [None]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": {60: 1.0}}, "logit_bias holds 60"), ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {5: math.nan}}, "logit_bias"), ({"logit_bias": [5]}, "logit_bias"),
        ({"logit_bias": {5: 1e39}}, "logit_bias"), ({"allowed_token_ids": [60]}, "allowed_token_ids holds 60"),
        ({"allowed_token_ids": []}, "allowed_token_ids"), ({"allowed_token_ids": 5}, "allowed_token_ids"),
        ({"bad_words": ["a"]}, "bad_words needs a tokenizer"), ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": [[5]]}, "bad_words"), ({"logits_processors": [5]}, "logits_processors"),
        ({"typical_p": 0}, "typical_p"), ({"typical_p": 1.5}, "typical_p"),
        ({"prompt_logprobs": 129}, "prompt_logprobs"),
    ],
)  # fmt: skip
def test_a_wrong_parameter_is_named_before_anything_runs(params: dict[str, Any], message: str) -> None:
    llm = engine("decoder_only")
    with pytest.raises(ValueError, match=message):
        llm.generate(PROMPT, SamplingParams(**params), use_tqdm=False)
    assert not llm.engine.has_unfinished_requests()


@ARCHITECTURES
def test_beams_and_samples_with_rules_share_a_step(architecture: str) -> None:
    llm = engine(architecture)
    search = BeamSearchParams(3, max_tokens=9, no_repeat_ngram_size=2, repetition_penalty=1.3, min_tokens=5)
    alone = llm.beam_search(PROMPT, search)[0].sequences
    params = SamplingParams(temperature=0, max_tokens=9, no_repeat_ngram_size=1, min_tokens=4, logit_bias={7: 2.0})
    single = llm.generate(PROMPT, params, use_tqdm=False)[0].outputs
    llm.add_request("search", PROMPT, search)
    llm.add_request("sample", PROMPT, params)
    finished = {}
    while llm.has_unfinished_requests():
        finished |= {output.request_id: output for output in llm.step() if output.finished}
    assert [c.token_ids for c in finished["search"].outputs] == [s.token_ids for s in alone]
    assert finished["sample"].outputs == single


def test_the_engine_knows_a_row_without_tokens_from_a_broken_one() -> None:
    empty, broken = torch.full((1, 9), -math.inf), torch.full((1, 9), math.nan)
    assert sample(empty, SamplingBatch.build(1)).errors == [NOTHING_LEFT]
    assert sample(broken, SamplingBatch.build(1)).errors != [NOTHING_LEFT]
