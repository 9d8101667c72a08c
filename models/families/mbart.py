"""mBART: BART with pre-norm and a norm at the end of each stack (arXiv:2001.08210)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from models.config import TransformerConfig
from models.families import bart
from models.families.family import Family, Values


def config(values: Values, names: Collection[str]) -> TransformerConfig:
    return dataclasses.replace(bart.config(values, names), norm_place="pre")


FAMILY = Family(config, bart.weights, prefix="model.")
