"""Gemma: Llama with scaled embeddings, norms around one and a gated gelu (arXiv:2403.08295)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from models.config import TransformerConfig
from models.families import llama
from models.families.family import Entry, Family, Source, Values, activation, optional, plus_one, refuse_unless, rope

NORMS = {
    "decoder.norm": "model.norm",
    "decoder.blocks.{i}.attention_norm": "model.layers.{i}.input_layernorm",
    "decoder.blocks.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
}
WEIGHTS: dict[str, Entry] = llama.WEIGHTS | {ours: Source((theirs,), plus_one) for ours, theirs in NORMS.items()}


def options(values: Values) -> dict[str, Any]:
    """What Gemma and Gemma 2 have in common."""
    refuse_unless(values, "use_bidirectional_attention", False)
    attention_bias = optional(values, "attention_bias", False)
    return {
        **llama.shape({"head_dim": 256, **values}),
        **rope(values),
        "norm": "rmsnorm",
        "bias": False,
        "qkv_bias": attention_bias,
        "out_bias": attention_bias,
        "scale_embedding": True,
        "tie_embeddings": optional(values, "tie_word_embeddings", True),
    }


def config(values: Values, names: Collection[str]) -> TransformerConfig:
    # The first files say "gelu" and mean its tanh form; later ones name that in hidden_activation.
    act = optional(values, "hidden_activation", optional(values, "hidden_act", "gelu"))
    theirs = {"hidden_act": "gelu_pytorch_tanh" if act == "gelu" else act}
    return TransformerConfig(
        "decoder_only", **options(values), activation=activation(theirs, "hidden_act", "gelu_pytorch_tanh", gated=True)
    )


def weights(config: TransformerConfig) -> Mapping[str, Entry]:
    return WEIGHTS


FAMILY = Family(config, weights, prefix="model.", ignored=llama.IGNORED)
