"""A step on its way: what has been asked of the device, and what its results are for."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from engine.request import Request, Sequence
from engine.scheduler import Schedule
from kernels.sampling import Draw


@dataclass
class Outlets:
    """What a step's logits are for: the sequences to sample, and searches, with their rows; what has been scored.

    A sequence with a draft is sampled once for each of its tokens, and once behind them.
    """

    samples: list[Sequence] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # of the samples, each behind so many of its tokens and its draft
    num_sampled: int = 0  # tokens that came of it
    rows: list[int] = field(default_factory=list)
    searches: dict[Request, list[int]] = field(default_factory=dict)
    scored: list[Sequence] = field(default_factory=list)


@dataclass
class Flight:
    """A step whose model has been run, or set to run; ``draw`` are its samples' tokens, and ``logits``, all of the
    step's, are for its searches.

    The next step may be sent after it before its tokens have arrived, as long as nobody needs them for it. A sequence
    that one of them ends is then run once more, for nothing: what that step writes lies in blocks that nobody reads
    before they are written again.
    """

    schedule: Schedule
    outlets: Outlets
    draw: Draw | None = None
    logits: Tensor | None = None

    @property
    def may_be_followed(self) -> bool:
        """Whether the next step can be sent before this one's results are known."""
        if self.outlets.searches or self.outlets.scored:
            return False
        return not any(sequence.draft or sequence.request.needs_its_tokens for sequence in self.outlets.samples)

    @property
    def places(self) -> dict[Sequence, int]:
        """Where among the drawn tokens a sequence's is."""
        return {sequence: i for i, sequence in enumerate(self.outlets.samples)}
