"""Timing of several callables side by side, on a CPU or a GPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from torch import Tensor

CHUNK_SECONDS = 0.002  # on a CPU, calls are timed in chunks of about this length
MIN_ROUNDS = 9
READ_BYTES = 256 << 20
FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU so far

Function = Callable[[], object]
Sampler = Callable[[], float]  # makes calls and returns the seconds of one


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median, and the spread that holds the middle 60% of the chunks."""

    median: float
    low: float
    high: float
    chunks: int

    def divided(self, calls: int) -> Timing:
        return Timing(self.median / calls, self.low / calls, self.high / calls, self.chunks)


def interleaved(
    functions: Mapping[str, Function], seconds: float = 1.0, device: torch.device | None = None
) -> dict[str, Timing]:
    """Time the functions in turn, round after round: a change in the machine's load meets all of them alike.

    `seconds` is how long each may take in all, warm-up aside; nine rounds are made in any case. On a CUDA `device` it
    is the GPU's time that counts, from a cold L2 cache.
    """
    sampler = CudaClock().sampler if device is not None and device.type == "cuda" else cpu_sampler
    samplers = {name: sampler(function) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    deadline = time.perf_counter() + seconds * len(functions)
    collecting = gc.isenabled()
    gc.disable()
    try:
        while time.perf_counter() < deadline or len(next(iter(samples.values()))) < MIN_ROUNDS:
            for name, sample in samplers.items():
                samples[name].append(sample())
    finally:
        if collecting:
            gc.enable()
    return {name: summary(times) for name, times in samples.items()}


def cpu_sampler(function: Function) -> Sampler:
    """Warms the function up and times it in chunks long enough for the clock."""
    for _ in range(3):
        function()
    calls = max(1, round(CHUNK_SECONDS / _time_chunk(function, 3)))
    return lambda: _time_chunk(function, calls)


class CudaClock:
    """Times single calls between two events of the GPU.

    Before each call a buffer is written, which flushes the L2 cache and keeps the GPU busy until the call's kernels are
    all queued: what the host takes to queue them is not in the figure. A figure carries one or two microseconds of the
    events' own, so operations are given work for 20 microseconds and more.
    """

    def __init__(self) -> None:
        self.buffer = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sampler(self, function: Function) -> Sampler:
        """Warms the function up and finds how many flushes cover the host's time."""
        for _ in range(3):
            function()
        torch.cuda.synchronize()
        flush = self._seconds(0, self.buffer.zero_)
        queueing = time.perf_counter()
        function()
        queueing = time.perf_counter() - queueing
        torch.cuda.synchronize()
        flushes = 1 + int(1.5 * queueing / flush)
        return lambda: self._seconds(flushes, function)

    def _seconds(self, flushes: int, function: Function) -> float:
        for _ in range(flushes):
            self.buffer.zero_()
        self.start.record()
        function()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


def in_graphs(functions: Mapping[str, Sequence[Function]], seconds: float, device: torch.device) -> dict[str, Timing]:
    """Time short calls: those of a name one after another in a CUDA graph, and of each graph its time by their number.

    Give each call memory of its own, more in all than the L2 cache holds. On a CPU they run as they are.
    """
    runs = {name: _all_of(calls) for name, calls in functions.items()}
    if device.type == "cuda":
        runs = {name: captured(run) for name, run in runs.items()}
        timings: dict[str, list[float]] = {name: [] for name in runs}
        clock = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
        deadline = time.perf_counter() + seconds * len(runs)
        while time.perf_counter() < deadline or len(next(iter(timings.values()))) < MIN_ROUNDS:
            for name, run in runs.items():
                clock[0].record()
                run()
                clock[1].record()
                clock[1].synchronize()
                timings[name].append(clock[0].elapsed_time(clock[1]) / 1e3)
        found = {name: summary(times) for name, times in timings.items()}
    else:
        found = interleaved(runs, seconds, device)
    return {name: found[name].divided(len(calls)) for name, calls in functions.items()}


def _all_of(calls: Sequence[Function]) -> Function:
    def run() -> None:
        for call in calls:
            call()

    return run


def captured(run: Function) -> Function:
    """A graph of what ``run`` launches, after two runs that compile it; replayed once, too."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return graph.replay


class ReadBandwidth:
    """Reads a buffer far larger than the caches with torch's threads: call it inside `interleaved`."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer

    def __call__(self) -> object:
        return self.buffer.sum()

    def bytes_per_second(self, timing: Timing) -> float:
        return self.buffer.nbytes / timing.median


def _time_chunk(function: Function, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def summary(times: list[float]) -> Timing:
    fifths = quantiles(times, n=5)
    return Timing(median(times), fifths[0], fifths[-1], len(times))
