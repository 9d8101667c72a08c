"""BART, and what its relatives share: learned positions, biases everywhere, an encoder-decoder (arXiv:1910.13461)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from models.config import ConfigError, TransformerConfig
from models.families.family import Entry, Family, Source, Values, activation, need, one_row, optional


def stack(side: str) -> dict[str, Entry]:
    """The weights that an encoder and a decoder have in common."""
    ours, theirs = f"{side}.blocks.{{i}}", f"model.{side}.layers.{{i}}"
    return {
        f"{side}.embedding.tokens": f"model.{side}.embed_tokens|model.shared",
        f"{side}.embedding.positions": f"model.{side}.embed_positions",
        f"{side}.embedding_norm": f"model.{side}.layernorm_embedding",
        f"{side}.norm": f"model.{side}.layer_norm",
        f"{ours}.attention_norm": f"{theirs}.self_attn_layer_norm",
        f"{ours}.attention.qkv": (
            f"{theirs}.self_attn.q_proj",
            f"{theirs}.self_attn.k_proj",
            f"{theirs}.self_attn.v_proj",
        ),
        f"{ours}.attention.out": f"{theirs}.self_attn.out_proj",
        f"{ours}.ffn_norm": f"{theirs}.final_layer_norm",
        f"{ours}.ffn.up": f"{theirs}.fc1",
        f"{ours}.ffn.down": f"{theirs}.fc2",
    }


CROSS = "model.decoder.layers.{i}.encoder_attn"
WEIGHTS: dict[str, Entry] = {
    **stack("encoder"),
    **stack("decoder"),
    "decoder.blocks.{i}.cross_attention_norm": f"{CROSS}_layer_norm",
    "decoder.blocks.{i}.cross_attention.q": f"{CROSS}.q_proj",
    "decoder.blocks.{i}.cross_attention.kv": (f"{CROSS}.k_proj", f"{CROSS}.v_proj"),
    "decoder.blocks.{i}.cross_attention.out": f"{CROSS}.out_proj",
    "lm_head": "lm_head",
    "lm_head.bias": Source(("final_logits_bias",), one_row),
}


def options(values: Values, names: Collection[str]) -> dict[str, Any]:
    """What BART and its relatives have in common."""
    return {
        "vocab_size": need(values, "vocab_size", int),
        "dim": need(values, "d_model", int),
        "encoder_depth": need(values, "encoder_layers", int),
        "depth": need(values, "decoder_layers", int),
        "heads": same_of_both(values, "attention_heads"),
        "ffn_dim": same_of_both(values, "ffn_dim"),
        "activation": activation(values, "activation_function", "gelu"),
        "norm_place": "post",
        "max_seqlen": optional(values, "max_position_embeddings", 1024),
        "scale_embedding": optional(values, "scale_embedding", False),
        "tie_embeddings": optional(values, "tie_word_embeddings", True),
        "head_bias": "final_logits_bias" in names,
        "dropout": optional(values, "dropout", 0.1),
        "attention_dropout": optional(values, "attention_dropout", 0.0),
    }


def same_of_both(values: Values, name: str) -> int:
    """A size that the encoder and the decoder must agree on."""
    encoder, decoder = (need(values, f"{side}_{name}", int) for side in ("encoder", "decoder"))
    if encoder != decoder:
        raise ConfigError(f"encoder_{name} {encoder} and decoder_{name} {decoder} differ, which is not supported")
    return encoder


def config(values: Values, names: Collection[str]) -> TransformerConfig:
    ours = {**options(values, names), "positions": "learned", "position_offset": 2, "embedding_norm": True}
    return TransformerConfig("encoder_decoder", **ours)


def weights(config: TransformerConfig) -> Mapping[str, Entry]:
    return WEIGHTS


FAMILY = Family(config, weights, prefix="model.")
