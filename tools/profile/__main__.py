"""`python -m tools.profile OP [--against PEER,PEER] [--shape NAME,NAME] [--batch N,N] [--json FILE]`"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

# An operation is a module with PEERS and SHAPES, each named by its keys, and run(options) -> Report.
OPERATIONS = {name: f"tools.profile.{name}" for name in ("load", "sampling", "train")}


@dataclass(frozen=True)
class Options:
    """What to measure; empty lists leave the choice to the operation."""

    against: list[str]
    shapes: list[str]
    batches: list[int]
    seconds: float  # for each thing timed
    peer_python: str = sys.executable  # what peers in processes of their own run under


def main(arguments: list[str] | None = None) -> int:
    parsed = parse(arguments)
    if not 0 <= parsed.threads <= 1024:
        raise ValueError(f"--threads must be from 0 (torch's own) to 1024, got {parsed.threads}")
    if not 0 < parsed.seconds < 1e6:
        raise ValueError(f"--seconds must be a positive number, got {parsed.seconds}")
    if parsed.json:
        parsed.json.open("a").close()  # a folder that is not there should not wait for the figures
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    operation = load(parsed.operation)
    options = Options(
        against=known("peer", parsed.against, list(operation.PEERS)),
        shapes=known("shape", parsed.shape, list(operation.SHAPES)),
        batches=numbers("--batch", parsed.batch),
        seconds=parsed.seconds,
        peer_python=parsed.peer_python,
    )
    report = operation.run(options)
    print(report.text())
    if parsed.json:
        report.save(parsed.json)
    return 1 if report.failures else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.profile", description=__doc__)
    parser.add_argument("operation", metavar="OP", help="one of " + ", ".join(OPERATIONS))
    parser.add_argument("--against", default="", metavar="PEER,PEER", help="what to compare with")
    parser.add_argument("--shape", default="", metavar="NAME,NAME", help="shapes by name; all by default")
    parser.add_argument("--batch", default="", metavar="N,N", help="batch sizes")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; torch's by default")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each measurement")
    parser.add_argument("--peer-python", default=sys.executable, metavar="PATH", help="Python of peers (load)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the JSON line to a file")
    return parser.parse_args(arguments)


def load(name: str) -> ModuleType:
    known("operation", name, list(OPERATIONS))
    return import_module(OPERATIONS[name])


def known(kind: str, names: str, allowed: list[str]) -> list[str]:
    chosen = [name for name in names.split(",") if name]
    for name in chosen:
        if name not in allowed:
            raise ValueError(f"unknown {kind} {name!r}: choose from {', '.join(allowed)}")
    return chosen


def numbers(option: str, text: str) -> list[int]:
    parts = [part for part in text.split(",") if part]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{option} must be positive integers separated by commas, got {text!r}")
    return [int(part) for part in parts]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, ImportError, OSError) as error:
        print(f"tools.profile: {error}", file=sys.stderr)
        sys.exit(2)
