"""Weights of every storage for the packed linear layers' tests, and what a layer over them should give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.extension import _C
from kernels.packed_linear import PackedWeight, pack
from kernels.quantization import QuantizedWeight, quantize

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@dataclass(frozen=True)
class Kind:
    """A storage and how a layer over it computes: ``rounds`` its rows to eight bits, or takes them as floats."""

    name: str
    dtype: torch.dtype | None = None  # None: quantised
    bits: int = 0
    group: int = 1
    symmetric: bool = True
    widen: bool = False

    @property
    def rounds(self) -> bool:
        return self.dtype is None and not self.widen

    def fits(self, inputs: int) -> bool:
        return inputs % self.group == 0

    def store(self, weight: Tensor) -> Tensor | QuantizedWeight:
        if self.dtype is not None:
            return weight.to(self.dtype)
        if self.bits == 8:
            return quantize(weight, 8)
        return quantize(weight, 4, group=self.group, symmetric=self.symmetric)

    def pack(self, weight: Tensor, order: Tensor | None = None) -> tuple[PackedWeight, Tensor]:
        """The packed weight, and what it stores: float64, in the order of the packed outputs."""
        stored = self.store(weight)
        values = exact(stored)
        if order is not None:
            values = torch.where(order[:, None] >= 0, values[order.clamp(min=0)], 0.0)
        return pack(stored, order=order), values


KINDS = [
    Kind("float32", torch.float32),
    Kind("bfloat16", torch.bfloat16),
    Kind("float16", torch.float16),
    Kind("int8", bits=8),
    *(
        Kind(f"int4-{group}{'' if symmetric else '-minimums'}{'-widened' if widen else ''}", None, 4, group, symmetric,
             widen)
        for group in (32, 64) for symmetric in (True, False) for widen in (False, True)
    ),
]  # fmt: skip


def exact(weight: Tensor | QuantizedWeight) -> Tensor:
    """What a stored weight means, in float64."""
    if isinstance(weight, Tensor):
        return weight.double()
    if weight.bits == 8:
        return weight.values * weight.scales.double()[:, None]
    values = torch.stack((weight.values & 15, weight.values >> 4), dim=-1).view(len(weight.values), -1, weight.group)
    scales = weight.scales.double()[..., None]
    minimums = scales * -8 if weight.minimums is None else weight.minimums.double()[..., None]
    return (values * scales + minimums).flatten(1)


OUTLIERS, OUTLIER_RATIO = 4, np.float32(1.5)


def outliers_of(rows: np.ndarray) -> np.ndarray:
    """A row's four numbers of the largest magnitudes if it has outliers, the first of equal ones; else zeros."""
    out = np.zeros_like(rows)
    for row, kept in zip(rows, out, strict=True):
        order = np.argsort(-np.abs(row), kind="stable")
        magnitudes = [*np.abs(row[order[: OUTLIERS + 1]]), *[0] * OUTLIERS]
        if magnitudes[0] >= OUTLIER_RATIO * magnitudes[OUTLIERS]:
            kept[order[:OUTLIERS]] = row[order[:OUTLIERS]]
    return out


def rounded(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows without their outliers as integers, their scales, and the outliers. In numpy: torch divides a number by a
    tensor in two steps."""
    outliers = outliers_of(x.numpy())
    rows = x.numpy() - outliers
    most = np.abs(rows).max(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(most > 0, np.float32(127) / most, np.float32(0))
    integers, scales = np.rint(rows * inverse).astype(np.int64), most / np.float32(127)
    return torch.from_numpy(integers), torch.from_numpy(scales), torch.from_numpy(outliers)


def product(kind: Kind, x: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
    """x W^T as the layer defines it, in float64, and the same sums of magnitudes, to measure errors by."""
    rows = x.double()
    if kind.rounds:
        integers, scales, outliers = rounded(x)
        rows = integers * scales.double() + outliers.double()
    return rows @ stored.T, rows.abs() @ stored.abs().T


def linear(x: Tensor, weight: PackedWeight, *, out: Tensor | None = None, threads: int = 1, **given: Any) -> Tensor:
    """The layer, its output full of NaN before."""
    bias, residual = given.get("bias"), given.get("residual")
    gated = given.get("gated", False)
    if out is None:
        out = torch.full((len(x), weight.outputs // 2 if gated else weight.outputs), torch.nan)
    _C.linear(
        x.numpy(), weight, None if bias is None else bias.numpy(), given.get("activation", "none"), gated,
        None if residual is None else residual.numpy(), given.get("widen", False), out.numpy(), threads,
    )  # fmt: skip
    return out
