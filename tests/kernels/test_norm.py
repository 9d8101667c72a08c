"""RMSNorm and LayerNorm: the kernels against torch in float64, and what stays torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.backend import TRITON_DEVICE
from kernels.norm import layer_norm, rms_norm
from tests.kernels import operators
from tests.kernels.conftest import DEVICE, poison
from tests.kernels.operators import COMPILERS, DTYPES, outputs_and_gradients, randn

EPS = 1e-5
KINDS = ("rms", "layer", "layer without bias")
SHAPES = [(1, 1), (63, 24), (111, 100), (1000, 7), (3, 5, 777), (33, 300)]
needs_triton = pytest.mark.skipif(TRITON_DEVICE != DEVICE, reason="Triton does not run here")


def norm(kind: str, backend: str | None = None) -> Callable[..., Any]:
    """A norm as a function of (x, weight[, bias][, residual])."""
    if kind == "rms":
        return lambda x, weight, residual=None: rms_norm(x, weight, EPS, residual=residual, backend=backend)
    if kind == "layer":
        return lambda x, weight, bias, residual=None: layer_norm(
            x, weight, bias, EPS, residual=residual, backend=backend
        )
    return lambda x, weight, residual=None: layer_norm(x, weight, None, EPS, residual=residual, backend=backend)


def case(
    kind: str, shape: tuple[int, ...], residual: bool = False, dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 3
) -> list[Tensor]:
    """Inputs of ``norm``; the dtypes are those of x, residual and the parameters."""
    x_dtype, residual_dtype, parameter_dtype = dtypes
    inputs = [randn(*shape, dtype=x_dtype), randn(shape[-1], dtype=parameter_dtype, seed=1)]
    if kind == "layer":
        inputs.append(randn(shape[-1], dtype=parameter_dtype, seed=2))
    return [*inputs, randn(*shape, dtype=residual_dtype, seed=3)] if residual else inputs


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_is_as_exact_as_torch(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch)
    inputs = case(kind, shape, residual=shape[0] != 63, dtypes=(dtype,) * 3)
    operators.assert_as_exact_as_torch(norm(kind, "triton"), norm(kind, "torch"), inputs)


MIXED = [
    (torch.float32, torch.float32, torch.float16),
    (torch.float32, torch.float16, torch.float16),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
]


@needs_triton
@pytest.mark.parametrize("dtypes", MIXED, ids=str)
@pytest.mark.parametrize("width", [24, 300])
def test_mixed_dtypes_leave_in_the_weights(width: int, dtypes: tuple[torch.dtype, ...]) -> None:
    inputs = case("rms", (37, width), residual=True, dtypes=dtypes)
    out, total = norm("rms", "triton")(*inputs)
    assert (out.dtype, total.dtype) == (dtypes[2], torch.float32)
    operators.assert_as_exact_as_torch(norm("rms", "triton"), norm("rms", "torch"), inputs)
    out, total = norm("layer", "triton")(*case("layer", (5, width), residual=True, dtypes=dtypes))
    assert (out.dtype, total.dtype) == (dtypes[2], torch.float32)


@needs_triton
@pytest.mark.parametrize("dtypes", [(dtype,) * 3 for dtype in DTYPES] + MIXED, ids=str)
@pytest.mark.parametrize("width", [24, 300])
def test_a_third_term_is_one_addition_more(width: int, dtypes: tuple[torch.dtype, ...]) -> None:
    x, weight, residual = case("rms", (37, width), residual=True, dtypes=dtypes)
    other = randn(37, width, dtype=dtypes[0], seed=4)
    for name in ("triton", "torch", "reference"):

        def fused(x: Tensor, weight: Tensor, residual: Tensor, other: Tensor, name: str = name) -> Any:
            return rms_norm(x, weight, EPS, residual=residual, other=other, backend=name)

        def apart(x: Tensor, weight: Tensor, residual: Tensor, other: Tensor, name: str = name) -> Any:
            return rms_norm(x + other, weight, EPS, residual=residual, backend=name)

        inputs = [x, weight, residual, other]
        results = [outputs_and_gradients(f, inputs) for f in (fused, apart)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_third_term_goes_with_a_residual() -> None:
    x, weight = case("rms", (5, 24))
    _, total = rms_norm(x, weight, EPS, residual=x, other=x.half())
    assert torch.equal(total, x + x.half() + x)
    for other in (x, x[:3]):
        with pytest.raises(ValueError, match="other must have x's shape"):
            layer_norm(x, weight, None, EPS, residual=None if other is x else x, other=other)  # type: ignore[call-overload]


@needs_triton
@pytest.mark.parametrize("width", [40, 600])
def test_a_mean_far_from_zero_costs_the_variance_nothing(width: int) -> None:
    x, weight, bias = case("layer", (9, width))
    x = (x.detach() + 1000).requires_grad_()
    operators.assert_as_exact_as_torch(norm("layer", "triton"), norm("layer", "torch"), [x, weight, bias])


@needs_triton
@pytest.mark.parametrize("which", [0, 1])
def test_either_result_may_go_nowhere(which: int) -> None:
    inputs = case("layer", (21, 48), residual=True)
    needed = [inputs[0], inputs[3], inputs[1]]
    grads = [
        torch.autograd.grad(
            norm("layer", name)(*inputs)[which].sin().sum(), needed, allow_unused=True, materialize_grads=True
        )
        for name in ("triton", "torch")
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@needs_triton
def test_inputs_without_gradient_get_none() -> None:
    x, weight, bias, residual = case("layer", (6, 33), residual=True)
    with torch.no_grad():
        assert not norm("layer", "triton")(x, weight, bias, residual)[0].requires_grad
    frozen = [t.detach() for t in (weight, bias)]
    results = [outputs_and_gradients(norm("layer", name), [x, *frozen, residual]) for name in ("triton", "torch")]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    results = [outputs_and_gradients(norm("layer", name), [x.detach(), weight, bias]) for name in ("triton", "torch")]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 5)], ids=str)
def test_nothing_to_norm(shape: tuple[int, ...]) -> None:
    results = [outputs_and_gradients(norm("layer", name), case("layer", shape, True)) for name in ("triton", "torch")]
    torch.testing.assert_close(*results)


@needs_triton
@pytest.mark.parametrize("width", [60, 500])
def test_views_and_strided_gradients(width: int) -> None:
    x, weight, bias, residual = case("layer", (4, 6, width), residual=True)
    views = [x.transpose(0, 1), weight, bias, residual[:1].expand(4, 6, width).transpose(0, 1)]
    results = [outputs_and_gradients(norm("layer", name), views) for name in ("triton", "torch")]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    operators.assert_strided_gradients_fit(norm("layer", "triton"), [x, weight, bias, residual])


@needs_triton
@pytest.mark.parametrize("width", [60, 500])
def test_the_same_bits_every_time(width: int) -> None:
    inputs = case("layer", (300, width), residual=True)
    first, second = (outputs_and_gradients(norm("layer", "triton"), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_triton
@pytest.mark.parametrize("width", [60, 500])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_how_many_there_are(kind: str, width: int) -> None:
    x, *parameters, residual = (t.detach() for t in case(kind, (1000, width), residual=True))
    many = norm(kind, "triton")(x, *parameters, residual)
    few = norm(kind, "triton")(x[:3], *parameters, residual[:3])
    assert all(torch.equal(a[:3], b) for a, b in zip(many, few, strict=True))


@needs_triton
def test_autocast_leaves_the_dtypes_alone() -> None:
    inputs = case("layer", (5, 16), residual=True, dtypes=(torch.bfloat16, torch.float32, torch.float32))
    plain = outputs_and_gradients(norm("layer", "triton"), inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = outputs_and_gradients(norm("layer", "triton"), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@needs_triton
@pytest.mark.filterwarnings("ignore")  # torch.compile's own
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiles_whole(compiler: str, residual: bool) -> None:
    kind = "layer" if residual else "rms"
    operators.assert_compiles(norm(kind, "triton"), case(kind, (6, 40), residual), compiler)


@needs_triton
def test_exports() -> None:
    operators.assert_exports(norm("layer", "triton"), case("layer", (6, 40), residual=True))


@needs_triton
def test_torchs_own_checks_of_an_operator() -> None:
    x, weight, bias, residual = (t.detach() for t in case("layer", (6, 40), residual=True))
    forward, backward = torch.ops.tandem.norm.default, torch.ops.tandem.norm_backward.default
    for given in ((residual, weight, bias, EPS, True), (None, weight, None, EPS, False)):
        torch.library.opcheck(forward, (x, *given))
        torch.library.opcheck(forward, (x, *given, x if given[0] is not None else None))
        _, total, statistics = forward(x, *given)
        kept, narrow = (total, torch.float16) if given[0] is not None else (x, None)
        for grad_total in (None, residual):
            torch.library.opcheck(backward, (x, grad_total, kept, weight, statistics, given[2] is not None, narrow))


@needs_triton
@pytest.mark.parametrize("residual", [False, True])
def test_a_second_gradient_is_refused(residual: bool) -> None:
    operators.assert_no_second_gradient(norm("rms", "triton"), case("rms", (6, 40), residual))


@needs_triton
def test_shapes_that_do_not_fit_are_refused() -> None:
    x, weight, bias, residual = case("layer", (6, 40), residual=True)
    with pytest.raises(ValueError, match=r"must be \(40,\), got \[\(39,\)\]"):
        rms_norm(x, weight[1:], EPS, backend="triton")
    with pytest.raises(ValueError, match=r"must be \(40,\)"):
        layer_norm(x, weight, bias[1:], EPS, backend="triton")
    with pytest.raises(ValueError, match=r"residual must have x's shape \(6, 40\), got \(3, 40\)"):
        layer_norm(x, weight, bias, EPS, residual=residual[:3], backend="triton")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_the_reference_is_the_formula(kind: str, dtype: torch.dtype) -> None:
    inputs = case(kind, (7, 33), residual=True, dtypes=(dtype,) * 3)
    results = [outputs_and_gradients(norm(kind, name), inputs) for name in ("reference", "torch")]
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(dtype, 1e-5)
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def test_on_a_cpu_it_is_torchs() -> None:
    x, weight, bias = (t.detach().cpu() for t in case("layer", (5, 24)))
    assert torch.equal(layer_norm(x, weight, bias, EPS), F.layer_norm(x, (24,), weight, bias, EPS))
    assert torch.equal(rms_norm(x, weight, EPS), F.rms_norm(x, (24,), weight, EPS))
    out, total = rms_norm(x, weight, EPS, residual=x)
    assert torch.equal(total, x + x)
    assert torch.equal(out, F.rms_norm(x + x, (24,), weight, EPS))
    narrow = rms_norm(x, weight.half(), EPS)
    assert torch.equal(narrow, F.rms_norm(x, (24,), weight.half().float(), EPS).half())


def test_there_is_no_norm_in_cpp() -> None:
    x, weight, _ = case("layer", (5, 24))
    with pytest.raises(ValueError, match="rms_norm has no native backend here"):
        rms_norm(x, weight, EPS, backend="native")


@needs_triton
def test_float64_is_torchs() -> None:
    x, weight = case("rms", (5, 24), dtypes=(torch.float64,) * 3)
    with pytest.raises(ValueError, match="rms_norm has no triton backend here"):
        rms_norm(x, weight, EPS, backend="triton")
