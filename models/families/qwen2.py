"""Qwen2 and Qwen2.5: Llama with biases on q, k and v (arXiv:2407.10671)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from models.config import TransformerConfig
from models.families import llama
from models.families.family import Family, Values, optional, windows


def config(values: Values, names: Collection[str]) -> TransformerConfig:
    ours = llama.config(values, names)
    return dataclasses.replace(ours, qkv_bias=True, **layer_windows(values, ours.depth))


def layer_windows(values: Values, depth: int) -> dict[str, Any]:
    """The upper layers have a window where ``use_sliding_window`` says so."""
    if not optional(values, "use_sliding_window", False):
        return {}
    return windows(values, depth, range(optional(values, "max_window_layers", 28), depth))


FAMILY = Family(config, llama.weights, prefix="model.", ignored=llama.IGNORED)
