"""What a kernel takes of a GPU, without one: compiled ahead of time, through the launchers that run it.

``compiled(architecture)`` replaces Triton's driver by a stub of that GPU and every launch by its compilation, so
the launchers' own choice of configuration and Triton's own specialisation of the arguments are what is measured.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_SHARED = {"sm80": 163 << 10, "sm90": 227 << 10}  # bytes a block, and all blocks of a multiprocessor
REGISTERS, MAX_WARPS, MAX_BLOCKS = 65536, 64, 32  # of a multiprocessor
INSTRUCTIONS = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", "LDL", "STL", "RED", "ATOM", "MUFU")


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
    with launches(compile_only=True) as kernels:
        yield kernels


@contextlib.contextmanager
def launches(compile_only: bool = False) -> Iterator[list[Any]]:
    """Yields the list of the kernels that are launched inside, as compiled."""
    from triton.runtime.jit import JITFunction

    run, kernels = JITFunction.run, []

    def recorded(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=warmup or compile_only, **kwargs)
        kernels.append(kernel)
        return kernel

    JITFunction.run = recorded
    try:
        yield kernels
    finally:
        JITFunction.run = run


def resources(kernel: Any, architecture: str) -> Resources:
    """Reads a compiled kernel's binary with the tools of Triton's own wheel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "k.cubin", Path(folder) / "k.ptx"
        cubin.write_bytes(kernel.asm["cubin"])
        ptx.write_text(kernel.asm["ptx"])
        usage = _run("cuobjdump", "--dump-resource-usage", str(cubin))
        sass = _run("cuobjdump", "-sass", str(cubin))
        log = _run("ptxas", "-v", f"--gpu-name={_full_name(architecture)}", str(ptx), "-o", "/dev/null")
    registers = int(re.search(r"REG:(\d+)", usage).group(1))  # type: ignore[union-attr]
    stores, loads = (
        int(n)
        for n in re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log).groups()  # type: ignore[union-attr]
    )
    names = Counter(re.findall(r"\b(" + "|".join(INSTRUCTIONS) + r")\b", sass))
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    return Resources(
        kernel=kernel.metadata.name,
        architecture=architecture,
        warps=warps,
        registers=registers,
        spills=max(stores, loads),
        shared=shared,
        occupancy=occupancy(architecture, registers, shared, warps),
        serialized="serialized" in log,
        instructions={name: names[name] for name in INSTRUCTIONS},
    )


def occupancy(architecture: str, registers: int, shared: int, warps: int) -> int:
    """Blocks that fit a multiprocessor: registers come in 256 a warp, shared memory with 1 KiB a block on top."""
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = (MAX_SHARED[architecture] + 1024) // (shared + 1024)
    return min(by_registers, by_shared, MAX_WARPS // warps, MAX_BLOCKS)


def _full_name(architecture: str) -> str:
    name = architecture.replace("sm", "sm_")
    return f"{name}a" if name >= "sm_90" else name


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_tools() / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


@functools.cache
def _tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
