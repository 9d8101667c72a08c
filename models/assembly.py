"""Fills a model with a checkpoint's weights, each straight to its place, device and dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kernels.quantization import QuantizedWeight
from models.config import TransformerConfig
from models.families.family import Entry, Family, Source, source_of
from models.files import CheckpointError
from models.layers import Linear
from models.sources import Quantization, SourceReader, check_quantization
from models.transformer import DecoderOnly, EncoderDecoder
from models.weights import Weights

Weight = Tensor | QuantizedWeight
NamedWeights = Iterator[tuple[list[str], Weight]]


@dataclass(frozen=True)
class Slot:
    """A parameter of ours.

    Attributes:
        names: that it has, more than one where it is tied. shape: its own.
        sources: the places it may come from.
        is_linear: whether it is what a linear layer multiplies by, or token embeddings: what may be quantised.
        is_vocabulary: whether it has a row for each token.
    """

    names: list[str]
    shape: torch.Size
    sources: list[Source]
    is_linear: bool
    is_vocabulary: bool


def named_weights(
    model: DecoderOnly | EncoderDecoder, weights: Weights, family: Family, *, where: Path,
    quantization: Quantization | None = None, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
    keeps_tables: bool = False,
) -> NamedWeights:  # fmt: skip
    """The weights of a model made on the meta device, one after the other, each with all the names it has there.

    They are on the device, floats in the dtype (None: the file's); what needs no change is a view of the mapped file.
    ``quantization``: None, quantised ones are made floats; "auto", they are as stored; "int8" and "int4", linear layers
    and token embeddings are quantised, though with "int4" embeddings and head have eight bits unless stored in four,
    as rows do that are no whole groups. ``keeps_tables``: token embeddings are floats all the same, and a head that is
    tied to them comes apart from them. The largest come first: what a weight takes on its way is then least where most
    of the model is there already.

    Raises CheckpointError, naming the file and the tensor, unless the file has what the model needs, in its shapes,
    and nothing else: for names at once, for shapes and numbers on the way.
    """
    check_quantization(quantization)
    slots = list(_slots(model, family))
    reader = SourceReader(weights, family.prefix, model.config, where)
    plan = _plan(slots, reader, family)

    def read(slot: Slot, floats: bool = False) -> Weight:
        source = plan[slot.names[0]]
        if quantization is not None and slot.is_linear and not floats:
            weight = reader.quantized(source, slot.shape, quantization, slot.is_vocabulary, torch.device(device))
            if weight is not None:
                return weight
        return reader.tensor(source, slot.shape, torch.device(device), dtype_of(model.config, slot.names[0], dtype))

    def in_order() -> NamedWeights:
        for slot in sorted(slots, key=lambda slot: -slot.shape.numel()):
            tables = [name for name in slot.names if is_embedding(name)] if keeps_tables else []
            if tables:
                yield tables, read(slot, floats=True)
            if others := [name for name in slot.names if name not in tables]:
                yield others, read(slot)

    return in_order()


def fill(
    model: DecoderOnly | EncoderDecoder, weights: NamedWeights, device: torch.device, dtype: torch.dtype | None
) -> None:
    """Gives a model made on the meta device its weights, as floats, and moves it to the device."""
    for names, weight in weights:
        if isinstance(weight, QuantizedWeight):
            weight = weight.dequantize(dtype_of(model.config, names[0], dtype) or torch.float32, device)
        parameter = nn.Parameter(weight)
        for name in names:
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, parameter)
    model.to(device)  # the buffers, which no file holds


def has_own_head(config: TransformerConfig, weights: Weights, family: Family) -> bool:
    """Whether a file's head is another than its target embedding, whatever the config says."""
    if family.weights is None:
        return False
    mapping, reader = family.weights(config), SourceReader(weights, family.prefix, config, Path())
    head, tokens = (
        reader.available([source_of(name, mapping)]) for name in ("lm_head.weight", "decoder.embedding.tokens.weight")
    )
    if head is None or tokens is None:
        return False
    (ours,), (theirs,) = head.names, tokens.names
    return ours != theirs and not torch.equal(weights.read(ours), weights.read(theirs))


def _plan(slots: list[Slot], reader: SourceReader, family: Family) -> dict[str, Source]:
    """Where the weight of each slot, by its first name, is to be found in the file."""
    found = {slot.names[0]: reader.available(slot.sources) for slot in slots}
    if missing := [slot for slot in slots if found[slot.names[0]] is None]:
        first = missing[0].sources[0].names[0].split("|")[0]
        raise CheckpointError(f"{reader.where} lacks {len(missing)} weights of the model, the first {first}")
    known = {name for slot in slots for source in slot.sources for name in reader.aliases(source)}
    if unexpected := sorted(name for name in reader.names if name not in known and not family.is_ignored(name)):
        raise CheckpointError(
            f"{reader.where} has {len(unexpected)} weights the model lacks, the first {unexpected[0]}"
        )
    return {name: source for name, source in found.items() if source is not None}


def _slots(model: nn.Module, family: Family) -> Iterator[Slot]:
    assert isinstance(model.config, TransformerConfig)
    weights = None if family.weights is None else family.weights(model.config)
    for parameter, own in parameter_names(model).items():
        sources = [_source(name, weights) for name in own]
        yield Slot(own, parameter.shape, sources, is_linear(model, own[0]), any(map(is_vocabulary, own)))


def parameter_names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Every parameter with all the names it has, more than one where it is tied."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def is_linear(model: nn.Module, name: str) -> bool:
    """Whether a parameter is what a linear layer multiplies by, or token embeddings: what may be quantised."""
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and (is_vocabulary(name) or isinstance(model.get_submodule(module), Linear))


def is_vocabulary(name: str) -> bool:
    """Whether a parameter has a row for each token: embeddings and the head."""
    return name == "lm_head.weight" or is_embedding(name)


def is_embedding(name: str) -> bool:
    """Whether a parameter is a table of token embeddings."""
    return name.endswith(".embedding.tokens.weight")


def _source(name: str, weights: Mapping[str, Entry] | None) -> Source:
    return Source((name,)) if weights is None else source_of(name, weights)


def dtype_of(config: TransformerConfig, name: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype of a parameter in a model of this one."""
    # Where T5 would overflow: see ``TransformerConfig.float32_residual``.
    exact = config.float32_residual and dtype == torch.float16 and name.endswith("ffn.down.weight")
    return torch.float32 if exact else dtype
