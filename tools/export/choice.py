"""Which family holds a model exactly: the one whose config.json reads back as ours."""

from __future__ import annotations

import dataclasses
from typing import Any

from models.config import SINUSOIDAL, ConfigError, TransformerConfig
from models.families import FAMILIES
from models.families.family import UNLIMITED
from tools.export.targets import DECODERS, ENCODER_DECODERS, Target

# What training alone reads; bias, which the other biases were filled from; float16's range, which no family states.
FREE = {"dropout", "attention_dropout", "bias", "float32_residual"}
ROPE_FIELDS = {
    "linear": ("kind", "factor"),
    "llama3": ("kind", "factor", "original_max_seqlen", "low_freq_factor", "high_freq_factor"),
}


def choose(config: TransformerConfig) -> tuple[Target, dict[str, Any]]:
    """The family to write a model as, and its config.json. Raises ConfigError, naming each family's obstacle."""
    obstacles = []
    for target in ENCODER_DECODERS if config.is_encoder_decoder else DECODERS:
        values = target.values(config)
        if (obstacle := find_obstacle(config, target, values)) is None:
            return target, {"architectures": [target.architecture], "model_type": target.model_type, **values}
        obstacles.append(obstacle)
    raise ConfigError(f"no family of transformers holds this model: {'; '.join(obstacles)}")


def find_obstacle(config: TransformerConfig, target: Target, values: dict[str, Any]) -> str | None:
    """What the family cannot hold of a config, None where it holds it all."""
    try:
        theirs = FAMILIES[target.model_type].config(values, telling_names(config))
    except ConfigError as error:
        return f"{target.title}: {error}"
    wanted, got = compared(config), compared(theirs)
    if theirs.max_seqlen == UNLIMITED:
        wanted["max_seqlen"] = UNLIMITED
    for name, value in wanted.items():
        if value != got.get(name):
            return f"{name} {value!r} cannot be written as {target.title}, which has {got.get(name)!r}"
    return None


def telling_names(config: TransformerConfig) -> list[str]:
    """Of the tensors to write, those whose presence says something about the config."""
    telling = {"lm_head.weight": not config.tie_embeddings, "final_logits_bias": config.head_bias}
    return [name for name, present in telling.items() if present]


def compared(config: TransformerConfig) -> dict[str, Any]:
    """The fields that a model's outputs depend on."""
    skipped = set(FREE)
    if config.positions not in ("learned", *SINUSOIDAL):
        skipped.add("position_offset")
    if config.window is None:
        skipped.add("window_layers")
    if not config.is_encoder_decoder:
        skipped |= {"encoder_depth", "share_embeddings"}
    unread = [prefix for kind, prefix in (("rotary", "rope_"), ("relative", "relative_")) if config.positions != kind]
    values = dataclasses.asdict(config)
    assert config.head_dim is not None
    values["softmax_scale"] = config.softmax_scale or config.head_dim**-0.5
    if (scaling := values["rope_scaling"]) is not None:
        values["rope_scaling"] = {name: scaling[name] for name in ROPE_FIELDS.get(scaling["kind"], scaling)}
    return {name: x for name, x in values.items() if name not in skipped and not name.startswith(tuple(unread))}
