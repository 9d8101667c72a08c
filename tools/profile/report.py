"""What a measurement comes to: one line on the machine, a table for people, one JSON line for programs.

Everything is printed and saved as it is measured, so a run that is cut short leaves its rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.profile.machine import Cell, machine_facts

Row = Mapping[str, Cell]


class Table:
    """Aligned columns under the keys of the rows, line by line; numbers to the right.

    expected: texts still to come in a column, for which it is made wide enough.
    """

    def __init__(self, expected: Mapping[str, Iterable[str]] | None = None) -> None:
        self.least = {name: max(map(len, texts), default=0) for name, texts in (expected or {}).items()}
        self.widths: dict[str, int] = {}
        self.right: dict[str, bool] = {}

    def lines(self, row: Row) -> list[str]:
        """The row's line, after a line of names where its columns are new."""
        lines = []
        cells = {name: _shown(cell) for name, cell in row.items()}
        if list(row) != list(self.widths):
            lines = [""] if self.widths else []
            self.widths = {name: max(len(name), len(cells[name]), self.least.get(name, 0)) for name in row}
            self.right = {name: not isinstance(cell, str) for name, cell in row.items()}
            lines.append(self._line({name: name for name in row}))
        self.widths = {name: max(width, len(cells[name])) for name, width in self.widths.items()}
        return [*lines, self._line(cells)]

    def _line(self, cells: dict[str, str]) -> str:
        padded = (
            cell.rjust(self.widths[name]) if self.right[name] else cell.ljust(self.widths[name])
            for name, cell in cells.items()
        )
        return "  ".join(padded).rstrip()


@dataclass
class Report:
    """Rows hold one measurement each, by column; ``ceilings`` are measured limits of the machine.

    keys: the columns that together say what a row is of. measure: those of its median and of its spread's two ends.
    hidden: columns for the JSON alone. path: where the JSON is written, after every row.
    """

    operation: str
    keys: tuple[str, ...] = ()
    measure: tuple[str, str, str] = ("ms", "20%", "80%")
    hidden: tuple[str, ...] = ()
    path: Path | None = None
    ceilings: dict[str, Cell] = field(default_factory=dict)
    rows: list[dict[str, Cell]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    table: Table = field(default_factory=Table)

    def start(self) -> None:
        """Prints the machine and its ceilings."""
        facts = {**machine_facts(), **self.ceilings}
        print(", ".join(f"{name} {value}" for name, value in facts.items()), end="\n\n", flush=True)
        self.save()

    def add(self, row: dict[str, Cell]) -> None:
        self.rows.append(row)
        shown = {name: cell for name, cell in row.items() if name not in self.hidden}
        print("\n".join(self.table.lines(shown)), flush=True)
        self.save()

    def finish(self) -> None:
        """Prints what failed and, last, the JSON line."""
        if not self.rows:
            print("nothing was measured")
        print("", *self.failures, self.json(), sep="\n", flush=True)
        self.save()

    def json(self) -> str:
        contents = {
            "operation": self.operation,
            "machine": machine_facts(),
            "ceilings": self.ceilings,
            "keys": self.keys,
            "measure": self.measure,
            "rows": self.rows,
            "failures": self.failures,
        }
        return json.dumps(contents)

    def save(self) -> None:
        """Replaces the file in one step, so that it is whole whenever the run ends."""
        if self.path is not None:
            partial = self.path.with_name(self.path.name + ".partial")
            partial.write_text(self.json() + "\n")
            partial.replace(self.path)


def read(path: Path) -> dict[str, Any]:
    """What ``save`` wrote. Raises ValueError for anything else."""
    try:
        run = json.loads(path.read_text())
        measure, keys = run["measure"], run["keys"]
        complete = all(name in row for row in run["rows"] for name in (*measure, *keys))
        kinds = {"operation": str, "machine": dict, "ceilings": dict}
        if not complete or len(measure) != 3 or not all(isinstance(run[name], kind) for name, kind in kinds.items()):
            raise KeyError
        if not all(isinstance(cell, Cell) for row in run["rows"] for cell in row.values()):
            raise TypeError
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not a file that tools.profile --json wrote") from None
    return run


def _shown(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.3g}" if abs(cell) < 100 else f"{cell:.0f}"
    return str(cell)
