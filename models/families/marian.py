"""Marian and OPUS-MT: BART with sinusoidal positions, and perhaps two vocabularies."""

from __future__ import annotations

from collections.abc import Collection

from models.config import TransformerConfig
from models.families import bart
from models.families.family import Family, Values, optional
from models.families.pegasus import IGNORED


def config(values: Values, names: Collection[str]) -> TransformerConfig:
    ours = {**bart.options(values, names), "positions": "sinusoidal"}
    if not optional(values, "share_encoder_decoder_embeddings", True):
        ours |= {
            "share_embeddings": False,
            "target_vocab_size": optional(values, "decoder_vocab_size", ours["vocab_size"]),
        }
    return TransformerConfig("encoder_decoder", **ours)


FAMILY = Family(config, bart.weights, prefix="model.", ignored=IGNORED)
