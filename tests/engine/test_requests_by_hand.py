"""``add_request``, ``step``, ``abort``: an engine driven by its caller; priorities, metrics, encoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine import LLM, BeamSearchParams, RequestOutput, SamplingParams
from models import EncoderDecoder
from tests.conftest import tiny_model
from tests.engine.llms import llm_of, within

ARCHITECTURES = pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def engine(architecture: str, **options: Any) -> LLM:
    return llm_of(tiny_model(architecture), **options)


def prompt(number: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": [5 + number % 50, *range(4, 6 + number % 7)]}


def drive(llm: LLM) -> list[RequestOutput]:
    """Steps until nothing is left; finished outputs in the order in which they finished."""
    finished = []
    while llm.has_unfinished_requests():
        finished += [output for output in llm.step() if output.finished]
    return finished


def step(llm: LLM) -> list[RequestOutput]:
    """What a step brings: on a GPU the next one is sent before that is known, which is then a call late."""
    return llm.step() or llm.step()


@ARCHITECTURES
def test_requests_join_and_leave_between_steps(architecture: str) -> None:
    llm = engine(architecture)
    for i in range(3):
        llm.add_request(f"early {i}", prompt(i), GREEDY)
    outputs = step(llm)
    assert [output.request_id for output in outputs] == ["early 0", "early 1", "early 2"]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 1, 1]
    llm.add_request("late", prompt(3), SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    llm.add_request("search", prompt(4), BeamSearchParams(2, max_tokens=3, ignore_eos=True))
    llm.abort("early 1")
    llm.abort("nobody")
    finished = {output.request_id: output.outputs[0] for output in drive(llm)}
    assert list(finished) == ["late", "search", "early 0", "early 2"]
    for i in (0, 2):
        assert finished[f"early {i}"] == llm.generate(prompt(i), GREEDY, use_tqdm=False)[0].outputs[0]
    assert not any(llm.engine.cache.pool.holders)


@ARCHITECTURES
def test_lower_priorities_come_first(architecture: str) -> None:
    llm = engine(architecture, max_num_seqs=1)
    for i, priority in enumerate([3, 0, -1, 0]):
        llm.add_request(str(i), prompt(i), GREEDY, priority)
    assert [output.request_id for output in drive(llm)] == ["2", "1", "3", "0"]
    outputs = llm.generate([prompt(0), prompt(1)], GREEDY, use_tqdm=False, priority=[1, 0])
    first, second = (output.metrics.finished_time for output in outputs if output.metrics is not None)
    assert first is not None and second is not None and first > second


@ARCHITECTURES
def test_a_search_shows_what_is_settled_on_its_way(architecture: str) -> None:
    llm, search = engine(architecture), BeamSearchParams(3, max_tokens=16, ignore_eos=True)
    expected = llm.beam_search(prompt(1), search)[0].sequences[0].token_ids
    for aborted in (False, True):
        llm.add_request("search", prompt(1), search)
        lengths = []
        for _ in range(10):
            (output,) = step(llm)
            (shown,) = output.outputs
            assert shown.token_ids == expected[: len(shown.token_ids)] and shown.finish_reason is None
            lengths.append(len(shown.token_ids))
        assert lengths == sorted(lengths)
        if aborted:
            llm.abort("search")
        assert len(drive(llm)) == (not aborted)
    assert not any(llm.engine.cache.pool.holders)


def test_a_long_prompt_does_not_hold_up_those_who_decode() -> None:
    llm = engine("decoder_only", max_num_batched_tokens=8, max_num_seqs=4)
    llm.add_request("decoding", prompt(0), SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    llm.step()
    llm.add_request("long", {"prompt_token_ids": [7] * 40}, GREEDY)
    late = llm.engine.runner.drawn is not None  # a step's results are a call late
    told = [[output.request_id for output in llm.step()] for _ in range(6 + late)]
    assert all("decoding" in ids for ids in told)
    assert ["long" in ids for ids in told].index(True) == 5 + late  # 40 tokens, 7 a step
    drive(llm)


def test_metrics_tell_what_is_going_on() -> None:
    llm = engine("encoder_decoder", max_num_seqs=2)
    empty = llm.get_metrics()
    assert (empty.num_running, empty.num_waiting, empty.cache_usage, empty.tokens_per_second) == (0, 0, 0.0, 0.0)
    for i in range(3):
        llm.add_request(str(i), prompt(1), GREEDY)
    step(llm)
    busy = llm.get_metrics()
    assert (busy.num_running, busy.num_waiting, busy.num_steps, busy.num_tokens) == (2, 1, 1, 2)
    assert busy.cache_usage == 3 / llm.engine.cache.num_blocks  # one source, two targets
    drive(llm)
    done = llm.get_metrics()
    assert (done.num_running, done.num_waiting, done.num_tokens, done.cache_usage) == (0, 0, 24, 0.0)
    assert done.source_hit_rate == pytest.approx(1 / 3)
    assert done.tokens_per_second > 0 < done.step_seconds


@pytest.mark.parametrize("backend", ["native", "torch"])
@torch.no_grad()
def test_encoded_sources_are_the_encoders_hidden_states(backend: str) -> None:
    model = tiny_model("encoder_decoder")
    assert isinstance(model, EncoderDecoder)
    llm = llm_of(model, backend=backend, max_num_batched_tokens=16, max_num_seqs=4)
    prompts = [prompt(i) for i in range(7)]
    for asked, output in zip(prompts, llm.encode(prompts), strict=True):
        assert output.token_ids == asked["prompt_token_ids"]
        expected = model.encode(torch.tensor([output.token_ids]))[0]
        torch.testing.assert_close(output.hidden, expected, atol=within(1e-5), rtol=within(1e-5))
    assert not any(llm.engine.cache.pool.holders)
    with pytest.raises(ValueError, match="no encoder"):
        engine("decoder_only").encode(prompts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("1", prompt(0), GREEDY, 1.5), "priority"), ((1, prompt(0), GREEDY), "request_id"),
     (("0", prompt(0)), "in progress"), (("1", "text"), "tokenizer"), (("1", prompt(0), 5), "SamplingParams")],
)  # fmt: skip
def test_what_cannot_be_added_is_a_sentence(arguments: tuple[Any, ...], message: str) -> None:
    llm = engine("decoder_only")
    llm.add_request("0", prompt(0), GREEDY)
    with pytest.raises(ValueError, match=message):
        llm.add_request(*arguments)
    assert len(drive(llm)) == 1


@ARCHITECTURES
def test_who_goes_on_after_an_interrupted_step_loses_nothing(architecture: str) -> None:
    def interrupt(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(output) == 3:
            raise KeyboardInterrupt
        return logits

    llm, search = engine(architecture), BeamSearchParams(3, max_tokens=8, ignore_eos=True)
    sampled = llm.generate(prompt(1), GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    found = llm.beam_search(prompt(2), search)[0].sequences[0].token_ids
    llm.add_request("a", prompt(1), GREEDY)
    llm.add_request("b", prompt(3), SamplingParams(temperature=0, logits_processors=[interrupt], ignore_eos=True))
    llm.add_request("c", prompt(2), search)
    with pytest.raises(KeyboardInterrupt):
        drive(llm)
    llm.abort("b")
    finished = {output.request_id: output.outputs[0].token_ids for output in drive(llm)}
    assert finished == {"a": sampled, "c": found}
    assert not any(llm.engine.cache.pool.holders)


@ARCHITECTURES
def test_calls_beside_each_other_take_nothing_from_each_other(architecture: str) -> None:
    llm = engine(architecture)
    for i in range(3):
        llm.add_request(str(i), prompt(i), GREEDY)
    outputs = llm.generate([prompt(i) for i in range(5)], GREEDY, use_tqdm=False)
    assert llm.has_unfinished_requests()
    assert sorted(output.request_id for output in drive(llm)) == ["0", "1", "2"]
    assert llm.step() == []
    assert [len(output.outputs[0].token_ids) for output in outputs] == [8] * 5


@ARCHITECTURES
def test_scores_are_right_when_their_prompt_was_sent_back(architecture: str) -> None:
    model, target = tiny_model(architecture), [3 + i % 9 for i in range(40)]
    expected = LLM.from_model(model, None, backend="native").score([prompt(1)], [target])[0]
    blocks = 7 if architecture == "encoder_decoder" else 5
    small = LLM.from_model(
        model, None, backend="native", max_num_batched_tokens=2, max_num_seqs=2, kv_cache_memory_bytes=blocks * 8192
    )
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    small.add_request("first", prompt(0), params, priority=-1)
    small.step()
    assert small.score([prompt(1)], [target])[0] == expected
    assert small.get_metrics().num_preemptions > 0


def test_a_callable_may_abort_its_own_request() -> None:
    llm = engine("decoder_only")

    def give_up(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(output) == 2:
            llm.abort("a")
        return logits

    llm.add_request(
        "a", prompt(0), SamplingParams(temperature=0, max_tokens=9, logits_processors=[give_up], ignore_eos=True)
    )
    llm.add_request("b", prompt(1), GREEDY)
    finished = {output.request_id: output.outputs[0].finish_reason for output in drive(llm)}
    assert finished == {"a": "abort", "b": "length"}
    assert not any(llm.engine.cache.pool.holders)
