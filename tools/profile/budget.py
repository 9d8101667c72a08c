"""What a kernel takes of a GPU, without one: compiled ahead of time, through the launchers that run it.

``compiled(architecture)`` replaces Triton's driver by a stub of that GPU and every launch by its compilation, so
the launchers' own choice of configuration and Triton's own specialisation of the arguments are what is measured.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAX_SHARED = {"sm80": 163 << 10, "sm90": 227 << 10}  # bytes a block, and all blocks of a multiprocessor
REGISTERS, MAX_WARPS, MAX_BLOCKS = 65536, 64, 32  # of a multiprocessor
INSTRUCTIONS = {  # by what they are called in machine code, as PTX writes them
    "HGMMA": r"wgmma\.mma_async",
    "HMMA": r"mma\.sync",
    "UTMALDG": r"cp\.async\.bulk\.tensor",
    "LDGSTS": r"cp\.async\.c[ag]",
    "RED": r"\bred\.",
    "ATOM": r"\batom\.",
}


@dataclass(frozen=True)
class Resources:
    """One compiled kernel; spills are bytes a thread, ``occupancy`` is blocks a multiprocessor."""

    kernel: str
    architecture: str
    warps: int
    registers: int
    spills: int
    shared: int
    occupancy: int
    serialized: bool  # ptxas gave up on asynchronous wgmma
    instructions: dict[str, int]


class _Driver:
    """Stands for the driver of a GPU that is not there."""

    def __init__(self, architecture: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.is_amd = architecture.startswith("gfx")
        self.target = (
            GPUTarget("hip", architecture, 64) if self.is_amd else GPUTarget("cuda", int(architecture[2:]), 32)
        )

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiled(architecture: str) -> Iterator[list[Any]]:
    """Inside, launches on CPU tensors compile and run nothing; yields the list of what was compiled.

    One architecture a process: Triton and the launchers remember theirs.
    """
    import triton

    from kernels.gpu.target import INTERPRETED

    if INTERPRETED:
        raise ValueError("kernels cannot be compiled while TRITON_INTERPRET is set")
    triton.runtime.driver.set_active(_Driver(architecture))
    triton.knobs.compilation.always_compile = True  # for the assembler's log, which no cache holds
    triton.knobs.nvidia.dump_ptxas_log = True
    with launches(compile_only=True) as kernels:
        yield kernels


@contextlib.contextmanager
def launches(compile_only: bool = False) -> Iterator[list[Any]]:
    """Yields the list of the kernels that are launched inside, as compiled, each with the assembler's ``log``."""
    from triton.runtime.jit import JITFunction

    run, kernels = JITFunction.run, []

    def recorded(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            kernel = run(self, *args, grid=grid, warmup=warmup or compile_only, **kwargs)
        if log := printed.getvalue():
            kernel.log = log
        kernels.append(kernel)
        return kernel

    JITFunction.run = recorded
    try:
        yield kernels
    finally:
        JITFunction.run = run


def resources(kernel: Any, architecture: str) -> Resources:
    """Reads the log of a compiled kernel's assembly, and its PTX."""
    registers = int(_number(r"Used (\d+) registers", kernel.log))
    spills = max(int(_number(rf"(\d+) bytes spill {kind}", kernel.log)) for kind in ("stores", "loads"))
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    return Resources(
        kernel=kernel.metadata.name,
        architecture=architecture,
        warps=warps,
        registers=registers,
        spills=spills,
        shared=shared,
        occupancy=occupancy(architecture, registers, shared, warps),
        serialized="serialized" in kernel.log,
        instructions={name: len(re.findall(ptx, kernel.asm["ptx"])) for name, ptx in INSTRUCTIONS.items()},
    )


def _number(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the assembler's log does not say {pattern!r}: {text!r}")
    return found.group(1)


def occupancy(architecture: str, registers: int, shared: int, warps: int) -> int:
    """Blocks that fit a multiprocessor: registers come in 256 a warp, shared memory with 1 KiB a block on top."""
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = (MAX_SHARED[architecture] + 1024) // (shared + 1024)
    return min(by_registers, by_shared, MAX_WARPS // warps, MAX_BLOCKS)
