"""Architectures as data: one config, one set of layers, two thin models."""

from __future__ import annotations

from models.checkpoint import load
from models.config import ConfigError, TransformerConfig
from models.files import CheckpointError
from models.transformer import DecoderOnly, EncoderDecoder, build_model

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DecoderOnly",
    "EncoderDecoder",
    "TransformerConfig",
    "build_model",
    "load",
]
