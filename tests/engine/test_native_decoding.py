"""The C++ core's programs give what the modules they were made of give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine import LLM, SamplingParams
from models import EncoderDecoder
from tests.conftest import tiny_model

LENGTHS = [1, 17, 5, 40, 16]
ROPE_SCALING = {"kind": "llama3", "factor": 4.0, "original_max_seqlen": 16}
SHAPES: list[dict[str, object]] = [
    {"positions": "learned", "activation": "gelu_new", "position_offset": 2, "embedding_norm": True},
    {"positions": "sinusoidal", "norm_place": "post", "activation": "relu"},
    {"positions": "relative", "norm": "rmsnorm", "bias": False, "softmax_scale": 1.0, "activation": "geglu_new"},
    {"positions": "relative", "relative_per_layer": True, "output_scale": 0.3, "tie_embeddings": True},
    {"positions": "rotary", "kv_heads": 2, "activation": "swiglu", "norm": "rmsnorm", "ffn_dim": 88},
    {"positions": "rotary", "rope_fraction": 0.5, "parallel_residual": True, "shared_norm": True},
    {"positions": "rotary", "parallel_residual": True, "rope_scaling": ROPE_SCALING, "tie_embeddings": False},
    {"positions": "rotary", "norm_place": "sandwich", "attention_softcap": 5.0, "logits_softcap": 3.0, "window": 7},
    {"positions": "alibi", "qk_norm": True, "norm": "rmsnorm", "kv_heads": 1, "activation": "silu"},
    {"positions": "none", "norm_place": "post", "output_scale": 0.5, "head_bias": True, "head_dim": 24},
]


def prompts() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    return [{"prompt_token_ids": torch.randint(4, 60, (n,), generator=generator).tolist()} for n in LENGTHS]


def targets() -> list[list[int]]:
    return [[7 + n, 9, 11, 8 + n % 5] for n in range(len(LENGTHS))]


def full_logprobs(model: torch.nn.Module, prompt: list[int], target: list[int]) -> Tensor:
    if isinstance(model, EncoderDecoder):
        logits = model(torch.tensor([prompt]), torch.tensor([[1, *target]]))[0]
    else:
        logits = model(torch.tensor([prompt + target]))[0, len(prompt) - 1 :]
    return logits.log_softmax(-1)[: len(target)].gather(1, torch.tensor(target)[:, None])[:, 0]


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
@torch.no_grad()
def test_scores_and_decoded_tokens_equal_those_of_a_full_forward_pass(
    architecture: str, shape: dict[str, object]
) -> None:
    if "parallel_residual" in shape and architecture == "encoder_decoder":
        pytest.skip("no such model")
    model = tiny_model(architecture, **shape)
    llm = LLM.from_model(model, None, backend="native")
    for prompt, target, score in zip(prompts(), targets(), llm.score(prompts(), targets()), strict=True):
        expected = full_logprobs(model, prompt["prompt_token_ids"], target)
        torch.testing.assert_close(torch.tensor(score.logprobs[: len(target)]), expected, atol=2e-5, rtol=2e-5)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    native, plain = (
        [output.outputs[0].token_ids for output in engine.generate(prompts(), params, use_tqdm=False)]
        for engine in (llm, LLM.from_model(model, None, backend="reference"))
    )
    assert native == plain
