"""``SamplingParams``: how one request's tokens are chosen and when they end."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from torch import Tensor

from engine.structured_outputs import StructuredOutputsParams

MAX_SAMPLES = 16_384
MAX_LOGPROBS = 128
MAX_STOPS, MAX_BAD_WORDS, MAX_NGRAM = 128, 1024, 2**20  # searched for in every step
MAX_TOP_K = 2**31 - 1
MAX_FLOAT = 3e38  # about float32's largest
LogitsProcessor = Callable[..., Tensor]


@dataclass(frozen=True)
class SamplingParams:
    """vLLM's names, defaults and ranges. A value out of range is a ValueError that names it.

    Attributes:
        n: samples of one prompt. temperature: 0 is greedy.
        top_p, top_k, min_p: keep the smallest set of mass top_p, the k likeliest (0 or -1: all), those at least min_p
            times as likely as the likeliest.
        presence_penalty, frequency_penalty, repetition_penalty: against tokens generated before (repetition: or in
            the prompt).
        max_tokens: most tokens generated; None: as many as max_model_len leaves room for.
        seed: of this request's random numbers; None or -1: drawn from the engine's.
        stop: strings that end the text; cut off unless include_stop_str_in_output.
        stop_token_ids: tokens that end it besides the end token. ignore_eos: go on after the end token.
        logprobs: None, or how many of the likeliest tokens to report besides the chosen one, 128 at most.
        prompt_logprobs: the same of each token of the decoder's prompt but the first.
        skip_special_tokens: leave special tokens out of the text.
        min_tokens: no end or stop token before so many others.
        logit_bias: added to the logits of these tokens. allowed_token_ids: only these are generated.
        bad_words: texts whose tokens never come in a row.
        structured_outputs: what shape the text must have.
        logits_processors: callables of (output's token ids, logits) or (prompt's, output's, logits), a list or two and
            a float32 tensor (vocab,), that give the logits to go on with, before everything else that changes them.
        typical_p: keep the tokens whose surprise is closest to the expected one, of mass typical_p.
        no_repeat_ngram_size: no run of so many tokens occurs twice in prompt and output; 0 is off.
        task: of the model's ``task_specific_params``, whose prefix goes before the source.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = 16
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    typical_p: float = 1.0
    no_repeat_ngram_size: int = 0
    task: str | None = None

    def __post_init__(self) -> None:
        check_integer("n", self.n, 1, MAX_SAMPLES)
        check_number("temperature", self.temperature, 0, math.inf)
        check_number("top_p", self.top_p, 0, 1, open_low=True)
        check_integer("top_k", self.top_k, -1, MAX_TOP_K)
        check_number("min_p", self.min_p, 0, 1)
        check_number("presence_penalty", self.presence_penalty, -2, 2)
        check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        check_number("repetition_penalty", self.repetition_penalty, 0, math.inf, open_low=True)
        check_number("typical_p", self.typical_p, 0, 1, open_low=True)
        check_integer("no_repeat_ngram_size", self.no_repeat_ngram_size, 0, MAX_NGRAM)
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise ValueError(f"structured_outputs must be StructuredOutputsParams, got {self.structured_outputs!r:.80}")
        if not isinstance(self.task, str | None):
            raise ValueError(f"task must be the name of a task, got {self.task!r}")
        if self.max_tokens is not None:
            check_integer("max_tokens", self.max_tokens, 1, None)
        check_integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.seed is not None:
            check_integer("seed", self.seed, -(2**63), 2**63 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        if self.stop is not None and not isinstance(self.stop, str | list | tuple):
            raise ValueError(f"stop must be a string or a list of them, got {self.stop!r}")
        if any(not isinstance(text, str) or not text for text in self.stop_strings):
            raise ValueError(f"stop must be strings that are not empty, got {self.stop!r}")
        self._check_lists()
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")

    def _check_lists(self) -> None:
        for name in ("stop_token_ids", "allowed_token_ids", "bad_words", "logits_processors"):
            if (values := getattr(self, name)) is not None and not isinstance(values, list | tuple):
                raise ValueError(f"{name} must be a list, got {values!r:.80}")
        for name in ("stop", "stop_token_ids", "allowed_token_ids", "bad_words", "logits_processors"):
            if isinstance(values := getattr(self, name), list):  # what the caller does to it later changes nothing
                object.__setattr__(self, name, tuple(values))
        for name, most in (("stop", MAX_STOPS), ("bad_words", MAX_BAD_WORDS)):
            if not isinstance(values := getattr(self, name) or (), str) and len(values) > most:
                raise ValueError(f"{name} holds {len(values)} strings, more than {most}")
        for name in ("stop_token_ids", "allowed_token_ids"):
            for token_id in getattr(self, name) or ():
                check_integer(name, token_id, 0, None)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids must hold a token, got none")
        if any(not isinstance(word, str) or not word for word in self.bad_words or ()):
            raise ValueError(f"bad_words must be strings that are not empty, got {self.bad_words!r:.80}")
        if any(not callable(process) for process in self.logits_processors or ()):
            raise ValueError(f"logits_processors must be callables, got {self.logits_processors!r:.80}")
        if not isinstance(self.logit_bias, Mapping | None):
            raise ValueError(f"logit_bias must be a dict of token ids and numbers, got {self.logit_bias!r:.80}")
        for token_id, bias in (self.logit_bias or {}).items():
            check_integer("logit_bias", token_id, 0, None)
            check_number("logit_bias", bias, -MAX_FLOAT, MAX_FLOAT)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop) if self.stop is not None else ()

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)


def check_number(name: str, value: object, low: float, high: float, open_low: bool = False) -> None:
    """Raises ValueError unless ``value`` is a number from ``low`` (itself left out where ``open_low``) to ``high``."""
    start = f"({low}" if open_low else f"[{low}"
    end = "infinity)" if high == math.inf else f"{high}]"
    if isinstance(value, Real) and not isinstance(value, bool):
        # As the sampler will see it: a number that float32 rounds to 0 or to infinity is out of range too.
        number = _as_float(value)
        single = ctypes.c_float(number).value if abs(number) < MAX_FLOAT else math.inf
        above = single > low if open_low else single >= low
        if math.isfinite(single) and above and number >= low and number <= high:
            return
    raise ValueError(f"{name} must be a number in {start}, {end}, got {value!r:.80}")


def _as_float(value: Real) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_integer(name: str, value: object, low: int, high: int | None) -> None:
    """Raises ValueError unless ``value`` is an integer from ``low`` to ``high`` (None: to any)."""
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):  # type: ignore[operator]
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be an integer {allowed}, got {value!r}")


def check_priority(value: object) -> int:
    """Raises ValueError unless ``value`` is an integer of 32 bits."""
    check_integer("priority", value, -(2**31), 2**31 - 1)
    assert isinstance(value, int)
    return value
