"""GPT-2: learned positions, pre-norm, weights stored the other way round."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from models.config import TransformerConfig
from models.families.family import Entry, Family, Source, Values, activation, need, optional, refuse_unless, transpose

WEIGHTS: dict[str, Entry] = {
    "decoder.embedding.tokens": "transformer.wte",
    "decoder.embedding.positions": "transformer.wpe",
    "decoder.norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "decoder.blocks.{i}.attention_norm": "transformer.h.{i}.ln_1",
    "decoder.blocks.{i}.attention.qkv": "transformer.h.{i}.attn.c_attn",
    "decoder.blocks.{i}.attention.out": "transformer.h.{i}.attn.c_proj",
    "decoder.blocks.{i}.ffn_norm": "transformer.h.{i}.ln_2",
    "decoder.blocks.{i}.ffn.up": "transformer.h.{i}.mlp.c_fc",
    "decoder.blocks.{i}.ffn.down": "transformer.h.{i}.mlp.c_proj",
}
TRANSPOSED = {
    f"{ours}.weight": Source((f"{theirs}.weight",), transpose)
    for ours, theirs in WEIGHTS.items()
    if isinstance(theirs, str) and (".attn." in theirs or ".mlp." in theirs)
}
# The causal mask, which older files store.
IGNORED = (r"\.attn\.(masked_)?bias$",)


def config(values: Values, names: Collection[str]) -> TransformerConfig:
    refuse_unless(values, "scale_attn_by_inverse_layer_idx", False)
    dim = need(values, "n_embd", int)
    return TransformerConfig(
        "decoder_only",
        vocab_size=need(values, "vocab_size", int),
        dim=dim,
        depth=need(values, "n_layer", int),
        heads=need(values, "n_head", int),
        ffn_dim=optional(values, "n_inner", 4 * dim),
        activation=activation(values, "activation_function", "gelu_new"),
        norm_eps=optional(values, "layer_norm_epsilon", 1e-5),
        positions="learned",
        max_seqlen=optional(values, "n_positions", 1024),
        softmax_scale=None if optional(values, "scale_attn_weights", True) else 1.0,
        tie_embeddings=optional(values, "tie_word_embeddings", True),
        dropout=optional(values, "resid_pdrop", 0.1),
        attention_dropout=optional(values, "attn_pdrop", 0.1),
    )


def weights(config: TransformerConfig) -> Mapping[str, Entry]:
    return WEIGHTS | TRANSPOSED


FAMILY = Family(config, weights, prefix="transformer.", ignored=IGNORED)
