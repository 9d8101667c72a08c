"""What a measurement comes to: one line on the machine, a table for people, one JSON line for programs."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

Cell = str | int | float | bool | None


@dataclass
class Report:
    """`rows` hold one measurement each, by column; `ceilings` are measured limits of the machine."""

    operation: str
    rows: list[dict[str, Cell]]
    ceilings: dict[str, Cell] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def text(self) -> str:
        machine = machine_facts()
        facts = [f"{name} {value}" for name, value in {**machine, **self.ceilings}.items()]
        return "\n".join([", ".join(facts), "", table(self.rows), "", *self.failures, self.json()])

    def json(self) -> str:
        contents = {
            "operation": self.operation,
            "machine": machine_facts(),
            "ceilings": self.ceilings,
            "rows": self.rows,
            "failures": self.failures,
        }
        return json.dumps(contents)

    def save(self, path: Path) -> None:
        path.write_text(self.json() + "\n")


def machine_facts() -> dict[str, Cell]:
    """Device, threads and versions, in the order they are shown."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    packages = {name: _version(name) for name in ("torch", "transformers")}
    return {"device": device, "threads": torch.get_num_threads(), **packages}


def table(rows: Sequence[dict[str, Cell]]) -> str:
    """Aligned columns under the keys of the rows; numbers to the right."""
    if not rows:
        return "nothing was measured"
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_shown(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [not any(isinstance(row.get(name), str) for row in rows) for name in names]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        )
        for line in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def _shown(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.3g}" if abs(cell) < 100 else f"{cell:.0f}"
    return str(cell)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
