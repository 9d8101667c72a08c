"""M2M-100 and NLLB: BART with pre-norm and tensor2tensor's sinusoidal positions (arXiv:2010.11125)."""

from __future__ import annotations

from collections.abc import Collection

from models.config import TransformerConfig
from models.families import bart
from models.families.family import Family, Values, activation, optional

IGNORED = (r"embed_positions\.weights?$",)


def config(values: Values, names: Collection[str]) -> TransformerConfig:
    ours = {
        **bart.options(values, names),
        "positions": "sinusoidal_t2t",
        "position_offset": optional(values, "pad_token_id", 1) + 1,
        "norm_place": "pre",
        "activation": activation(values, "activation_function", "relu"),
        "scale_embedding": optional(values, "scale_embedding", True),
    }
    return TransformerConfig("encoder_decoder", **ours)


FAMILY = Family(config, bart.weights, prefix="model.", ignored=IGNORED)
