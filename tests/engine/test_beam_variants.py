"""Groups of beams, beams with words they must contain, and a search that is watched while it runs."""

from __future__ import annotations

from typing import Any

import pytest

from engine import LLM, BeamSearchParams, SamplingParams
from models import EncoderDecoder
from models.config import EOS_ID
from models.tokenizer import Tokenizer
from tests.conftest import tiny_model
from tests.engine.llms import llm_of
from tests.engine.test_beam_requests import decisive_model, log_probs, prompts

ARCHITECTURES = pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])


def engine(architecture: str, **options: Any) -> LLM:
    return llm_of(decisive_model(architecture), **options)


def plain_groups(model: Any, prompt: list[int], params: BeamSearchParams) -> list[tuple[float, list[int]]]:
    """Diverse beam search as one would write it first: (score, token ids), best first."""
    start = [1] if isinstance(model, EncoderDecoder) else prompt
    limit = min(params.max_tokens or 64, 64 - len(start))
    width = params.beam_width // params.num_beam_groups
    running: list[list[tuple[float, list[int]]]] = [[(0.0, [])] for _ in range(params.num_beam_groups)]
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in running]
    open_groups = set(range(len(running)))
    for length in range(1, limit + 1):
        chosen: list[int] = []
        for group in sorted(open_groups):
            rows = log_probs(model, prompt, [ids for _, ids in running[group]])
            candidates = sorted(
                (
                    (total + logprob - params.diversity_penalty * chosen.count(token), [*ids, token])
                    for (total, ids), row in zip(running[group], rows, strict=True)
                    for token, logprob in enumerate(row)
                ),
                reverse=True,
            )[: 2 * width]
            ends = [length == limit or ids[-1] == EOS_ID for _, ids in candidates]
            best = zip(candidates[:width], ends, strict=False)
            finished[group] += [(score / length**params.length_penalty, ids) for (score, ids), end in best if end]
            finished[group] = sorted(finished[group], reverse=True)[:width]
            running[group] = [c for c, end in zip(candidates, ends, strict=True) if not end][:width]
            chosen += [ids[-1] for _, ids in (running[group] or candidates[:width])]
            hope = running[group][0][0] / length**params.length_penalty if running[group] else -float("inf")
            if len(finished[group]) == width and hope <= finished[group][-1][0]:
                open_groups.remove(group)
    return sorted((each for group in finished for each in group), reverse=True)


@ARCHITECTURES
@pytest.mark.parametrize(("width", "groups", "penalty"), [(4, 2, 0.8), (6, 3, 1.5), (3, 3, 5.0), (4, 2, 0.0)])
def test_groups_are_those_of_a_plain_search(architecture: str, width: int, groups: int, penalty: float) -> None:
    params = BeamSearchParams(width, max_tokens=10, num_beam_groups=groups, diversity_penalty=penalty)
    model = decisive_model(architecture)
    for prompt, output in zip(prompts(), engine(architecture).beam_search(prompts(), params), strict=True):
        expected = plain_groups(model, prompt["prompt_token_ids"], params)[:width]
        assert [each.token_ids for each in output.sequences] == [ids for _, ids in expected]
        assert [each.score for each in output.sequences] == pytest.approx([score for score, _ in expected], abs=1e-4)


@ARCHITECTURES
def test_every_hypothesis_contains_the_words(architecture: str) -> None:
    llm, words = engine(architecture), [[9, 10], [17], [9, 11, 12]]
    params = BeamSearchParams(4, max_tokens=16, force_words=words, num_return_sequences=4)
    model = decisive_model(architecture)
    for prompt, output in zip(prompts(), llm.beam_search(prompts(), params), strict=True):
        assert len(output.sequences) == 4
        for found in output.sequences:
            ids = found.token_ids
            assert all(any(ids[i : i + len(w)] == w for i in range(len(ids))) for w in words), ids
            own = sum(log_probs(model, prompt["prompt_token_ids"], [ids[:i]])[0][ids[i]] for i in range(len(ids)))
            assert found.cum_logprob == pytest.approx(own, abs=1e-3)
    assert not any(llm.engine.cache.pool.holders)


@ARCHITECTURES
def test_a_search_that_is_watched_shows_what_is_settled(architecture: str) -> None:
    llm = engine(architecture)
    params = [
        BeamSearchParams(4, max_tokens=20), BeamSearchParams(3, max_tokens=12, ignore_eos=True),
        BeamSearchParams(4, max_tokens=9, num_beam_groups=2, diversity_penalty=0.1), BeamSearchParams(1, max_tokens=20),
        BeamSearchParams(4, max_tokens=12, force_words=[[9]]), BeamSearchParams(2, max_tokens=20, early_stopping=True),
    ]  # fmt: skip
    pieces: dict[int, list[list[int]]] = {i: [] for i in range(len(params))}
    for delta in llm.stream(prompts(), params):
        pieces[delta.request_index].append(delta.token_ids)
        last = delta
    best = [output.sequences[0].token_ids for output in llm.beam_search(prompts(), params)]
    assert [[token for piece in own for token in piece] for own in pieces.values()] == best
    assert sum(len(own) > 1 for own in pieces.values()) >= 1  # before the end
    assert last.finish_reason in ("stop", "length")


def test_words_are_given_as_texts_and_text_is_streamed(tokenizer: Tokenizer) -> None:
    llm = llm_of(tiny_model("encoder_decoder", vocab_size=tokenizer.vocab_size), tokenizer)
    params = BeamSearchParams(3, max_tokens=12, force_words=["xyz", "세계"])
    text = "".join(delta.text for delta in llm.stream("abc", params))
    assert "xyz" in text and "세계" in text
    assert text == llm.beam_search("abc", params)[0].sequences[0].text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beam_groups": 3}, "num_beam_groups"), ({"num_beam_groups": 0}, "num_beam_groups"),
        ({"diversity_penalty": 1.0}, "num_beam_groups"), ({"diversity_penalty": -1, "num_beam_groups": 2}, "diversity"),
        ({"force_words": "abc"}, "force_words"), ({"force_words": [[]]}, "force_words"),
        ({"force_words": [[5]] * 65}, "force_words"), ({"force_words": [[5]], "num_beam_groups": 2}, "force_words"),
        ({"force_words": [[99]]}, "token id 99"), ({"force_words": [[5] * 20]}, "20 tokens"),
        ({"force_words": ["text"]}, "tokenizer"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine("decoder_only").beam_search(prompts()[0], BeamSearchParams(4, max_tokens=16, **options))
    assert engine("decoder_only").generate(prompts()[0], SamplingParams(max_tokens=1), use_tqdm=False)[0].finished
