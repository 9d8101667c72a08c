"""What a run's weights start from: nothing, or the checkpoint that ``model.init_from`` names."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models
from models.config import ConfigError, TransformerConfig
from models.tokenizer import Tokenizer
from models.transformer import DecoderOnly, EncoderDecoder, build_model
from train.config import RunConfig


def starting_point(
    config: RunConfig, start: Path | None
) -> tuple[DecoderOnly | EncoderDecoder | None, Tokenizer | None]:
    """The model to fine-tune, None for one that is to be made, and the tokenizer, None for one that is to be learned.

    ``start`` is the run's own checkpoint, which knows both: what it was fine-tuned from may be gone by then.
    Raises ConfigError, or CheckpointError, for a checkpoint that does not fit the run.
    """
    if config.model.init_from is None:
        return None, Tokenizer.load(start) if start else None
    model, tokenizer = models.load(start or config.model.init_from)
    if tokenizer is None:
        raise ConfigError(f"model.init_from: {config.model.init_from} has no tokenizer")
    check(config, model, tokenizer)
    return rebuilt(model, changed(config, model.config)), tokenizer


def check(config: RunConfig, model: DecoderOnly | EncoderDecoder, tokenizer: Tokenizer) -> None:
    """Raises ConfigError unless the model can learn the task with the tokenizer."""
    shape, place = model.config, f"model.init_from: {config.model.init_from}"
    if shape.architecture != config.architecture:
        raise ConfigError(f"{place} is {shape.architecture}, data.task {config.data.task} needs {config.architecture}")
    if shape.is_encoder_decoder and model.generation.start_id is None:
        raise ConfigError(f"{place} does not say which token an output starts from (decoder_start_token_id)")
    if shape.is_encoder_decoder and not model.generation.eos_ids:
        raise ConfigError(f"{place} does not say which token ends an output (eos_token_id)")
    rows = (shape.vocab_size, shape.target_vocab_size or 0)
    for tokens, known in zip((tokenizer.vocab_size, tokenizer.target_vocab_size), rows, strict=True):
        if tokens > known:
            raise ConfigError(f"{place} has a tokenizer of {tokens} tokens and a model of {known}")


def changed(config: RunConfig, shape: TransformerConfig) -> TransformerConfig:
    """The checkpoint's config with what the run gives beside it. Raises ConfigError for a longer max_seqlen."""
    given = {name: getattr(config.model, name) for name in ("dropout", "attention_dropout", "max_seqlen")}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if changes.get("max_seqlen", 0) > shape.max_seqlen:
        raise ConfigError(
            f"model.max_seqlen {changes['max_seqlen']} is longer than {shape.max_seqlen}, which "
            f"{config.model.init_from} takes"
        )
    return dataclasses.replace(shape, **changes)


def rebuilt(model: DecoderOnly | EncoderDecoder, config: TransformerConfig) -> DecoderOnly | EncoderDecoder:
    """The model under a config that differs in what training alone reads, and in being shorter.

    Its weights are copies: a loaded model's may be views of its file, whose mapping takes training's writes for now
    but hangs on a file that someone may cut short or replace.
    """
    with torch.device("meta"):  # no memory, no random numbers: every weight is assigned
        new = build_model(config)
    shapes = {name: parameter.shape for name, parameter in new.named_parameters(remove_duplicate=False)}
    copies: dict[nn.Parameter, nn.Parameter] = {}  # a tied weight stays one
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter not in copies:
            rows = parameter.detach()[: shapes[name][0]]  # fewer where learned positions are
            copies[parameter] = nn.Parameter(rows.clone(memory_format=torch.contiguous_format))
        state[name] = copies[parameter]
    new.load_state_dict(state, assign=True)
    new.generation = model.generation
    return new
