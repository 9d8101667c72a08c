"""What requests have in common is computed once and held once."""

from __future__ import annotations

from typing import Any

import pytest

from engine import BeamSearchParams, SamplingParams
from engine.beam_requests import search_request
from engine.engine import Engine
from engine.request import Request
from tests.conftest import tiny_model
from tests.engine.hash_model import HashRunner, hash_engine, reader
from tests.engine.llms import DEVICE, llm_of

MAX_LEN = 64
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def engine_of(**changes: Any) -> Engine:
    return hash_engine(
        **({"num_blocks": 64, "block_size": 4, "max_num_seqs": 8, "max_model_len": MAX_LEN, "budget": 64} | changes)
    )


def asked(architecture: str, number: int, prompt: Any, params: SamplingParams | BeamSearchParams = GREEDY) -> Request:
    prompts = reader(architecture, MAX_LEN)
    if isinstance(params, BeamSearchParams):
        return search_request(prompts, str(number), prompt, params)
    return prompts.request(str(number), prompt, params, seed=number)


def run(engine: Engine, *requests: Request) -> tuple[list[list[int]], int, int]:
    """The outputs, and how many tokens and sources' tokens have run for them."""
    runner = engine.runner
    assert isinstance(runner, HashRunner)
    runner.num_tokens = runner.num_encoded = 0
    for request in requests:
        engine.add_request(request)
    while engine.has_unfinished_requests():
        engine.step()
    outputs = [s.output_ids for request in requests for s in request.sequences]
    return outputs, runner.num_tokens, runner.num_encoded


def ids(count: int, first: int = 3) -> dict[str, list[int]]:
    return {"prompt_token_ids": [first, *(4 + i % 17 for i in range(count - 1))]}


def test_a_prompt_seen_before_is_not_read_again() -> None:
    engine = engine_of()
    cold = run(engine, asked("decoder_only", 1, ids(30)))
    warm = run(engine, asked("decoder_only", 2, ids(30)))
    assert cold[0] == warm[0]
    assert cold[1] == 30 + 5
    assert warm[1] == 2 + 5  # seven blocks of four tokens were there
    counts = engine.cache.counts
    assert (counts.prompt_tokens, counts.prompt_hits) == (60, 28)
    assert run(engine, asked("decoder_only", 3, ids(30, first=5)))[1] == 35  # another first token, another text


def test_prompts_of_one_step_share_their_beginning() -> None:
    requests = [asked("decoder_only", i, {"prompt_token_ids": [*ids(16)["prompt_token_ids"], 5 + i]}) for i in range(4)]
    outputs, tokens, _ = run(engine_of(), *requests)
    assert tokens == 17 + 3 * 1 + 4 * 5
    assert outputs == [
        run(engine_of(), asked("decoder_only", 9, {"prompt_token_ids": r.prompt_token_ids}))[0][0] for r in requests
    ]


def test_outputs_are_found_again_as_part_of_a_longer_prompt() -> None:
    engine = engine_of()
    (output,), _, _ = run(engine, asked("decoder_only", 1, ids(10)))
    longer = {"prompt_token_ids": [*ids(10)["prompt_token_ids"], *output]}
    assert run(engine, asked("decoder_only", 2, longer))[1] == 4 + 5  # 12 of 16 tokens are in full blocks


def test_samples_read_their_prompt_once() -> None:
    params = SamplingParams(n=4, temperature=1.0, seed=3, max_tokens=6, ignore_eos=True)
    for caching in (True, False):
        assert run(engine_of(enable_prefix_caching=caching), asked("decoder_only", 1, ids(18), params))[1] == 18 + 4 * 5


def test_a_source_is_encoded_once_for_all_who_have_it() -> None:
    engine = engine_of()
    same = [asked("encoder_decoder", i, ids(20)) for i in range(3)]
    assert run(engine, *same)[2] == 20
    assert run(engine, asked("encoder_decoder", 4, ids(20)), asked("encoder_decoder", 5, ids(21)))[2] == 21
    assert engine.cache.counts.source_hits == 20  # of the first step's three none was there yet
    assert (
        run(engine_of(enable_prefix_caching=False), *[asked("encoder_decoder", i, ids(20)) for i in range(3)])[2] == 60
    )


def test_a_decoder_prompt_is_found_again_with_its_source_alone() -> None:
    engine, start = engine_of(), ids(13)
    prompt = lambda source: {"encoder_prompt": ids(source), "decoder_prompt": start}  # noqa: E731
    assert run(engine, asked("encoder_decoder", 1, prompt(9)))[1] == 14 + 5
    assert run(engine, asked("encoder_decoder", 2, prompt(9)))[1] == 2 + 5
    assert run(engine, asked("encoder_decoder", 3, prompt(10)))[1] == 14 + 5


@pytest.mark.parametrize("beams", [1, 4, 8])
def test_cross_attention_takes_the_same_memory_for_any_number_of_beams(beams: int) -> None:
    engine = engine_of()
    engine.add_request(asked("encoder_decoder", 1, ids(40), BeamSearchParams(beams, max_tokens=6, ignore_eos=True)))
    most = 0
    while engine.has_unfinished_requests():
        engine.step()
        rows = {block for r in engine.scheduler.running for s in r.sequences if s.row for block in s.row.blocks}
        most = max(most, engine.cache.pool.num_held - len(rows))
    assert most == 10  # blocks of four tokens for the source's forty


def test_what_was_used_last_is_kept_longest() -> None:
    engine = engine_of(num_blocks=16)
    for first in (3, 4, 5):
        run(engine, asked("decoder_only", first, ids(22, first)))
        run(engine, asked("decoder_only", first + 10, ids(22, 3)))
    assert run(engine, asked("decoder_only", 20, ids(22, 3)))[1] == 2 + 5
    assert run(engine, asked("decoder_only", 21, ids(22, 4)))[1] > 10


def test_a_live_model_that_has_learned_finds_nothing_of_before() -> None:
    model = tiny_model("encoder_decoder").to(DEVICE)
    llm = llm_of(model)
    prompt = {"encoder_prompt": ids(40), "decoder_prompt": ids(20)}
    before = llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    for parameter in model.parameters():
        parameter.data.mul_(-1.3)
    after = llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    fresh = llm_of(model).generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    assert after == fresh != before
