"""On the C++ core a sequence's tokens and log-probabilities do not depend on what runs beside it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import LLM, BeamSearchParams, SamplingParams, native_runner
from kernels.quantization import quantize
from models import DecoderOnly, EncoderDecoder, checkpoint
from models.native import live_weights
from models.sources import BITS, FOUR_BIT_GROUP
from tests.conftest import tiny_model
from tests.models.made_folders import llama_config, llama_shapes, t5_config, t5_shapes, write
from tests.models.small_families import build, save

ARCHITECTURES = pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])
GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logprobs=3)
STORAGES = ["float32", "bfloat16", "int8", "int4"]
LENGTHS = [1, 17, 5, 40, 16, 2, 33]


def model_of(architecture: str, **changes: object) -> DecoderOnly | EncoderDecoder:
    shape: dict[str, object] = {"dim": 64, "ffn_dim": 96, "activation": "swiglu", "positions": "rotary"}
    if architecture == "encoder_decoder":
        shape |= {"positions": "relative", "activation": "gelu", "encoder_depth": 2}
    return tiny_model(architecture, **(shape | changes))


def engine(architecture: str, storage: str, **options: Any) -> LLM:
    model = model_of(architecture)
    if storage in BITS:
        options["quantization"] = storage
    else:
        model = model.to(getattr(torch, storage))
    return LLM.from_model(model, None, backend="native", **options)


def prompts() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(3)
    return [{"prompt_token_ids": torch.randint(4, 60, (n,), generator=generator).tolist()} for n in LENGTHS]


def targets() -> list[list[int]]:
    return [[7 + n, 9, 11, 8 + n % 5] for n in range(len(LENGTHS))]


def generated(llm: LLM, chosen: list[dict[str, list[int]]], params: Any = GREEDY) -> list[tuple[list[int], Any]]:
    """Tokens and the log-probabilities beside them, of every prompt."""
    outputs = [output.outputs[0] for output in llm.generate(chosen, params, use_tqdm=False)]
    return [(output.token_ids, output.logprobs) for output in outputs]


@ARCHITECTURES
@pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_prompt_gives_the_same_bits_alone_in_any_batch_and_in_slices(
    architecture: str, storage: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engine(architecture, storage, kv_cache_dtype=cache)
    alone = [generated(llm, [prompt])[0] for prompt in prompts()]
    scores = [llm.score([prompt], [target])[0] for prompt, target in zip(prompts(), targets(), strict=True)]
    assert generated(llm, prompts()) == alone
    assert generated(llm, prompts()[::-1]) == alone[::-1]
    assert llm.score(prompts(), targets()) == scores
    monkeypatch.setattr(native_runner, "MAX_TOKENS", 7)
    assert generated(llm, prompts()) == alone
    assert generated(llm, prompts()[3:4]) == alone[3:4]
    assert llm.score(prompts(), targets()) == scores


@ARCHITECTURES
@pytest.mark.parametrize("storage", STORAGES)
def test_prompts_that_join_late_change_nothing(architecture: str, storage: str) -> None:
    """Two places for seven prompts of different lengths: each joins as another leaves, while a third goes on."""
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, logprobs=0) for n in (2, 9, 4, 7, 1, 5, 3)]
    crowded, roomy = engine(architecture, storage, max_num_seqs=2), engine(architecture, storage)
    together = generated(crowded, prompts(), params)
    assert together == [generated(roomy, [p], own)[0] for p, own in zip(prompts(), params, strict=True)]
    stream = roomy.stream(prompts()[1:2], GREEDY)
    tokens = [*next(stream).token_ids, *next(stream).token_ids]
    assert generated(roomy, prompts()[3:5]) == [generated(roomy, [p])[0] for p in prompts()[3:5]]
    tokens += [token for delta in stream for token in delta.token_ids]
    assert tokens == generated(roomy, prompts()[1:2])[0][0]


@ARCHITECTURES
@pytest.mark.parametrize("storage", STORAGES)
def test_threads_and_the_size_of_blocks_change_nothing(architecture: str, storage: str) -> None:
    before = torch.get_num_threads()
    expected = generated(engine(architecture, storage), prompts())
    try:
        for options in ({"num_threads": 2}, {"block_size": 48, "num_threads": 3}):
            assert generated(engine(architecture, storage, **options), prompts()) == expected
    finally:
        torch.set_num_threads(before)


def dequantized(model: DecoderOnly | EncoderDecoder, bits: int) -> DecoderOnly | EncoderDecoder:
    """The model with the weights that its quantised ones stand for."""
    plain = copy.deepcopy(model)
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for names, weight in live_weights(model, f"int{bits}"):
            weights[names[0]].copy_(weight if isinstance(weight, torch.Tensor) else weight.dequantize())
    return plain


@ARCHITECTURES
@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_quantised_decoding_is_that_of_the_weights_they_stand_for(architecture: str, bits: int) -> None:
    """But for the rounding of activations to eight bits: log-probabilities differ by 0.02 on average, 0.1 at most."""
    model = model_of(architecture)
    weight = model.decoder.blocks[0].ffn.down.weight
    assert weight.shape[1] % FOUR_BIT_GROUP == 0
    plain = dequantized(model, bits)
    assert torch.equal(plain.decoder.blocks[0].ffn.down.weight, quantize(weight, bits).dequantize())
    llm = LLM.from_model(model, None, backend="native", quantization=f"int{bits}", kv_cache_dtype="float32")
    ours, theirs = (
        torch.tensor([score.logprobs for score in own.score(prompts(), targets())])
        for own in (llm, LLM.from_model(plain, None, backend="reference"))
    )
    assert (ours - theirs).abs().mean() < 0.02
    assert (ours - theirs).abs().max() < 0.1


@ARCHITECTURES
@pytest.mark.parametrize("beams", [1, 4])
def test_beams_are_those_of_the_reference(architecture: str, beams: int) -> None:
    model = model_of(architecture)
    params = BeamSearchParams(beams, max_tokens=12, num_return_sequences=beams, length_penalty=0.8)
    ours, theirs = (
        [sequence for output in LLM.from_model(model, None, backend=backend).beam_search(prompts(), params)
         for sequence in output.sequences]
        for backend in ("native", "reference")
    )  # fmt: skip
    assert [sequence.token_ids for sequence in ours] == [sequence.token_ids for sequence in theirs]
    mine, other = (torch.tensor([sequence.score for sequence in each]) for each in (ours, theirs))
    torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


@ARCHITECTURES
@pytest.mark.parametrize("storage", STORAGES)
def test_a_search_gives_the_same_bits_alone_and_beside_others(architecture: str, storage: str) -> None:
    params = BeamSearchParams(3, max_tokens=20, num_return_sequences=3)
    llm = engine(architecture, storage)
    alone = [llm.beam_search([prompt], params)[0].sequences for prompt in prompts()]
    assert [output.sequences for output in llm.beam_search(prompts(), params)] == alone


def folder_of(kind: str, path: Path) -> Path:
    if kind == "llama":
        config = llama_config(dim=64, ffn=96)
        return write(path, config, llama_shapes(config))
    if kind == "t5":
        config = t5_config(dim=64, ffn=96)
        return write(path, config, t5_shapes(config))
    folder = save(build(kind), path)
    assert json.loads((folder / "config.json").read_text())["model_type"] == kind
    return folder


@pytest.mark.parametrize("kind", ["llama", "t5", "gpt2", "bart", "marian"])
def test_a_folder_is_served_as_the_model_in_it(kind: str, tmp_path: Path) -> None:
    """Weights read from a file one by one, and those of a live model, are packed to the same bits."""
    folder = folder_of(kind, tmp_path)
    for storage in STORAGES:
        options: dict[str, Any] = {"max_model_len": 64, "backend": "native"}
        dtype = storage if storage not in BITS else "float32"
        model, _ = checkpoint.load(folder, dtype=getattr(torch, dtype))
        if storage in BITS:
            options["quantization"] = storage
        ours = LLM(folder, device="cpu", dtype=dtype, **options)
        live = LLM.from_model(model, None, **options)
        assert generated(ours, prompts()) == generated(live, prompts())


PARAMS = [
    GREEDY,
    SamplingParams(temperature=0.9, top_p=0.9, max_tokens=24, seed=7, ignore_eos=True, logprobs=1),
    SamplingParams(temperature=1.2, top_k=20, max_tokens=17, seed=8, ignore_eos=True, repetition_penalty=1.2),
]


@ARCHITECTURES
@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_a_request_alone_among_strangers_sent_back_and_with_a_warm_cache(architecture: str, storage: str) -> None:
    """Whatever happens to a request on its way, its tokens and log-probabilities stay the same to the last bit."""
    llm = engine(architecture, storage)
    asked = [(prompt, params) for prompt in prompts() for params in PARAMS]
    expected = [generated(engine(architecture, storage), [prompt], params)[0] for prompt, params in asked]
    ours, theirs = [prompt for prompt, _ in asked], [params for _, params in asked]
    strangers = [{"prompt_token_ids": [9 + i, 5, *range(4, 4 + i)]} for i in range(32)]
    noise = [SamplingParams(temperature=1.0, seed=i, max_tokens=3 + i, ignore_eos=True) for i in range(32)]
    among = generated(llm, [*strangers[:16], *ours, *strangers[16:]], [*noise[:16], *theirs, *noise[16:]])
    assert among[16 : 16 + len(ours)] == expected
    hits = llm.engine.cache.counts.prompt_hits + llm.engine.cache.counts.source_hits
    assert generated(llm, ours, theirs) == expected
    assert llm.engine.cache.counts.prompt_hits + llm.engine.cache.counts.source_hits > hits
    block, blocks = llm.engine.cache.storage.blocks.shape[1], 14 if architecture == "encoder_decoder" else 6  # type: ignore[attr-defined]
    small = engine(
        architecture, storage, kv_cache_memory_bytes=blocks * block, max_num_batched_tokens=11, max_num_seqs=8
    )
    assert generated(small, [*ours, *ours[::-1]], [*theirs, *theirs[::-1]]) == expected + expected[::-1]
    assert small.engine.scheduler.num_preemptions > 0
