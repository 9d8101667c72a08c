"""The families a model trained here can be written as: for each, its config.json from ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models.config import RopeScaling, TransformerConfig
from models.families.family import GATED

UNGATED = {gated: plain for plain, gated in GATED.items()}


@dataclass(frozen=True)
class Target:
    """A family to write: its name in prose, its model_type, its class in transformers, and its config.json's values.

    ``values`` says as much of a config as the family's config.json can: reading it back tells whether that is all.
    ``is_bart``: a relative of BART, whose files hold more tensors (see ``weights.bart_extras``).
    """

    title: str
    model_type: str
    architecture: str
    values: Callable[[TransformerConfig], dict[str, Any]]
    is_bart: bool = False


def plain_activation(config: TransformerConfig) -> str:
    """The function itself, under the name that both sides have for it."""
    return UNGATED.get(config.activation, config.activation)


def shape(config: TransformerConfig) -> dict[str, Any]:
    """What Llama and its relatives name alike."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn_dim,
        "hidden_act": plain_activation(config),
        "max_position_embeddings": config.max_seqlen,
        "attention_bias": config.qkv_bias,
        "attention_dropout": config.attention_dropout,
        "tie_word_embeddings": config.tie_embeddings,
    }


def rope(config: TransformerConfig) -> dict[str, Any]:
    """``rope_parameters``, as transformers 5 has them."""
    base = {"rope_theta": config.rope_theta}
    return {"rope_type": "default", **base} if config.rope_scaling is None else base | scaled_rope(config.rope_scaling)


def scaled_rope(scaling: RopeScaling) -> dict[str, Any]:
    own: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return own
    own["original_max_position_embeddings"] = scaling.original_max_seqlen
    if scaling.kind == "llama3":
        return own | {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    names = ("beta_fast", "beta_slow", "truncate", "attention_factor")
    return own | {name: getattr(scaling, name) for name in names}


def llama(config: TransformerConfig) -> dict[str, Any]:
    return {
        **shape(config),
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "mlp_bias": config.ffn_bias,
        "rope_parameters": rope(config),
    }


def gpt_neox(config: TransformerConfig) -> dict[str, Any]:
    return {
        **shape(config),
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel_residual,
        "hidden_dropout": config.dropout,
        "rope_parameters": {**rope(config), "partial_rotary_factor": config.rope_fraction},
    }


def gpt2(config: TransformerConfig) -> dict[str, Any]:
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop"), config.dropout)
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.dim,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_inner": config.ffn_dim,
        "n_positions": config.max_seqlen,
        "activation_function": plain_activation(config),
        "layer_norm_epsilon": config.norm_eps,
        "scale_attn_weights": config.softmax_scale != 1.0,
        "tie_word_embeddings": config.tie_embeddings,
        "attn_pdrop": config.attention_dropout,
        **dropouts,
    }


def bart(config: TransformerConfig) -> dict[str, Any]:
    """BART's, and what its relatives share."""
    return {
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.dim,
        "encoder_layers": config.encoder_depth,
        "decoder_layers": config.depth,
        **{f"{side}_attention_heads": config.heads for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": config.ffn_dim for side in ("encoder", "decoder")},
        "activation_function": plain_activation(config),
        "max_position_embeddings": config.max_seqlen,
        "scale_embedding": config.scale_embedding,
        "tie_word_embeddings": config.tie_embeddings,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
    }


def marian(config: TransformerConfig) -> dict[str, Any]:
    own = {"share_encoder_decoder_embeddings": config.share_embeddings, "decoder_vocab_size": config.target_vocab_size}
    return bart(config) | own


def t5(config: TransformerConfig) -> dict[str, Any]:
    # "gated-gelu" means the tanh form.
    gated = {"geglu_new": "gated-gelu", "geglu": "gated-gelu"}
    prefix = "gated-" if config.gated else ""
    return {
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.dim,
        "d_kv": config.head_dim,
        "d_ff": config.ffn_dim,
        "num_layers": config.encoder_depth,
        "num_decoder_layers": config.depth,
        "num_heads": config.heads,
        "feed_forward_proj": gated.get(config.activation, prefix + plain_activation(config)),
        "layer_norm_epsilon": config.norm_eps,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "dropout_rate": config.dropout,
        # T5's word for whether the decoder's output is scaled; whether the head is tied, the weights themselves say.
        "tie_word_embeddings": config.output_scale != 1.0,
    }


DECODERS = [
    Target("Llama", "llama", "LlamaForCausalLM", llama),
    Target("GPT-NeoX", "gpt_neox", "GPTNeoXForCausalLM", gpt_neox),
    Target("GPT-2", "gpt2", "GPT2LMHeadModel", gpt2),
]
ENCODER_DECODERS = [
    Target("Marian", "marian", "MarianMTModel", marian, is_bart=True),
    Target("T5", "t5", "T5ForConditionalGeneration", t5),
    Target("Pegasus", "pegasus", "PegasusForConditionalGeneration", bart, is_bart=True),
    Target("BART", "bart", "BartForConditionalGeneration", bart, is_bart=True),
    Target("mBART", "mbart", "MBartForConditionalGeneration", bart, is_bart=True),
]
