"""``LLM.beam_search``: beams through the cache go where they go without one, whatever else the engine runs."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import BeamSearchParams, BeamSequence, SamplingParams
from models import DecoderOnly, EncoderDecoder
from models.config import EOS_ID
from tests.conftest import tiny_model
from tests.engine.llms import DEVICE, llm_from, llm_of

LENGTHS = [1, 17, 5, 33, 16, 15]  # around block_size, ragged
Prompt = dict[str, list[int]]


def decisive_model(architecture: str, **changes: object) -> DecoderOnly | EncoderDecoder:
    """A random model that has clear preferences, so that beams never tie, and likes to end."""
    model = tiny_model(architecture, tie_embeddings=False, **changes)
    bias = torch.zeros(60)
    bias[EOS_ID] = 4.0
    with torch.no_grad():
        torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    on = functools.cache(bias.to)  # a CUDA graph cannot copy it
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + on(logits.device))
    return model


def prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    return [{"prompt_token_ids": torch.randint(4, 60, (n,), generator=generator).tolist()} for n in LENGTHS]


@torch.no_grad()
def log_probs(model: DecoderOnly | EncoderDecoder, prompt: list[int], outputs: list[list[int]]) -> list[list[float]]:
    """Of the token after each output, all as long, from one pass over everything."""
    if isinstance(model, EncoderDecoder):
        logits = model(torch.tensor([prompt] * len(outputs)), torch.tensor([[1, *output] for output in outputs]))
    else:
        logits = model(torch.tensor([prompt + output for output in outputs]))
    result: list[list[float]] = logits[:, -1].log_softmax(-1).tolist()
    return result


def plain_search(model: DecoderOnly | EncoderDecoder, prompt: list[int], params: BeamSearchParams) -> list[Any]:
    """Beam search as one would write it first: (score, token ids) of the best hypotheses."""
    width, alpha, early = params.beam_width, params.length_penalty, params.early_stopping
    size, start = params.no_repeat_ngram_size, [1] if isinstance(model, EncoderDecoder) else prompt
    limit = min(params.max_tokens or 64, 64 - len(start))
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    for length in range(1, limit + 1):
        candidates = [
            (total + logprob, [*ids, token])
            for (total, ids), row in zip(running, log_probs(model, prompt, [ids for _, ids in running]), strict=True)
            for token, logprob in enumerate(row)
            if not (size and repeats([*start, *ids, token], size))
        ]
        candidates = sorted(candidates, reverse=True)[: 2 * width]
        ends = [length == limit or (ids[-1] == EOS_ID and not params.ignore_eos) for _, ids in candidates]
        finished += [(c[0] / length**alpha, c[1]) for c, end in zip(candidates[:width], ends, strict=False) if end]
        finished = sorted(finished, reverse=True)[:width]
        running = [candidate for candidate, end in zip(candidates, ends, strict=True) if not end][:width]
        hoped = limit if early == "never" and alpha > 0 else length
        full = len(finished) == width
        if full and (early is True or width == 1 or best_hope(running, hoped, alpha) <= finished[-1][0]):
            break
    return finished[: params.num_returned]


def best_hope(running: list[tuple[float, list[int]]], length: int, alpha: float) -> float:
    return running[0][0] / length**alpha if running else -float("inf")


def repeats(ids: list[int], size: int) -> bool:
    grams = [ids[i : i + size] for i in range(len(ids) - size + 1)]
    return bool(grams) and grams[-1] in grams[:-1]


PARAMS = [
    BeamSearchParams(4, max_tokens=20),
    BeamSearchParams(3, max_tokens=24, length_penalty=2.0, early_stopping=True),
    BeamSearchParams(1, max_tokens=20),
    BeamSearchParams(5, max_tokens=20, length_penalty=0.6, early_stopping="never", num_return_sequences=2),
    BeamSearchParams(2, max_tokens=18, no_repeat_ngram_size=2, ignore_eos=True),
    BeamSearchParams(7, max_tokens=None, length_penalty=1.5),
]


def answers(sequences: list[BeamSequence]) -> list[list[int]]:
    return [sequence.token_ids for sequence in sequences]


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])
def test_beams_through_the_cache_are_those_of_a_plain_search(architecture: str) -> None:
    model = decisive_model(architecture)
    expected = [plain_search(model, p["prompt_token_ids"], own) for p, own in zip(prompts(), PARAMS, strict=True)]
    for block_size in (1, 4, 16):
        llm = llm_of(model, block_size=block_size)
        for output, best in zip(llm.beam_search(prompts(), PARAMS), expected, strict=True):
            assert answers(output.sequences) == [ids for _, ids in best]
            assert [each.score for each in output.sequences] == pytest.approx([score for score, _ in best], abs=1e-4)


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])
def test_a_search_does_not_notice_what_runs_beside_it(architecture: str) -> None:
    model = decisive_model(architecture)
    llm = llm_of(model, block_size=4)
    alone = [llm.beam_search(prompt, own)[0].sequences for prompt, own in zip(prompts(), PARAMS, strict=True)]
    for options in ({"backend": "torch"}, {"backend": "reference"}, {"max_num_seqs": 8}):
        queued = llm_of(model, **options).beam_search(prompts(), PARAMS)
        assert [answers(output.sequences) for output in queued] == [answers(each) for each in alone]
    sampling = SamplingParams(temperature=1.0, seed=3, max_tokens=40, ignore_eos=True)
    free = llm.generate(prompts(), sampling, use_tqdm=False)

    def work(turn: int) -> bool:
        if turn % 2:
            return [o.outputs for o in llm.generate(prompts(), sampling, use_tqdm=False)] == [o.outputs for o in free]
        return [answers(o.sequences) for o in llm.beam_search(prompts(), PARAMS)] == [answers(each) for each in alone]

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(4)))
    assert not llm.engine.has_unfinished_requests()


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])
def test_every_block_and_row_is_free_again(architecture: str) -> None:
    llm = llm_of(decisive_model(architecture), block_size=4)
    cache = llm.engine.cache
    before = cache.pool.num_available, cache.num_free_rows
    llm.beam_search(prompts(), PARAMS)
    assert (cache.pool.num_available, cache.num_free_rows) == before
    assert not any(cache.pool.holders)


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])
def test_one_beam_is_greedy_decoding(architecture: str) -> None:
    llm = llm_of(decisive_model(architecture))
    greedy = llm.generate(prompts(), SamplingParams(temperature=0, max_tokens=15, logprobs=0), use_tqdm=False)
    searched = llm.beam_search(prompts(), BeamSearchParams(1, max_tokens=15, length_penalty=2.0))
    for output, expected in zip(searched, (each.outputs[0] for each in greedy), strict=True):
        (found,) = output.sequences
        assert (found.token_ids, found.finish_reason) == (expected.token_ids, expected.finish_reason)
        assert found.cum_logprob == pytest.approx(expected.cumulative_logprob, abs=1e-4)
        assert found.score == pytest.approx(found.cum_logprob / len(found.token_ids) ** 2)


def test_an_output_says_what_was_asked_and_found(model_folder: Path) -> None:
    llm = llm_from(model_folder)
    assert llm.tokenizer is not None
    (output,) = llm.beam_search("abc", BeamSearchParams(3, max_tokens=6))
    source = output.encoder_prompt_token_ids if llm.config.is_encoder_decoder else output.prompt_token_ids
    assert source == llm.tokenizer.encode("abc")
    assert "abc" in (output.prompt, output.encoder_prompt)
    assert len(output.sequences) == 3 and output.error is None
    for found in output.sequences:
        assert found.tokens == output.prompt_token_ids + found.token_ids
        assert found.text == llm.tokenizer.decode(found.token_ids)
        assert (found.finish_reason == "stop") == (found.token_ids[-1] == EOS_ID)
    assert [each.score for each in output.sequences] == sorted((each.score for each in output.sequences), reverse=True)


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])
def test_a_search_that_is_not_finite_fails_alone(architecture: str) -> None:
    model = decisive_model(architecture).to(DEVICE)
    stack = model.encoder if isinstance(model, EncoderDecoder) else model.decoder
    llm = llm_of(model, block_size=4)
    asked, params = prompts()[:3], BeamSearchParams(3, max_tokens=8)
    expected = [answers(output.sequences) for output in llm.beam_search(asked, params)]
    broken = next(i for i in range(4, 60) if not any(i in ids for each in expected for ids in each))
    with torch.no_grad():
        stack.embedding.tokens.weight[broken] = float("nan")
    first, failed, *rest = llm.beam_search([asked[0], {"prompt_token_ids": [broken]}, *asked[1:]], params)
    assert failed.sequences == []
    assert failed.error == "the model gave no finite logits"
    assert [answers(output.sequences) for output in (first, *rest)] == expected
    # and it leaves nothing behind in the blocks it held
    assert [answers(output.sequences) for output in llm.beam_search(asked, params)] == expected


def test_a_search_that_is_interrupted_frees_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = llm_of(decisive_model("decoder_only"))
    free = llm.engine.cache.num_free_rows
    run, steps = llm.engine.runner.logits, iter(range(3))

    def interrupt(sequences: list[Any]) -> torch.Tensor:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return run(sequences)

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "logits", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.beam_search(prompts(), PARAMS)
    assert not llm.engine.has_unfinished_requests()
    assert llm.engine.cache.num_free_rows == free


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (BeamSearchParams(9, max_tokens=2), "beam_width is 9, more than max_num_seqs 8"),
        (BeamSearchParams(8, max_tokens=60), "cache blocks.*beam_width"),
        (SamplingParams(), "BeamSearchParams"),
        (None, "BeamSearchParams"),
        ([BeamSearchParams(2)], "2 prompts but 1 params"),
    ],
)
def test_what_cannot_run_is_a_sentence(params: Any, message: str) -> None:
    small = {"max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 16}
    llm = llm_of(tiny_model("decoder_only"), **small)
    with pytest.raises(ValueError, match=message):
        llm.beam_search(prompts()[:3:2], params)
    assert not llm.engine.has_unfinished_requests()
