"""gelu in both forms and gated activations against torch in float64: values, slopes, shapes, backends and CPU paths."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.activation import gelu, gelu_new, glu
from kernels.backend import TRITON_DEVICE
from tests.kernels import operators
from tests.kernels.conftest import DEVICE, RunOnPath, poison
from tests.kernels.operators import COMPILERS, DTYPES, outputs_and_gradients, randn

needs_triton = pytest.mark.skipif(TRITON_DEVICE != DEVICE, reason="Triton does not run here")
GATES = pytest.mark.parametrize("gate", ["relu", "silu", "gelu", "gelu_new"])
OURS = {"none": gelu, "tanh": gelu_new}
FORMS = list(OURS)


def with_slope(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = function(x)
    return out.detach(), torch.autograd.grad(out.sum(), x)[0]


def of_torch(form: str) -> Callable[[Tensor], Tensor]:
    return lambda x: F.gelu(x, approximate=form)


@pytest.mark.parametrize("form", FORMS)
def test_matches_torch_in_float64(form: str) -> None:
    x = torch.cat((torch.linspace(-12, 12, 20_001), torch.linspace(-0.01, 0.01, 2_001)))
    out, slope = with_slope(OURS[form], x)
    truth, true_slope = with_slope(of_torch(form), x.double())
    torch.testing.assert_close(out.double(), truth, rtol=2e-7, atol=5e-7)
    torch.testing.assert_close(slope.double(), true_slope, rtol=2e-7, atol=5e-7)


def test_the_exact_form_is_right_to_the_last_digits_where_it_is_small() -> None:
    x = torch.linspace(-6, -1, 5_001)
    torch.testing.assert_close(gelu(x).double(), F.gelu(x.double()), rtol=2e-6, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 5), (17,), (2, 3, 37), (1, 16_385), (3, 20_011)], ids=str)
def test_shapes(form: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
    out, expected = OURS[form](x), of_torch(form)(x)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(y, x, grad) for y in (out, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_inputs_and_gradients_that_are_not_contiguous(form: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 66)[:, 1:34].t().requires_grad_()
    out, expected = OURS[form](x), of_torch(form)(x)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    for grad in (torch.randn(7, 33).t(), torch.randn(1).expand(33, 7)):
        actual, theirs = (torch.autograd.grad(y, x, grad, retain_graph=True)[0] for y in (out, expected))
        torch.testing.assert_close(actual, theirs, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_extremes(form: str) -> None:
    x = torch.tensor([0.0, -0.0, 1e30, -1e30, 1e-40, torch.inf, torch.nan])
    out, slope = with_slope(OURS[form], x)
    assert out[:4].tolist() == [0, 0, x[2].item(), 0]
    assert slope[:4].tolist() == [0.5, 0.5, 1, 0]
    assert out[5] == torch.inf
    assert out[6].isnan()
    assert slope[6].isnan()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_are_torchs(form: str, dtype: torch.dtype) -> None:
    x = torch.randn(5, 7).to(dtype)
    assert torch.equal(OURS[form](x), of_torch(form)(x))


def test_autocast_is_torchs() -> None:
    x = torch.randn(5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gelu(x), F.gelu(x))


@pytest.mark.parametrize("form", FORMS)
def test_threads_do_not_change_the_bits(form: str) -> None:
    x, threads = torch.randn(100_003), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.stack(with_slope(OURS[form], x)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


CHECK_PATH = """
from torch.nn import functional as F
from kernels.activation import gelu, gelu_new
x = torch.linspace(-10, 10, 4099, requires_grad=True)
exact = x.detach().double().requires_grad_()
for ours, form in ((gelu, "none"), (gelu_new, "tanh")):
    out, truth = ours(x), F.gelu(exact, approximate=form)
    torch.testing.assert_close(out.double(), truth, rtol=3e-7, atol=5e-7)
    slope, true_slope = (torch.autograd.grad(y.sum(), z)[0] for y, z in ((out, x), (truth, exact)))
    torch.testing.assert_close(slope.double(), true_slope, rtol=3e-7, atol=5e-7)
    assert ours(torch.tensor([torch.nan] * 3)).isnan().all()
"""


@pytest.mark.parametrize("path", ["generic", "avx2", "avx512"])
def test_each_cpu_path(path: str, run_on_path: RunOnPath) -> None:
    run_on_path(CHECK_PATH, path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_is_the_formula(form: str, dtype: torch.dtype) -> None:
    x = torch.randn(5, 7).to(dtype)
    expected = of_torch(form)(x)
    assert torch.equal(OURS[form](x, backend="torch"), expected)
    torch.testing.assert_close(
        OURS[form](x, backend="reference"), expected, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-6
    )


def gated(gate: str, backend: str | None = None) -> Callable[[Tensor], Tensor]:
    return lambda x: glu(x, gate, backend=backend)  # type: ignore[arg-type]


TORCHS = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh")}


@GATES
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_a_gate_comes_first_and_is_activated(gate: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 14).to(dtype)
    expected = TORCHS[gate](x[..., :7]) * x[..., 7:]
    assert torch.equal(glu(x, gate, backend="torch"), expected)
    for name in (None, "reference"):
        tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-6)
        torch.testing.assert_close(glu(x, gate, backend=name), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("gate", "form"), [("gelu", "none"), ("gelu_new", "tanh")])
def test_a_gelu_gate_on_a_cpu_is_gelu_in_cpp(gate: str, form: str) -> None:
    x = torch.randn(3, 14)
    assert torch.equal(glu(x, gate), OURS[form](x[:, :7]) * x[:, 7:])
    assert torch.equal(glu(x, gate, backend="native"), glu(x, gate))


@needs_triton
@GATES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (63, 48), (3, 37, 222), (1000, 14), (2, 2600)], ids=str)
def test_the_kernel_is_as_exact_as_torch(
    gate: str, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch)
    operators.assert_as_exact_as_torch(gated(gate, "triton"), gated(gate, "torch"), [randn(*shape, dtype=dtype)])


@needs_triton
@GATES
def test_extreme_gates(gate: str) -> None:
    gates = torch.tensor([0.0, -0.0, 1e30, -1e30, 1e-40, 30.0, -30.0, torch.nan], device=DEVICE)
    x = torch.cat((gates, torch.full_like(gates, 2))).requires_grad_()
    results = [outputs_and_gradients(gated(gate, name), [x]) for name in ("triton", "torch")]
    if gate == "gelu_new":  # torch's own slope is NaN far out
        results[1][1].nan_to_num_(0)
        results = [[out, grad.where(gates.abs().repeat(2) < 1e29, 0).nan_to_num(0)] for out, grad in results]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6, equal_nan=True)


@needs_triton
def test_the_slope_of_the_tanh_form_stays_finite_far_out() -> None:
    x = torch.tensor([[1e30, -1e30, 20.0, -20.0, 2.0, 2.0, 2.0, 2.0]], device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(glu(x, "gelu_new", backend="triton").sum(), x)
    assert grad[0, :4].tolist() == [2, 0, 2, 0]


@needs_triton
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 4), (3, 0)], ids=str)
def test_nothing_to_gate(shape: tuple[int, ...]) -> None:
    out, grad = outputs_and_gradients(gated("silu", "triton"), [randn(*shape)])
    assert out.shape == (*shape[:-1], shape[-1] // 2)
    assert grad.shape == shape


@needs_triton
def test_views_strided_gradients_and_a_second_one() -> None:
    view = randn(4, 3, 20)[:, :, 2:16].transpose(0, 1)
    results = [gated("gelu", name)(view) for name in ("triton", "torch")]
    torch.testing.assert_close(*results)
    operators.assert_strided_gradients_fit(gated("gelu", "triton"), [randn(4, 3, 14)])
    operators.assert_no_second_gradient(gated("silu", "triton"), [randn(4, 14)])


@needs_triton
def test_autocast_leaves_a_gates_dtype_alone() -> None:
    with torch.autocast(DEVICE, torch.bfloat16):
        assert glu(randn(4, 14), "silu", backend="triton").dtype == torch.float32
        assert glu(randn(4, 14, dtype=torch.float16), "silu", backend="triton").dtype == torch.float16


@needs_triton
@pytest.mark.filterwarnings("ignore")  # torch.compile's own
@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_gate_compiles_whole(compiler: str) -> None:
    operators.assert_compiles(gated("gelu_new", "triton"), [randn(4, 14)], compiler)


@needs_triton
def test_a_gate_exports_and_passes_torchs_own_checks() -> None:
    x = randn(4, 14).detach()
    operators.assert_exports(gated("silu", "triton"), [x])
    torch.library.opcheck(torch.ops.tandem.glu.default, (x, "silu"))
    torch.library.opcheck(torch.ops.tandem.glu_backward.default, (x[:, :7], x, "silu"))


def test_what_cannot_be_gated_is_refused() -> None:
    with pytest.raises(
        ValueError, match="unknown activation 'tanh' of a gate: choose one of relu, silu, gelu, gelu_new"
    ):
        glu(torch.randn(3, 4), "tanh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"need an even last dimension, got \(3, 5\)"):
        glu(torch.randn(3, 5), "silu")
    with pytest.raises(ValueError, match="glu has no native backend here"):
        glu(torch.randn(3, 4), "silu", backend="native")
    with pytest.raises(ValueError, match="gelu has no triton backend here"):
        gelu(torch.randn(3), backend="triton")
