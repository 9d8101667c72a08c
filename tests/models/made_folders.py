"""Folders of families under their own names, written without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def llama_config(dim: int = 32, depth: int = 2, ffn: int = 48, vocab: int = 60) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": dim, "num_hidden_layers": depth, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": ffn, "vocab_size": vocab, "max_position_embeddings": 64,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def llama_shapes(config: dict[str, Any]) -> Shapes:
    dim, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes: Shapes = {"model.embed_tokens": (vocab, dim), "model.norm": (dim,), "lm_head": (vocab, dim)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{name}": (dim,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}.self_attn.{name}": (dim, dim) for name in ("q_proj", "o_proj")}
        shapes |= {f"{layer}.self_attn.{name}": (dim // 2, dim) for name in ("k_proj", "v_proj")}
        shapes |= {f"{layer}.mlp.{name}": (ffn, dim) for name in ("gate_proj", "up_proj")}
        shapes[f"{layer}.mlp.down_proj"] = (dim, ffn)
    return shapes


def t5_config(dim: int = 32, depth: int = 2, ffn: int = 48, vocab: int = 60) -> dict[str, Any]:
    return {
        "model_type": "t5", "d_model": dim, "num_layers": depth, "num_heads": 4, "d_kv": dim // 4, "d_ff": ffn,
        "vocab_size": vocab, "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip


def t5_shapes(config: dict[str, Any]) -> Shapes:
    dim, ffn = config["d_model"], config["d_ff"]
    shapes: Shapes = {"shared": (config["vocab_size"], dim)}
    for side, kinds in {"encoder": ["SelfAttention"], "decoder": ["SelfAttention", "EncDecAttention"]}.items():
        shapes[f"{side}.final_layer_norm"] = (dim,)
        shapes[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias"] = (32, 4)
        for i in range(config["num_layers"]):
            block = f"{side}.block.{i}.layer"
            for place, kind in enumerate(kinds):
                shapes |= {f"{block}.{place}.{kind}.{part}": (dim, dim) for part in "qkvo"}
            shapes |= {f"{block}.{place}.layer_norm": (dim,) for place in range(len(kinds) + 1)}
            shapes[f"{block}.{len(kinds)}.DenseReluDense.wi"] = (ffn, dim)
            shapes[f"{block}.{len(kinds)}.DenseReluDense.wo"] = (dim, ffn)
    return shapes


def write(folder: Path, config: dict[str, Any], shapes: Shapes) -> Path:
    """A folder of random float32 weights, each called ``weight``."""
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
