"""Linear layers over weights packed for a GPU: against the floats they stand for, whatever the shape; refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.activation import TORCH
from kernels.backend import TRITON_DEVICE
from kernels.quantization import QuantizedWeight, quantize
from kernels.weight_only_linear import FLOAT8_CAPABILITY, DeviceWeight, pack_nibbles, unpack_nibbles, weight_only_linear
from tests.kernels.conftest import DEVICE, poison

needs_triton = pytest.mark.skipif(TRITON_DEVICE is None, reason="needs triton")
KINDS = ("int8", "int4", "int4-64", "int4-minimums", "fp8", "float")
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
HALVES = (torch.bfloat16, torch.float16)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def stored(kind: str, outputs: int, inputs: int) -> QuantizedWeight | Tensor:
    weight = numbers(outputs, inputs).to(DEVICE) / inputs**0.5  # quantised there
    if kind == "int8":
        return quantize(weight, 8)
    if kind.startswith("int4"):
        return quantize(weight, 4, group=64 if kind.endswith("64") else 32, symmetric="minimums" not in kind)
    return weight


def pack(kind: str, outputs: int, inputs: int, dtype: torch.dtype = torch.float32) -> DeviceWeight:
    if kind == "fp8" and DEVICE == "cuda" and torch.cuda.get_device_capability() < FLOAT8_CAPABILITY:
        pytest.skip("this GPU has no floats of eight bits")
    return DeviceWeight.pack(stored(kind, outputs, inputs), DEVICE, dtype, float8=kind == "fp8")


def formula(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none", gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The layer in the dtype of its arguments, in torch's own operations."""
    product = F.linear(x, weight, bias)
    activate = TORCH.get(activation, lambda y: y)
    if gated:
        gates, factors = product.chunk(2, dim=-1)
        product = activate(gates) * factors
    else:
        product = activate(product)
    return product if residual is None else product + residual


def assert_as_exact_as_torch(x: Tensor, weight: DeviceWeight, **options: Any) -> Tensor:
    """The error against float64 is at most twice that of torch with the same floats in the same dtype."""
    floats = weight.dequantize(torch.float32)
    tensors = {name: value for name, value in options.items() if isinstance(value, Tensor)}
    plain = options | {name: value.to(x.dtype) for name, value in tensors.items()}
    exact = options | {name: value.double() for name, value in tensors.items()}
    out = weight_only_linear(x, weight, backend="triton", **options)
    peer, truth = formula(x, floats.to(x.dtype), **plain), formula(x.double(), floats.double(), **exact)
    assert out.dtype == x.dtype
    assert out.shape == truth.shape
    if out.numel():
        error, allowed = ((y.double() - truth).abs().max().item() for y in (out, peer))
        assert error <= 2 * allowed + 4e-6 * truth.abs().max().item(), (error, allowed)
    return out


@EACH_KIND
@pytest.mark.parametrize(("outputs", "inputs"), [(7, 64), (70, 320), (1, 576)], ids=str)
def test_a_packed_weight_stands_for_the_same_floats(kind: str, outputs: int, inputs: int) -> None:
    weight, packed = stored(kind, outputs, inputs), pack(kind, outputs, inputs)
    assert packed.shape == (outputs, inputs)
    floats = packed.dequantize()
    if isinstance(weight, QuantizedWeight):
        assert torch.equal(floats, weight.dequantize(device=DEVICE))
        assert packed.bits == weight.bits
    elif kind == "float":
        assert torch.equal(floats, weight)
    else:
        assert packed.is_float8
        half_steps = weight.abs() / 16 + weight.abs().amax(1, keepdim=True) / 448 / 1024
        assert ((floats - weight).abs() <= half_steps).all()


def test_nibbles_come_back() -> None:
    values = torch.randint(0, 256, (5, 160), dtype=torch.uint8)
    back = unpack_nibbles(pack_nibbles(values))
    assert torch.equal(back[:, 0:320:2], values & 15)
    assert torch.equal(back[:, 1:320:2], values >> 4)
    assert (back[:, 320:] == 8).all()


@needs_triton
@EACH_KIND
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_few_rows(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    for rows, outputs, inputs in ((1, 111, 320), (3, 64, 512), (16, 70, 128)):
        assert_as_exact_as_torch(numbers(rows, inputs).to(DEVICE, dtype), pack(kind, outputs, inputs, dtype))


@needs_triton
@EACH_KIND
@pytest.mark.parametrize("rows", [17, 64, 65, 200])
def test_more_rows(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    assert_as_exact_as_torch(numbers(rows, 320).to(DEVICE, torch.bfloat16), pack(kind, 70, 320, torch.bfloat16))


@needs_triton
@pytest.mark.parametrize("kind", ["int8", "int4", "float"])
def test_wide_outputs(kind: str) -> None:
    assert_as_exact_as_torch(numbers(2, 64).to(DEVICE, torch.bfloat16), pack(kind, 4099, 64, torch.bfloat16))


@needs_triton
@pytest.mark.parametrize("kind", ["int8", "fp8", "float"])
@pytest.mark.parametrize("inputs", [1, 3, 63, 131])
def test_inputs_that_are_no_whole_groups(kind: str, inputs: int) -> None:
    assert_as_exact_as_torch(numbers(5, inputs).to(DEVICE, torch.bfloat16), pack(kind, 37, inputs, torch.bfloat16))


@needs_triton
@EACH_KIND
@pytest.mark.parametrize("activation", ["none", *TORCH])
def test_bias_activation_and_residual(kind: str, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    weight = pack(kind, 70, 192, torch.bfloat16)
    bias = numbers(70).to(DEVICE, torch.bfloat16)
    for rows in (5, 70):
        x, residual = (numbers(rows, n, seed=n).to(DEVICE, torch.bfloat16) for n in (192, 70))
        assert_as_exact_as_torch(x, weight, bias=bias, activation=activation, residual=residual)


@needs_triton
@EACH_KIND
@pytest.mark.parametrize("rows", [1, 9, 17, 66])
def test_gated_layers(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    weight = pack(kind, 140, 192, torch.bfloat16)
    bias = numbers(140).to(DEVICE, torch.bfloat16)
    x, residual = (numbers(rows, n, seed=n).to(DEVICE, torch.bfloat16) for n in (192, 70))
    for activation in ("silu", "gelu_new", "none"):
        assert_as_exact_as_torch(x, weight, bias=bias, activation=activation, gated=True, residual=residual)
    assert_as_exact_as_torch(x, weight, activation="relu", gated=True)


@needs_triton
@EACH_KIND
def test_sums_that_several_programs_share_have_the_same_bits_each_time(kind: str) -> None:
    from kernels.gpu import weight_only_linear as gpu

    weight, x = pack(kind, 48, 2048, torch.bfloat16), numbers(4, 2048).to(DEVICE, torch.bfloat16)
    config = gpu.config_of(weight, 4, gated=False)
    tiles = -(-2048 // config.block_k)
    assert gpu.splits_of(1, tiles, 64, gpu.multiprocessors()) > 1
    first = assert_as_exact_as_torch(x, weight)
    for _ in range(3):
        assert torch.equal(weight_only_linear(x, weight, backend="triton"), first)
    assert not weight.counters.any()


@pytest.mark.parametrize(("blocks", "tiles"), [(1, 1), (64, 16), (64, 32), (172, 43), (786, 6), (4000, 8)])
def test_a_split_fills_the_gpu_and_leaves_each_program_two_tiles(blocks: int, tiles: int) -> None:
    pytest.importorskip("triton")
    from kernels.gpu.weight_only_linear import RESIDENT, splits_of

    splits = splits_of(blocks, tiles, 64, 132)
    assert splits == 1 or (blocks * splits <= RESIDENT * 132 and tiles >= 2 * splits)
    if blocks == 64:
        assert splits >= 5


@needs_triton
def test_leading_dimensions_and_strides() -> None:
    weight = pack("int8", 40, 96, torch.bfloat16)
    x = numbers(4, 3, 192).to(DEVICE, torch.bfloat16)[..., ::2]
    out = weight_only_linear(x, weight, backend="triton")
    assert torch.equal(out, weight_only_linear(x.contiguous().view(12, 96), weight, backend="triton").view(4, 3, 40))
    assert weight_only_linear(x[:0], weight, backend="triton").shape == (0, 3, 40)
    wide = weight_only_linear(x, weight, out_dtype=torch.float32, backend="triton")
    assert wide.dtype == torch.float32
    assert torch.equal(wide.to(torch.bfloat16), out)


@EACH_KIND
def test_other_backends_make_floats_of_the_weight(kind: str) -> None:
    weight, x = pack(kind, 40, 128), numbers(5, 128).to(DEVICE)
    expected = formula(x, weight.dequantize(), activation="silu", gated=True)
    for name in ("torch", "reference"):
        out = weight_only_linear(x, weight, activation="silu", gated=True, backend=name)
        torch.testing.assert_close(out, expected)


def test_what_does_not_fit_is_refused() -> None:
    weight, x = pack("int8", 41, 96), numbers(5, 96).to(DEVICE)
    for message, change in (
        ("unknown activation", {"activation": "tanh"}),
        ("as many gates as factors", {"gated": True}),
        ("a bias is", {"bias": x[0]}),
        ("a residual is", {"residual": x}),
    ):
        with pytest.raises(ValueError, match=message):
            weight_only_linear(x, weight, **change)  # type: ignore[arg-type]
    for other in (x[:, :95], x.bfloat16()):
        with pytest.raises(ValueError, match=r"multiplies torch\.float32 rows of 96"):
            weight_only_linear(other, weight)
    with pytest.raises(ValueError, match="has no native backend"):
        weight_only_linear(x, weight, backend="native")
    with pytest.raises(ValueError, match="only matrices"):
        DeviceWeight.pack(x[0], DEVICE, torch.float32)
    with pytest.raises(ValueError, match="multiplies float32, bfloat16 or float16"):
        DeviceWeight.pack(x, DEVICE, torch.float64)
    with pytest.raises(ValueError, match="only finite weights"):
        DeviceWeight.pack(x * torch.inf, DEVICE, torch.float32, float8=True)


@needs_triton
def test_a_gradient_is_not_lost_in_silence() -> None:
    weight, x = pack("int8", 40, 96), numbers(5, 96).to(DEVICE).requires_grad_()
    with pytest.raises(RuntimeError, match="no gradients"):
        weight_only_linear(x, weight, backend="triton")
    with torch.no_grad():
        assert weight_only_linear(x, weight, backend="triton").shape == (5, 40)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@EACH_KIND
@pytest.mark.parametrize("inputs", [4096, 11008])
def test_large_layers_alone_and_in_a_cuda_graph(kind: str, inputs: int) -> None:
    weight = pack(kind, 4096, inputs, torch.bfloat16)
    for rows in (1, 8, 16, 64, 300):
        x = numbers(rows, inputs).to(DEVICE, torch.bfloat16)
        out = assert_as_exact_as_torch(x, weight)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = weight_only_linear(x, weight)
        for _ in range(3):
            replayed.fill_(torch.nan)
            graph.replay()
            assert torch.equal(replayed, out)
