"""What to measure, and the reading of the names and numbers that say so."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

MODES = ("forward", "backward", "both")
PRECISIONS = ("fp32", "int8", "int4")


@dataclass(frozen=True)
class Options:
    """Empty lists, and None, leave the choice to the operation."""

    against: list[str] | None = None
    shapes: list[str] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    modes: list[str] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    precisions: list[str] = field(default_factory=list)  # of weights
    prompt: int = 32  # tokens
    beams: int | None = None  # 1 is greedy search
    requests: int = 256
    rounds: int | None = None
    max_num_seqs: int = 64
    seconds: float = 0.5  # for each thing timed, unless the operation says of what
    json: Path | None = None
    peer_python: str = sys.executable  # what peers in processes of their own run under


def known(kind: str, names: Iterable[str], allowed: Iterable[str]) -> list[str]:
    """The names, each of which must be among the allowed ones."""
    allowed = list(allowed)
    for name in (names := list(names)):
        if name not in allowed:
            raise ValueError(f"unknown {kind} {name!r}: choose from {', '.join(allowed)}")
    return names


def listed(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def numbers(option: str, text: str) -> list[int]:
    parts = listed(text)
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{option} must be positive integers separated by commas, got {text!r}")
    return [int(part) for part in parts]


def number(option: str, text: str) -> int | None:
    """The one number given, None where none is."""
    given = numbers(option, text)
    if len(given) > 1:
        raise ValueError(f"{option} is one number, got {text!r}")
    return given[0] if given else None
