"""Shapes of operations on rows: so many rows of one width, in one of the operation's kinds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

CPU_BYTES, GPU_BYTES = 32 << 20, 64 << 20  # the least an input has: more than caches hold, and 20 microseconds' work
WIDTHS = (768, 1024, 2048, 4096, 8192, 16384)  # hidden widths, from BERT's base to a large language model's


@dataclass(frozen=True)
class Rows:
    rows: int
    width: int
    kind: str

    @property
    def label(self) -> str:
        return f"{self.rows}x{self.width}-{self.kind}"


def enough_rows(width: int) -> int:
    """A power of two, of float32 on a CPU and of bfloat16 on a GPU."""
    least = GPU_BYTES // 2 if torch.cuda.is_available() else CPU_BYTES // 4
    return 1 << (-(-least // width) - 1).bit_length()


def shapes(
    names: list[str], kinds: Sequence[str], preset: str, widths: Sequence[int] = WIDTHS, rows: int | None = None
) -> list[Rows]:
    """The preset, which is all kinds at all widths; one kind at all widths; or rows x width, of one kind or of all.

    rows: of the widths without rows of their own; ``enough_rows`` unless given. Raises ValueError for other names.
    """
    found: list[Rows] = []
    for name in names or [preset]:
        size = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:-(\w+))?", name)
        if name == preset or name in kinds:
            named = kinds if name == preset else [name]
            found += [Rows(rows or enough_rows(width), width, kind) for kind in named for width in widths]
        elif size and size[3] in (None, *kinds):
            found += [Rows(int(size[1]), int(size[2]), kind) for kind in ([size[3]] if size[3] else kinds)]
        else:
            raise ValueError(
                f"unknown shape {name!r}: choose from {', '.join((preset, *kinds))}, or give rows x width such as "
                f"4096x1024 or 4096x1024-{kinds[0]}"
            )
    return found
