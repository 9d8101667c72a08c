"""Tile sizes of the attention kernels: a checked-in table, so that every run and every rank takes the same ones.

``attention_configs.json`` holds an entry a kernel, architecture, width of numbers, head_dim and set of features; an
entry serves calls whose head_dim is no larger and whose features are among its own. ``python -m tools.profile attention
--tune`` measures candidates on a GPU and writes the best ones there.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from kernels.gpu.target import architecture

TABLE = Path(__file__).with_suffix(".json")
FEATURES = ("bias", "softcap", "dropout")  # those that cost registers; masks and lengths do not
FALLBACK = {"sm86": "sm80", "sm89": "sm80", "sm90": "sm80", "sm100": "sm90", "sm103": "sm90", "sm120": "sm80"}


@dataclass(frozen=True)
class Config:
    """``stages`` of the plain loops' pipelines; ``near_stages`` of those that mask or look numbers up."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    near_stages: int
    one_pass: bool = False  # for keys: add dq up with atomics unless the call has to be deterministic
    descriptors: bool = False  # the copy engine fetches what the loop walks over


@dataclass(frozen=True)
class Entry:
    """Which calls of which kernel a config is for."""

    kernel: str  # forward, keys, queries or bias_gradient
    architecture: str
    bits: int
    head_dim: int
    features: tuple[str, ...]
    config: Config


INTERPRETED = {  # small and unequal, so that tests at small sizes cross many borders
    "forward": Config(32, 16, 4, 1, 1, descriptors=True),
    "keys": Config(16, 32, 4, 1, 1, descriptors=True),
    "queries": Config(32, 16, 4, 1, 1, descriptors=True),
    "bias_gradient": Config(16, 16, 4, 1, 1),
}


def entries(table: Path = TABLE) -> list[Entry]:
    names = [field.name for field in fields(Entry)]
    rows = json.loads(table.read_text())
    return [
        Entry(
            **{name: row[name] for name in names[:4]}, features=tuple(row["features"]), config=Config(**row["config"])
        )
        for row in rows
    ]


def save(rows: list[Entry], table: Path = TABLE) -> None:
    lines = [json.dumps(asdict(row)) for row in rows]
    table.write_text("[\n" + ",\n".join(lines) + "\n]\n")


@contextlib.contextmanager
def instead_of(table: list[Entry]) -> Iterator[None]:
    """Inside, ``choose`` reads these entries: for measuring what another table would do."""
    global _known
    before, _known = _known, lambda: table
    choose.cache_clear()
    try:
        yield
    finally:
        _known = before
        choose.cache_clear()


_known: Callable[[], list[Entry]] = entries


@functools.cache
def choose(kernel: str, bits: int, head_dim: int, features: tuple[str, ...]) -> Config:
    """The config of the entry that fits the call most narrowly. features: a subset of ``FEATURES``, in their order.

    The copy engine wants rows of whole 16 bytes: others take an older architecture's entry, which does without.
    """
    arch = architecture()
    whole = bits * head_dim % 128 == 0
    if arch == "interpreter":
        return replace(INTERPRETED[kernel], descriptors=INTERPRETED[kernel].descriptors and whole)
    known = _known()
    while True:
        fitting = [
            row
            for row in known
            if (row.kernel, row.architecture, row.bits) == (kernel, arch, bits)
            and row.head_dim >= head_dim
            and set(row.features) >= set(features)
            and (whole or not row.config.descriptors)
        ]
        if fitting:
            return min(fitting, key=lambda row: (row.head_dim, len(row.features))).config
        if arch not in FALLBACK:
            return _small(bits * head_dim)
        arch = FALLBACK[arch]


def _small(row_bits: int) -> Config:
    """For GPUs that the table does not know: square tiles of a few KB."""
    rows = 32 if row_bits <= 2048 else 16
    return Config(rows, rows, 4, 1, 1)
