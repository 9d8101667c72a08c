"""Searches that take their steps together go where each goes alone, bit for bit, whatever happens to the others."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import numpy as np
import pytest

from engine.beam_params import BeamSearchParams
from engine.beam_requests import search_output, search_request
from engine.beam_search import BeamSearch
from engine.beam_step import Indices, Logprobs, NoContinuation, advance_together
from engine.engine import Engine
from engine.request import Request
from tests.engine.hash_model import VOCAB, hash_engine, reader

EOS, OTHER_EOS, MAX_LEN = 2, 3, 40
FAILS = VOCAB - 1  # whatever reads it gets NaN


def random_params(rng: random.Random, **options: object) -> BeamSearchParams:
    return BeamSearchParams(
        rng.choice([1, 2, 4, 4, 7]), max_tokens=rng.choice([1, 2, 9, 25]),
        early_stopping=rng.choice([True, False, "never"]),
        length_penalty=rng.choice([-1.0, 0.0, 0.6, 1.0, 2.0]), patience=rng.choice([0.4, 1.0, 1.0, 2.0]),
        ignore_eos=rng.random() < 0.2, **options,  # type: ignore[arg-type]
    )  # fmt: skip


def random_search(rng: random.Random) -> BeamSearch:
    params, prompt = random_params(rng), [1] * rng.choice([1, 1, 4])
    assert params.max_tokens is not None
    return BeamSearch(params, prompt, len(prompt) + params.max_tokens, rng.choice([(EOS,), (EOS, OTHER_EOS), ()]))


def best_tokens(search: BeamSearch, rng: np.random.Generator, kind: str) -> tuple[Logprobs, Indices]:
    """Of random log-probabilities: "tied" where many are equal, "banned" where many are -inf."""
    logits = rng.normal(size=(len(search.token_ids), VOCAB)) * 2
    logits = np.round(logits) if kind == "tied" else logits
    scores = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)
    scores[(rng.random(scores.shape) < 0.6) & (kind == "banned")] = -np.inf
    if rng.random() < 0.01:
        scores[0] = np.nan
    if rng.random() < 0.01:
        scores[:] = -np.inf
    tokens = np.argsort(-scores, axis=1, kind="stable")[:, : search.num_candidates]
    return np.take_along_axis(scores, tokens, axis=1), tokens


def together(searches: list[BeamSearch], best: list[tuple[Logprobs, Indices]]) -> list[list[int] | NoContinuation]:
    """One step of all, by likeness."""
    moves: dict[int, list[int] | NoContinuation] = {}
    for likeness in {search.likeness for search in searches}:
        members = [i for i, search in enumerate(searches) if search.likeness == likeness]
        logprobs = np.stack([best[i][0] for i in members])
        tokens = np.stack([best[i][1] for i in members])
        moves |= zip(members, advance_together([searches[i] for i in members], logprobs, tokens), strict=True)
    return [moves[i] for i in range(len(searches))]


def state(search: BeamSearch) -> object:
    beams = [list(ids) for ids in search.token_ids], search.logprobs.tobytes()
    return beams, search.done, search.bar, list(search.finished), search.hypotheses(), search.settled()


@pytest.mark.parametrize("kind", ["plain", "tied", "banned"])
def test_a_step_together_is_a_step_of_each(kind: str) -> None:
    rng, numbers = random.Random(kind), np.random.default_rng(len(kind))
    ended = failed = 0
    for seed in range(12):
        many = [random_search(random.Random(100 * seed + i)) for i in range(20)]
        single = [random_search(random.Random(100 * seed + i)) for i in range(20)]
        while many:
            best = [best_tokens(search, numbers, kind) for search in many]
            before = [state(search) for search in many]
            moves = together(many, best)
            goes_on = []
            for i, (one, move) in enumerate(zip(single, moves, strict=True)):
                if isinstance(move, NoContinuation):
                    with pytest.raises(NoContinuation, match=str(move)):
                        one.advance(*best[i])
                    assert state(many[i]) == before[i]
                    failed += 1
                    continue
                assert one.advance(*best[i]) == move
                assert state(one) == state(many[i])
                assert len({id(ids) for ids in many[i].token_ids}) == len(move)  # no two beams write to one list
                ended += one.done
                if not one.done and rng.random() > 0.01:  # some are aborted
                    goes_on.append(i)
            many, single = [many[i] for i in goes_on], [single[i] for i in goes_on]
    assert ended > 100 and failed > 5


def test_a_step_in_which_all_fail_is_only_errors() -> None:
    searches = [BeamSearch(BeamSearchParams(2), [1], 9, (EOS,)) for _ in range(3)]
    scores = np.full((3, 1, 4), -np.inf, dtype=np.float32)
    scores[1] = np.nan
    moves = advance_together(searches, scores, np.zeros((3, 1, 4), dtype=np.int64))
    assert [move.not_finite for move in moves if isinstance(move, NoContinuation)] == [False, True, False]
    assert all(search.length == 1 and not search.done for search in searches)


def random_request(number: int, architecture: str) -> Request:
    rng = random.Random(number)
    prompt: dict[str, object] = {"prompt_token_ids": [rng.randrange(3, FAILS) for _ in range(rng.choice([1, 4, 9]))]}
    kind = rng.random()
    if kind < 0.15:
        params = BeamSearchParams(4, max_tokens=12, num_beam_groups=2, diversity_penalty=0.5)
    elif kind < 0.3:
        params = BeamSearchParams(3, max_tokens=14, force_words=[[5], [FAILS, 8] if kind < 0.2 else [7, 8]])
    else:
        params = random_params(rng, no_repeat_ngram_size=rng.choice([0, 0, 2]))
    return search_request(reader(architecture, MAX_LEN), str(number), prompt, params)


def run(engine: Engine, requests: Iterator[Request], abort: random.Random | None = None) -> list[Request]:
    """Requests join by threes while there are any; some are aborted."""
    everyone: list[Request] = []
    while (joining := list(itertools.islice(requests, 3))) or engine.has_unfinished_requests():
        for request in joining:
            engine.add_request(request)
        everyone += joining
        if abort is not None and abort.random() < 0.04:
            engine.abort(abort.choice([request for request in everyone if not request.finished]))
        engine.step()
    return everyone


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])
def test_searches_of_all_kinds_beside_each_other_are_what_each_is_alone(architecture: str) -> None:
    """Some fail, some are aborted, and the pool is so small that some are sent back."""
    engine = hash_engine(64, 4, 80, MAX_LEN, 64, fails=FAILS)
    numbers = range(60)
    done = run(engine, (random_request(i, architecture) for i in numbers), random.Random(architecture))
    aborted = failed = 0
    for i, request in zip(numbers, done, strict=True):
        if request.sequences[0].finish_reason == "abort":
            aborted += 1
            continue
        alone = hash_engine(200, 4, 8, MAX_LEN, 512, fails=FAILS, enable_prefix_caching=False)
        (expected,) = run(alone, iter([random_request(i, architecture)]))
        assert search_output(request, None) == search_output(expected, None)
        failed += request.sequences[0].error is not None
    assert aborted > 1 and failed > 0 and engine.scheduler.num_preemptions > 0
    assert not any(engine.cache.pool.holders)
