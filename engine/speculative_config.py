"""``SpeculativeConfig``: how an engine guesses the tokens to come, by vLLM's names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.sampling import check_integer

MOST_TOKENS = 64


@dataclass(frozen=True)
class SpeculativeConfig:
    """Either a draft ``model`` guesses, or prompt lookup does. A wrong value is a ValueError that names it.

    Attributes:
        method: "ngram" looks up what came after the same tokens before; "draft_model" runs a smaller model.
        num_speculative_tokens: most tokens guessed at once; how many of them are worth their time is measured.
        prompt_lookup_min, prompt_lookup_max: how many of the last tokens are looked up.
        model: the draft model's folder or id; it has the same vocabulary.
    """

    method: str | None = None
    num_speculative_tokens: int = 8
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 5
    model: str | Path | None = None

    def __post_init__(self) -> None:
        if self.method not in (None, "ngram", "draft_model"):
            raise ValueError(f"speculative_config's method must be ngram or draft_model, got {self.method!r:.80}")
        if (self.kind == "draft_model") != (self.model is not None):
            raise ValueError("speculative_config takes a model for the method draft_model, and for it alone")
        check_integer("num_speculative_tokens", self.num_speculative_tokens, 1, MOST_TOKENS)
        check_integer("prompt_lookup_max", self.prompt_lookup_max, 1, 32)
        check_integer("prompt_lookup_min", self.prompt_lookup_min, 1, self.prompt_lookup_max)
        if not isinstance(self.model, str | Path | None):
            raise ValueError(f"speculative_config's model must be a folder, got {self.model!r:.80}")

    @property
    def kind(self) -> str:
        return self.method or ("ngram" if self.model is None else "draft_model")

    @classmethod
    def of(cls, given: Mapping[str, Any] | SpeculativeConfig) -> SpeculativeConfig:
        if isinstance(given, SpeculativeConfig):
            return given
        if not isinstance(given, Mapping):
            raise ValueError(f"speculative_config must be a dict, got {given!r:.80}")
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"speculative_config has no {unknown[0]!r}: choose from {', '.join(known)}")
        return cls(**given)
