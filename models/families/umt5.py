"""umT5: mT5 with a relative bias of its own in each layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from models.config import TransformerConfig
from models.families import t5
from models.families.family import Family, Values


def config(values: Values, names: Collection[str]) -> TransformerConfig:
    ours = t5.config({"feed_forward_proj": "gated-gelu", **values}, names)
    return dataclasses.replace(ours, relative_per_layer=True)


FAMILY = Family(config, t5.weights, ignored=t5.IGNORED)
