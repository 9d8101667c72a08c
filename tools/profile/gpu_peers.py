"""transformers in ``engine --workload gpu``: a process with a time limit, whose answers count as they come."""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.profile.measure import NOTE_LENGTH
from tools.profile.workers import environment

PEERS = ("transformers",)
WORKER = Path(__file__).with_name("gpu_peer.py")


@dataclass(frozen=True)
class PeerAnswer:
    """who: compiled or not. case: its number. seconds: each round's of one token and of all; None where the note says
    why there are none."""

    who: str
    case: int
    seconds: list[tuple[float, float]] | None
    note: str = ""


def peer_answers(asked: dict[str, Any], python: str, seconds: float) -> Iterator[PeerAnswer]:
    """What the peer's process says of every case, not compiled and compiled; those it had no time for come last."""
    left = {(compiled, case): "" for compiled in (False, True) for case in range(len(asked["cases"]))}
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as errors:
        json.dump(asked, given)
        given.seek(0)
        process = subprocess.Popen(
            [python, "-P", str(WORKER)], stdin=given, stdout=subprocess.PIPE, stderr=errors, text=True,
            env=environment(python),
        )  # fmt: skip
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                answer = json.loads(line)
                del left[answer["compiled"], answer["case"]]
                yield _answer(**answer)
        finally:
            in_time = timer.is_alive()
            timer.cancel()
            process.kill()
            process.communicate()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or ["no message"])[-1]
    note = last[:NOTE_LENGTH] if in_time else f"no answer within {seconds:g} s"
    for compiled, case in left:
        yield _answer(compiled, case, error=note)


def _answer(compiled: bool, case: int, seconds: list[list[float]] | None = None, error: str = "") -> PeerAnswer:
    rounds = None if seconds is None else [(one, whole) for one, whole in seconds]
    return PeerAnswer("transformers compiled" if compiled else "transformers", case, rounds, error[:NOTE_LENGTH])
