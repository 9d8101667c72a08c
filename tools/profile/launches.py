"""The kernels that a call of ours launches, as Triton compiled them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tools.profile.budget import MAX_SHARED, launches, occupancy
from tools.profile.machine import Cell

COLUMNS = ("registers", "spills", "occupancy")


@contextlib.contextmanager
def described(row: dict[str, Cell]) -> Iterator[None]:
    """Adds to the row what the kernels launched inside take of the GPU: the worst of them, where there are several."""
    from kernels.gpu.target import architecture

    with launches() as kernels:
        yield
    name = architecture()
    if not kernels or name not in MAX_SHARED:
        return
    row["registers"] = max(kernel.n_regs for kernel in kernels)
    row["spills"] = max(kernel.n_spills for kernel in kernels)
    row["occupancy"] = min(
        occupancy(name, kernel.n_regs, kernel.metadata.shared, kernel.metadata.num_warps) for kernel in kernels
    )
