"""Random models: the C++ core scores as their modules do, and each prompt alone as in a batch."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from engine import LLM
from models import ConfigError, DecoderOnly, EncoderDecoder
from tests.conftest import tiny_model
from tests.engine.test_native_decoding import full_logprobs

CHOICES: dict[str, list[Any]] = {
    "positions": ["learned", "sinusoidal", "relative", "rotary", "rotary", "alibi", "none"],
    "norm": ["layernorm", "rmsnorm"], "norm_place": ["pre", "pre", "post", "sandwich"],
    "activation": ["relu", "gelu", "gelu_new", "silu", "swiglu", "geglu", "geglu_new"],
    "dim": [32, 48, 64], "ffn_dim": [24, 64, 100], "depth": [1, 2], "bias": [True, False],
    "tie_embeddings": [True, False], "head_dim": [None, 8, 24], "embedding_norm": [False, False, True],
    "logits_softcap": [0.0, 0.0, 3.0], "attention_softcap": [0.0, 0.0, 4.0], "output_scale": [1.0, 1.0, 0.4],
    "window": [None, None, 5], "qk_norm": [False, False, True],
}  # fmt: skip


def draw_model(draw: random.Random, seed: int) -> DecoderOnly | EncoderDecoder:
    """Draws again where the options do not go together."""
    while True:
        heads = draw.choice([2, 4])
        shape = {name: draw.choice(values) for name, values in CHOICES.items()}
        shape |= {"heads": heads, "kv_heads": draw.choice([1, 2, heads]), "encoder_depth": draw.choice([1, 2])}
        architecture = draw.choice(["encoder_decoder", "decoder_only"])
        if architecture == "decoder_only":
            shape |= {"encoder_depth": 0, "parallel_residual": draw.choice([False, False, True])}
        try:
            return tiny_model(architecture, seed, **shape)
        except ConfigError:
            continue


@torch.no_grad()
def check(seed: int) -> None:
    draw = random.Random(seed)
    model = draw_model(draw, seed)
    lengths = [draw.choice([1, 16, draw.randint(1, 40)]) for _ in range(4)]
    prompts = [[draw.randint(4, 59) for _ in range(n)] for n in lengths]
    targets = [[draw.randint(4, 59) for _ in range(draw.randint(1, 9))] for _ in prompts]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    for quantization in (None, "int8", "int4"):
        llm = LLM.from_model(model, None, backend="native", quantization=quantization)
        scores = llm.score(inputs, targets)
        assert [llm.score([i], [t])[0] for i, t in zip(inputs, targets, strict=True)] == scores, seed
        if quantization is not None:
            continue
        for prompt, target, score in zip(prompts, targets, scores, strict=True):
            expected = full_logprobs(model, prompt, target)
            actual = torch.tensor(score.logprobs[: len(target)])
            torch.testing.assert_close(actual, expected, atol=5e-5, rtol=5e-5, msg=f"seed {seed}: {model.config}")


def test_random_models() -> None:
    for seed in range(25):
        check(seed)


@pytest.mark.slow
def test_many_random_models() -> None:
    for seed in range(25, 800):
        check(seed)
