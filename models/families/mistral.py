"""Mistral: Llama with a sliding window (arXiv:2310.06825)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from models.config import TransformerConfig
from models.families import llama
from models.families.family import Family, Values, windows


def config(values: Values, names: Collection[str]) -> TransformerConfig:
    ours = llama.config({"num_key_value_heads": 8, **values}, names)
    return dataclasses.replace(ours, **windows({"sliding_window": 4096, **values}, ours.depth, range(ours.depth)))


FAMILY = Family(config, llama.weights, prefix="model.", ignored=llama.IGNORED)
