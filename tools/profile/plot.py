"""`plot A.json FILE.png`, and --plot: a roofline with a point a row, and bars of what each implementation reaches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tools.profile.machine import Cell
from tools.profile.report import read

Rows = list[dict[str, Any]]


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 2:
        raise ValueError(f"plot takes a JSON file and the file to draw, got {' '.join(arguments) or 'none'}")
    run = read(Path(arguments[0]))
    draw(run["operation"], run["rows"], run["ceilings"], Path(arguments[1]))
    return 0


def library() -> ModuleType:
    """pyplot, drawing to files. Raises ImportError, which says how to get it."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'tandem-transformer[bench]'") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def draw(operation: str, rows: Rows, ceilings: dict[str, Cell], path: Path) -> None:
    """Raises ValueError where no row has a time and a rate, or the file is not called .png."""
    if path.suffix != ".png":
        raise ValueError(f"plots are PNG: call the file {path.stem or 'plot'}.png")
    if speeds := [row for row in rows if row.get("tokens/s")]:
        draw_speeds(operation, speeds, path)
        return
    rows = [row for row in rows if row.get("ms") and "who" in row and "mode" in row]
    if not rows:
        raise ValueError(f"there is nothing to draw: no row of {operation} has a time, a mode and an implementation")
    pyplot = library()
    rate = next((name for name in rows[0] if name.endswith(("FLOP/s", "B/s"))), None)
    if rate is None or not any(name.startswith("copy") for name in ceilings) or "flops" not in rows[0]:
        raise ValueError(f"there is nothing to draw: {operation} has no rates, or no ceilings to hold them against")
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    roofline = rate.endswith("FLOP/s")
    shapes = {(row["shape"], row["dtype"]) for row in rows}
    size = (max(8.0, 1.5 + 0.7 * len(shapes)), 4.0 * (len(modes) + roofline))
    figure, axes = pyplot.subplots(len(modes) + roofline, 1, figsize=size, squeeze=False, layout="constrained")
    colors = {who: f"C{i}" for i, who in enumerate(dict.fromkeys(row["who"] for row in rows))}
    for mode, axis in zip(modes, axes[:, 0], strict=False):
        draw_bars(axis, [row for row in rows if row["mode"] == mode], rate, colors)
        axis.set_title(f"{operation}, {mode}")
    if roofline:
        draw_roofline(axes[-1, 0], rows, rate, ceilings, colors)
    draw_legend(axes[0, 0], colors)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_speeds(operation: str, rows: Rows, path: Path) -> None:
    """Tokens a second: a panel for each precision of weights, a group of bars for each shape and batch."""
    pyplot = library()
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    groups = {(row["shape"], row["batch"]) for row in rows}
    size = (max(8.0, 1.5 + 0.9 * len(groups)), 4.0 * len(precisions))
    figure, axes = pyplot.subplots(len(precisions), 1, figsize=size, squeeze=False, layout="constrained")
    colors = {who: f"C{i}" for i, who in enumerate(dict.fromkeys(row["who"] for row in rows))}
    for precision, axis in zip(precisions, axes[:, 0], strict=True):
        draw_bars(axis, [row for row in rows if row["precision"] == precision], "tokens/s", colors, "batch")
        axis.set_title(f"{operation}, {precision}")
    draw_legend(axes[0, 0], colors)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_bars(axis: Any, rows: Rows, rate: str, colors: dict[str, str], beside: str = "dtype") -> None:
    """A group of bars for each shape and the column beside it, a bar for each implementation."""
    groups = list(dict.fromkeys(f"{row['shape']} {row[beside]}" for row in rows))
    width = 0.8 / len(colors)
    for i, (who, color) in enumerate(colors.items()):
        theirs = [row for row in rows if row["who"] == who]
        places = [groups.index(f"{row['shape']} {row[beside]}") + i * width - 0.4 for row in theirs]
        axis.bar(places, [row[rate] for row in theirs], width, color=color, label=who, align="edge")
    axis.set_xticks(range(len(groups)), groups, rotation=30, ha="right", fontsize="x-small")
    axis.set_ylabel(rate)


def draw_legend(axis: Any, colors: dict[str, str]) -> None:
    """Of all implementations, whether or not they have a bar on this panel."""
    from matplotlib.patches import Patch

    handles = [Patch(color=color, label=who) for who, color in colors.items()]
    axis.legend(handles=handles, ncols=len(colors), fontsize="small")


def draw_roofline(axis: Any, rows: Rows, rate: str, ceilings: dict[str, Cell], colors: dict[str, str]) -> None:
    """FLOP/s over FLOPs a byte, under the measured copy and matrix products."""
    copy = next(float(rate or 0) for name, rate in ceilings.items() if name.startswith("copy"))
    products = {name: float(value or 0) for name, value in ceilings.items() if "product" in name}
    intensities = [row["flops"] / row["bytes"] for row in rows]
    ends = min(intensities) / 2, max(intensities) * 2
    for name, product in products.items():
        corner = product / copy
        line = sorted({*ends, min(max(corner, ends[0]), ends[1])})
        axis.plot(line, [min(product, copy * x) for x in line], color="black", linewidth=1)
        axis.annotate(name, (line[-1], min(product, copy * line[-1])), ha="right", va="bottom", fontsize="x-small")
    for row, intensity in zip(rows, intensities, strict=True):
        axis.scatter(intensity, row[rate], color=colors[row["who"]], s=14)
    axis.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel=rate, title="roofline")
