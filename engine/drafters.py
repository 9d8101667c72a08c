"""From ``speculative_config`` to an engine's speculation."""

from __future__ import annotations

import dataclasses

import torch

from engine.draft_model import DraftModel
from engine.options import EngineOptions, resolve_dtype
from engine.prompt_lookup import PromptLookup
from engine.runner import Runner
from engine.runners import open_checkpoint, runner_of
from engine.speculation import Speculation
from engine.speculative_config import SpeculativeConfig
from models.config import TransformerConfig


def speculation_of(options: EngineOptions, ours: TransformerConfig, device: torch.device) -> Speculation | None:
    """What the options ask for, for a model ``ours``. Raises ValueError for a draft model that does not fit."""
    config = options.speculative_config
    if config is None:
        return None
    if config.kind == "ngram":
        reads_source = ours.is_encoder_decoder and ours.vocab_size == ours.target_vocab_size
        lookup = PromptLookup(config.prompt_lookup_min, config.prompt_lookup_max, reads_source)
        return Speculation(lookup, config.num_speculative_tokens)
    theirs, runner = _draft(config, options, device)
    if theirs.architecture != ours.architecture or theirs.target_vocab_size != ours.target_vocab_size:
        raise ValueError("the draft model must be of the model's architecture and have its vocabulary")
    drafter = DraftModel(runner, runner.cache.tokens.shape[1], options.num_threads)
    return Speculation(drafter, config.num_speculative_tokens)


def _draft(
    config: SpeculativeConfig, options: EngineOptions, device: torch.device
) -> tuple[TransformerConfig, Runner]:  # fmt: skip
    assert config.model is not None
    own = dataclasses.replace(options, speculative_config=None, max_model_len=None, kv_cache_memory_bytes=None)
    model, _, weights = open_checkpoint(config.model, own, device, resolve_dtype("auto", device))
    return model.config, runner_of(model, weights, own)
