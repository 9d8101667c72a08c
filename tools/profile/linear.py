"""`linear`: packed linear layers by the precision of their weights, against torch's. This is the CPU's side."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.packed_linear import pack, packed_linear
from kernels.quantization import quantize
from models.sources import BITS
from tools.profile import gpu_linear
from tools.profile.contenders import OURS, Contender, Problem, Work, chosen
from tools.profile.engine_limit import BYTES
from tools.profile.measure import measure
from tools.profile.options import PRECISIONS, Options
from tools.profile.report import Report

OPTIONS = ("shape", "precision", "plot")
PEERS = ("eager", "dynamic")
MODES = ("forward",)
ROWS = (1, 8, 32, 1024)
LAYERS = ((768, 2304), (768, 3072), (3072, 768), (768, 50257))  # GPT-2's
COLD_BYTES = 64 << 20  # weights are read in turns from copies of this size together, as a model's layers are


@dataclass(frozen=True)
class Shape:
    rows: int
    inputs: int
    outputs: int
    precision: str

    @property
    def label(self) -> str:
        return f"{self.rows}x{self.inputs}x{self.outputs}-{self.precision}"

    @property
    def weight_bytes(self) -> float:
        return self.inputs * self.outputs * BYTES[self.precision]

    def work(self) -> Work:
        """A multiplication and an addition a weight and row; weights and rows read, and the result written."""
        moved = self.weight_bytes + 4 * self.rows * (self.inputs + self.outputs)
        return Work(2 * self.rows * self.inputs * self.outputs, moved, reads=True)


# By name, for --shape.
SHAPES = {"gpt2": [(rows, *layer) for rows in ROWS for layer in LAYERS], **gpu_linear.SHAPES}
WEIGHTS = (*PRECISIONS, "int4-minimums", "fp8", "bf16")  # of --precision; the last three on a GPU


def run(options: Options) -> Report:
    on_gpu = torch.cuda.is_available()
    here = gpu_linear.PRECISIONS if on_gpu else PRECISIONS
    if unknown := [name for name in options.precisions if name not in here]:
        raise ValueError(f"weights in {unknown[0]} are not measured here: choose from {', '.join(here)}")
    if on_gpu:
        return gpu_linear.run(options, sizes(options.shapes or ["decode"]))
    wanted = shapes(options.shapes, options.precisions or ["fp32", "int8", "int4"])
    return measure("linear", wanted, partial(problem, against=options.against), options, rate="FLOP", modes=MODES)


def shapes(names: list[str], precisions: list[str]) -> list[Shape]:
    """Presets, and others as rows x inputs x outputs. Raises ValueError for what is neither."""
    return [Shape(*size, precision) for size in sizes(names or ["gpt2"]) for precision in precisions]


def sizes(names: list[str]) -> list[tuple[int, int, int]]:
    """Rows, inputs and outputs. Raises ValueError for what is no shape."""
    found_sizes: list[tuple[int, int, int]] = []
    for name in names:
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", name)
        if name not in SHAPES and not found:
            raise ValueError(
                f"unknown shape {name!r}: choose from {', '.join(SHAPES)}, or give rows x inputs x outputs "
                "such as 8x768x3072"
            )
        found_sizes += [(int(found[1]), int(found[2]), int(found[3]))] if found else SHAPES[name]
    return found_sizes


def problem(shape: Shape, device: torch.device, _: torch.dtype, against: list[str] | None) -> Problem:
    """Rows, and a bias for the result; what they are multiplied by is the contenders' own copy of one weight."""
    weight = torch.randn(shape.outputs, shape.inputs, device=device) / shape.inputs**0.5
    stored = quantize(weight, BITS[shape.precision]) if shape.precision in BITS else weight
    values = weight if isinstance(stored, Tensor) else stored.dequantize()
    inputs = (torch.randn(shape.rows, shape.inputs, device=device), torch.randn(shape.outputs, device=device))
    copies = max(1, round(COLD_BYTES / shape.weight_bytes))
    everyone = {
        f"{OURS} native": Contender(in_turns(packed_linear, [pack(stored) for _ in range(copies)])),
        # In float32, whatever the weights were stored in.
        "eager": Contender(in_turns(F.linear, [values.clone() for _ in range(max(1, COLD_BYTES // values.nbytes))])),
    }
    if shape.precision == "int8":
        everyone["dynamic"] = Contender(dynamic(weight, max(1, COLD_BYTES // weight.numel())))
    return Problem(
        torch.float32 if shape.precision == "fp32" else torch.int8,
        inputs,
        reference=lambda x, bias: F.linear(x, values.to(x.dtype), bias),
        contenders=chosen(everyone, against),
        forward=shape.work(),
        backward=Work(0, 0),
    )


def in_turns(layer: Callable[..., Tensor], weights: Sequence[object]) -> Callable[[Tensor, Tensor], Tensor]:
    turns = itertools.cycle(weights)
    return lambda x, bias: layer(x, next(turns), bias)


def dynamic(weight: Tensor, copies: int) -> Callable[[Tensor, Tensor], Tensor]:
    """torch's own layer with int8 weights, which rounds activations as they come."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(weight)
    turns: list[itertools.cycle[torch.nn.Module]] = []

    def function(x: Tensor, bias: Tensor) -> Tensor:
        if not turns:  # at the first call, where what it may raise becomes a row's note
            kinds = {torch.nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
            made = [torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer), kinds) for _ in range(copies)]
            turns.append(itertools.cycle(made))
        return next(turns[0])(x) + bias

    return function
