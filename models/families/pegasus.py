"""Pegasus: BART with pre-norm and sinusoidal positions (arXiv:1912.08777)."""

from __future__ import annotations

from collections.abc import Collection

from models.config import TransformerConfig
from models.families import bart
from models.families.family import Family, Values

# The sinusoids, which are computed.
IGNORED = (r"embed_positions\.weight$",)


def config(values: Values, names: Collection[str]) -> TransformerConfig:
    ours = {**bart.options(values, names), "positions": "sinusoidal", "norm_place": "pre"}
    return TransformerConfig("encoder_decoder", **ours)


FAMILY = Family(config, bart.weights, prefix="model.", ignored=IGNORED)
