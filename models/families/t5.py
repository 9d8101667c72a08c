"""T5, T5 1.1, Flan-T5 and ByT5: relative bias, unscaled scores, RMSNorm, no biases (arXiv:1910.10683)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from models.config import ConfigError, TransformerConfig
from models.families.family import UNLIMITED, Entry, Family, Values, activation, need, optional

TOKENS = "shared|encoder.embed_tokens|decoder.embed_tokens"


def stack(ours: str, theirs: str) -> dict[str, Entry]:
    """What the encoder and the decoder have in common but the feed-forward's place."""
    block, layer = f"{ours}.blocks.{{i}}", f"{theirs}.block.{{i}}.layer"
    attention = f"{layer}.0.SelfAttention"
    feed_forward = 1 if theirs == "encoder" else 2
    return {
        f"{ours}.norm": f"{theirs}.final_layer_norm",
        f"{ours}.relative_bias.table": f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        f"{block}.attention_norm": f"{layer}.0.layer_norm",
        f"{block}.attention.qkv": (f"{attention}.q", f"{attention}.k", f"{attention}.v"),
        f"{block}.attention.out": f"{attention}.o",
        f"{block}.attention.relative_bias.table": f"{attention}.relative_attention_bias.weight",
        f"{block}.ffn_norm": f"{layer}.{feed_forward}.layer_norm",
        f"{block}.ffn.down": f"{layer}.{feed_forward}.DenseReluDense.wo",
    }


CROSS = "decoder.block.{i}.layer.1"
WEIGHTS: dict[str, Entry] = {
    "encoder.embedding.tokens": TOKENS,
    "decoder.embedding.tokens": TOKENS,
    "lm_head": "lm_head",
    **stack("encoder", "encoder"),
    **stack("decoder", "decoder"),
    "decoder.blocks.{i}.cross_attention_norm": f"{CROSS}.layer_norm",
    "decoder.blocks.{i}.cross_attention.q": f"{CROSS}.EncDecAttention.q",
    "decoder.blocks.{i}.cross_attention.kv": (f"{CROSS}.EncDecAttention.k", f"{CROSS}.EncDecAttention.v"),
    "decoder.blocks.{i}.cross_attention.out": f"{CROSS}.EncDecAttention.o",
}
# One layer of T5, two of its successors, whose gate comes first.
ONE_LAYER = {
    "encoder.blocks.{i}.ffn.up": "encoder.block.{i}.layer.1.DenseReluDense.wi",
    "decoder.blocks.{i}.ffn.up": "decoder.block.{i}.layer.2.DenseReluDense.wi",
}
GATED = {ours: (f"{theirs}_0", f"{theirs}_1") for ours, theirs in ONE_LAYER.items()}
# A bias of cross-attention, which the first files hold and nothing ever read.
IGNORED = (r"EncDecAttention\.relative_attention_bias\.weight$",)


def options(values: Values, names: Collection[str]) -> dict[str, Any]:
    """What T5 and its relatives have in common."""
    gate, _, act = optional(values, "feed_forward_proj", "relu").rpartition("-")
    if gate not in ("", "gated"):
        raise ConfigError(
            f"feed_forward_proj {values['feed_forward_proj']!r} is not supported: expected gated-NAME or NAME"
        )
    act = "gelu_new" if gate and act == "gelu" else act
    depth = need(values, "num_layers", int)
    return {
        "vocab_size": need(values, "vocab_size", int),
        "dim": need(values, "d_model", int),
        "encoder_depth": depth,
        "depth": optional(values, "num_decoder_layers", depth),
        "heads": need(values, "num_heads", int),
        "head_dim": need(values, "d_kv", int),
        "ffn_dim": need(values, "d_ff", int),
        "activation": activation({"feed_forward_proj": act}, "feed_forward_proj", act, gated=bool(gate)),
        "norm": "rmsnorm",
        "norm_eps": optional(values, "layer_norm_epsilon", 1e-6),
        "positions": "relative",
        "relative_buckets": optional(values, "relative_attention_num_buckets", 32),
        "relative_max_distance": optional(values, "relative_attention_max_distance", 128),
        "softmax_scale": 1.0,
        "max_seqlen": UNLIMITED,
        "bias": False,
        # Whatever the config says: a head in the file is one of its own.
        "tie_embeddings": "lm_head.weight" not in names,
        "float32_residual": True,
        "dropout": optional(values, "dropout_rate", 0.1),
        "attention_dropout": optional(values, "dropout_rate", 0.1),
    }


def config(values: Values, names: Collection[str]) -> TransformerConfig:
    # A config that ties is the original T5's, which scales before its head; T5 1.1 says it does not tie.
    scaled = optional(values, "scale_decoder_outputs", optional(values, "tie_word_embeddings", True))
    ours = TransformerConfig("encoder_decoder", **options(values, names))
    return dataclasses.replace(ours, output_scale=ours.dim**-0.5) if scaled else ours


def weights(config: TransformerConfig) -> Mapping[str, Entry]:
    return {**WEIGHTS, **(GATED if config.gated else ONE_LAYER)}


FAMILY = Family(config, weights, ignored=IGNORED)
