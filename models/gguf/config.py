"""config.json as transformers would have written it, from the metadata and tensors of a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from models.config import LARGEST
from models.files import CheckpointError
from models.gguf.file import GgufFile

EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
# The Llama 3.1, 3.2 and 3.3 checkpoints agree on these; a GGUF file keeps only the divisors that come of them.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_config(file: GgufFile) -> dict[str, Any]:
    """The content of config.json, without token ids. Raises CheckpointError for a model that we do not know."""
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in READERS:
        raise CheckpointError(
            f"{file.path} is of the architecture {str(architecture)[:40]!r}: expected one of {', '.join(READERS)}"
        )
    return READERS[architecture](_Metadata(file, architecture))


class _Metadata:
    """The values of a file under its architecture's prefix. Raises CheckpointError for what is missing or odd."""

    def __init__(self, file: GgufFile, prefix: str) -> None:
        self.file, self.prefix = file, prefix

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"{self.prefix}.{key}", default)

    def size(self, key: str, default: int | None = None, smallest: int = 1) -> int:
        value = self.get(key, default)
        if type(value) is not int or not smallest <= value <= LARGEST:
            raise self.error(f"{self.prefix}.{key} is {str(value)[:40]}: expected {smallest} to {LARGEST}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.error(f"{self.prefix}.{key} is {str(value)[:40]}: expected a positive number")
        return float(value)

    def blocks(self, key: str, stem: str, default: int | None = None) -> int:
        """The number of blocks, which has to be that of the tensors whose names begin with the stem."""
        count = self.size(key, default)
        there = {name.removeprefix(stem).split(".")[0] for name in self.file.tensors if name.startswith(stem)}
        if len(there) != count:
            raise self.error(f"{self.prefix}.{key} is {count}, but there are tensors of {len(there)}")
        return count

    @property
    def vocab_size(self) -> int:
        if EMBEDDING not in self.file.tensors:
            raise self.error(f"there is no {EMBEDDING}")
        return self.file.tensors[EMBEDDING].shape[0]

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: {message}")


def _llama(metadata: _Metadata) -> dict[str, Any]:
    if metadata.get("expert_count"):
        raise metadata.error("it is a mixture of experts, which is not supported")
    width, heads = metadata.size("embedding_length"), metadata.size("attention.head_count")
    rotary = metadata.size("rope.dimension_count", width // heads)
    head_dim = metadata.size("attention.key_length", rotary)
    if rotary != head_dim or head_dim % 2:
        raise metadata.error(f"rotary positions turn {rotary} of {head_dim} dimensions, expected all, in pairs")
    theta = metadata.number("rope.freq_base", 10_000.0)
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": metadata.vocab_size,
        "hidden_size": width,
        "intermediate_size": metadata.size("feed_forward_length"),
        "num_hidden_layers": metadata.blocks("block_count", "blk."),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": metadata.size("context_length"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(metadata, head_dim, theta),
        "attention_bias": "blk.0.attn_q.bias" in metadata.file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in metadata.file.tensors,
        "tie_word_embeddings": HEAD not in metadata.file.tensors,
    }


def _rope_scaling(metadata: _Metadata, head_dim: int, theta: float) -> dict[str, Any] | None:
    kind = metadata.get("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise metadata.error(f"rotary positions are scaled by {str(kind)[:40]}, which is not supported")
    if ROPE_FACTORS in metadata.file.tensors:
        return _llama3_scaling(metadata, head_dim, theta)
    if kind == "linear":
        return {"rope_type": "linear", "factor": metadata.number("rope.scaling.factor")}
    return None


def _llama3_scaling(metadata: _Metadata, head_dim: int, theta: float) -> dict[str, Any] | None:
    """The scaling that a table of divisors, one a frequency, came of; the largest divisor is its factor."""
    tensor = metadata.file.tensors[ROPE_FACTORS]
    if tensor.kind.name != "F32" or tensor.shape != (head_dim // 2,):
        raise metadata.error(f"{ROPE_FACTORS} is {tensor.kind.name} {tensor.shape}, expected F32 {(head_dim // 2,)}")
    divisors = metadata.file.blocks(ROPE_FACTORS).view(np.float32)
    if (divisors == 1).all():
        return None
    scaling = {"rope_type": "llama3", "factor": round(float(divisors.max()), 3), **LLAMA3_ROPE}
    if not np.allclose(divisors, llama3_divisors(scaling, head_dim, theta), rtol=1e-4):
        raise metadata.error(f"{ROPE_FACTORS} is a scaling of rotary positions that is not Llama 3's")
    return scaling


def llama3_divisors(scaling: dict[str, Any], head_dim: int, theta: float) -> np.ndarray:
    """What Llama 3.1 divides each rotary frequency by: (head_dim / 2,), from 1 for short waves to the factor."""
    waves = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((scaling["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    return 1 / ((1 - kept) / scaling["factor"] + kept)


def _t5(metadata: _Metadata) -> dict[str, Any]:
    width, heads = metadata.size("embedding_length"), metadata.size("attention.head_count")
    encoder_blocks = metadata.blocks("block_count", "enc.blk.")
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "vocab_size": metadata.vocab_size,
        "d_model": width,
        "d_kv": metadata.size("attention.key_length", width // heads),
        "d_ff": metadata.size("feed_forward_length"),
        "num_layers": encoder_blocks,
        "num_decoder_layers": metadata.blocks("decoder_block_count", "dec.blk.", encoder_blocks),
        "num_heads": heads,
        "n_positions": metadata.size("context_length", 512),
        "relative_attention_num_buckets": metadata.size("attention.relative_buckets_count", 32),
        "relative_attention_max_distance": 128,  # of every T5 there is; the format has no key for it
        "layer_norm_epsilon": metadata.number("attention.layer_norm_epsilon", 1e-6),
        "feed_forward_proj": "gated-gelu" if "enc.blk.0.ffn_gate.weight" in metadata.file.tensors else "relu",
        "decoder_start_token_id": metadata.size("decoder_start_token_id", 0, smallest=0),
        "tie_word_embeddings": HEAD not in metadata.file.tensors,
    }


READERS: dict[str, Callable[[_Metadata], dict[str, Any]]] = {"llama": _llama, "t5": _t5}
