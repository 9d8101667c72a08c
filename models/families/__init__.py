"""Families of checkpoints that Hugging Face folders hold, by their model_type."""

from __future__ import annotations

from models.config import ConfigError
from models.families import (
    bart,
    gemma,
    gemma2,
    gpt2,
    gpt_neox,
    llama,
    m2m_100,
    marian,
    mbart,
    mistral,
    mt5,
    pegasus,
    phi,
    qwen2,
    qwen3,
    t5,
    umt5,
)
from models.families.family import Family

FAMILIES: dict[str, Family] = {
    module.__name__.rpartition(".")[2]: module.FAMILY
    for module in (
        gpt2, llama, mistral, qwen2, qwen3, phi, gpt_neox, gemma, gemma2, t5, mt5, umt5, bart, mbart, pegasus, marian,
        m2m_100,
    )
}  # fmt: skip


def family_of(model_type: object) -> Family:
    """The family of a config.json's model_type. Raises ConfigError, listing those we have, for another."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(f"model_type {model_type!r} is not supported: choose from {', '.join(['tandem', *FAMILIES])}")
    return FAMILIES[model_type]
