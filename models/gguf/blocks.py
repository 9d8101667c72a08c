"""What the blocks of a GGUF tensor hold, as floats or as quantised weights. Their layouts: ggml's ggml-common.h."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from kernels.quantization import QuantizedWeight, concatenate, quantize
from models.files import CheckpointError
from models.gguf.file import GgufFile

SLICE = 1 << 22  # elements converted at a time, which bounds the memory for it beside the result
FLOATS = ("F64", "F32", "F16", "BF16")
SUB_BLOCKS = 8  # of 32 weights, in a block of the kinds that end in _K


def check_types(file: GgufFile) -> None:
    """Raises CheckpointError for a tensor of a kind that nobody can dequantise."""
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    for kind in {tensor.kind for tensor in file.tensors.values()}:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            name = next(name for name, tensor in file.tensors.items() if tensor.kind == kind)
            raise CheckpointError(f"{file.path}: {name} is {kind.name}, which cannot be dequantised") from None


def read_floats(file: GgufFile, name: str) -> Tensor:
    """The tensor in float32, a view of the file where that is what it holds."""
    from gguf.quants import dequantize

    tensor = file.tensors[name]
    if tensor.kind.name == "F32":
        return torch.from_numpy(file.blocks(name).view(np.float32))
    values = torch.empty(tensor.shape)
    out, start = values.view(-1, tensor.shape[-1]).numpy(), 0
    for rows in _slices(file, name):
        out[start : start + len(rows)] = dequantize(rows, tensor.kind)
        start += len(rows)
    return values


def read_quantized(file: GgufFile, name: str) -> QuantizedWeight | None:
    """The matrix in the form nearest to its kind's, None for floats.

    Q4_0 and Q4_1 are the same numbers. Q4_K's are within 0.75% of a step plus 0.05% of the minimum: its scales and
    minimums are products, here rounded to float16. What else there is becomes eight bits a row, within half a 127th of
    the row's largest weight.
    """
    from gguf.quants import dequantize

    tensor = file.tensors[name]
    if tensor.kind.name in FLOATS or len(tensor.shape) != 2:
        return None
    convert = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k}.get(tensor.kind.name)
    if convert is not None:
        return concatenate([convert(torch.from_numpy(rows)) for rows in _slices(file, name)])
    try:
        return concatenate(
            [quantize(torch.from_numpy(dequantize(rows, tensor.kind)), 8) for rows in _slices(file, name)]
        )
    except ValueError as error:
        raise CheckpointError(f"{file.path}: {name} cannot be quantised: {error}") from None


def _slices(file: GgufFile, name: str) -> Iterator[np.ndarray]:
    """The blocks (rows, bytes of a row), some rows at a time."""
    blocks = file.blocks(name)
    rows, step = blocks.reshape(-1, blocks.shape[-1]), max(1, SLICE // file.tensors[name].shape[-1])
    yield from (rows[start : start + step] for start in range(0, len(rows), step))


def _q4_0(rows: Tensor) -> QuantizedWeight:
    """A float16 scale, and 16 bytes: low halves are the first 16 weights, high halves the others."""
    scales, values = rows.unflatten(1, (-1, 18)).split((2, 16), dim=-1)
    return QuantizedWeight(_pairs(values.unsqueeze(-2)), _half(scales))


def _q4_1(rows: Tensor) -> QuantizedWeight:
    """As Q4_0 with a float16 minimum after the scale."""
    scales, minimums, values = rows.unflatten(1, (-1, 20)).split((2, 2, 16), dim=-1)
    return QuantizedWeight(_pairs(values.unsqueeze(-2)), _half(scales), _half(minimums))


def _q4_k(rows: Tensor) -> QuantizedWeight:
    """Float16 factors of the scales and of the minimums, 12 bytes of either in six bits, and four runs of 32 bytes:
    the low halves of a run are a sub-block, the high halves the next."""
    factor, minimum_factor, bits, values = rows.unflatten(1, (-1, 144)).split((2, 2, 12, 128), dim=-1)
    scales, minimums, rest = bits.split(4, dim=-1)
    # The last four have their upper two bits in the bytes of the first four.
    scales = torch.cat((scales & 63, (rest & 15) | (scales >> 2) & 48), dim=-1)
    minimums = torch.cat((minimums & 63, (rest >> 4) | (minimums >> 2) & 48), dim=-1)
    return QuantizedWeight(
        _pairs(values.unflatten(-1, (SUB_BLOCKS // 2, 32))),
        (_half(factor).float()[..., None] * scales).half().flatten(1),
        (-_half(minimum_factor).float()[..., None] * minimums).half().flatten(1),
    )


def _pairs(runs: Tensor) -> Tensor:
    """Runs of bytes (rows, ..., bytes) with first their low, then their high halves as bytes of neighbours."""
    values = torch.stack((runs & 15, runs >> 4), dim=-2).flatten(1)
    return values[:, ::2] | (values[:, 1::2] << 4)


def _half(pairs: Tensor) -> Tensor:
    """Bytes (..., 2) as float16 (...,)."""
    return pairs.contiguous().view(torch.float16).squeeze(-1)
