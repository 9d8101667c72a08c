"""A small random transformers model of every family, of odd sizes, and the folders it is saved to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

VOCAB = 1009
WIDTH = {"hidden_size": 84, "num_attention_heads": 7, "num_hidden_layers": 3, "vocab_size": VOCAB}
LLAMA = {**WIDTH, "intermediate_size": 100, "num_key_value_heads": 1, "head_dim": 12, "max_position_embeddings": 256}
EXPLICIT = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 12}  # more head than width
BART = {
    "d_model": 84, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 7, "decoder_attention_heads": 7,
    "encoder_ffn_dim": 100, "decoder_ffn_dim": 100, "vocab_size": VOCAB, "max_position_embeddings": 256,
}  # fmt: skip
T5 = {"d_model": 60, "d_kv": 12, "d_ff": 100, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 7,
      "vocab_size": VOCAB, "decoder_start_token_id": 0, "relative_attention_max_distance": 40}  # fmt: skip

# By the name of a case: model_type, and what its config differs in.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_embd": 84, "n_head": 7, "n_layer": 3, "vocab_size": VOCAB, "n_positions": 256}),
    "llama": ("llama", LLAMA),
    "llama3": ("llama", {**LLAMA, **EXPLICIT, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
                         "rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0,
                                             "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                             "original_max_position_embeddings": 64}}),
    "llama-yarn": ("llama", {**LLAMA, "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                                          "original_max_position_embeddings": 64}}),
    "llama-linear": ("llama", {**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0,
                                                            "factor": 2.0}}),
    "mistral": ("mistral", {**LLAMA, **EXPLICIT, "sliding_window": 20}),
    "qwen2": ("qwen2", {**LLAMA, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "qwen3": ("qwen3", {**LLAMA, **EXPLICIT}),
    "phi": ("phi", {**WIDTH, "intermediate_size": 100, "max_position_embeddings": 256}),
    "gpt_neox": ("gpt_neox", {**WIDTH, "intermediate_size": 100, "max_position_embeddings": 256,
                              "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                                  "partial_rotary_factor": 0.5}}),
    "gpt_neox-sequential": ("gpt_neox", {**WIDTH, "intermediate_size": 100, "max_position_embeddings": 256,
                                         "use_parallel_residual": False,
                                         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                                             "partial_rotary_factor": 1.0}}),
    "gemma": ("gemma", {**LLAMA, "head_dim": 16}),
    "gemma2": ("gemma2", {**LLAMA, **EXPLICIT, "sliding_window": 20, "query_pre_attn_scalar": 24,
                          "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "t5": ("t5", T5),
    "t5-1.1": ("t5", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("mt5", T5),
    "umt5": ("umt5", T5),
    "bart": ("bart", BART),
    "mbart": ("mbart", {**BART, "scale_embedding": True, "decoder_start_token_id": 2}),
    "pegasus": ("pegasus", {**BART, "activation_function": "relu", "scale_embedding": True}),
    "marian": ("marian", {**BART, "activation_function": "swish", "scale_embedding": True, "pad_token_id": 1008,
                          "decoder_start_token_id": 1008}),
    "marian-two-vocabularies": ("marian", {**BART, "share_encoder_decoder_embeddings": False, "vocab_size": 901,
                                           "decoder_vocab_size": VOCAB, "pad_token_id": 900,
                                           "decoder_start_token_id": 900}),
    "m2m_100": ("m2m_100", BART),
}  # fmt: skip
ENCODER_DECODERS = [name for name, (kind, _) in CASES.items() if kind in
                    ("t5", "mt5", "umt5", "bart", "mbart", "pegasus", "marian", "m2m_100")]  # fmt: skip
DECODERS = [name for name in CASES if name not in ENCODER_DECODERS]


def build(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """The case's model, random in all its parameters: norms and biases that start as ones and zeros included."""
    kind, changes = CASES[name]
    config = transformers.AutoConfig.for_model(kind, **({"eos_token_id": 3, "pad_token_id": 0} | changes))
    config._attn_implementation = "eager"  # the formula itself, soft-caps included
    torch.manual_seed(seed)
    auto = "AutoModelForSeq2SeqLM" if name in ENCODER_DECODERS else "AutoModelForCausalLM"
    model = getattr(transformers, auto).from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if any(word in key for word in ("embed_positions", "inv_freq", "embed_scale", ".weights")):
                continue
            if tensor.dim() < 2 or "relative_attention_bias" in key or "final_logits_bias" in key:
                tensor.add_(torch.randn_like(tensor) * 0.3)
            elif tensor.dim() == 2 and "embed" not in key and "shared" not in key and "wte" not in key:
                tensor.copy_(torch.randn_like(tensor) * tensor.shape[-1] ** -0.5)
    return model


def save(model: transformers.PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def rewrite_as_4x(folder: Path) -> None:
    """Turns a folder that transformers 5 wrote into what transformers 4 wrote for the same model."""
    config = json.loads((folder / "config.json").read_text())
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters", None)
    if rope is not None:
        _rope_as_4x(config, rope)
    config.pop("layer_types", None) if config["model_type"] in ("qwen2", "qwen3", "mistral") else None
    if config.pop("scale_decoder_outputs", True) is False:
        config["tie_word_embeddings"] = False
    # Its generation settings stood in config.json.
    generation = folder / "generation_config.json"
    config |= {k: v for k, v in json.loads(generation.read_text()).items() if k != "transformers_version"}
    generation.unlink()
    config["transformers_version"] = "4.40.0"
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    if config["model_type"] == "gpt2":
        weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
        for layer in range(config["n_layer"]):
            weights[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 256, 256).tril()
    if config["model_type"] in ("bart", "mbart"):
        for side in ("encoder", "decoder"):  # copies, as .bin files have them
            weights.setdefault(f"model.{side}.embed_tokens.weight", weights["model.shared.weight"].clone())
        weights.setdefault("lm_head.weight", weights["model.shared.weight"].clone())
    if config["model_type"] == "t5":
        name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        weights[name] = torch.zeros(32, 7)
        weights.setdefault("encoder.embed_tokens.weight", weights["shared.weight"].clone())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _rope_as_4x(config: dict[str, Any], rope: dict[str, Any]) -> None:
    theta, part = rope.pop("rope_theta", 10000.0), rope.pop("partial_rotary_factor", None)
    if config["model_type"] == "gpt_neox":
        config |= {"rotary_emb_base": theta, "rotary_pct": part}
    else:
        config["rope_theta"] = theta
        if part is not None:
            config["partial_rotary_factor"] = part
    if (kind := rope.pop("rope_type", "default")) != "default":
        config["rope_scaling"] = {"type" if kind == "linear" else "rope_type": kind, **rope}
