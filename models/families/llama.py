"""Llama, and what its relatives share: pre-norm, RMSNorm, rotary positions, a gated feed-forward, grouped heads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from models.config import TransformerConfig
from models.families.family import Entry, Family, Values, activation, need, optional, rope

WEIGHTS: dict[str, Entry] = {
    "decoder.embedding.tokens": "model.embed_tokens",
    "decoder.norm": "model.norm",
    "lm_head": "lm_head",
    "decoder.blocks.{i}.attention_norm": "model.layers.{i}.input_layernorm",
    "decoder.blocks.{i}.attention.qkv": (
        "model.layers.{i}.self_attn.q_proj",
        "model.layers.{i}.self_attn.k_proj",
        "model.layers.{i}.self_attn.v_proj",
    ),
    "decoder.blocks.{i}.attention.out": "model.layers.{i}.self_attn.o_proj",
    "decoder.blocks.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "decoder.blocks.{i}.ffn.up": ("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"),
    "decoder.blocks.{i}.ffn.down": "model.layers.{i}.mlp.down_proj",
}
IGNORED = (r"rotary_emb\.inv_freq$",)


def shape(values: Values) -> dict[str, Any]:
    """The options that Llama and its relatives name alike."""
    heads = need(values, "num_attention_heads", int)
    return {
        "vocab_size": need(values, "vocab_size", int),
        "dim": need(values, "hidden_size", int),
        "depth": need(values, "num_hidden_layers", int),
        "heads": heads,
        "kv_heads": optional(values, "num_key_value_heads", heads),
        "head_dim": values.get("head_dim"),
        "ffn_dim": need(values, "intermediate_size", int),
        "norm_eps": optional(values, "rms_norm_eps", 1e-6),
        "max_seqlen": optional(values, "max_position_embeddings", 2048),
        "attention_dropout": optional(values, "attention_dropout", 0.0),
    }


def config(values: Values, names: Collection[str]) -> TransformerConfig:
    attention_bias = optional(values, "attention_bias", False)
    return TransformerConfig(
        "decoder_only",
        **shape(values),
        **rope(values),
        norm="rmsnorm",
        activation=activation(values, "hidden_act", "silu", gated=True),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        ffn_bias=optional(values, "mlp_bias", False),
        tie_embeddings=optional(values, "tie_word_embeddings", False),
    )


def weights(config: TransformerConfig) -> Mapping[str, Entry]:
    return WEIGHTS


FAMILY = Family(config, weights, prefix="model.", ignored=IGNORED)
