"""What the engine tells of its work: of each request, and of all together."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from engine.scheduler import Scheduler
from engine.speculation import Speculation

RECENT = 256  # steps that rates and times are taken over


@dataclass(frozen=True)
class EngineMetrics:
    """The state of an engine, and its work so far.

    Attributes:
        num_running, num_waiting: requests; those that were sent back wait.
        cache_usage: share of the blocks that running requests hold, 0 to 1; known content that is kept is not counted.
        prefix_hit_rate, source_hit_rate: share of the tokens of decoder prompts, and of sources, found in the cache.
        num_guessed, num_right: tokens guessed ahead, and those of them that came.
        num_preemptions: how often a request was sent back for want of blocks.
        num_steps, num_tokens: steps run, tokens generated (a beam search's: those of all its beams).
        tokens_per_second, step_seconds: generated tokens per second of stepping, and the mean step, over the last 256.
    """

    num_running: int
    num_waiting: int
    cache_usage: float
    prefix_hit_rate: float
    source_hit_rate: float
    num_preemptions: int
    num_guessed: int
    num_right: int
    num_steps: int
    num_tokens: int
    tokens_per_second: float
    step_seconds: float


class StepClock:
    """Counts steps and tokens, and times the recent ones."""

    def __init__(self) -> None:
        self.num_steps = self.num_tokens = 0
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT)
        self._start = self._carried = 0.0

    def start(self) -> None:
        self._start = time.perf_counter() - self._carried

    def pause(self) -> None:
        """What has passed since ``stop``, as in sending the next step, belongs to that step."""
        self._carried = time.perf_counter() - self._start

    def stop(self, num_tokens: int) -> float:
        """Returns the seconds since the last call, less those from ``pause`` to ``start``."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        self._recent.append((seconds, num_tokens))
        self.num_steps += 1
        self.num_tokens += num_tokens
        return seconds

    def metrics(self, scheduler: Scheduler, speculation: Speculation | None) -> EngineMetrics:
        """May be called while another thread takes a step."""
        cache, recent = scheduler.cache, tuple(self._recent)
        seconds, tokens = (sum(values) for values in zip(*recent, strict=True)) if recent else (0.0, 0)
        counts = cache.counts
        return EngineMetrics(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            cache_usage=cache.pool.num_held / cache.num_blocks,
            prefix_hit_rate=_share(counts.prompt_hits, counts.prompt_tokens),
            source_hit_rate=_share(counts.source_hits, counts.source_tokens),
            num_preemptions=scheduler.num_preemptions,
            num_guessed=0 if speculation is None else speculation.num_guessed,
            num_right=0 if speculation is None else speculation.num_right,
            num_steps=self.num_steps,
            num_tokens=self.num_tokens,
            tokens_per_second=_share(tokens, seconds),
            step_seconds=_share(seconds, len(recent)),
        )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
