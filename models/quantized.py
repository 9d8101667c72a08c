"""Models on a GPU whose linear layers have their weights in eight or four bits; all else are floats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor, nn

from kernels.quantization import QuantizedWeight, quantize
from kernels.weight_only_linear import DeviceWeight, check_float8, weight_only_linear
from models.assembly import (
    NamedWeights,
    Weight,
    dtype_of,
    fill,
    is_embedding,
    is_linear,
    is_vocabulary,
    parameter_names,
)
from models.checkpoint import open_model
from models.layers import GATES, FeedForward, Linear
from models.sources import BITS, bits_of, check_quantization
from models.tokenizer import Tokenizer
from models.transformer import DecoderOnly, EncoderDecoder, build_model

DeviceQuantization = Literal["auto", "int8", "int4", "fp8"]
FLOAT8: Final = "fp8"


class QuantizedLinear(nn.Module):
    """A ``Linear`` whose weight is packed for the device. ``backend``: of ``kernels.weight_only_linear``."""

    def __init__(self, weight: DeviceWeight, bias: nn.Parameter | None, backend: str | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight, self.backend = weight, backend
        self.bias = bias

    def forward(
        self, x: Tensor, *, activation: str = "none", gated: bool = False, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        return weight_only_linear(
            x, self.weight, self.bias, activation=activation, gated=gated, out_dtype=out_dtype, backend=self.backend
        )


class QuantizedFeedForward(nn.Module):
    """A ``FeedForward`` whose activation joins the first layer's kernel."""

    def __init__(self, up: QuantizedLinear, down: QuantizedLinear, activation: str) -> None:
        super().__init__()
        self.up, self.down = up, down
        self.gated, self.activation = activation in GATES, GATES.get(activation, activation)

    def forward(self, x: Tensor) -> Tensor:
        # The second layer of a float16 model may be float32: see ``FeedForward``.
        dtype = self.down.weight.dtype
        return self.down(self.up(x, activation=self.activation, gated=self.gated, out_dtype=dtype))


def load(
    model: str | Path, device: torch.device, dtype: torch.dtype, quantization: DeviceQuantization,
    backend: str | None = None,
) -> tuple[DecoderOnly | EncoderDecoder, Tokenizer | None]:  # fmt: skip
    """A checkpoint's model with quantised linear layers, in evaluation mode, and its tokenizer.

    "int8" and "int4" are as in ``models.assembly.named_weights``, "auto" leaves layers as they are stored, "fp8" rounds
    them to floats of eight bits with a scale a row. The output head is quantised as a linear layer is, also where it is
    tied: embeddings stay floats. Raises CheckpointError for the checkpoint, ValueError for the GPU.
    """
    if quantization == FLOAT8:
        check_float8(device)
        built, tokenizer, weights = open_model(model, None, device=device, dtype=dtype)
    else:
        built, tokenizer, weights = open_model(model, quantization, device=device, dtype=dtype, keeps_tables=True)
    return _filled(built, weights, device, dtype, quantization, backend), tokenizer


def quantized_copy(
    model: DecoderOnly | EncoderDecoder, quantization: DeviceQuantization, backend: str | None = None
) -> DecoderOnly | EncoderDecoder:
    """A live model with its linear layers quantised as they are now; whatever else it has, both share."""
    if quantization != FLOAT8:
        check_quantization(quantization)
    parameter = next(model.parameters())
    with torch.device("meta"):
        built = build_model(model.config)
    built.generation = model.generation
    weights = _live_weights(model, quantization)
    return _filled(built, weights, parameter.device, parameter.dtype, quantization, backend)


def _live_weights(model: nn.Module, quantization: str) -> NamedWeights:
    for parameter, names in parameter_names(model).items():
        weight = parameter.detach()
        tables = [name for name in names if is_embedding(name)]
        others = [name for name in names if not is_embedding(name)]
        if tables:
            yield tables, weight
        if others and quantization in BITS and is_linear(model, others[0]):
            bits = bits_of(quantization, weight.shape[1], any(map(is_vocabulary, others)))
            yield others, quantize(weight, bits)
        elif others:
            yield others, weight


def _filled(
    model: DecoderOnly | EncoderDecoder, weights: NamedWeights, device: torch.device, dtype: torch.dtype,
    quantization: str, backend: str | None,
) -> DecoderOnly | EncoderDecoder:  # fmt: skip
    """Gives a model made on the meta device its weights, and quantised ones to layers of their kind."""

    def floats() -> Iterator[tuple[list[str], Weight]]:
        for names, weight in weights:
            layers = [name for name in names if _is_layer(model, name)]
            if layers and (isinstance(weight, QuantizedWeight) or quantization == FLOAT8):
                own = dtype_of(model.config, layers[0], dtype) or dtype
                packed = DeviceWeight.pack(weight, device, own, float8=quantization == FLOAT8)
                for name in layers:
                    _replace(model, name.removesuffix(".weight"), packed, backend)
                names = [name for name in names if name not in layers]
            if names:
                yield names, weight

    fill(model, floats(), device, dtype)
    _join_activations(model)
    return model.eval()


def _is_layer(model: nn.Module, name: str) -> bool:
    return name.endswith(".weight") and isinstance(model.get_submodule(name.removesuffix(".weight")), Linear)


def _replace(model: nn.Module, name: str, weight: DeviceWeight, backend: str | None) -> None:
    parent, _, leaf = name.rpartition(".")
    layer = model.get_submodule(name)
    assert isinstance(layer, Linear)
    setattr(model.get_submodule(parent), leaf, QuantizedLinear(weight, layer.bias, backend))


def _join_activations(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if (
                isinstance(child, FeedForward)
                and isinstance(child.up, QuantizedLinear)
                and isinstance(child.down, QuantizedLinear)
            ):
                setattr(module, name, QuantizedFeedForward(child.up, child.down, child.activation))
