"""Timing of several callables side by side, and what the machine could do at best."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

from torch import Tensor

CHUNK_SECONDS = 0.002  # calls are timed in chunks of about this length
MIN_ROUNDS = 9
READ_BYTES = 256 << 20


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median, and the spread that holds the middle 60% of the chunks."""

    median: float
    low: float
    high: float
    chunks: int


def interleaved(functions: Mapping[str, Callable[[], object]], seconds: float = 1.0) -> dict[str, Timing]:
    """Time the functions in turn, round after round: a change in the machine's load meets all of them alike.

    `seconds` is how long each may take in all, warm-up aside; nine rounds are made in any case.
    """
    calls = {name: _calls_a_chunk(function) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    deadline = time.perf_counter() + seconds * len(functions)
    collecting = gc.isenabled()
    gc.disable()
    try:
        while time.perf_counter() < deadline or len(next(iter(samples.values()))) < MIN_ROUNDS:
            for name, function in functions.items():
                samples[name].append(_time_chunk(function, calls[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: _summary(times) for name, times in samples.items()}


class ReadBandwidth:
    """Reads a buffer far larger than the caches with torch's threads: call it inside `interleaved`."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer

    def __call__(self) -> object:
        return self.buffer.sum()

    def bytes_per_second(self, timing: Timing) -> float:
        return self.buffer.nbytes / timing.median


def _calls_a_chunk(function: Callable[[], object]) -> int:
    for _ in range(3):
        function()
    return max(1, round(CHUNK_SECONDS / _time_chunk(function, 3)))


def _time_chunk(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def _summary(times: list[float]) -> Timing:
    fifths = quantiles(times, n=5)
    return Timing(median(times), fifths[0], fifths[-1], len(times))
