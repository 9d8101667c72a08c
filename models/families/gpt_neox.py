"""GPT-NeoX and Pythia: attention and feed-forward side by side from two norms, a quarter of each head rotated."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from models.config import TransformerConfig
from models.families import llama
from models.families.family import Entry, Family, Source, Values, activation, optional, rope


def by_kind(x: Tensor, config: TransformerConfig) -> Tensor:
    """Rows that go head by head, each q, k, v, to all q, all k, all v."""
    return x.unflatten(0, (config.heads, 3, -1)).transpose(0, 1).flatten(0, 2)


WEIGHTS: dict[str, Entry] = {
    "decoder.embedding.tokens": "gpt_neox.embed_in",
    "decoder.norm": "gpt_neox.final_layer_norm",
    "lm_head": "embed_out",
    "decoder.blocks.{i}.attention_norm": "gpt_neox.layers.{i}.input_layernorm",
    "decoder.blocks.{i}.attention.qkv": Source(("gpt_neox.layers.{i}.attention.query_key_value",), by_kind, True),
    "decoder.blocks.{i}.attention.out": "gpt_neox.layers.{i}.attention.dense",
    "decoder.blocks.{i}.ffn_norm": "gpt_neox.layers.{i}.post_attention_layernorm",
    "decoder.blocks.{i}.ffn.up": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
    "decoder.blocks.{i}.ffn.down": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
}
# The causal mask and rotary frequencies, which older files store.
IGNORED = (r"\.attention\.(masked_)?bias$", r"rotary_emb\.inv_freq$")


def config(values: Values, names: Collection[str]) -> TransformerConfig:
    attention_bias = optional(values, "attention_bias", True)
    return TransformerConfig(
        "decoder_only",
        **{**llama.shape(values), "norm_eps": optional(values, "layer_norm_eps", 1e-5)},
        **rope(values, fraction=0.25, base="rotary_emb_base", part="rotary_pct"),
        activation=activation(values, "hidden_act", "gelu"),
        parallel_residual=optional(values, "use_parallel_residual", True),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        tie_embeddings=optional(values, "tie_word_embeddings", False),
        dropout=optional(values, "hidden_dropout", 0.0),
    )


def weights(config: TransformerConfig) -> Mapping[str, Entry]:
    return WEIGHTS


FAMILY = Family(config, weights, prefix="gpt_neox.", ignored=IGNORED)
