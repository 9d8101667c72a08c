"""What a run reports: metrics.jsonl, TensorBoard, a progress bar (or plain lines where there is no terminal)."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Levenshtein
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_LINE_SECONDS = 5.0  # between lines of progress where output is no terminal


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The fraction of predictions equal to one of their references."""
    if not predictions:
        return 0.0
    return sum(p in r for p, r in zip(predictions, references, strict=True)) / len(predictions)


def token_error_rate(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Edit distance over reference length, in space-separated tokens, each against its nearest reference.

    Over phones this is the phone error rate, over words the word error rate.
    """
    errors = total = 0
    for prediction, candidates in zip(predictions, references, strict=True):
        hypothesis = prediction.split()
        distance, length = min(
            (Levenshtein.distance(hypothesis, reference.split()), len(reference.split())) for reference in candidates
        )
        errors, total = errors + distance, total + length
    return errors / max(total, 1)


class Reporter:
    """Writes a run's metrics; every method does nothing on ranks other than the first."""

    def __init__(self, folder: Path, first_step: int, total_steps: int, enabled: bool) -> None:
        self.enabled = enabled
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        keep_until(self.path, first_step)
        self.board = SummaryWriter(str(folder), purge_step=first_step if first_step else None)
        self.total_steps = total_steps
        self.started, self.first_step = time.monotonic(), first_step
        self.console = Console()
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(), console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("training", total=total_steps, completed=first_step, figures="")
        self.bar.start()
        self._last_line = 0.0

    def training(self, step: int, **figures: float) -> None:
        """One line of training figures: loss, learning_rate, grad_norm, tokens_per_second, epoch."""
        if not self.enabled:
            return
        self._write({"step": step, **figures})
        text = f"loss {figures['loss']:.4f}  {figures['tokens_per_second']:,.0f} tokens/s"
        self.bar.update(self.task, completed=step, figures=text)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = now
            left = (now - self.started) / max(1, step - self.first_step) * (self.total_steps - step)
            print(f"step {step}/{self.total_steps}  {text}  {left:.0f} s left", flush=True)

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        if not self.enabled:
            return
        self._write({"step": step, **figures})
        text = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.console.print(f"step {step}/{self.total_steps}  {text}", highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        if self.enabled:
            self.console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self.enabled:
            self.bar.stop()
            self.board.close()

    def _write(self, figures: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(figures) + "\n")
        for name, value in figures.items():
            if name != "step":
                self.board.add_scalar(name, value, figures["step"])


def keep_until(path: Path, step: int) -> None:
    """Drops what metrics.jsonl says of updates after ``step``: a resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            past = json.loads(line)["step"] > step
        except (ValueError, KeyError, TypeError):
            past = True  # cut short when the run was killed: past the checkpoint anyway
        if past:
            break
        kept.append(line)
    path.write_text("".join(kept))
