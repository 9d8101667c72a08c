"""Random lives of an engine: whatever joins, leaves or has to wait, blocks are accounted for and outputs right."""

from __future__ import annotations

import contextlib
import random
from collections import Counter

import pytest

from engine import BeamSearchParams, SamplingParams
from engine.beam_requests import search_output, search_request
from engine.engine import Engine
from engine.prompt_lookup import PromptLookup
from engine.prompts import PromptReader
from engine.request import Request
from engine.speculation import Speculation, StepCost
from tests.engine.hash_model import hash_engine, reader

MAX_LEN = 40
FAILS = 23


def random_request(rng: random.Random, prompts: PromptReader, number: int) -> Request:
    """Prompts that often begin alike, sources that often repeat, samples, beams and scores of odd lengths."""
    stem = [rng.choice([3, 4]) for _ in range(rng.choice([1, 5, 9, 18]))]
    ids = [*stem, *(rng.randrange(3, 24) for _ in range(rng.randrange(0, 4)))]
    prompt: dict[str, object] = {"prompt_token_ids": ids}
    if prompts.config.is_encoder_decoder and rng.random() < 0.4:
        start = {"prompt_token_ids": [rng.choice([3, 4]) for _ in range(rng.randrange(1, 11))]}
        prompt = {"encoder_prompt": prompt, "decoder_prompt": start}
    length, goes_on = rng.choice([1, 3, 15, 25]), rng.random() < 0.7
    if rng.random() < 0.3:
        search = BeamSearchParams(rng.choice([1, 2, 4]), max_tokens=length, ignore_eos=goes_on)
        return search_request(prompts, str(number), prompt, search)
    params = SamplingParams(
        n=rng.choice([1, 1, 2, 3]), temperature=rng.choice([0.0, 1.0]), max_tokens=length, seed=number,
        ignore_eos=goes_on, prompt_logprobs=rng.choice([None, None, 2]),
    )  # fmt: skip
    request = prompts.request(str(number), prompt, params, seed=number)
    request.priority = rng.choice([0, 0, 1])
    return request


def outcome(request: Request) -> object:
    if request.beams is not None:
        return search_output(request, None)
    return [(s.token_ids, s.finish_reason, s.error) for s in request.sequences], request.scores


def run_alone(life: float, number: int, prompts: PromptReader) -> object:
    """The outcome of the same request in an engine that has room for anything and nothing else to do."""
    again = random_request(random.Random(life), prompts, number)
    engine = hash_engine(200, 4, 8, MAX_LEN, 512, FAILS, enable_prefix_caching=False)
    engine.add_request(again)
    while engine.has_unfinished_requests():
        engine.step()
    return outcome(again)


class Interrupt(BaseException):
    """As KeyboardInterrupt, which may come anywhere."""


def interruptions(engine: Engine) -> list[tuple[object, str, object]]:
    def interrupt(*arguments: object, **options: object) -> None:
        raise Interrupt

    runner = engine.runner
    places = [(runner, "encode"), (runner, "logits"), (engine, "_draw"), (engine, "_advance"),
              (engine, "_deliver_all"), (engine.columns, "batch"), (engine.cache, "copy_shared"),
              (engine.cache.storage, "copy")]  # fmt: skip
    return [(where, name, interrupt) for where, name in places]


def fits(engine: Engine, request: Request) -> bool:
    blocks = [s.max_length for s in request.sequences] + [len(request.encoder_prompt_token_ids or ())]
    return sum(map(engine.cache.blocks_for, blocks)) <= engine.cache.num_blocks


def check_accounts(engine: Engine) -> None:
    """Every block's holders are the rows that name it and the requests whose source it is part of, no more, no less."""
    cache, expected = engine.cache, Counter[int]()
    rows = [(s, s.row) for request in engine.scheduler.running for s in request.sequences if s.row is not None]
    for sequence, row in rows:
        expected.update(row.blocks)
        assert cache.tables[row.index, : len(row.blocks)].tolist() == row.blocks
        assert (
            cache.tokens[row.index, : len(sequence.token_ids)].tolist() == sequence.token_ids
            or not sequence.request.forked
        )
    for request in engine.scheduler.running:
        expected.update(request.source.blocks if request.source is not None else ())
    assert {block: count for block, count in enumerate(cache.pool.holders) if count} == dict(expected)
    assert cache.pool.num_available == cache.num_blocks - len(expected)
    assert cache.num_free_rows == cache.num_rows - len(rows)


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])
@pytest.mark.parametrize(
    ("caching", "guessing", "ahead"),
    [(True, True, False), (False, False, False), (True, False, True), (True, True, True)],
)
def test_random_lives_of_an_engine(
    architecture: str, caching: bool, guessing: bool, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40,000 operations over the eight cases, on a pool so small that requests are sent back all the time."""
    rng, prompts = random.Random(f"{architecture} {caching} {guessing} {ahead}"), reader(architecture, MAX_LEN)
    engine = hash_engine(
        14 if prompts.config.is_encoder_decoder else 11,
        4,
        8,
        MAX_LEN,
        9,
        FAILS,
        enable_prefix_caching=caching,
        ahead=ahead,
    )
    if guessing:
        monkeypatch.setattr(StepCost, "of_a_row", lambda self, rows: 1e-9)
        engine.speculation = Speculation(PromptLookup(1, 3, reads_source=True), 5)
    alive: dict[str, Request] = {}
    lives: dict[str, float] = {}
    finished = failed = number = 0
    for _ in range(5000):
        operation = rng.random()
        if operation < 0.14 and len(alive) < 12:
            number += 1
            lives[str(number)] = rng.random()
            request = random_request(random.Random(lives[str(number)]), prompts, number)
            if fits(engine, request):
                engine.add_request(request)
                alive[request.request_id] = request
        elif operation < 0.16 and alive:
            engine.abort(rng.choice(list(alive.values())))
        elif operation < 0.18:
            with monkeypatch.context() as patch, contextlib.suppress(Interrupt):
                patch.setattr(*rng.choice(interruptions(engine)))
                engine.step()
        else:
            engine.step()
        check_accounts(engine)
        for request in [request for request in alive.values() if request.finished]:
            del alive[request.request_id]
            if all(sequence.finish_reason != "abort" for sequence in request.sequences):
                finished += 1
                failed += request.sequences[0].finish_reason == "error"
                if finished % 3 == 0:
                    assert outcome(request) == run_alone(lives[request.request_id], int(request.request_id), prompts)
    assert failed > 1 and finished > 200 and engine.scheduler.num_preemptions > 30
    assert engine.speculation is None or engine.speculation.num_guessed > engine.speculation.num_right > 20
    for request_id in list(alive):
        engine.abort(alive[request_id])
    assert not engine.has_unfinished_requests() and not any(engine.cache.pool.holders)


@pytest.mark.parametrize("searches", [True, False])
def test_what_is_on_its_way_of_an_aborted_request_is_not_its_successors(searches: bool) -> None:
    """They have the same id; the first one's step was sent before it was aborted."""
    prompts, engine = reader("decoder_only", MAX_LEN), hash_engine(20, 4, 8, MAX_LEN, 32, ahead=True)
    told = []

    def request() -> Request:
        prompt = {"prompt_token_ids": [5, 6, 7]}
        if searches:
            return search_request(prompts, "a", prompt, BeamSearchParams(2, max_tokens=4, ignore_eos=True))
        return prompts.request("a", prompt, SamplingParams(max_tokens=4, prompt_logprobs=1, ignore_eos=True), seed=1)

    first, second = request(), request()
    first.on_change = lambda changed: told.append(changed.finished)
    engine.add_request(first)
    engine.step()
    engine.abort(first)
    engine.add_request(second)
    while engine.has_unfinished_requests():
        engine.step()
    assert second.finished and len(told) == 1
    assert second.sequences[0].finish_reason in ("stop", "length")
    assert first.metrics.first_token_time is None
