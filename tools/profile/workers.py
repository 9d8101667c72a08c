"""Processes that measure for us: each runs a script that stands alone, under our Python or that of the peers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tools.profile.machine import ROOT

REST = 0.3  # seconds for which the threads of a library may go on spinning after its work is done


class WorkerError(ValueError):
    """A worker that could not do what it was asked; the sentence is its own last line."""


def python_of(who: str, peer_python: str) -> str:
    return sys.executable if who.split()[0] == "tandem" else peer_python


def run_once(script: Path, peer_python: str, *arguments: object) -> dict[str, Any]:
    """What a fresh process prints last; its first argument says for whom it works.

    Raises WorkerError, with the last line of what it says, where it fails.
    """
    python = python_of(str(arguments[0]), peer_python)
    command = [python, "-P", str(script), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(python))
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise WorkerError(f"{arguments[0]} could not be measured under {python}: {last}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def environment(python: str) -> dict[str, str]:
    """-P keeps our folder's names out of peers' way; under our own Python it is this checkout that is measured."""
    return {**os.environ, "PYTHONPATH": str(ROOT)} if python == sys.executable else dict(os.environ)


class Worker:
    """A process that answers each JSON line with one, and sleeps in between."""

    def __init__(self, script: Path, python: str, *arguments: object) -> None:
        """Starts it and waits for its first line. Raises WorkerError where it ends instead."""
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [python, "-P", str(script), *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment(python),
        )  # fmt: skip
        self._read()

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer, and as "others" the share of this machine's time that went to other processes meanwhile.

        Raises WorkerError where the process ends instead.
        """
        assert self._process.stdin is not None
        start, others = time.perf_counter(), self._others_seconds()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the reading below says why
        answer = self._read()
        share = (self._others_seconds() - others) / (time.perf_counter() - start) / (os.cpu_count() or 1)
        time.sleep(REST)
        return {**answer, "others": min(max(share, 0.0), 1.0)}

    def close(self) -> None:
        """Ends the process; may be called twice."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _others_seconds(self) -> float:
        """CPU seconds so far of everything but the worker, those of other guests of the machine's host included."""
        user, nice, system, _, _, *interrupts_and_stolen = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        everything = sum(map(int, (user, nice, system, *interrupts_and_stolen)))
        own = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (everything - sum(map(int, own))) / os.sysconf("SC_CLK_TCK")

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        last = (self._errors.read().strip().splitlines() or ["no message"])[-1]
        self.close()
        raise WorkerError(last)
