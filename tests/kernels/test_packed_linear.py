"""Linear layers over packed weights: values against float64, bits against themselves, every CPU path, refusals."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.extension import _C
from kernels.packed_linear import gated_order, pack, packed_linear
from kernels.quantization import QuantizedWeight, quantize
from tests.kernels.conftest import CPU_PATHS, RunOnPath, poison
from tests.kernels.packed_weights import ACTIVATIONS, KINDS, Kind, exact, linear, product, rounded

EACH_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
INT8 = next(kind for kind in KINDS if kind.bits == 8)
OUTPUTS = (1, 40, 64, 65, 130)
INPUTS = (1, 3, 32, 63, 64, 96, 768)
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 13, 16, 17, 31, 32, 33, 48, 49, 97, 300)
# Relative to the sums of magnitudes: some roundings of float32, in whatever order they come.
TOLERANCE = 1e-6


def fitting(inputs: tuple[int, ...]) -> list[tuple[Kind, int]]:
    return [(kind, n) for kind in KINDS for n in inputs if kind.fits(n)]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def assert_near(actual: Tensor, expected: Tensor, magnitude: Tensor | float, tolerance: float = TOLERANCE) -> None:
    assert ((actual - expected).abs() <= tolerance * magnitude + 1e-30).all()


@pytest.mark.parametrize(("kind", "inputs"), fitting(INPUTS), ids=lambda value: getattr(value, "name", str(value)))
def test_products_are_those_of_float64_whatever_the_shape(kind: Kind, inputs: int) -> None:
    x = numbers(max(ROWS), inputs)
    for outputs in OUTPUTS:
        packed, stored = kind.pack(numbers(outputs, inputs))
        whole = linear(x, packed, widen=kind.widen)
        assert_near(whole, *product(kind, x, stored))
        for rows in ROWS:
            assert torch.equal(linear(x[:rows], packed, widen=kind.widen), whole[:rows])


@pytest.mark.parametrize("inputs", [1, 3, 63, 64, 96, 768])
def test_eight_bits_are_exact_integers_beside_the_largest_numbers(inputs: int) -> None:
    x, weight = numbers(49, inputs), quantize(numbers(65, inputs), 8)
    integers, scales, outliers = rounded(x)
    expected = (integers @ weight.values.long().T).float() * (weight.scales * scales)
    whole = weight.dequantize()
    for row, kept in zip(expected, outliers, strict=True):
        for k in sorted(kept.nonzero()[:, 0].tolist(), key=lambda k: -abs(float(kept[k]))):
            row += kept[k] * whole[:, k]
    assert_near(linear(x, pack(weight)), expected, expected.abs() + outliers.abs() @ whole.abs().T, 3e-7)


@EACH_KIND
def test_what_rounding_costs_stays_within_half_a_step(kind: Kind) -> None:
    """Against float64 weights and rows as they were: half a step of each, and in four bits what their weights lost."""
    x, weight = numbers(33, 192), numbers(65, 192)
    packed, stored = kind.pack(weight)
    lost = x.abs().double() @ (stored - weight).abs().T
    if kind.rounds:
        rest = x - rounded(x)[2]
        lost += rest.abs().amax(1, keepdim=True).double() / 254 * stored.abs().sum(1)
    if kind.bits == 8:
        half_steps = weight.abs().amax(1).double() / 254
        assert ((stored - weight).abs() <= half_steps[:, None] * 1.0001).all()
    expected = x.double() @ weight.double().T
    magnitude = x.abs().double() @ stored.abs().T
    assert ((linear(x, packed, widen=kind.widen) - expected).abs() <= lost + TOLERANCE * magnitude).all()


@EACH_KIND
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bias_activation_and_residual(kind: Kind, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, bias, residual = numbers(17, 128), numbers(130), numbers(17, 130)
    packed, stored = kind.pack(numbers(130, 128))
    sums, magnitude = product(kind, x, stored)
    expected = ACTIVATIONS[activation](sums + bias) + residual
    poison(monkeypatch)
    actual = packed_linear(x, packed, bias, activation=activation, residual=residual, widen=kind.widen)
    assert_near(actual, expected, magnitude + bias.abs() + residual.abs())
    plain = packed_linear(x, packed, activation=activation, widen=kind.widen)
    assert_near(plain, ACTIVATIONS[activation](sums), magnitude)
    given = {"bias": bias, "activation": activation, "widen": kind.widen}
    assert torch.equal(linear(x, packed, residual=residual, out=residual, **given), actual)


@EACH_KIND
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_new", "silu"])
@pytest.mark.parametrize("width", [32, 40, 88, 96])
def test_gated_layers(kind: Kind, activation: str, width: int) -> None:
    order = gated_order(width)
    x, bias = numbers(13, 64), numbers(2 * width)
    ordered = torch.where(order >= 0, bias[order.clamp(min=0)], 0.0)
    residual = numbers(13, len(order) // 2)
    weight = numbers(2 * width, 64)
    packed, _ = kind.pack(weight, order)
    sums, magnitude = product(kind, x, exact(kind.store(weight)))
    gates, factors = (sums + bias).split(width, dim=1)
    activated = ACTIVATIONS[activation](gates)
    out = linear(x, packed, bias=ordered, activation=activation, gated=True, residual=residual, widen=kind.widen)
    first, second = (magnitude + bias.abs()).split(width, dim=1)
    scale = first * (factors.abs() + second) + residual[:, :width].abs()
    assert_near(out[:, :width], activated * factors + residual[:, :width], scale, 2e-6)
    assert torch.equal(out[:, width:], residual[:, width:])


@EACH_KIND
def test_an_order_with_rows_of_zeros(kind: Kind) -> None:
    order = torch.tensor([3, -1, 0, 3, -1, *range(64, 0, -1), -1])
    weight, x = numbers(66, 64), numbers(5, 64)
    packed, stored = kind.pack(weight, order)
    assert (packed.outputs, packed.inputs) == (len(order), 64)
    out = linear(x, packed, widen=kind.widen)
    assert_near(out, *product(kind, x, stored))
    assert not out[:, order < 0].any()
    plain = linear(x, kind.pack(weight)[0], widen=kind.widen)
    assert torch.equal(out[:, order >= 0], plain[:, order[order >= 0]])


@pytest.mark.parametrize(
    ("kind", "inputs"), fitting((3, 64, 192)), ids=lambda value: getattr(value, "name", str(value))
)
def test_rows_read_back_are_what_is_stored(kind: Kind, inputs: int) -> None:
    weight = numbers(70, inputs)
    weight[3] *= 1e-6  # subnormal in float16
    weight[4] = 0
    packed, stored = kind.pack(weight)
    ids = torch.tensor([69, 0, 3, 4, 63, 64, 3])
    np.testing.assert_allclose(packed.rows(ids.numpy()), stored[ids], rtol=2e-7, atol=1e-7 if kind.bits == 4 else 0)
    if kind.dtype is not None:
        assert torch.equal(torch.from_numpy(packed.rows(ids.numpy())), stored[ids].float())
    with pytest.raises(ValueError, match="id 70 is not one of 70 outputs"):
        packed.rows(np.array([70]))


def test_halves_of_every_size_are_widened() -> None:
    """All of float16, subnormal and infinite numbers too, through the rows read back and through a product."""
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    weight = halves[halves.isfinite()][:, None]
    packed = pack(weight)
    assert torch.equal(torch.from_numpy(packed.rows(np.arange(len(weight)))), weight.float())
    assert torch.equal(linear(torch.ones(1, 1), packed), weight.float().T)
    infinite = pack(torch.tensor([[torch.inf], [-torch.inf], [torch.nan]]).half())
    out = linear(torch.ones(7, 1), infinite)
    assert torch.equal(out[:, :2], torch.tensor([[torch.inf, -torch.inf]]).expand(7, 2))
    assert out[:, 2].isnan().all()


@EACH_KIND
def test_strided_rows_and_output(kind: Kind) -> None:
    packed, _ = kind.pack(numbers(130, 64))
    wide, out = numbers(9, 100), torch.full((9, 200), torch.nan)
    x = wide[:, 20:84]
    expected = linear(x.contiguous(), packed, widen=kind.widen)
    assert linear(x, packed, out=out[:, 7:137], widen=kind.widen) is not None
    assert torch.equal(out[:, 7:137], expected)
    assert out[:, :7].isnan().all() and out[:, 137:].isnan().all()
    every_other = numbers(18, 64)[::2]
    assert torch.equal(linear(every_other, packed), linear(every_other.contiguous(), packed))


@EACH_KIND
def test_rows_of_zeros_and_of_tiny_and_huge_numbers(kind: Kind) -> None:
    packed, stored = kind.pack(numbers(65, 64) * 0.01)
    x = numbers(40, 64)
    scales = torch.ones(40, 1)
    scales[[3, 17, 20, 30, 31]] = torch.tensor([0.0, 1e30, 1e-30, 1e-37, 1e-42])[:, None]
    x = x * scales
    out = linear(x, packed, widen=kind.widen)
    assert not out[3].any()
    normal = x[:30]
    assert_near(out[:30], *product(kind, normal, stored))
    # Too small for a scale: they are zeros in eight bits, which is as near as it matters.
    assert_near(out[30:32], torch.zeros(2, 65), 1e-35, 1.0)
    assert torch.equal(out[32:], linear(x[32:], packed, widen=kind.widen))


@EACH_KIND
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(kind: Kind, value: float) -> None:
    packed, _ = kind.pack(numbers(65, 96 if kind.fits(96) else 64))
    x = numbers(40, packed.inputs)
    expected = linear(x, packed, widen=kind.widen)
    bad = [0, 7, 33]
    x[bad, [0, 31, 63]] = value
    out = linear(x, packed, widen=kind.widen)
    good = [i for i in range(40) if i not in bad]
    assert torch.equal(out[good], expected[good])
    assert not out[bad].isfinite().any()
    if kind.rounds or value != value:
        assert out[bad].isnan().all()
    for activation in ACTIVATIONS:
        activated = linear(x, packed, activation=activation, widen=kind.widen)
        assert activated[good].isfinite().all()
        assert activated[bad].isnan().all() or not (kind.rounds or value != value)


@EACH_KIND
@pytest.mark.parametrize("largest", [3.0, 1e4, 1e30])
def test_numbers_far_larger_than_the_rest_cost_the_rest_nothing(kind: Kind, largest: float) -> None:
    """One to four of them, and then those that occur twice, of which the second is rounded."""
    packed, stored = kind.pack(numbers(65, 64))
    x = numbers(20, 64).clamp(-2, 2)
    x[:, [5, 63]] = torch.tensor([largest, -1.5 * largest])
    x[7:, 31], x[9:, 0] = largest * 1.25, -largest * 1.125
    x[13:, 1:3] = largest * 1.0625
    assert_near(linear(x, packed, widen=kind.widen), *product(kind, x, stored))
    if kind.rounds:
        rest = rounded(x)[0].abs().amax(1) * rounded(x)[1][:, 0]
        assert (rest[:13] <= 2.001).all() and (rest[13:] >= largest).all()


@EACH_KIND
def test_a_weight_of_zeros_gives_zeros(kind: Kind) -> None:
    weight = numbers(65, 64)
    weight[[0, 64]] = 0
    out = linear(numbers(33, 64), kind.pack(weight)[0], widen=kind.widen)
    assert not out[:, [0, 64]].any()
    assert out[:, 1:64].any(0).all()


@EACH_KIND
def test_nothing_to_do(kind: Kind) -> None:
    packed, _ = kind.pack(numbers(65, 64))
    assert packed_linear(torch.empty(0, 64), packed, widen=kind.widen).shape == (0, 65)
    none, _ = kind.pack(numbers(5, 64), torch.empty(0, dtype=torch.int64))
    assert linear(numbers(3, 64), none, widen=kind.widen).shape == (3, 0)


def check_bits(kind: Kind, inputs: int, all_rows: bool) -> Tensor:
    """A row has the same bits in any batch, on any number of threads; returns them."""
    packed, stored = kind.pack(numbers(130, inputs))
    x = numbers(100, inputs)
    given: dict[str, Any] = {"bias": numbers(130), "activation": "relu", "widen": kind.widen}
    whole = linear(x, packed, **given)
    sums, magnitude = product(kind, x, stored)
    assert_near(whole, (sums + given["bias"]).relu(), magnitude + given["bias"].abs())
    for rows in range(1, 101) if all_rows else (1, 2, 3, 4, 5, 6, 7, 16, 17, 32, 33, 47, 64, 97):
        first = (rows * 7) % (101 - rows)
        assert torch.equal(linear(x[first : first + rows], packed, **given), whole[first : first + rows])
    for threads in (2, 3):
        assert torch.equal(linear(x, packed, threads=threads, **given), whole)
        assert torch.equal(linear(x[:2], packed, threads=threads, **given), whole[:2])
    return whole


@EACH_KIND
@pytest.mark.parametrize("inputs", [64, 192])
def test_a_rows_bits_depend_on_nothing_but_the_row(kind: Kind, inputs: int) -> None:
    check_bits(kind, inputs, all_rows=True)


def test_rows_beyond_a_block_have_the_same_bits() -> None:
    """So many rows, and so wide, that they are worked on block by block."""
    x = numbers(420, 3072)
    for kind in KINDS:
        packed, _ = kind.pack(numbers(70, 3072))
        whole = linear(x, packed, widen=kind.widen, threads=2)
        for rows in (slice(0, 1), slice(95, 97), slice(200, 210), slice(419, 420)):
            assert torch.equal(linear(x[rows], packed, widen=kind.widen), whole[rows])


def digests() -> dict[str, str]:
    """Of the bits of every quantised kind, all of them checked on the way."""
    found = {}
    for kind in KINDS:
        bits = check_bits(kind, 192, all_rows=False)
        found[kind.name] = hashlib.sha256(bits.numpy().tobytes()).hexdigest()
    return {kind.name: found[kind.name] for kind in KINDS if kind.rounds}


CHECK_PATH = """
import json
from tests.kernels import test_packed_linear as tests
from tests.kernels.packed_weights import KINDS
print(json.dumps(tests.digests()))
for kind in KINDS:
    tests.test_products_are_those_of_float64_whatever_the_shape(kind, 768)
    tests.test_rows_of_zeros_and_of_tiny_and_huge_numbers(kind)
    tests.test_what_is_not_finite_stays_in_its_row(kind, float("nan"))
    tests.test_strided_rows_and_output(kind)
    for activation in ("gelu", "silu"):
        tests.test_gated_layers(kind, activation, 40)
for inputs in (3, 64, 96):
    tests.test_eight_bits_are_exact_integers_beside_the_largest_numbers(inputs)
tests.test_halves_of_every_size_are_widened()
tests.test_the_widest_rows_are_summed_exactly()
"""


@pytest.mark.parametrize("path", CPU_PATHS)
def test_each_cpu_path(path: str, run_on_path: RunOnPath) -> None:
    """The paths agree bit for bit where products and sums are fused."""
    theirs = json.loads(run_on_path(CHECK_PATH, path))
    fused = "generic" not in (path, _C.cpu_path)
    ours = digests()
    assert theirs.keys() == ours.keys()
    assert not fused or theirs == ours


def test_the_widest_rows_are_summed_exactly() -> None:
    """As many inputs as thirty-two bits hold, all at their ends."""
    inputs = 66311
    signs = torch.ones(3, inputs)
    signs[2, ::2] = -1
    values = torch.stack((torch.full((inputs,), -128), torch.full((inputs,), 127), torch.arange(inputs) % 256 - 128))
    weight = QuantizedWeight(values.to(torch.int8), torch.ones(3))
    packed = pack(weight)
    expected = (signs.double() * 127) @ values.double().T
    for x in (signs, -signs):
        sign = 1 if x is signs else -1
        assert_near(linear(x, packed) * 127, expected * sign, expected.abs())
        assert_near(linear(x.repeat(3, 1), packed)[:3] * 127, expected * sign, expected.abs())
    too_wide = QuantizedWeight(torch.zeros(1, inputs + 1, dtype=torch.int8), torch.ones(1))
    with pytest.raises(ValueError, match="int8 weights have at most 66311 inputs, got 66312"):
        pack(too_wide)


def misaligned(*shape: int) -> np.ndarray:
    size = int(np.prod(shape)) * 4
    return np.zeros(size + 1, np.uint8)[1:].view(np.float32).reshape(shape)


X, OUT = np.zeros((2, 64), np.float32), np.zeros((2, 65), np.float32)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x": X.astype(np.float64)}, "x must be float32 rows of 64"),
        ({"x": X.view(np.int32)}, "x must be float32 rows of 64"),
        ({"x": X.astype(">f4")}, "x must be float32 rows of 64"),
        ({"x": X[:, :63]}, "x must be float32 rows of 64"),
        ({"x": X[0]}, "x must be float32 rows of 64"),
        ({"x": X[None]}, "x must be float32 rows of 64"),
        ({"x": np.asfortranarray(X)}, "contiguous and apart"),
        ({"x": np.broadcast_to(X[:1], (2, 64))}, "contiguous and apart"),
        ({"x": X[::-1]}, "contiguous and apart"),
        ({"x": misaligned(2, 64)}, "x must .* off the boundaries of its type"),
        ({"out": misaligned(2, 65)}, "out must .* off the boundaries of its type"),
        ({"out": np.zeros((3, 65), np.float32)}, "out must be writeable, with x's number of rows"),
        ({"out": np.zeros((2, 64), np.float32)}, "out must be float32 rows of 65"),
        ({"out": np.broadcast_to(OUT[:1], (2, 65))}, "out must"),
        ({"bias": np.zeros(64, np.float32)}, "bias must be contiguous float32 of 65"),
        ({"bias": np.zeros(130, np.float32)[::2]}, "bias must be contiguous"),
        ({"bias": np.zeros(65)}, "bias must be contiguous float32"),
        ({"bias": misaligned(65)}, "bias must"),
        ({"residual": np.zeros((2, 64), np.float32)}, "residual must be float32 rows of 65"),
        ({"residual": np.zeros((3, 65), np.float32)}, "residual must be of out's shape"),
        ({"activation": "tanh"}, "activation must be none, relu, gelu, gelu_new or silu, got tanh"),
        ({"gated": True}, "a gated layer needs a multiple of 64 outputs, got 65"),
        ({"threads": 0}, "num_threads must be between 1 and 1024, got 0"),
        ({"threads": 10**8}, "num_threads must be between 1 and 1024"),
    ],
)
@pytest.mark.parametrize("kind", [KINDS[0], INT8], ids=lambda kind: kind.name)
def test_what_a_layer_refuses(kind: Kind, changes: dict[str, Any], said: str) -> None:
    packed, _ = kind.pack(numbers(65, 64))
    given = {"x": X, "bias": None, "activation": "none", "gated": False, "residual": None, "out": OUT, "threads": 1}
    x, bias, activation, gated, residual, out, threads = (given | changes).values()
    with pytest.raises(ValueError, match=said):
        _C.linear(x, packed, bias, activation, gated, residual, False, out, threads)


def test_a_layer_does_not_write_where_it_reads() -> None:
    packed, _ = KINDS[0].pack(numbers(64, 64))
    memory = np.zeros((8, 64), np.float32)
    for x, out, residual in (
        (memory[:4], memory[3:7], None),
        (memory[:4], memory[:4], None),
        (memory[:4:2], memory[4:6], memory[5:7]),
        (memory[:2], memory[2:6:2], memory[2:4]),
    ):
        with pytest.raises(ValueError, match="out must not overlap"):
            _C.linear(x, packed, None, "none", False, residual, False, out, 1)
    read_only = np.zeros((4, 64), np.float32)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="out must be writeable"):
        _C.linear(memory[:4], packed, None, "none", False, None, False, read_only, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.zeros(2, 64).double(), None), "x must be float32 on the CPU, got torch.float64"),
        ((torch.zeros(2, 64).bfloat16(), None), "x must be float32 on the CPU, got torch.bfloat16"),
        ((torch.zeros(2, 64, device="meta"), None), "x must be float32 on the CPU"),
        ((torch.zeros(64), None), "x must be float32 rows"),
        ((torch.tensor(1.0), None), "x must be float32 rows"),
        ((torch.zeros(2, 64), torch.zeros(65).half()), "bias must be float32 on the CPU"),
    ],
)
def test_tensors_that_are_refused(arguments: tuple[Tensor, Tensor | None], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        packed_linear(arguments[0], pack(numbers(65, 64)), arguments[1])


HALVES = np.zeros((4, 2), np.uint16)
BYTES = np.zeros((4, 32), np.uint8)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: pack(torch.zeros(4, 64).double()), "packed from float32, bfloat16 or float16, not torch.float64"),
        (lambda: pack(torch.zeros(64)), "values must be a matrix"),
        (lambda: pack(torch.zeros(4, 0)), "rows that are not empty"),
        (lambda: pack(torch.zeros(4, 64), order=torch.tensor([4])), "order names row 4 of 4"),
        (lambda: pack(torch.zeros(4, 64), order=torch.tensor([-2])), "order names row -2 of 4"),
        (lambda: pack(torch.zeros(4, 64), order=torch.tensor([1]).int()), "order must be contiguous int64"),
        (lambda: _C.PackedWeight.from_floats(misaligned(4, 64), False, None, 1), "values must"),
        (lambda: _C.PackedWeight.from_floats(X, False, None, 0), "num_threads"),
        (lambda: _C.PackedWeight.from_int8(X, X[0], None, 1), "values must be a matrix of int8"),
        (lambda: _C.PackedWeight.from_int8(X.astype(np.int8), X[0], None, 1), "scales must be contiguous float32 of 2"),
        (lambda: _C.PackedWeight.from_int4(BYTES, HALVES[:, :0], None, None, 1), "not empty"),
        (lambda: _C.PackedWeight.from_int4(BYTES[:, :24], HALVES, None, None, 1), "one for each 32 or 64 of 48"),
        (lambda: _C.PackedWeight.from_int4(BYTES, HALVES[:3], None, None, 1), "scales must be contiguous"),
        (lambda: _C.PackedWeight.from_int4(BYTES, HALVES, HALVES[:3], None, 1), "minimums must be contiguous"),
        (lambda: _C.PackedWeight.from_int4(BYTES, HALVES.view(np.float16), None, None, 1), "float16, as uint16"),
    ],
)
def test_what_is_not_packed(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_a_weight_of_one_input_may_lie_in_any_order() -> None:
    column = numbers(1, 70).T
    assert torch.equal(linear(torch.ones(2, 1), pack(column)), column.T.expand(2, 70))
