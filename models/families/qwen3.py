"""Qwen3: Llama with a norm on each head's q and k (arXiv:2505.09388)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from models.config import TransformerConfig
from models.families import llama
from models.families.family import Entry, Family, Values
from models.families.qwen2 import layer_windows

WEIGHTS: dict[str, Entry] = llama.WEIGHTS | {
    "decoder.blocks.{i}.attention.q_norm": "model.layers.{i}.self_attn.q_norm",
    "decoder.blocks.{i}.attention.k_norm": "model.layers.{i}.self_attn.k_norm",
}


def config(values: Values, names: Collection[str]) -> TransformerConfig:
    ours = llama.config({"head_dim": 128, **values}, names)
    return dataclasses.replace(ours, qk_norm=True, **layer_windows(values, ours.depth))


def weights(config: TransformerConfig) -> Mapping[str, Entry]:
    return WEIGHTS


FAMILY = Family(config, weights, prefix="model.", ignored=llama.IGNORED)
