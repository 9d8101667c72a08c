"""Fills a model with a checkpoint's tensors, each straight to its place, device and dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models.config import TransformerConfig
from models.families.family import Entry, Family, Source, source_of
from models.files import CheckpointError
from models.transformer import DecoderOnly, EncoderDecoder
from models.weights import Weights


@dataclass(frozen=True)
class Slot:
    """A parameter of ours: the names it has, more than one where it is tied, and the places it may come from."""

    names: list[str]
    shape: torch.Size
    sources: list[Source]


def assemble(
    model: DecoderOnly | EncoderDecoder, weights: Weights, family: Family, device: torch.device,
    dtype: torch.dtype | None, *, where: Path,
) -> None:  # fmt: skip
    """Gives a model made on the meta device its tensors, and moves it to ``device``; dtype None keeps the file's.

    A tensor that needs no change is used where the file is mapped. Raises CheckpointError, naming the file and the
    tensor, unless the file has what the model needs, in its shapes, and nothing else.
    """
    slots = list(_slots(model, family))
    reader = _Reader(weights, family.prefix, where)
    plan = {slot.names[0]: reader.available(slot.sources) for slot in slots}
    if missing := [slot for slot in slots if plan[slot.names[0]] is None]:
        first = missing[0].sources[0].names[0].split("|")[0]
        raise CheckpointError(f"{where} lacks {len(missing)} weights of the model, the first {first}")
    known = {name for slot in slots for source in slot.sources for name in reader.aliases(source)}
    if unexpected := sorted(name for name in weights.names() if name not in known and not family.is_ignored(name)):
        raise CheckpointError(f"{where} has {len(unexpected)} weights the model lacks, the first {unexpected[0]}")
    # The largest first: what a tensor takes on its way is then least where most of the model is there already.
    for slot in sorted(slots, key=lambda slot: -slot.shape.numel()):
        source = plan[slot.names[0]]
        assert source is not None
        wanted = _dtype_of(model.config, slot.names[0], dtype)
        parameter = nn.Parameter(reader.tensor(source, slot.shape, model.config, device, wanted))
        for name in slot.names:
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, parameter)
    model.to(device)  # the buffers, which no file holds


def has_own_head(config: TransformerConfig, weights: Weights, family: Family) -> bool:
    """Whether a file's head is another than its target embedding, whatever the config says."""
    if family.weights is None:
        return False
    mapping, reader = family.weights(config), _Reader(weights, family.prefix, Path())
    head, tokens = (
        reader.available([source_of(name, mapping)]) for name in ("lm_head.weight", "decoder.embedding.tokens.weight")
    )
    if head is None or tokens is None:
        return False
    (ours,), (theirs,) = head.names, tokens.names
    return ours != theirs and not torch.equal(weights.read(ours), weights.read(theirs))


def _slots(model: nn.Module, family: Family) -> Iterator[Slot]:
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    assert isinstance(model.config, TransformerConfig)
    weights = None if family.weights is None else family.weights(model.config)
    for parameter, own in names.items():
        yield Slot(own, parameter.shape, [_source(name, weights) for name in own])


def _source(name: str, weights: Mapping[str, Entry] | None) -> Source:
    return Source((name,)) if weights is None else source_of(name, weights)


def _dtype_of(config: TransformerConfig, name: str, dtype: torch.dtype | None) -> torch.dtype | None:
    # Where T5 would overflow: see ``TransformerConfig.float32_residual``.
    exact = config.float32_residual and dtype == torch.float16 and name.endswith("ffn.down.weight")
    return torch.float32 if exact else dtype


class _Reader:
    """Finds theirs under any of its names and brings it into our form."""

    def __init__(self, weights: Weights, prefix: str, where: Path) -> None:
        self.weights, self.prefix, self.where = weights, prefix, where
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
                return Source(tuple(name for name in found if name is not None), source.convert)
        return None

    def tensor(
        self, source: Source, shape: torch.Size, config: TransformerConfig, device: torch.device,
        dtype: torch.dtype | None,
    ) -> Tensor:  # fmt: skip
        """The source as a tensor of this shape, device and dtype."""
        if len(source.names) == 1:
            tensor = self._part(source, source.names[0], config)
            self._check(source, tuple(tensor.shape), shape)
            return tensor.to(device=device, dtype=dtype or tensor.dtype)
        rows = [self.weights.shape(name)[0] if self.weights.shape(name) else 0 for name in source.names]
        self._check(source, (sum(rows), *self.weights.shape(source.names[0])[1:]), shape)
        out = torch.empty(shape, device=device, dtype=dtype or self.weights.read(source.names[0]).dtype)
        for name, place in zip(source.names, out.split(rows), strict=True):
            part = self._part(source, name, config)
            self._check(Source((name,)), tuple(part.shape), place.shape)
            place.copy_(part)
        return out

    def _part(self, source: Source, name: str, config: TransformerConfig) -> Tensor:
        tensor = self.weights.read(name)
        if not tensor.is_floating_point():
            raise CheckpointError(f"{self.where}: {name} holds {tensor.dtype}, expected floating-point numbers")
        if source.convert is None:
            return tensor
        try:
            return source.convert(tensor, config)
        except RuntimeError:
            shape = tuple(tensor.shape)
            raise CheckpointError(f"{self.where}: {name} is {shape}, which does not fit the config") from None

    def _check(self, source: Source, shape: tuple[int, ...], expected: torch.Size) -> None:
        if shape != tuple(expected):
            names = " and ".join(source.names)
            raise CheckpointError(f"{self.where}: {names} is {shape}, the config asks for {tuple(expected)}")
