"""From what a caller gives as a prompt to a checked ``Request``."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

from engine.grammar_compiler import GrammarCompiler
from engine.grammar_state import CompiledGrammar
from engine.logits_rules import GenerationRules, mask_of
from engine.request import Request, Sequence
from engine.sampling import SamplingParams
from models.config import TransformerConfig
from models.generation import GenerationConfig
from models.tokenizer import TextStream, Tokenizer, is_unicode

Prompt = str | Mapping[str, Any]

FORMS = '{"prompt": str}, {"prompt_token_ids": [int]} or {"encoder_prompt": ..., "decoder_prompt": ...}'


class PromptReader:
    """Turns prompts into requests for one model. Every method raises ValueError, in one sentence, for a bad prompt."""

    def __init__(
        self, config: TransformerConfig, generation: GenerationConfig, tokenizer: Tokenizer | None, max_model_len: int
    ) -> None:
        self.config, self.generation, self.tokenizer = config, generation, tokenizer
        self.max_model_len = max_model_len
        self._compiler: GrammarCompiler | None = None

    def set_generation(self, generation: GenerationConfig) -> None:
        """Of the requests to come."""
        self.generation, self._compiler = generation, None  # grammars know the end tokens

    def request(self, request_id: str, prompt: Prompt, params: SamplingParams, seed: int) -> Request:
        """The request for a prompt, with its ``n`` sequences; sample i draws from ``seed + i``."""
        self._check_params(params)
        request = self._read(request_id, prompt, params)
        request.rules = self._rules(params)
        length = len(request.prompt_token_ids)
        if length >= self.max_model_len:
            raise ValueError(
                f"the prompt is {length} tokens; max_model_len {self.max_model_len} leaves no room to generate"
            )
        if params.prompt_logprobs is not None and length > 1:
            request.scored = (1, length)
        limit = self.max_model_len if params.max_tokens is None else length + params.max_tokens
        grammar = self._grammar(params)
        for index in range(params.n):
            request.sequences.append(
                Sequence(
                    request,
                    index,
                    list(request.prompt_token_ids),
                    _wrap(seed + index),
                    self._text_stream(params),
                    max_length=min(limit, self.max_model_len),
                    grammar=None if grammar is None else grammar.state(),
                )
            )
        return request

    def _text_stream(self, params: SamplingParams) -> TextStream | None:
        if self.tokenizer is None:
            return None
        # Cleaned up, a text might no longer have its shape.
        return TextStream(self.tokenizer, params.skip_special_tokens, as_is=params.structured_outputs is not None)

    def _grammar(self, params: SamplingParams) -> CompiledGrammar | None:
        if params.structured_outputs is None:
            return None
        if self.tokenizer is None:
            raise ValueError("structured_outputs needs a tokenizer, and this model has none")
        if self._compiler is None:
            self._compiler = GrammarCompiler(self.tokenizer, self.vocab_size, self.generation.eos_ids)
        return self._compiler.compile(params.structured_outputs)

    def _check_params(self, params: SamplingParams) -> None:
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token_id in getattr(params, name) or ():
                if token_id >= self.vocab_size:
                    raise ValueError(f"{name} holds {token_id}, beyond the vocabulary's {self.vocab_size} tokens")
        if params.task is not None and not self.config.is_encoder_decoder:
            raise ValueError(f"task {params.task!r} goes before a source, which a decoder-only model does not have")
        for name in ("stop", "bad_words"):
            if getattr(params, name) and self.tokenizer is None:
                raise ValueError(f"{name} needs a tokenizer, and this model has none")

    @property
    def vocab_size(self) -> int:
        """Of the tokens that are generated."""
        return self.config.target_vocab_size or 0

    def _rules(self, params: SamplingParams) -> GenerationRules:
        """The rules of the model and, beside them, of one request."""
        generation, allowed = self.generation, params.allowed_token_ids
        return GenerationRules(
            generation.eos_ids, tuple(params.stop_token_ids or ()), generation.forced_bos_id, generation.forced_eos_id,
            generation.suppress_ids, generation.begin_suppress_ids, generation.bad_words + self._bad_words(params),
            params.no_repeat_ngram_size, params.min_tokens, logit_bias=dict(params.logit_bias or {}),
            allowed=None if allowed is None else mask_of(allowed, self.vocab_size),
        )  # fmt: skip

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Each word's tokens, as at the start of a text and behind a space."""
        spellings = [spelled for word in params.bad_words or () for spelled in (word, " " + word.lstrip(" "))]
        found = (tuple(self.target_ids(spelled)) for spelled in spellings)
        return tuple(dict.fromkeys(token_ids for token_ids in found if token_ids))

    def _read(self, request_id: str, prompt: Prompt, params: SamplingParams) -> Request:
        if isinstance(prompt, Mapping) and set(prompt) == {"encoder_prompt", "decoder_prompt"}:
            if not self.config.is_encoder_decoder:
                raise ValueError("a decoder-only model takes no encoder_prompt: give the prompt alone")
            source, source_ids = self._source(prompt["encoder_prompt"], params)
            text, token_ids = self._decoder_prompt(prompt["decoder_prompt"])
            return Request(request_id, text, token_ids, params, source, source_ids)
        if self.config.is_encoder_decoder:
            source, source_ids = self._source(prompt, params)
            return Request(request_id, None, self._start(), params, source, source_ids)
        text, token_ids = self._text_and_ids(prompt, target=True)
        if not token_ids:
            raise ValueError("the prompt is empty: a decoder-only model needs at least one token")
        return Request(request_id, text, token_ids, params)

    def source_ids(self, prompt: Prompt) -> list[int]:
        """The token ids of a source, given alone or beside a decoder prompt."""
        if isinstance(prompt, Mapping) and set(prompt) == {"encoder_prompt", "decoder_prompt"}:
            prompt = prompt["encoder_prompt"]
        return self._source(prompt, SamplingParams())[1]

    def _source(self, prompt: Prompt, params: SamplingParams) -> tuple[str | None, list[int]]:
        text, token_ids = self._text_and_ids(self._with_task(prompt, params.task), target=False)
        if len(token_ids) > self.max_model_len:
            raise ValueError(f"the source is {len(token_ids)} tokens, beyond max_model_len {self.max_model_len}")
        token_ids = token_ids or list(self.generation.eos_ids[:1])  # as in training: one key for cross-attention
        if not token_ids:
            raise ValueError("the source is empty, and the model has no end token to stand for it")
        return text, token_ids

    def _with_task(self, prompt: Prompt, task: str | None) -> Prompt:
        """The prompt behind the prefix that the model's makers gave the task; ids are used as they are."""
        if task is None:
            return prompt
        if task not in self.generation.tasks:
            known = ", ".join(sorted(self.generation.tasks)) or "none"
            raise ValueError(f"the model has no task {task!r}: it has {known}")
        prefix = self.generation.tasks[task].get("prefix") or ""
        text = prompt["prompt"] if isinstance(prompt, Mapping) and set(prompt) == {"prompt"} else prompt
        return prefix + text if isinstance(text, str) else prompt

    def _start(self) -> list[int]:
        if self.generation.start_id is None:
            raise ValueError("the model names no decoder_start_token_id: give a decoder_prompt")
        return [self.generation.start_id]

    def _decoder_prompt(self, prompt: Prompt | None) -> tuple[str | None, list[int]]:
        """A given prompt behind the start token, unless it begins with it."""
        if prompt is None:
            return None, self._start()
        text, token_ids = self._text_and_ids(prompt, target=True)
        if self.generation.start_id is None and token_ids:
            return text, token_ids
        start = self._start()
        return text, token_ids if token_ids[:1] == start else start + token_ids

    def _text_and_ids(self, prompt: Prompt, target: bool) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping) and set(prompt) == {"prompt"}:
            prompt = prompt["prompt"]
        if isinstance(prompt, str):
            tokenizer = self._encoder(prompt)
            # A decoder-only model's prompt is a whole text, with what its tokenizer puts around one.
            whole = not (target and self.config.is_encoder_decoder)
            return prompt, self.checked_ids(
                tokenizer.encode(prompt) if whole else tokenizer.encode_target(prompt), target
            )
        if not isinstance(prompt, Mapping) or set(prompt) != {"prompt_token_ids"}:
            raise ValueError(f"a prompt is a string, {FORMS}, got {prompt!r:.80}")
        return None, self.checked_ids(prompt["prompt_token_ids"], target)

    def target_ids(self, target: str | SequenceOf[int]) -> list[int]:
        """The token ids of a target given as text, with no special tokens around it, or as ids."""
        if not isinstance(target, str):
            return self.checked_ids(target, target=True)
        return self.checked_ids(self._encoder(target).encode_target(target), target=True)

    def _encoder(self, text: str) -> Tokenizer:
        """The tokenizer, for a text that it can encode."""
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: give prompt_token_ids instead of text")
        if not is_unicode(text):
            raise ValueError(f"the prompt is not valid Unicode: {text!a:.80}")
        return self.tokenizer

    def checked_ids(self, token_ids: Any, target: bool) -> list[int]:
        """``token_ids`` as a list of ints inside the vocabulary."""
        size = (self.config.target_vocab_size if target else self.config.vocab_size) or 0
        try:
            ids = [operator.index(token_id) for token_id in token_ids]
        except TypeError:
            raise ValueError(f"token ids must be a list of integers, got {token_ids!r:.80}") from None
        if outside := [token_id for token_id in ids if not 0 <= token_id < size]:
            raise ValueError(f"token id {outside[0]} is outside the vocabulary of {size}")
        return ids


def _wrap(seed: int) -> int:
    """``seed`` as the sampler's signed 64 bits."""
    return (seed + 2**63) % 2**64 - 2**63
