"""Who takes part in ``engine``: a process for each contender and precision, and what they answer in turns."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tools.profile.workers import Worker, WorkerError, python_of, run_once

QUIET = 0.05  # of the machine's time may go to others
Rows = list[list[int]]


@dataclass(frozen=True)
class Case:
    """What is generated: ``new_tokens`` for each of ``batch`` prompts of ``prompt`` tokens."""

    shape: str
    prompt: int
    beams: int
    batch: int
    new_tokens: int


@dataclass(frozen=True)
class Contender:
    """who: an engine. precision: of its weights. hint: OpenVINO's precision of everything else."""

    who: str
    precision: str
    hint: str = "f32"

    @property
    def label(self) -> str:
        return self.who if self.hint == "f32" else f"{self.who} {self.hint}"


@dataclass(frozen=True)
class Sample:
    """Seconds to the first token, seconds from there to the last; the tokens.

    others: the share of the machine's time that other processes took meanwhile. spent: seconds of ``decode`` by what
    they went into, where the contender says so.
    """

    prefill: float
    decode: float
    others: float
    tokens: Rows
    spent: dict[str, float] = field(default_factory=dict)


@dataclass
class Samples:
    """One contender's, of the same prompts."""

    prompts: Rows
    taken: list[Sample] = field(default_factory=list)

    def add(self, answer: dict[str, Any]) -> None:
        first, whole = answer["seconds"]
        before, after = answer["spent"]
        spent = {kind: seconds - before[kind] for kind, seconds in after.items()}
        self.taken.append(Sample(first, whole - first, answer["others"], answer["tokens"], spent))

    def quiet(self) -> int:
        return sum(sample.others <= QUIET for sample in self.taken)

    def quietest(self, count: int) -> Samples:
        return Samples(self.prompts, sorted(self.taken, key=lambda sample: sample.others)[:count])

    @property
    def prefill(self) -> float:
        """The median, in seconds."""
        return median(sample.prefill for sample in self.taken)

    @property
    def decode(self) -> tuple[float, float, float]:
        """Median, least and most, in seconds."""
        seconds = [sample.decode for sample in self.taken]
        return median(seconds), min(seconds), max(seconds)

    def share(self, kind: str) -> float | None:
        """The median share of decoding's seconds that went into one kind of work; None where nobody says."""
        shares = [sample.spent[kind] / sample.decode for sample in self.taken if kind in sample.spent]
        return median(shares) if shares else None

    @property
    def others(self) -> float:
        return median(sample.others for sample in self.taken)

    @property
    def tokens(self) -> Rows:
        return self.taken[0].tokens


class Field:
    """The contenders for one model. One that fails stays in the field, with the sentence it failed with."""

    WORKER, EXPORTER = (Path(__file__).with_name(f"engine_{name}.py") for name in ("worker", "export"))

    def __init__(
        self, seq2seq: bool, threads: int, beams: int, sequences: int, peer_python: str, worker: Path = WORKER
    ) -> None:
        self.settings = {"threads": threads, "seq2seq": seq2seq, "beams": beams, "sequences": sequences}
        self.peer_python, self.worker = peer_python, worker
        self.contenders: list[Contender] = []
        self.workers: dict[Contender, Worker] = {}
        self.failed: dict[Contender, str] = {}

    def enter(self, contender: Contender, folder: Path, scratch: Path) -> None:
        """Starts the contender's process, for all rounds to come."""
        self.contenders.append(contender)
        try:
            self.workers[contender] = self.start(contender, folder, scratch)
        except WorkerError as error:
            self.failed[contender] = str(error)

    def start(self, contender: Contender, folder: Path, scratch: Path) -> Worker:
        """A process of the contender, the model exported for it where it needs that. Raises WorkerError."""
        own = self._exported(contender, folder, scratch)
        of_its_own = {"folder": str(own), "precision": contender.precision, "hint": contender.hint}
        python = python_of(contender.who, self.peer_python)
        return Worker(self.worker, python, contender.who, json.dumps({**self.settings, **of_its_own}))

    def _exported(self, contender: Contender, folder: Path, scratch: Path) -> Path:
        if contender.who in ("tandem", "transformers"):
            return folder
        precision = "fp32" if contender.who == "ctranslate2" else contender.precision
        own = scratch / f"{contender.who}-{precision}"
        if not own.exists():
            kind = "seq2seq" if self.settings["seq2seq"] else "causal"
            run_once(self.EXPORTER, self.peer_python, contender.who, folder, own, precision, kind)
        return own

    def measure(self, prompts: Rows, new_tokens: int, rounds: int) -> dict[Contender, Samples]:
        """Each one's quietest so many rounds, of rounds in which all generate in turn, the first aside.

        More are made, three times as many at most, until everybody has had enough that others left alone.
        """
        samples = {contender: Samples(prompts) for contender in self.workers}
        for turn in range(3 * rounds + 1):
            if all(samples[contender].quiet() >= rounds for contender in self.workers):
                break
            for contender in list(self.workers):
                answer = self.ask(contender, prompts=prompts, new_tokens=[1, new_tokens])
                if answer is not None and turn:
                    samples[contender].add(answer)
        return {contender: samples[contender].quietest(rounds) for contender in self.workers}

    def ask(self, contender: Contender, **request: Any) -> dict[str, Any] | None:
        """The worker's answer; None, and no more of it, where it fails."""
        try:
            return self.workers[contender].ask(**request)
        except WorkerError as error:
            self.failed[contender] = str(error)
            del self.workers[contender]
            return None

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
