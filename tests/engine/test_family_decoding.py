"""Every family decodes as transformers does: greedily, all prompts in one batch, and with beams."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import LLM, BeamSearchParams, SamplingParams
from tests.engine.llms import llm_from
from tests.models.small_families import CASES, ENCODER_DECODERS, build, rewrite_as_4x, save

NUM_PROMPTS, NUM_TOKENS = 16, 64
ENDS = list(range(100, 140))  # so many end tokens that beams end here and there
# length_penalty, early_stopping, no_repeat_ngram_size, whether first and last tokens are forced
COMBINATIONS = [(0.6, True, 0, False), (1.0, False, 3, True), (2.0, "never", 0, True), (1.0, True, 3, False)]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, list[Path]]:
    model = build(request.param)
    return request.param, model, saved(model, tmp_path_factory)


@pytest.fixture(scope="module", params=ENCODER_DECODERS)
def seq2seq(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[LLM]]:
    model = build(request.param)
    model.generation_config.eos_token_id = ENDS
    model.generation_config.forced_eos_token_id = None
    return model, [llm_from(folder, max_num_seqs=32, max_model_len=128) for folder in saved(model, tmp_path_factory)]


def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The model's folder as transformers 5 writes it, and as transformers 4 did."""
    newer, older = (save(model, tmp_path_factory.mktemp("family")) for _ in range(2))
    rewrite_as_4x(older)
    return [newer, older]


def ragged_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    lengths = [1, 97, *torch.randint(1, 97, (NUM_PROMPTS - 2,), generator=generator).tolist()]
    return [torch.randint(150, 900, (length,), generator=generator).tolist() for length in lengths]


def padded(prompts: list[list[int]], left: bool) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids, mask = torch.zeros(len(prompts), width, dtype=torch.int64), torch.zeros(len(prompts), width, dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        ids[i, place], mask[i, place] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


def generated(ids: list[int], ends: list[int]) -> list[int]:
    """The output up to its end token, without the padding behind it."""
    end = next((i for i, token_id in enumerate(ids) if token_id in ends), len(ids) - 1)
    return ids[: end + 1]


def test_greedy_tokens_are_those_of_transformers(case: tuple[str, Any, list[Path]]) -> None:
    name, theirs, folders = case
    prompts, seq2seq = ragged_prompts(), name in ENCODER_DECODERS
    inputs = padded(prompts, left=not seq2seq)
    wanted = theirs.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False, num_beams=1)
    wanted = wanted[:, 1:] if seq2seq else wanted[:, inputs["input_ids"].shape[1] :]
    for folder in folders:
        llm = llm_from(folder, max_num_seqs=NUM_PROMPTS, max_model_len=192)
        ours = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=NUM_TOKENS),
            use_tqdm=False,
        )
        ends = list(llm.model.generation.eos_ids)
        assert ends
        for output, row in zip(ours, wanted.tolist(), strict=True):
            assert output.outputs[0].token_ids == generated(row, ends)


def check_beams(model: Any, llms: list[LLM], beams: int, combination: tuple[float, bool | str, int, bool]) -> None:
    penalty, stopping, ngram, forced = combination
    first, last = (11, ENDS[0]) if forced else (None, None)
    model.generation_config.forced_bos_token_id, model.generation_config.forced_eos_token_id = first, last
    prompts = [prompt[:20] for prompt in ragged_prompts()[:3]]
    returned = min(3, beams)
    result = model.generate(
        **padded(prompts, left=False), max_new_tokens=16, num_beams=beams, num_return_sequences=returned,
        length_penalty=penalty, early_stopping=stopping, no_repeat_ngram_size=ngram, do_sample=False,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    params = BeamSearchParams(
        beams, max_tokens=16, length_penalty=penalty, early_stopping=stopping,  # type: ignore[arg-type]
        num_return_sequences=returned, no_repeat_ngram_size=ngram,
    )  # fmt: skip
    for llm in llms:
        llm.set_generation(forced_bos_id=first, forced_eos_id=last)
        outputs = llm.beam_search([{"prompt_token_ids": prompt} for prompt in prompts], params)
        ours = [sequence for output in outputs for sequence in output.sequences]
        assert [sequence.token_ids for sequence in ours] == [
            generated(row, ENDS) for row in result.sequences[:, 1:].tolist()
        ]
        if beams > 1:  # one beam is greedy search there, without a score
            scores = torch.tensor([sequence.score for sequence in ours])
            torch.testing.assert_close(scores, result.sequences_scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("beams", "combination"), list(zip([1, 2, 4, 7], COMBINATIONS, strict=True)))
def test_beams_are_those_of_transformers(
    seq2seq: tuple[Any, list[LLM]], beams: int, combination: tuple[float, bool | str, int, bool]
) -> None:
    check_beams(*seq2seq, beams, combination)


def all_combinations() -> Iterator[tuple[float, bool | str, int, bool]]:
    return itertools.product((0.6, 1.0, 2.0), (True, False, "never"), (0, 3), (False, True))


@pytest.mark.slow
@pytest.mark.parametrize("combination", list(all_combinations()))
@pytest.mark.parametrize("beams", [2, 4, 7])
def test_beams_are_those_of_transformers_in_every_combination(
    seq2seq: tuple[Any, list[LLM]], beams: int, combination: tuple[float, bool | str, int, bool]
) -> None:
    check_beams(*seq2seq, beams, combination)
