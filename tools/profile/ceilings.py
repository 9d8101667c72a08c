"""What this machine can do at best, measured: a large matrix product, a large copy, a large read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tools.profile.contenders import Work
from tools.profile.machine import Cell
from tools.profile.timing import ReadBandwidth, interleaved

CPU_PRODUCT, GPU_PRODUCT = 1024, 8192  # sides of the matrices
CPU_COPY, GPU_COPY = 64 << 20, 2 << 30  # bytes that are read, and written
SECONDS = 0.2  # for each
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.int8: "int8"}


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s of matrix products by dtype, int8's of whole numbers; bytes a second, of a copy read and written."""

    device: torch.device
    products: dict[torch.dtype, float]
    copy: float
    read: float | None = None

    @property
    def unit(self) -> tuple[str, float]:
        """What rates are given in."""
        return ("T", 1e12) if self.device.type == "cuda" else ("G", 1e9)

    def cells(self) -> dict[str, Cell]:
        prefix, unit = self.unit
        rates = {f"{NAMES[dtype]} product {prefix}FLOP/s": rate for dtype, rate in self.products.items()}
        rates[f"copy {prefix}B/s"] = self.copy
        if self.read is not None:
            rates[f"read {prefix}B/s"] = self.read
        return {name: float(f"{rate / unit:.3g}") for name, rate in rates.items()}

    def least_seconds(self, work: Work, dtype: torch.dtype) -> tuple[float, str]:
        """How long the work must take, and what says so: the product, or the copy (the read, of work that reads)."""
        product = self.products[dtype if dtype in self.products else torch.float32]
        moving = (work.bytes / self.copy, "copy")
        if work.reads and self.read is not None:
            moving = (work.bytes / self.read, "read")
        return max((work.flops / product, "product"), moving)


def measure(device: torch.device, dtypes: Iterable[torch.dtype]) -> Ceilings:
    """A GPU's float32 product goes through its tensor cores, as TF32; a CPU's float32 stands for all floats."""
    if device.type == "cpu":
        products = {torch.float32: product(device, torch.float32, CPU_PRODUCT), torch.int8: int8_product(CPU_PRODUCT)}
        return Ceilings(device, products, copy(device, CPU_COPY), read(CPU_COPY))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    products = {dtype: product(device, dtype, GPU_PRODUCT) for dtype in dtypes}
    torch.set_float32_matmul_precision(precision)
    return Ceilings(device, products, copy(device, GPU_COPY))


def product(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """FLOP/s of a square matrix product."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / interleaved({"product": lambda: a @ b}, SECONDS, device)["product"].median


def int8_product(side: int) -> float:
    """Operations a second of a square product of int8 matrices on the CPU, whose sums are int32."""
    a, b = (torch.randint(-127, 128, (side, side), dtype=torch.int8) for _ in range(2))
    return 2 * side**3 / interleaved({"product": lambda: torch._int_mm(a, b)}, SECONDS)["product"].median


def copy(device: torch.device, size: int) -> float:
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / interleaved({"copy": lambda: target.copy_(source)}, SECONDS, device)["copy"].median


def read(size: int) -> float:
    reading = ReadBandwidth(torch.rand(size // 4))
    return reading.bytes_per_second(interleaved({"read": reading}, SECONDS)["read"])
