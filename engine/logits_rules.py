"""Rules on the next token that look at the sequence so far: what must come, and what must not.

The meaning and the order are those of transformers' logits processors, and apply to logits (sampling) as to
log-probabilities (beam search, whose sums then leave a forced token out, as in transformers). What a rule asks of one
row at one place is put together here; ``kernels.sampling.edit_logits`` does it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.sampling import LogitEdits

if TYPE_CHECKING:
    from engine.request import Sequence

Mask = NDArray[np.int32]  # bit i % 32 of word i // 32: token i is allowed
BAN = -math.inf


@dataclass(frozen=True, eq=False)
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
        logit_bias: added to the scores of tokens. allowed: only these tokens come.
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
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed: Mask | None = None

    @functools.cached_property
    def ask_nothing(self) -> bool:
        always = self.suppress_ids or self.bad_words or self.no_repeat_ngram_size or self.logit_bias
        sometimes = self.begin_suppress_ids or self.min_new_tokens or self.repetition_penalty != 1
        forced = self.forced_bos_id is not None or self.forced_eos_id is not None or self.allowed is not None
        return not (always or sometimes or forced)

    @functools.cached_property
    def look_back(self) -> bool:
        """Whether they ask something of a token that depends on those before it, not on how many they are alone."""
        words = any(len(word) > 1 for word in self.bad_words)
        return words or bool(self.no_repeat_ngram_size) or self.repetition_penalty != 1

    @functools.cached_property
    def _bad_words_after(self) -> dict[int | None, list[tuple[int, ...]]]:
        """The words by the token before their last; None: there is none."""
        words: dict[int | None, list[tuple[int, ...]]] = {}
        for word in self.bad_words:
            words.setdefault(word[-2] if len(word) > 1 else None, []).append(word)
        return words

    @functools.cached_property
    def stops(self) -> frozenset[int]:
        return frozenset(self.stop_ids)

    def steady_until(self, length: int, num_prompt: int, max_length: int) -> int:
        """The next length, beyond this one, at which the rules may ask something else of a sequence."""
        if any(len(word) > 1 for word in self.bad_words):
            return length + 1
        changes = (2, num_prompt, num_prompt + 1, num_prompt + 2, num_prompt + self.min_new_tokens, max_length - 1)
        return min((change for change in changes if change > length), default=max_length)

    def forced(self, length: int, max_length: int) -> int | None:
        """The one token that may follow ``length`` tokens, if the model says so."""
        if self.forced_eos_id is not None and length == max_length - 1:
            return self.forced_eos_id
        return self.forced_bos_id if length == 1 else None

    def bias(self, text: NDArray[np.int32], num_prompt: int) -> dict[int, float]:
        """What to add to the scores of the token after ``text``, the decoder's prompt of ``num_prompt`` included."""
        bias = dict(self.logit_bias)
        before = int(text[-1])
        for *start, last in (*self._bad_words_after.get(None, ()), *self._bad_words_after.get(before, ())):
            repeated = len(start) <= len(text) and text[len(text) - len(start) :].tolist() == start
            if repeated and (start or last not in self.eos_ids):
                bias[last] = BAN
        banned = self.suppress_ids
        if len(text) - num_prompt < self.min_new_tokens:
            banned += self.eos_ids + self.stop_ids
        if len(text) == num_prompt + (num_prompt == 1 and self.forced_bos_id is not None):
            banned += self.begin_suppress_ids
        return bias | dict.fromkeys(banned, BAN)


NO_RULES = GenerationRules()


def mask_of(token_ids: SequenceOf[int], vocab_size: int) -> Mask:
    """A mask that allows these tokens alone."""
    mask = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
    for token_id in token_ids:
        mask[token_id // 32] |= np.uint32(1 << token_id % 32)
    return mask.view(np.int32)


class RuleColumns:
    """Builds ``LogitEdits`` for the rows of a step, and keeps them from step to step while they ask for the same.

    Histories are read where they lie, in ``tokens``, int32 (rows, positions).
    """

    def __init__(self, tokens: NDArray[np.int32]) -> None:
        self.tokens = tokens
        self._flat = torch.from_numpy(tokens.reshape(-1))
        self._edits: LogitEdits | None = None
        self._for: tuple[list[Sequence], list[int], list[int]] = ([], [], [])
        self._steady = 0  # for so many more steps

    def edits(
        self, sequences: list[Sequence], lengths: list[int], vocab_size: int, masks: Mapping[int, Mask] | None = None
    ) -> LogitEdits | None:
        """What the rules ask of rows of scores, one a sequence; None: nothing. It counts until the next call.

        A row's scores are those of the token after the first ``lengths`` of its sequence's. ``masks``: further ones,
        by row.
        """
        masks = masks or {}
        bound = [i for i, sequence in enumerate(sequences) if not sequence.request.rules.ask_nothing or i in masks]
        if not bound:
            return None
        chosen, at = [sequences[i] for i in bound], [lengths[i] for i in bound]
        places = [sequence.row.index for sequence in chosen if sequence.row is not None]
        if self._steady > 0 and not masks and self._for == (chosen, [length - 1 for length in at], [*bound, *places]):
            assert self._edits is not None
            self._edits.history_lengths.add_(1)
            self._steady -= 1
        else:
            self._edits = self._build(bound, chosen, at, places, vocab_size, masks)
            until = [
                s.request.rules.steady_until(length, s.num_prompt, s.max_length) - length
                for s, length in zip(chosen, at, strict=True)
            ]
            self._steady = 0 if masks else min(until) - 1
        self._for = (chosen, at, [*bound, *places])
        return self._edits

    def _build(
        self, bound: list[int], sequences: list[Sequence], lengths: list[int], places: list[int], vocab_size: int,
        masks: Mapping[int, Mask],
    ) -> LogitEdits:  # fmt: skip
        rules = [sequence.request.rules for sequence in sequences]
        bias, forced, allowed = [], [], []
        for i, sequence, length, own, place in zip(bound, sequences, lengths, rules, places, strict=True):
            bias.append(own.bias(self.tokens[place, :length], sequence.num_prompt))
            token_id = own.forced(length, sequence.max_length)
            forced.append(-1 if token_id is None else token_id)
            # A rule that strikes a forced token out leaves nothing.
            struck_out = token_id is not None and bias[-1].get(token_id) == BAN
            nothing = mask_of((), vocab_size) if struck_out else None
            allowed.append(_joined(own.allowed, masks.get(i), nothing))
        distinct = [mask for mask in allowed if mask is not None]
        numbers = iter(range(len(distinct)))
        starts = torch.tensor(places, dtype=torch.int64) * self.tokens.shape[1]
        return LogitEdits.build(
            bound,
            repetition_penalty=[own.repetition_penalty for own in rules],
            no_repeat_ngram_size=[own.no_repeat_ngram_size for own in rules],
            bias=bias,
            forced=forced,
            mask=[-1 if mask is None else next(numbers) for mask in allowed],
            masks=torch.from_numpy(np.stack(distinct)) if distinct else None,
            history=(self._flat, starts, torch.tensor(lengths, dtype=torch.int32)),
        )


def _joined(*masks: Mask | None) -> Mask | None:
    """What all of them allow."""
    given = [mask for mask in masks if mask is not None]
    return functools.reduce(np.bitwise_and, given) if given else None
