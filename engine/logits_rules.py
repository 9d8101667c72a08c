"""Rules on the next token that look at the sequence so far: what must come, and what must not.

The meaning and the order are those of transformers' logits processors. But for the two that are for beams alone, rules
only set entries, to 0 or to minus infinity, so they apply to logits (sampling) as to log-probabilities (beam search,
whose sums then leave a forced token out, as in transformers).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.sampling import SamplingParams
from models.generation import GenerationConfig

if TYPE_CHECKING:
    from engine.request import Sequence


@dataclass(frozen=True)
class GenerationRules:
    """What a model or a request asks of generated tokens; the default asks nothing.

    Attributes:
        eos_ids: the end tokens; bad_words cannot ban them. stop_ids: others that end one request's output.
        forced_bos_id: comes right after a decoder prompt of one token. forced_eos_id: comes last, at the length limit.
        suppress_ids: never come. begin_suppress_ids: do not come first (after forced_bos_id, where that is forced).
        bad_words: sequences of tokens that are never completed.
        no_repeat_ngram_size: no n-gram of this size occurs twice, prompt included; 0 is off.
        repetition_penalty: divides, or multiplies where they are negative, the scores of tokens seen (of beams alone:
            the sampler has its own).
        renormalize: log-probabilities sum to one again in the end (of beams alone).
        min_new_tokens: neither an end token nor a stop token before so many others.
    """

    eos_ids: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    forced_bos_id: int | None = None
    forced_eos_id: int | None = None
    suppress_ids: tuple[int, ...] = ()
    begin_suppress_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    renormalize: bool = False

    @functools.cached_property
    def reads_history(self) -> bool:
        """Whether any rule depends on more of the sequence than its length."""
        return bool(self.no_repeat_ngram_size) or any(len(word) > 1 for word in self.bad_words)

    @functools.cached_property
    def ask_nothing(self) -> bool:
        return self == GenerationRules(eos_ids=self.eos_ids, stop_ids=self.stop_ids)


def rules_of(generation: GenerationConfig, params: SamplingParams) -> GenerationRules:
    """The rules of a model and, beside them, of one request."""
    return GenerationRules(
        generation.eos_ids, tuple(params.stop_token_ids or ()), generation.forced_bos_id, generation.forced_eos_id,
        generation.suppress_ids, generation.begin_suppress_ids, generation.bad_words, params.no_repeat_ngram_size,
        params.min_tokens,
    )  # fmt: skip


def apply_to_samples(samples: list[Sequence], logits: Tensor) -> None:
    """Applies the rules of each sample's request, in place, to its row of logits."""
    for i, sequence in enumerate(samples):
        rules = sequence.request.rules
        if rules.ask_nothing:
            continue
        # A long history is made a tensor only for the rules that read it; the others ask for its length.
        length = len(sequence.token_ids)
        history = (
            torch.tensor([sequence.token_ids]) if rules.reads_history else torch.empty(1, length, dtype=torch.int64)
        )
        apply_rules(logits[i : i + 1], history, rules, sequence.num_prompt, sequence.max_length)


NO_RULES = GenerationRules()


def apply_rules(scores: Tensor, token_ids: Tensor, rules: GenerationRules, num_prompt: int, max_length: int) -> None:
    """Applies one request's rules, in place, to the scores (rows, vocab) of the token after each row of ``token_ids``.

    ``token_ids`` are int64 (rows, length), the decoder's prompt of ``num_prompt`` tokens included; ``max_length`` is
    the longest they may grow. A later rule overrides an earlier one: suppressing a forced token leaves nothing.
    """
    length = token_ids.shape[1]
    if rules.repetition_penalty != 1:
        penalise_repetition(scores, token_ids, rules.repetition_penalty)
    ban_repeated_ngrams(scores, token_ids, rules.no_repeat_ngram_size)
    for word in rules.bad_words:
        if len(word) > 1 or word[0] not in rules.eos_ids:
            ban_word(scores, token_ids, word)
    if length - num_prompt < rules.min_new_tokens and (rules.eos_ids or rules.stop_ids):
        scores[:, [*rules.eos_ids, *rules.stop_ids]] = -math.inf
    if rules.forced_bos_id is not None and length == 1:
        force(scores, rules.forced_bos_id)
    if rules.forced_eos_id is not None and length == max_length - 1:
        force(scores, rules.forced_eos_id)
    if rules.suppress_ids:
        scores[:, list(rules.suppress_ids)] = -math.inf
    forced_first = num_prompt == 1 and rules.forced_bos_id is not None
    if rules.begin_suppress_ids and length == num_prompt + forced_first:
        scores[:, list(rules.begin_suppress_ids)] = -math.inf


def penalise_repetition(scores: Tensor, token_ids: Tensor, penalty: float) -> None:
    """Makes every token seen before less likely (CTRL, arXiv:1909.05858)."""
    seen = scores.gather(1, token_ids)
    scores.scatter_(1, token_ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def force(scores: Tensor, token_id: int) -> None:
    """Leaves this one token, and a row that is not finite as it is: that is for others to find."""
    broken = scores.isnan().any(1)
    scores.masked_fill_(~broken[:, None], -math.inf)
    scores[~broken, token_id] = 0.0


def ban_word(scores: Tensor, token_ids: Tensor, word: tuple[int, ...]) -> None:
    """Bans the last token of ``word`` where the tokens before it have just come."""
    *start, last = word
    if len(start) <= token_ids.shape[1]:
        tail = token_ids[:, token_ids.shape[1] - len(start) :]
        scores[(tail == torch.tensor(start, dtype=torch.int64)).all(1), last] = -math.inf


def ban_repeated_ngrams(scores: Tensor, token_ids: Tensor, size: int) -> None:
    """Bans every token that would complete an n-gram of this size a second time."""
    length = token_ids.shape[1]
    if not 0 < size <= length:
        return
    windows = token_ids.unfold(1, size, 1)  # (rows, windows, size)
    last_tokens = token_ids[:, None, length + 1 - size :]
    rows, at = (windows[..., :-1] == last_tokens).all(-1).nonzero(as_tuple=True)
    scores[rows, windows[rows, at, -1]] = -math.inf
