"""Weights packed for the CPU, and linear layers over them: csrc/linear.h. C++ only, without gradients.

float32, bfloat16 and float16 weights are multiplied as float32. Weights in eight or four bits are multiplied by
activations that are rounded to eight, with a scale a row (the row-wise scheme of LLM.int8, arXiv:2208.07339, without
its outliers): the sums are then of integers, and exact.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.extension import _C
from kernels.quantization import QuantizedWeight

PackedWeight: TypeAlias = _C.PackedWeight
Floats = NDArray[np.float32]
CHUNK = 64  # outputs that lie together


def pack(weight: Tensor | QuantizedWeight, *, order: Tensor | None = None) -> PackedWeight:
    """A weight (out_features, in_features) in the order the kernels read it; floats stay in their dtype.

    order: int64, the row of the weight that each output of the packed one is, -1 for an output of zeros.
    Raises ValueError for a dtype there are no kernels for, or rows too long to be summed exactly.
    """
    rows = None if order is None else order.numpy()
    threads = torch.get_num_threads()
    if isinstance(weight, Tensor):
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"weights are packed from float32, bfloat16 or float16, not {weight.dtype}")
        values = weight.detach() if weight.stride(-1) == 1 else weight.detach().contiguous()
        bits = values if values.dtype == torch.float32 else values.view(torch.uint16)
        return _C.PackedWeight.from_floats(bits.numpy(), values.dtype == torch.bfloat16, rows, threads)
    if weight.bits == 8:
        return _C.PackedWeight.from_int8(weight.values.numpy(), weight.scales.numpy(), rows, threads)
    minimums = None if weight.minimums is None else weight.minimums.view(torch.uint16).numpy()
    scales = weight.scales.view(torch.uint16).numpy()
    return _C.PackedWeight.from_int4(weight.values.numpy(), scales, minimums, rows, threads)


def gated_order(width: int) -> Tensor:
    """The order in which a gated layer's rows, ``width`` gates and then as many factors, are packed: 32 and 32.

    int64 (a multiple of 64,): the layer's output is then a multiple of 32, zeros behind ``width``.
    """
    half = CHUNK // 2
    gates = torch.arange(-(-width // half) * half).view(-1, half)
    gates = torch.where(gates < width, gates, -1)
    return torch.stack((gates, torch.where(gates < 0, -1, gates + width)), dim=1).flatten()


def packed_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    gated: bool = False,
    residual: Tensor | None = None,
    widen: bool = False,
) -> Tensor:
    """activation(x W^T + bias) + residual, float32 (rows, out_features), for float32 x (rows, in_features).

    Args:
        activation: none, relu, gelu, gelu_new or silu.
        gated: activation(gates) * factors instead, for a weight (and bias) in ``gated_order``.
        residual: of the result's shape.
        widen: multiply four-bit weights as floats, by activations that are not rounded.

    A row's result has the same bits whatever rows are beside it. Raises ValueError for what does not fit together.
    """
    out = torch.empty(*x.shape[:1], weight.outputs // 2 if gated else weight.outputs)
    _C.linear(
        _array("x", x), weight, None if bias is None else _array("bias", bias), activation, gated,
        None if residual is None else _array("residual", residual), widen, out.numpy(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _array(name: str, x: Tensor) -> Floats:
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise ValueError(f"{name} must be float32 on the CPU, got {x.dtype} on {x.device}")
    return x.detach().numpy()
