"""Quantised weights in a checkpoint of ours: a matrix of integers ``X``, its ``X.scales`` and its ``X.minimums``."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from kernels.quantization import QuantizedWeight
from models.files import CheckpointError
from models.weights import Weights

SCALES, MINIMUMS = ".scales", ".minimums"


def parts_of(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors that a quantised weight is stored as, by name."""
    parts = {name: weight.values, name + SCALES: weight.scales}
    return parts if weight.minimums is None else {**parts, name + MINIMUMS: weight.minimums}


class QuantizedFile(Weights):
    """The weights of a folder, some of which are stored in parts. ``where`` is the folder, for messages."""

    def __init__(self, weights: Weights, where: Path) -> None:
        self._weights, self._where = weights, where
        self._stored = set(weights.names())
        self._quantized = {name for name in self._stored if name + SCALES in self._stored}
        parts = {name + suffix for name in self._quantized for suffix in (SCALES, MINIMUMS)}
        self._names = [name for name in weights.names() if name not in parts]

    def names(self) -> list[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        weight = self.quantized(name)
        return self._weights.shape(name) if weight is None else tuple(weight.shape)

    def read(self, name: str) -> Tensor:
        weight = self.quantized(name)
        return self._weights.read(name) if weight is None else weight.dequantize()

    def quantized(self, name: str) -> QuantizedWeight | None:
        if name not in self._quantized:
            return None
        minimums = self._weights.read(name + MINIMUMS) if name + MINIMUMS in self._stored else None
        try:
            return QuantizedWeight(self._weights.read(name), self._weights.read(name + SCALES), minimums)
        except ValueError as error:
            raise CheckpointError(f"{self._where}: {name} is broken: {error}") from None
