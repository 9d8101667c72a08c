"""Speculative decoding: guesses at the tokens to come, checked by the model in one step.

A guess is right when it is the very token that would have been drawn, with its own random number, had it been decoded
by itself. So outputs are the same with and without guesses, sampled ones too, to the last bit where the backend's
results do not depend on the batch. How far a guess goes is weighed in each step: another row in the batch costs time,
which is worth as many tokens as the engine makes in it, and gains a token as often as such guesses have been right.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Protocol

from engine.request import Sequence


class Drafter(Protocol):
    """Makes guesses."""

    def kinds(self, sequences: list[Sequence]) -> list[int | None]:
        """For each sequence, which decodes, what kind of guess there is, None for none; kinds differ in how often they
        are right."""
        ...

    def propose(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        """At most so many tokens that may come next, for sequences that there is a guess for."""
        ...


class StepCost:
    """What another row adds to a step, as a share of what the step takes: a line fitted to the steps so far.

    Old steps count less and less, so that it follows the machine; before there are any, a row costs a seventh.
    """

    FORGET = 0.99
    PRIOR = (1 / 6, 1.0)  # seconds a row and of any step, in proportion

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._squares = self._products = 0.0

    def add(self, rows: int, seconds: float) -> None:
        self._weight = self._weight * self.FORGET + 1
        self._rows = self._rows * self.FORGET + rows
        self._seconds = self._seconds * self.FORGET + seconds
        self._squares = self._squares * self.FORGET + rows * rows
        self._products = self._products * self.FORGET + rows * seconds

    def of_a_row(self, rows: int) -> float:
        """The cost of one more row in a step of so many."""
        per_row, fixed = self._line()
        return per_row / max(fixed + per_row * rows, 1e-12)

    def _line(self) -> tuple[float, float]:
        spread = self._weight * self._squares - self._rows**2
        if spread <= 0.5 * self._weight**2:  # all steps had about as many rows
            return self.PRIOR
        per_row = max((self._weight * self._products - self._rows * self._seconds) / spread, 0.0)
        return per_row, max((self._seconds - per_row * self._rows) / self._weight, 0.0)


class Acceptance:
    """How often the next guessed token is right, as far as it has been seen; what was seen last counts most."""

    def __init__(self, forget: float) -> None:
        self.forget = forget
        self._right = self._all = 0.0

    def add(self, right: int, guessed: int) -> None:
        """The first ``right`` of ``guessed`` tokens were; what came behind a wrong one says nothing."""
        self._right = self._right * self.forget + right
        self._all = self._all * self.forget + min(right + 1, guessed)

    def rate(self, prior: float) -> float:
        """``prior`` is the rate of two guesses that might have been seen before."""
        return (self._right + 2 * prior) / (self._all + 2)

    def fade(self) -> None:
        """Lets what was seen count less, so that what was not worth a guess is tried again some time."""
        self._right *= 0.99
        self._all *= 0.99


class Speculation:
    """Decides whose next tokens are guessed, and how many, ``num_tokens`` at most; counts the guessed and the right."""

    def __init__(self, drafter: Drafter, num_tokens: int) -> None:
        self.drafter, self.num_tokens = drafter, num_tokens
        self.cost = StepCost()
        self.num_guessed = self.num_right = 0
        self._of_kinds: dict[int, Acceptance] = defaultdict(lambda: Acceptance(0.95))
        self._of_sequences: dict[Sequence, Acceptance] = {}
        self._kinds: dict[Sequence, int] = {}

    def guess(self, sequences: Iterable[Sequence]) -> None:
        """Gives those sequences a ``draft`` for whom one is worth its cost."""
        decoding = [sequence for sequence in sequences if sequence.num_lacking == 1]
        able = [sequence for sequence in decoding if _may_guess(sequence)]
        # The time of another row, in tokens that the step makes in it.
        price = self.cost.of_a_row(len(decoding)) * len(decoding)
        if not able or price > 0.9:
            return
        self._of_sequences = {s: self._of_sequences.get(s) or Acceptance(0.8) for s in able}
        kinds = zip(able, self.drafter.kinds(able), strict=True)
        self._kinds = {sequence: kind for sequence, kind in kinds if kind is not None}
        counts = {s: self._worth(s, kind, price) for s, kind in self._kinds.items()}
        wanted = [sequence for sequence, count in counts.items() if count > 0]
        drafts = self.drafter.propose(wanted, [counts[sequence] for sequence in wanted]) if wanted else []
        for sequence, draft in zip(wanted, drafts, strict=True):
            sequence.draft = draft

    def _worth(self, sequence: Sequence, kind: int, price: float) -> int:
        """How many tokens to guess: the last one is right as often as pays for it."""
        of_kind = self._of_kinds[kind]
        rate = min(self._of_sequences[sequence].rate(of_kind.rate(0.5)), 0.99)
        if rate <= price:
            of_kind.fade()
            return 0
        worth = int(math.log(price) / math.log(rate)) if price > 0 else self.num_tokens
        return min(worth, self.num_tokens, _room(sequence))

    def judge(self, sequence: Sequence, right: int, guessed: int) -> None:
        """Takes note of how a sequence's draft has fared."""
        self.num_guessed += guessed
        self.num_right += right
        self._of_sequences[sequence].add(right, guessed)
        self._of_kinds[self._kinds[sequence]].add(right, guessed)


def _may_guess(sequence: Sequence) -> bool:
    """Whether the sequence is past its prompt, and nothing looks at its tokens one by one."""
    params = sequence.request.params
    watched = params.logits_processors or params.structured_outputs is not None
    return sequence.request.forked and sequence.request.beams is None and not watched


def _room(sequence: Sequence) -> int:
    """How many tokens may come before the last one."""
    return sequence.max_length - len(sequence.token_ids) - 1
