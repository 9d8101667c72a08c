"""``BeamSearchParams``: how wide one request's beam search is, how hypotheses compare and when it ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from engine.sampling import MAX_NGRAM, check_integer, check_number

MAX_BEAMS = 1024
MAX_PENALTY = 16.0  # length ** length_penalty stays a number, whatever the length
MAX_PATIENCE = 1024.0
MAX_FORCED = 64


@dataclass(frozen=True)
class BeamSearchParams:
    """transformers' names, defaults and meaning. A wrong value is a ValueError that names it.

    Attributes:
        beam_width: hypotheses carried from step to step (num_beams); 1 is greedy search.
        max_tokens: most tokens generated; None: as many as max_model_len leaves room for.
        length_penalty: a hypothesis's score is its log-probability / length ** length_penalty, where length counts
            generated tokens, the end token included.
        early_stopping: True ends the search once enough hypotheses are finished; False, once the best running one
            would not beat them if it ended now; "never", once it could not beat them at any length.
        num_return_sequences: hypotheses returned, the best first; beam_width of them unless given (or as many as are
            kept, where patience keeps fewer).
        min_tokens: no end token before so many others.
        repetition_penalty: of tokens in prompt and output so far: their log-probability times this.
        no_repeat_ngram_size: no n-gram of this size occurs twice in prompt and output; 0 is off.
        patience: round(beam_width * patience) finished hypotheses are kept, and are enough: the patience factor of
            "A Call for Clarity in Beam Search" (Kasai et al., 2022); 1 is plain beam search.
        ignore_eos: the end token is a token like any other.
        num_beam_groups: the beams are so many searches of equal width, which step in turn; diversity_penalty is taken
            off the log-probability of a token for each beam of the groups before that has chosen it in this step
            ("Diverse Beam Search", Vijayakumar et al., 2016).
        force_words: texts, or their token ids, that every hypothesis contains, where the length allows it ("Fast
            Lexically Constrained Decoding", Post and Vilar, 2018).
        task: of the model's ``task_specific_params``, whose prefix goes before the source.
    """

    beam_width: int
    max_tokens: int | None = 16
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int | None = None
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    patience: float = 1.0
    ignore_eos: bool = False
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    force_words: Sequence[str | Sequence[int]] | None = None
    task: str | None = None

    def __post_init__(self) -> None:
        check_integer("beam_width", self.beam_width, 1, MAX_BEAMS)
        if self.max_tokens is not None:
            check_integer("max_tokens", self.max_tokens, 1, None)
        check_integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        check_number("repetition_penalty", self.repetition_penalty, 0, math.inf, open_low=True)
        check_number("length_penalty", self.length_penalty, -MAX_PENALTY, MAX_PENALTY)
        if not isinstance(self.early_stopping, bool | str) or self.early_stopping not in (True, False, "never"):
            raise ValueError(f'early_stopping must be True, False or "never", got {self.early_stopping!r}')
        check_integer("no_repeat_ngram_size", self.no_repeat_ngram_size, 0, MAX_NGRAM)
        check_number("patience", self.patience, 0, MAX_PATIENCE, open_low=True)
        if self.num_return_sequences is not None:
            check_integer("num_return_sequences", self.num_return_sequences, 1, min(self.beam_width, self.num_kept))
        self._check_groups()
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")

    def _check_groups(self) -> None:
        check_integer("num_beam_groups", self.num_beam_groups, 1, self.beam_width)
        if self.beam_width % self.num_beam_groups:
            raise ValueError(f"num_beam_groups {self.num_beam_groups} must divide beam_width {self.beam_width}")
        check_number("diversity_penalty", self.diversity_penalty, 0, math.inf)
        if self.diversity_penalty and self.num_beam_groups == 1:
            raise ValueError("diversity_penalty needs num_beam_groups above 1")
        if self.force_words is None:
            return
        words = self.force_words
        if not isinstance(words, list | tuple) or not all(
            isinstance(word, str | list | tuple) and word for word in words
        ):
            raise ValueError(f"force_words must be texts or lists of token ids, none of them empty, got {words!r:.80}")
        if len(words) > MAX_FORCED or self.num_beam_groups > 1:
            raise ValueError(f"force_words takes {MAX_FORCED} words at most, and no groups")

    @property
    def num_kept(self) -> int:
        """How many finished hypotheses are kept."""
        return max(1, int(self.beam_width * self.patience + 0.5))

    @property
    def num_returned(self) -> int:
        return self.num_return_sequences or min(self.beam_width, self.num_kept)
