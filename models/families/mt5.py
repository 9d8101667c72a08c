"""mT5: T5 1.1 with a large vocabulary (arXiv:2010.11934)."""

from __future__ import annotations

from collections.abc import Collection

from models.config import TransformerConfig
from models.families import t5
from models.families.family import Family, Values


def config(values: Values, names: Collection[str]) -> TransformerConfig:
    return TransformerConfig("encoder_decoder", **t5.options({"feed_forward_proj": "gated-gelu", **values}, names))


FAMILY = Family(config, t5.weights, ignored=t5.IGNORED)
