"""The linear layer and its gradients against torch in float64, and the transpose that its weight gradient uses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.linear import linear
from kernels.native_elementwise import transpose

# rows, in_features, out_features: the last three are wide enough for the transposed weight gradient
SHAPES = [(1, 1, 1), (1, 64, 48), (63, 33, 17), (111, 80, 80), (1, 64, 16), (63, 133, 5), (300, 260, 65)]


def results(shape: tuple[int, int, int], dtype: torch.dtype, bias: bool) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    rows, k, n = shape
    x, weight, b, grad = (torch.randn(s).to(dtype) for s in ((rows, k), (n, k), (n,), (rows, n)))
    inputs = [x, weight, b] if bias else [x, weight]
    out = linear(*(t.requires_grad_() for t in inputs))
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_torch_in_float64(shape: tuple[int, int, int], bias: bool) -> None:
    for actual, truth in zip(results(shape, torch.float32, bias), results(shape, torch.float64, bias), strict=True):
        assert actual.is_contiguous()
        torch.testing.assert_close(actual.double(), truth, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("k", [16, 80], ids=["narrow", "wide"])
def test_layouts(k: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(9, k, requires_grad=True), torch.randn(9, requires_grad=True)
    for x in (torch.randn(3, 5, k), torch.randn(3, 5, 2 * k)[..., 1 : k + 1], torch.randn(3, k, 5).transpose(1, 2)):
        for grad in (torch.randn(3, 5, 9), torch.randn(3, 5, 12)[..., 2:11], torch.randn(1).expand(3, 5, 9)):
            wanted = torch.autograd.grad(F.linear(x, weight, bias), (weight, bias), grad)
            ours = torch.autograd.grad(linear(x, weight, bias), (weight, bias), grad)
            for actual, expected in zip(ours, wanted, strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_one_gradient_without_the_others() -> None:
    x, weight, bias = torch.randn(6, 64), torch.randn(8, 64), torch.randn(8)
    for wanted in (x, weight, bias):
        wanted.requires_grad_()
        ours, theirs = (torch.autograd.grad(f(x, weight, bias).sum(), wanted)[0] for f in (linear, F.linear))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        wanted.requires_grad_(False)


@pytest.mark.parametrize(
    "shape", [(0, 0), (0, 5), (5, 0), (1, 1), (1, 70), (70, 1), (16, 64), (33, 129), (111, 63)], ids=str
)
def test_transpose_and_column_sums(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    inner = torch.randn(shape[0], shape[1] + 3)[:, 2 : 2 + shape[1]]
    for matrix in (x, inner, x.t().contiguous().t(), x[:, :1].expand(shape)):
        sums = torch.full(shape[1:], torch.nan)
        assert torch.equal(transpose(matrix, sums), matrix.t())
        torch.testing.assert_close(sums, matrix.double().sum(0).float(), rtol=1e-6, atol=5e-6)
        assert torch.equal(transpose(matrix), matrix.t())


def test_threads_do_not_change_the_sums() -> None:
    x, threads = torch.randn(1000, 300), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.empty(300))
            transpose(x, results[-1])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])
