"""The engine over the GPU's kernels: the tokens of the native backend, whoever shares a step, and of padded steps."""

from __future__ import annotations

import pytest
import torch

from engine import LLM, BeamSearchParams, SamplingParams
from engine.decode_graphs import DecodeGraphs
from engine.runner import TorchRunner
from kernels.backend import TRITON_DEVICE
from tests.conftest import tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(TRITON_DEVICE != DEVICE, reason="Triton does not run here")
MODELS = {
    "encoder-decoder": ("encoder_decoder", {}),
    "decoder-only": ("decoder_only", {}),
    "t5": ("encoder_decoder", {"positions": "relative", "norm": "rmsnorm", "encoder_depth": 2}),
    "alibi": ("decoder_only", {"positions": "alibi"}),
    "windows": ("decoder_only", {"window": 7, "attention_softcap": 20.0}),
}
KINDS = pytest.mark.parametrize("kind", list(MODELS))
BOTH = pytest.mark.parametrize("kind", ["encoder-decoder", "decoder-only"])


def engines(kind: str, **options: object) -> tuple[LLM, LLM]:
    """The same model on the native backend and on Triton's; logits far apart, so that rounding decides nothing."""
    architecture, changes = MODELS[kind]
    made = []
    for backend, device in (("native", "cpu"), ("triton", DEVICE)):
        model = tiny_model(architecture, tie_embeddings=False, **changes)
        torch.nn.init.normal_(model.lm_head.weight, std=0.5)
        limits = {"max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 20} | options
        made.append(LLM.from_model(model.to(device), None, backend=backend, **limits))
    return made[0], made[1]


def prompts(*lengths: int) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": [4 + (7 * i + n) % 50 for i in range(n)]} for n in lengths]


def tokens(llm: LLM, given: list[dict[str, list[int]]], params: SamplingParams) -> list[list[list[int]]]:
    outputs = llm.generate(given, params, use_tqdm=False)
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


@KINDS
def test_greedy_tokens_are_those_of_the_native_backend(kind: str) -> None:
    native, triton = engines(kind)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    given = prompts(1, 17, 5)
    assert tokens(triton, given, params) == tokens(native, given, params)


@BOTH
def test_steps_sent_ahead_give_the_same_tokens(kind: str) -> None:
    """As on a GPU: a step takes the tokens that the one before has drawn where they lie."""
    native, triton = engines(kind)
    runner = triton.engine.runner
    assert isinstance(runner, TorchRunner) and runner.graphs is not None
    if runner.drawn is None:
        runner.drawn = runner.graphs.drawn = torch.zeros(8, dtype=torch.int64)
    given = prompts(2, 9, 4)
    each = [
        SamplingParams(temperature=0, max_tokens=5, ignore_eos=True),
        SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=3, logprobs=2, ignore_eos=True),
        SamplingParams(temperature=0, repetition_penalty=1.5, max_tokens=4, ignore_eos=True),
    ]
    expected, found = (llm.generate(given, each, use_tqdm=False) for llm in (native, triton))
    assert [output.outputs[0].token_ids for output in found] == [output.outputs[0].token_ids for output in expected]
    for ours, theirs in zip(found[1].outputs[0].logprobs or [], expected[1].outputs[0].logprobs or [], strict=True):
        assert list(ours) == list(theirs)


@BOTH
def test_prompts_in_pieces_beside_those_that_decode(kind: str) -> None:
    native, triton = engines(kind, max_num_batched_tokens=6, block_size=16)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    decoder_prompts = [
        {"prompt_token_ids": p["prompt_token_ids"]} if kind == "decoder-only"
        else {"encoder_prompt": prompts(3)[0], "decoder_prompt": p}
        for p in prompts(2, 13, 19)
    ]  # fmt: skip
    assert tokens(triton, decoder_prompts, params) == tokens(native, decoder_prompts, params)


@BOTH
def test_samples_with_seeds_and_filters(kind: str) -> None:
    native, triton = engines(kind)
    params = SamplingParams(n=2, temperature=0.9, top_k=20, top_p=0.9, seed=7, max_tokens=4, ignore_eos=True)
    given = prompts(3, 9)
    assert tokens(triton, given, params) == tokens(native, given, params)


@BOTH
def test_beams(kind: str) -> None:
    native, triton = engines(kind)
    search = BeamSearchParams(2, max_tokens=4)
    found = [
        [[s.token_ids for s in output.sequences] for output in llm.beam_search(prompts(2, 7), search)]
        for llm in (native, triton)
    ]
    assert found[0] == found[1]


def test_a_step_of_one_token_each_is_the_graphs() -> None:
    _, triton = engines("decoder-only")
    runner = triton.engine.runner
    assert isinstance(runner, TorchRunner) and isinstance(runner.graphs, DecodeGraphs)
    sizes = []
    run = runner.graphs.run
    runner.graphs.run = lambda tensors, parts: sizes.append(tensors.token_ids.shape[0]) or run(tensors, parts)  # type: ignore[func-returns-value]
    tokens(triton, prompts(3, 4, 5), SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    if runner.graphs.captures:
        assert any(step.graph is not None for step in runner.graphs._steps.values())
    else:
        assert sizes == [4, 4]  # two steps behind the prompts', of three sequences and a gap
