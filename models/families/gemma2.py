"""Gemma 2: norms before and after each branch, soft-caps, a window in every other layer (arXiv:2408.00118)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from models.config import ConfigError, TransformerConfig
from models.families import gemma, llama
from models.families.family import Entry, Family, Source, Values, activation, optional, plus_one, windows

NORMS = {
    "decoder.norm": "model.norm",
    "decoder.blocks.{i}.attention_norm": "model.layers.{i}.input_layernorm",
    "decoder.blocks.{i}.attention_post_norm": "model.layers.{i}.post_attention_layernorm",
    "decoder.blocks.{i}.ffn_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "decoder.blocks.{i}.ffn_post_norm": "model.layers.{i}.post_feedforward_layernorm",
}
WEIGHTS: dict[str, Entry] = llama.WEIGHTS | {ours: Source((theirs,), plus_one) for ours, theirs in NORMS.items()}


def config(values: Values, names: Collection[str]) -> TransformerConfig:
    options = gemma.options(values)
    depth = options["depth"]
    scalar = optional(values, "query_pre_attn_scalar", 256.0)
    if not scalar > 0:
        raise ConfigError(f"query_pre_attn_scalar is {scalar}: expected a positive number")
    return TransformerConfig(
        "decoder_only",
        **options,
        **windows({"sliding_window": 4096, **values}, depth, range(0, depth, 2)),
        norm_place="sandwich",
        activation=activation(values, "hidden_activation", "gelu_pytorch_tanh", gated=True),
        softmax_scale=scalar**-0.5,
        attention_softcap=optional({"attn_logit_softcapping": 50.0, **values}, "attn_logit_softcapping", 0.0),
        logits_softcap=optional({"final_logit_softcapping": 30.0, **values}, "final_logit_softcapping", 0.0),
    )


def weights(config: TransformerConfig) -> Mapping[str, Entry]:
    return WEIGHTS


FAMILY = Family(config, weights, prefix="model.", ignored=llama.IGNORED)
