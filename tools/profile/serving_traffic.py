"""The requests of ``serving``, the same in every run, and what it took to serve them."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.profile.engine_field import Rows
from tools.profile.prompts import random_lengths, random_prompts

FEWEST, MOST = 4, 256  # tokens of an output


@dataclass(frozen=True)
class Requests:
    """lengths: of the outputs. times: of arrival, a Poisson process of one a second that begins with the first."""

    prompts: Rows
    lengths: list[int]
    times: list[float]

    @classmethod
    def draw(cls, count: int, vocab_size: int) -> Requests:
        """Outputs as long as log-uniform numbers: most are short, a few long."""
        draw = random.Random(0)
        lengths = [int(math.exp(draw.uniform(math.log(FEWEST), math.log(MOST + 1)))) for _ in range(count)]
        gaps = [draw.expovariate(1) for _ in range(count - 1)]
        return cls(random_prompts(random_lengths(count), vocab_size), lengths, [*itertools.accumulate(gaps, initial=0)])

    def some(self, count: int, most_tokens: int = MOST) -> Requests:
        """The first of them, with outputs no longer than so."""
        lengths = [min(length, most_tokens) for length in self.lengths[:count]]
        return Requests(self.prompts[:count], lengths, self.times[:count])

    def arrivals(self, rate: float | None) -> list[float]:
        """In seconds, at so many a second; all at once without a rate."""
        return [0.0 if rate is None else time / rate for time in self.times]


@dataclass(frozen=True)
class Served:
    """Seconds, of each request: of its arrival, its first and its last token; others: other processes' share."""

    arrivals: list[float]
    first: list[float]
    last: list[float]
    tokens: Rows
    others: float

    @classmethod
    def of(cls, arrivals: list[float], answer: dict[str, Any]) -> Served:
        return cls(arrivals, answer["first"], answer["last"], answer["tokens"], answer["others"])

    @property
    def makespan(self) -> float:
        return max(self.last) - min(self.arrivals)

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.last) / self.makespan

    @property
    def speed(self) -> float:
        """Tokens a second, those that were asked for."""
        return sum(map(len, self.tokens)) / self.makespan

    def figures(self) -> dict[str, float]:
        waits, latencies = (np.subtract(times, self.arrivals) for times in (self.first, self.last))
        return {
            "done/s": self.rate,
            "first s": float(waits.mean()),
            "first 50%": float(np.median(waits)),
            "first 99%": float(np.percentile(waits, 99)),
            "latency s": float(latencies.mean()),
            "latency 99%": float(np.percentile(latencies, 99)),
            "% others": 100 * self.others,
        }
