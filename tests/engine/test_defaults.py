"""What generation_config.json and config.json say counts where the caller says nothing, and always where it must."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine import LLM, BeamSearchParams, SamplingParams
from engine.defaults import default_params
from tests.engine.llms import llm_from
from tests.models.small_families import build, save

PROMPT = {"prompt_token_ids": [150, 160, 170]}


def folder(tmp_path: Path, name: str, generation: dict[str, Any], **config: Any) -> Path:
    save(build(name), tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | config))
    return tmp_path


def output_ids(llm: LLM, params: SamplingParams | None = None) -> list[int]:
    return llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].token_ids


def test_a_foreign_model_is_greedy_unless_its_makers_sample(tmp_path: Path) -> None:
    llm = llm_from(folder(tmp_path, "gpt2", {"max_new_tokens": 5}), max_num_seqs=4)
    assert output_ids(llm) == output_ids(llm, SamplingParams(temperature=0, max_tokens=5))
    assert default_params({"do_sample": True, "temperature": 0.6, "top_k": 7, "max_length": 9}, 4, beams=True) == (
        SamplingParams(temperature=0.6, top_k=7, max_tokens=5)
    )


def test_our_own_models_keep_the_usual_defaults() -> None:
    assert default_params({}, 1, beams=True) == SamplingParams()


def test_a_model_made_for_beams_is_searched_with_beams(tmp_path: Path) -> None:
    llm = llm_from(folder(tmp_path, "bart", {"num_beams": 4, "max_length": 9, "length_penalty": 2.0, "eos_token_id": 3,
                                        "decoder_start_token_id": 2}))  # fmt: skip
    (found,) = llm.beam_search(PROMPT, BeamSearchParams(4, max_tokens=8, length_penalty=2.0))
    (output,) = llm.generate(PROMPT, use_tqdm=False)
    assert [each.token_ids for each in output.outputs] == [found.sequences[0].token_ids]
    streamed = [token_id for delta in llm.stream(PROMPT) for token_id in delta.token_ids]
    assert streamed == output_ids(llm, SamplingParams(temperature=0, max_tokens=8))


def test_forced_and_suppressed_tokens_bind_samples_too(tmp_path: Path) -> None:
    generation = {"forced_bos_token_id": 11, "forced_eos_token_id": 3, "eos_token_id": 3}
    llm = llm_from(folder(tmp_path, "bart", generation, decoder_start_token_id=2))
    ids = output_ids(llm, SamplingParams(temperature=0, max_tokens=6))
    assert (ids[0], ids[-1], len(ids)) == (11, 3, 6)
    llm.set_generation(forced_bos_id=None, forced_eos_id=None, suppress_ids=tuple(ids[1:5]))
    assert not set(ids[1:5]) & set(output_ids(llm, SamplingParams(temperature=1, max_tokens=50, seed=1)))


def test_no_ngram_comes_twice(tmp_path: Path) -> None:
    llm = llm_from(folder(tmp_path, "gpt2", {}))
    ids = [*PROMPT["prompt_token_ids"], *output_ids(llm, SamplingParams(temperature=0, max_tokens=60,
                                                                       no_repeat_ngram_size=2))]  # fmt: skip
    pairs = list(itertools.pairwise(ids))
    assert len(set(pairs)) == len(pairs)


def test_a_task_puts_its_prefix_before_the_source(tmp_path: Path) -> None:
    tasks = {"translation_en_to_fr": {"prefix": "ab ", "num_beams": 4}}
    llm = llm_from(folder(tmp_path, "t5", {"decoder_start_token_id": 0, "eos_token_id": 1}, task_specific_params=tasks))
    request = llm.reader.request("0", PROMPT, SamplingParams(task="translation_en_to_fr"), 0)
    assert request.encoder_prompt_token_ids == PROMPT["prompt_token_ids"]  # ids are used as given
    assert llm.reader._with_task({"prompt": "c"}, "translation_en_to_fr") == "ab c"
    assert llm.reader._with_task("c", "translation_en_to_fr") == "ab c"
    with pytest.raises(ValueError, match="no task 'summarization': it has translation_en_to_fr"):
        llm.generate("x", SamplingParams(task="summarization"))


def test_the_ids_of_older_files_are_read_from_config_json(tmp_path: Path) -> None:
    where = folder(tmp_path, "bart", {}, eos_token_id=[3, 5], forced_bos_token_id=11, decoder_start_token_id=7)
    beside = llm_from(where).model.generation
    assert (beside.eos_ids, beside.forced_bos_id, beside.start_id) == ((3, 5), None, 7)
    (where / "generation_config.json").unlink()
    alone = llm_from(where).model.generation
    assert (alone.eos_ids, alone.forced_bos_id, alone.start_id) == ((3, 5), 11, 7)


@pytest.mark.parametrize("beams", [1, 4])
def test_a_summariser_s_settings_give_transformers_output(beams: int, tmp_path: Path) -> None:
    generation = {"num_beams": beams, "min_length": 14, "max_length": 24, "length_penalty": 2.0, "early_stopping": True,
                  "no_repeat_ngram_size": 3, "forced_bos_token_id": 11, "forced_eos_token_id": 100,
                  "eos_token_id": list(range(100, 400)), "decoder_start_token_id": 2, "pad_token_id": 1}  # fmt: skip
    model = build("bart")
    where = folder(tmp_path, "bart", generation)
    model.generation_config = transformers.GenerationConfig.from_pretrained(where)
    wanted = model.generate(torch.tensor([PROMPT["prompt_token_ids"]]))[0, 1:].tolist()
    assert len(wanted) >= 13
    assert output_ids(llm_from(where)) == wanted


@pytest.mark.parametrize(
    "settings", [{"renormalize_logits": True, "bad_words_ids": [[72]]}, {"repetition_penalty": 2.5}], ids=str
)
def test_a_search_follows_what_its_makers_ask_for(settings: dict[str, Any], tmp_path: Path) -> None:
    generation = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 12, "no_repeat_ngram_size": 2,
                  "eos_token_id": list(range(100, 200)), "decoder_start_token_id": 2, "pad_token_id": 1}  # fmt: skip
    model = build("bart")
    where = folder(tmp_path, "bart", generation | settings)
    model.generation_config = transformers.GenerationConfig.from_pretrained(where)
    ids = torch.tensor([PROMPT["prompt_token_ids"]])
    wanted = model.generate(ids, output_scores=True, return_dict_in_generate=True)
    (found,) = llm_from(where).beam_search(PROMPT)
    scores = torch.tensor([each.score for each in found.sequences])
    torch.testing.assert_close(scores, wanted.sequences_scores, atol=1e-4, rtol=0)
    for ours, theirs in zip(found.sequences, wanted.sequences[:, 1:].tolist(), strict=True):
        assert ours.token_ids == theirs[: len(ours.token_ids)]


def test_what_cannot_be_followed_is_refused_by_name(tmp_path: Path) -> None:
    llm = llm_from(folder(tmp_path, "gpt2", {"exponential_decay_length_penalty": [4, 1.5]}))
    with pytest.raises(ValueError, match="exponential_decay_length_penalty"):
        llm.generate(PROMPT)
    assert output_ids(llm, SamplingParams(temperature=0, max_tokens=3))
    with pytest.raises(ValueError, match="asks for no beams"):
        llm_from(folder(tmp_path, "gpt2", {})).beam_search(PROMPT)


@pytest.mark.parametrize("changes", [{"nothing": 1}, {"forced_bos_id": 99999}, {"eos_ids": (5, 99999)}], ids=str)
def test_generation_is_not_changed_into_what_cannot_run(changes: dict[str, Any], tmp_path: Path) -> None:
    llm = llm_from(folder(tmp_path, "gpt2", {}))
    with pytest.raises(ValueError, match=r"nothing|99999"):
        llm.set_generation(**changes)


def test_a_target_is_scored_as_it_would_be_generated(tmp_path: Path) -> None:
    generation = {"forced_bos_token_id": 11, "eos_token_id": 3, "decoder_start_token_id": 2}
    llm = llm_from(folder(tmp_path, "bart", generation))
    (free,), (given,) = llm.score([PROMPT], [[150, 160]]), llm.score([PROMPT], [[11, 150, 160, 3]])
    assert free.token_ids == [11, 150, 160, 3]
    assert free.total == given.total


def test_min_tokens_holds_stop_tokens_back_too(tmp_path: Path) -> None:
    llm = llm_from(folder(tmp_path, "gpt2", {}))
    free = output_ids(llm, SamplingParams(temperature=0, max_tokens=12))
    stopped = SamplingParams(temperature=0, max_tokens=12, min_tokens=6, stop_token_ids=free[:3])
    assert len(output_ids(llm, stopped)) >= 6
    with pytest.raises(ValueError, match="min_tokens"):
        SamplingParams(max_tokens=3, min_tokens=4)
