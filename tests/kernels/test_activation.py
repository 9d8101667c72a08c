"""gelu in both forms against torch in float64: values, slopes, shapes and CPU paths."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.activation import gelu, gelu_new
from tests.kernels.conftest import RunOnPath

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
