"""Quantised weights: what the integers mean, how near they come, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quantize as gguf_quantize
from torch import Tensor

from kernels import quantization
from kernels.quantization import QuantizedWeight, concatenate, quantize

RULES = [(8, 0, False), (4, 32, True), (4, 64, True), (4, 32, False), (4, 64, False)]
KINDS = pytest.mark.parametrize(("bits", "group", "symmetric"), RULES, ids=str)


def quantized(weight: Tensor, bits: int, group: int, symmetric: bool) -> QuantizedWeight:
    return quantize(weight, bits) if bits == 8 else quantize(weight, bits, group=group, symmetric=symmetric)


def plain(weight: QuantizedWeight) -> Tensor:
    """The definition, number by number."""
    out = torch.empty(weight.shape)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            if weight.bits == 8:
                out[i, j] = weight.values[i, j] * weight.scales[i]
                continue
            byte, g = int(weight.values[i, j // 2]), j // weight.group
            value = byte & 15 if j % 2 == 0 else byte >> 4
            scale = weight.scales[i, g].float()
            out[i, j] = scale * (value - 8) if weight.minimums is None else scale * value + weight.minimums[i, g]
    return out


@KINDS
def test_what_the_integers_mean(bits: int, group: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "SLICE", 256)  # several slices, the last of them short
    torch.manual_seed(0)
    weight = quantized(torch.randn(5, 128), bits, group, symmetric)
    assert (weight.bits, weight.shape, weight.group) == (bits, (5, 128), group or 128)
    expected = plain(weight)
    assert torch.equal(weight.dequantize(), expected)
    assert torch.equal(weight.dequantize(torch.bfloat16), expected.bfloat16())
    order = torch.tensor([3, 0, 3])
    assert torch.equal(weight.rows(order).dequantize(), expected[order])
    joined = concatenate([weight.rows(slice(2, 5)), weight])
    assert torch.equal(joined.dequantize(), torch.cat((expected[2:], expected)))


@KINDS
def test_slices_do_not_change_the_result(
    bits: int, group: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 192)
    whole = quantized(weight, bits, group, symmetric)
    monkeypatch.setattr(quantization, "SLICE", 400)
    for source in (weight, weight.t().contiguous().t(), weight.double()):
        parts = quantized(source, bits, group, symmetric)
        for ours, theirs in zip(parts._tensors(), whole._tensors(), strict=True):
            assert torch.equal(ours, theirs)


def test_eight_bits_are_off_by_half_a_step_at_most() -> None:
    torch.manual_seed(0)
    weight = torch.randn(50, 77) * torch.logspace(-30, 30, 50)[:, None]
    step = weight.abs().amax(1, keepdim=True) / 127
    quantized = quantize(weight, 8)
    assert ((quantized.dequantize() - weight).abs() <= step * 0.5001).all()
    assert (quantized.values.abs().amax(1) == 127).all()
    assert quantized.nbytes == 50 * 77 + 50 * 4


@pytest.mark.parametrize(("group", "symmetric", "kind"), [(32, True, Kind.Q4_0), (32, False, Kind.Q4_1)], ids=str)
def test_four_bits_come_nearer_than_the_same_form_of_llama_cpp(group: int, symmetric: bool, kind: Kind) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256) * 0.02
    theirs = torch.from_numpy(gguf_dequantize(gguf_quantize(weight.numpy(), kind), kind))
    ours = quantize(weight, 4, group=group, symmetric=symmetric)
    assert (ours.dequantize() - weight).norm() < 0.98 * (theirs - weight).norm()
    assert ours.nbytes == np.prod(gguf_quantize(weight.numpy(), kind).shape)


@KINDS
def test_weights_on_the_grid_come_back(bits: int, group: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    weight = quantized(torch.randn(8, 128), bits, group, symmetric).dequantize()
    assert (quantized(weight, bits, group, symmetric).dequantize() - weight).norm() < 1e-3 * weight.norm()


@KINDS
def test_odd_rows(bits: int, group: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    rows = {
        "zeros": torch.zeros(128),
        "one number": torch.full((128,), 0.3),
        "one of many": torch.eye(1, 128)[0] * 100,
        "too small for float16": torch.randn(128) * 1e-9,
        "float16's smallest": torch.randn(128) * 3e-7,
        "too small for float32": torch.full((128,), 1e-44),
        "large": torch.randn(128).clamp(-3, 3) * 1e4,
        "far from zero": torch.randn(128) * 1e-2 + 100,
    }
    weight = torch.stack(list(rows.values()))
    back = quantized(weight, bits, group, symmetric).dequantize()
    assert torch.isfinite(back).all()
    assert not back[0].any()
    error = (back - weight).norm(dim=1) / weight.norm(dim=1).clamp_min(1e-6)
    assert (error < 0.15).all(), dict(zip(rows, error.tolist(), strict=True))
    assert quantized(torch.empty(0, 128), bits, group, symmetric).dequantize().shape == (0, 128)


@KINDS
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_named(bits: int, group: int, symmetric: bool, number: float) -> None:
    weight = torch.ones(3, 128)
    weight[1, 100] = number
    with pytest.raises(ValueError, match=f"a weight is {number}: only finite"):
        quantized(weight, bits, group, symmetric)


def test_what_cannot_be_quantised() -> None:
    weight = torch.ones(2, 48)
    with pytest.raises(ValueError, match="rows of 48 do not divide into groups of 32: use eight bits"):
        quantize(weight, 4)
    with pytest.raises(ValueError, match="a weight of 1e\\+06 is too large for four bits"):
        quantize(torch.full((2, 64), 1e6), 4)
    with pytest.raises(ValueError, match="to 8 or 4 bits, got 3"):
        quantize(weight, 3)
    with pytest.raises(ValueError, match="groups of 32 or 64, got 16"):
        quantize(weight, 4, group=16)
    for wrong in (weight[0], weight.int()):
        with pytest.raises(ValueError, match="only matrices of floating-point numbers"):
            quantize(wrong, 8)


INT4 = {"values": torch.zeros(2, 32, dtype=torch.uint8), "scales": torch.zeros(2, 2, dtype=torch.float16)}
INT8 = {"values": torch.zeros(2, 64, dtype=torch.int8), "scales": torch.zeros(2)}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (INT8 | {"values": torch.zeros(2, 64)}, "int8 or uint8 matrices, got float32 \\(2, 64\\)"),
        (INT8 | {"values": INT8["values"][0]}, "int8 or uint8 matrices"),
        (INT8 | {"scales": torch.zeros(3)}, "do not go with scales float32 \\(3,\\)"),
        (INT8 | {"scales": torch.zeros(2).half()}, "do not go with scales float16"),
        (INT8 | {"minimums": torch.zeros(2)}, "do not go with minimums"),
        (INT4 | {"scales": torch.zeros(2, 3).half()}, "for every 32 or 64 inputs, got 3 for 64"),
        (INT4 | {"scales": torch.zeros(2, 0).half()}, "for every 32 or 64 inputs, got 0 for 64"),
        (INT4 | {"scales": torch.zeros(2, 2)}, "do not go with scales float32"),
        (INT4 | {"minimums": torch.zeros(2, 1).half()}, "do not go with minimums float16 \\(2, 1\\)"),
        (INT4 | {"minimums": torch.zeros(2, 2)}, "do not go with minimums float32"),
    ],
)
def test_parts_that_do_not_go_together(parts: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizedWeight(**parts)


def test_rows_of_different_kinds_are_not_joined() -> None:
    with pytest.raises(ValueError, match="rows of 2 kinds"):
        concatenate([QuantizedWeight(**INT4), QuantizedWeight(**INT8)])
