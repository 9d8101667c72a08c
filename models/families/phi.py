"""phi-1, phi-1.5 and phi-2: attention and feed-forward side by side from one norm, half of each head rotated."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from models.config import TransformerConfig
from models.families import llama
from models.families.family import Entry, Family, Values, activation, optional, refuse_unless, rope

WEIGHTS: dict[str, Entry] = {
    "decoder.embedding.tokens": "model.embed_tokens",
    "decoder.norm": "model.final_layernorm",
    "lm_head": "lm_head",
    "decoder.blocks.{i}.attention_norm": "model.layers.{i}.input_layernorm",
    "decoder.blocks.{i}.attention.qkv": (
        "model.layers.{i}.self_attn.q_proj",
        "model.layers.{i}.self_attn.k_proj",
        "model.layers.{i}.self_attn.v_proj",
    ),
    "decoder.blocks.{i}.attention.out": "model.layers.{i}.self_attn.dense",
    "decoder.blocks.{i}.ffn.up": "model.layers.{i}.mlp.fc1",
    "decoder.blocks.{i}.ffn.down": "model.layers.{i}.mlp.fc2",
}


def config(values: Values, names: Collection[str]) -> TransformerConfig:
    refuse_unless(values, "qk_layernorm", False)
    return TransformerConfig(
        "decoder_only",
        **{**llama.shape(values), "norm_eps": optional(values, "layer_norm_eps", 1e-5)},
        **rope(values, fraction=0.5),
        activation=activation(values, "hidden_act", "gelu_new"),
        parallel_residual=True,
        shared_norm=True,
        head_bias=True,
        tie_embeddings=optional(values, "tie_word_embeddings", False),
        dropout=optional(values, "resid_pdrop", 0.0),
    )


def weights(config: TransformerConfig) -> Mapping[str, Entry]:
    return WEIGHTS


FAMILY = Family(config, weights, prefix="model.", ignored=llama.IGNORED)
