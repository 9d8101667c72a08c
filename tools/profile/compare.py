"""`compare A.json B.json`: two runs of one operation, row by row, and which rows changed by more than their spreads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.profile.machine import Cell
from tools.profile.report import Table, read

Run = dict[str, Any]


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or any(argument.startswith("-") for argument in arguments):
        raise ValueError(f"compare takes two JSON files, got {' '.join(arguments) or 'none'}")
    a, b = (read(Path(argument)) for argument in arguments)
    if a["operation"] != b["operation"]:
        raise ValueError(f"{arguments[0]} measured {a['operation']}, {arguments[1]} {b['operation']}")
    print(f"A: {described(a)}\nB: {described(b)}\n")
    rows, left_out = compared(a, b)
    table = Table({key: [str(row[key]) for row in rows] for key in a["keys"]})
    for row in rows:
        print("\n".join(table.lines(row)))
    changed = sum(row["changed"] != "" for row in rows)
    print(f"\n{changed} of {len(rows)} rows changed; {left_out} are in one file only or have no time in one")
    return 0


def compared(a: Run, b: Run) -> tuple[list[dict[str, Cell]], int]:
    """Rows that both runs timed, in A's order, and how many others there are."""
    before, after = timed(a), timed(b)
    rows = [
        {
            **dict(zip(a["keys"], key, strict=True)),
            f"A {a['measure'][0]}": before[key][0],
            f"B {a['measure'][0]}": after[key][0],
            "B/A": after[key][0] / before[key][0],
            "changed": verdict(before[key], after[key], rate=a["measure"][0].endswith("/s")),
        }
        for key in before
        if key in after
    ]
    everything = {key_of(a, row) for row in a["rows"]} | {key_of(b, row) for row in b["rows"]}
    return rows, len(everything) - len(rows)


def timed(run: Run) -> dict[tuple[Cell, ...], tuple[float, float, float]]:
    """Median, low and high of every row that has them."""
    return {
        key_of(run, row): tuple(row[name] for name in run["measure"])
        for row in run["rows"]
        if all(isinstance(row[name], int | float) and row[name] > 0 for name in run["measure"])
    }


def key_of(run: Run, row: dict[str, Cell]) -> tuple[Cell, ...]:
    return tuple(row[key] for key in run["keys"])


def verdict(before: tuple[float, float, float], after: tuple[float, float, float], *, rate: bool) -> str:
    """A change leaves the two spreads without a common value. More of a rate is faster, of a time slower."""
    if after[1] > before[2]:
        return "faster" if rate else "slower"
    if after[2] < before[1]:
        return "slower" if rate else "faster"
    return ""


def described(run: Run) -> str:
    return ", ".join(f"{name} {value}" for name, value in run["machine"].items())
