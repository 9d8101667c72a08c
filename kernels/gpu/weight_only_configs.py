"""Tile sizes of the weight-only linear layers: a checked-in table, so that every run takes the same ones.

``weight_only_configs.json`` holds an entry an architecture, kind of weight and most rows; an entry serves calls of its
kind with no more rows. ``python -m tools.profile linear --tune`` measures candidates on a GPU and writes the best ones.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kernels.gpu.attention_configs import FALLBACK
from kernels.gpu.target import architecture, multiprocessors

TABLE = Path(__file__).with_suffix(".json")
KINDS = ("int8", "int4", "int4-minimums", "fp8", "half", "float32")  # the last whatever the weight
BUSY = 6  # warps that keep a multiprocessor reading


@dataclass(frozen=True)
class Config:
    """Rows of a program; outputs and inputs of each of its warps; and buffers of the pipeline, of which one is worked
    on."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    deep: bool  # the warps share out the inputs and add up their sums, else the outputs
    resident: int  # programs a multiprocessor holds at once, as far as sharing out inputs goes
    ahead: int = 0  # inputs to ask for before the kernel before has ended; 0 starts after it
    narrow: bool = False  # half the outputs a warp where programs would be fewer than three for two multiprocessors

    @property
    def outputs(self) -> int:
        return self.block_n if self.deep else self.block_n * self.warps

    @property
    def inputs(self) -> int:
        """Of one step."""
        return self.block_k * self.warps if self.deep else self.block_k


@dataclass(frozen=True)
class Entry:
    """Which calls a config is for."""

    architecture: str
    kind: str
    rows: int
    config: Config


def entries(table: Path = TABLE) -> list[Entry]:
    return [Entry(**(row | {"config": Config(**row["config"])})) for row in json.loads(table.read_text())]


def save(rows: list[Entry], table: Path = TABLE) -> None:
    lines = [json.dumps(asdict(row)) for row in rows]
    table.write_text("[\n" + ",\n".join(lines) + "\n]\n")


_known: Callable[[], list[Entry]] = entries


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


@functools.cache
def choose(kind: str, rows: int, gated: bool, width: int | None = None) -> Config:
    """The config of the narrowest entry that fits; of a layer with ``width`` results where they are given.

    Two sums a result, of gates and factors, take half the outputs.
    """
    arch, known = architecture(), _known()
    arch = "sm90" if arch == "interpreter" else arch
    while not (fitting := [e for e in known if (e.architecture, e.kind) == (arch, kind) and rows <= e.rows]):
        if arch == "sm80":
            raise ValueError(f"{TABLE.name} has no entry for weights in {kind}")
        arch = FALLBACK.get(arch, "sm80")
    config = min(fitting, key=lambda entry: entry.rows).config
    few = width is not None and 2 * -(-width // config.outputs) < 3 * multiprocessors()
    halvings = max(gated, config.narrow and few)
    return replace(config, block_n=max(16, config.block_n >> halvings))


@functools.cache
def splits_of(blocks: int, tiles: int, most: int, programs: int, warps: int, resident: int) -> int:
    """How many programs share a block of outputs, so that ``programs`` multiprocessors have equally much to read.

    blocks: of outputs and rows. tiles: of inputs. Each takes two tiles or more, and all of them run at once. What
    counts is how full the busiest multiprocessor's time is with reading, and that it has several warps to wait on.
    """

    def score(splits: int) -> float:
        load = blocks * splits / programs
        waiting = min(1, load * warps / BUSY)
        return waiting * load / -(-blocks * splits // programs) * tiles / splits / -(-tiles // splits)

    allowed = [n for n in range(1, min(most, tiles // 2) + 1) if blocks * n <= resident * programs]
    return max(allowed or [1], key=lambda splits: (round(score(splits), 6), -splits))
