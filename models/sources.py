"""Finds the tensors that a weight of ours is made of in a checkpoint, and brings them into our form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from kernels.quantization import QuantizedWeight, concatenate, quantize
from models.config import TransformerConfig
from models.families.family import Source
from models.files import CheckpointError
from models.weights import Weights

Quantization = Literal["auto", "int8", "int4"]
BITS: dict[str, int] = {"int8": 8, "int4": 4}
FOUR_BIT_GROUP = 32
# Of embeddings and head where other layers have four. In four they would take a seventh off what SmolLM2-135M reads for
# a token, and add a tenth to its perplexity, more for each byte than any other layer.
VOCABULARY_BITS = 8


def check_quantization(quantization: str | None) -> None:
    """Raises ValueError for what is no ``Quantization`` or None."""
    if quantization not in (None, *get_args(Quantization)):
        raise ValueError(f"quantization is {quantization!r}: expected None, {', '.join(get_args(Quantization))}")


def bits_of(quantization: str, in_features: int, is_vocabulary: bool) -> int:
    """In how many bits "int8" or "int4" stores the rows of a matrix that has floats."""
    if quantization == "int4" and not in_features % FOUR_BIT_GROUP:
        return VOCABULARY_BITS if is_vocabulary else 4
    return 8


class SourceReader:
    """Finds theirs under any of its names and brings it into our form. ``where`` is the checkpoint, for messages."""

    def __init__(self, weights: Weights, prefix: str, config: TransformerConfig, where: Path) -> None:
        self.weights, self.prefix, self.config, self.where = weights, prefix, config, where
        self.names = set(weights.names())

    def aliases(self, source: Source) -> Iterator[str]:
        """Every name that a source may have in a file, those without the family's prefix included."""
        for part in source.names:
            for name in part.split("|"):
                yield name
                yield name.removeprefix(self.prefix)

    def available(self, sources: list[Source]) -> Source | None:
        """The first source that the file has all of, under the names it has there."""
        for source in sources:
            found = [next((name for name in self.aliases(Source((part,))) if name in self.names), None)
                     for part in source.names]  # fmt: skip
            if None not in found:
                return replace(source, names=tuple(name for name in found if name is not None))
        return None

    def tensor(self, source: Source, shape: torch.Size, device: torch.device, dtype: torch.dtype | None) -> Tensor:
        """The source as a tensor of this shape, device and dtype (None: its own)."""
        if len(source.names) == 1:
            tensor = self._part(source, source.names[0])
            self._check(source.names, tuple(tensor.shape), shape)
            return tensor.to(device=device, dtype=dtype or tensor.dtype)
        shapes = [self.weights.shape(name) for name in source.names]
        rows = [own[0] if own else 0 for own in shapes]
        self._check(source.names, (sum(rows), *shapes[0][1:]), shape)
        out = torch.empty(shape, device=device, dtype=dtype or self.weights.read(source.names[0]).dtype)
        for name, place in zip(source.names, out.split(rows), strict=True):
            part = self._part(source, name)
            self._check((name,), tuple(part.shape), place.shape)
            place.copy_(part)
        return out

    def quantized(
        self, source: Source, shape: torch.Size, quantization: Quantization, is_vocabulary: bool,
        device: torch.device,
    ) -> QuantizedWeight | None:  # fmt: skip
        """The source as quantised rows of this shape on the device, None where "auto" finds floats.

        What is stored in the bits asked for stays as it is. Parts of different forms are joined in one: the one asked
        for, else the widest among them.
        """
        stored = [self._stored(source, name) for name in source.names]
        there = [weight for weight in stored if weight is not None]
        if quantization == "auto" and len(there) < len(stored):
            return None
        bits = BITS.get(quantization) or max(weight.bits for weight in there)
        forms = {(weight.group, weight.symmetric) for weight in there if weight.bits == bits}
        if not forms and quantization != "auto":
            bits = bits_of(quantization, shape[-1], is_vocabulary)
        form = forms.pop() if len(forms) == 1 else None
        parts = [
            weight.to(device)
            if weight is not None and weight.bits == bits and (bits == 8 or (weight.group, weight.symmetric) == form)
            else self._quantize(source, name, bits, form, device)
            for name, weight in zip(source.names, stored, strict=True)
        ]
        for name, part in zip(source.names, parts, strict=True):
            self._check((name,), tuple(part.shape[1:]), shape[1:])
        self._check(source.names, (sum(part.shape[0] for part in parts), *shape[1:]), shape)
        return concatenate(parts) if len(parts) > 1 else parts[0]

    def _stored(self, source: Source, name: str) -> QuantizedWeight | None:
        weight = self.weights.quantized(name)
        if weight is None or source.convert is None:
            return weight
        return weight.rows(self._converted(source, name, torch.arange(weight.shape[0])))

    def _quantize(
        self, source: Source, name: str, bits: int, form: tuple[int, bool] | None, device: torch.device
    ) -> QuantizedWeight:
        part = self._part(source, name).to(device)
        try:
            if bits == 8 or form is None:
                return quantize(part, bits)
            return quantize(part, 4, group=form[0], symmetric=form[1])
        except ValueError as error:
            raise CheckpointError(f"{self.where}: {name} cannot be quantised: {error}") from None

    def _part(self, source: Source, name: str) -> Tensor:
        tensor = self.weights.read(name)
        if not tensor.is_floating_point():
            raise CheckpointError(f"{self.where}: {name} holds {tensor.dtype}, expected floating-point numbers")
        return self._converted(source, name, tensor)

    def _converted(self, source: Source, name: str, tensor: Tensor) -> Tensor:
        if source.convert is None:
            return tensor
        if not source.moves_rows and self.weights.quantized(name) is not None:
            raise CheckpointError(f"{self.where}: {name} is quantised, which this family of models has no rule for")
        try:
            return source.convert(tensor, self.config)
        except RuntimeError:
            shape = self.weights.shape(name)
            raise CheckpointError(f"{self.where}: {name} is {shape}, which does not fit the config") from None

    def _check(self, names: tuple[str, ...], shape: tuple[int, ...], expected: torch.Size) -> None:
        if shape != tuple(expected):
            raise CheckpointError(
                f"{self.where}: {' and '.join(names)} is {shape}, the config asks for {tuple(expected)}"
            )
