"""The loss of a head without its logits: values, gradients, memory, options of the head, and torch's machinery."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.chunked_loss as chunks
from kernels.backend import TRITON_DEVICE
from kernels.chunked_loss import LossOptions, chunk_rows
from kernels.linear_cross_entropy import linear_cross_entropy
from tests.kernels.losses import COMPILERS, DEVICE, DTYPES, assert_follows_the_error_rule, poison, results

needs_triton = pytest.mark.skipif(TRITON_DEVICE is None, reason="needs triton")
TRITON = pytest.param("triton", marks=needs_triton)
CHUNKED = [TRITON, "torch"]
BACKENDS = [TRITON, "torch", "reference"]
HEADS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1, "z_loss": 1e-4},
    {"softcap": 5.0, "scale": 0.5},
    {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 5.0, "scale": 2.0},
]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 8 rows and fewer."""
    monkeypatch.setattr(chunks, "MIN_ROWS", 8)
    monkeypatch.setattr(chunks, "MAX_ROWS", 8)


def make(rows: int, dim: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """Hidden states, weight and bias; labels, every third of them ignored from the second on."""
    generator = torch.Generator().manual_seed(rows + vocab)
    shapes = (rows, dim), (vocab, dim), (vocab,)
    inputs = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[1::3] = -100
    return inputs, labels.to(DEVICE)


def loss_of(labels: Tensor, backend: str, **options: Any) -> Any:
    """A function of (hidden, weight, bias or nothing)."""

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, bias=bias, backend=backend, **options)

    return loss


def check(inputs: list[Tensor], labels: Tensor, backend: str, **options: Any) -> None:
    ours, theirs = (loss_of(labels, name, **options) for name in (backend, "reference"))
    # Half a unit in the last place of the dtype that products are rounded to: one number's error is a matter of luck.
    rounding = max(1e-6, torch.finfo(inputs[0].dtype).eps / 2)
    assert_follows_the_error_rule(ours, theirs, inputs, 0.37, rounding)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", CHUNKED)
@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "dim", "vocab", "bias"), [(1, 8, 1, True), (19, 16, 63, True), (11, 32, 1000, False)])
def test_chunks_follow_the_error_rule(
    rows: int, dim: int, vocab: int, bias: bool, dtype: torch.dtype, options: dict[str, Any], backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    inputs, labels = make(rows, dim, vocab, dtype)
    poison(monkeypatch)
    check(inputs[: 2 + bias], labels, backend, **options)


@pytest.mark.parametrize("backend", CHUNKED)
def test_a_large_vocabulary_follows_the_error_rule(backend: str) -> None:
    inputs, labels = make(3, 16, 32001, torch.bfloat16)
    check(inputs, labels, backend, label_smoothing=0.1)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_that_are_needed_come(backend: str) -> None:
    inputs, labels = make(19, 16, 63)
    everything = results(loss_of(labels, backend), inputs)
    for i in range(3):
        leaves = [x.clone().requires_grad_(j == i) for j, x in enumerate(inputs)]
        loss_of(labels, backend)(*leaves).backward()
        assert [x.grad is not None for x in leaves] == [j == i for j in range(3)]
        torch.testing.assert_close(leaves[i].grad.double(), everything[1 + i])  # type: ignore[union-attr]
    with torch.no_grad():
        torch.testing.assert_close(loss_of(labels, backend)(*leaves).double(), everything[0])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_cost_nothing_whatever_their_states(backend: str) -> None:
    inputs, labels = make(19, 16, 63)
    expected = results(loss_of(labels, backend), inputs[:1] + inputs[1:])
    assert (expected[1][labels == -100] == 0).all()
    inputs[0][1::3] = torch.inf
    loss, grad_hidden = results(lambda x: loss_of(labels, backend)(x, *inputs[1:]), inputs[:1])
    torch.testing.assert_close(loss, expected[0])
    if backend != "reference":  # whose head has a gradient of its own to take
        torch.testing.assert_close(grad_hidden, expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_but_ignored_rows_and_no_rows_at_all(backend: str) -> None:
    inputs, labels = make(4, 16, 63)
    for rows in (4, 0):
        chosen = [inputs[0][:rows], *inputs[1:]]
        for x in results(loss_of(labels[:rows].fill_(-100), backend), chosen):
            assert (x == 0).all()


@needs_triton
def test_a_label_outside_the_vocabulary_makes_the_kernels_loss_not_a_number() -> None:
    inputs, labels = make(4, 16, 63)
    labels[0] = 63
    loss, grad_hidden, *_ = results(loss_of(labels, "triton"), inputs)
    assert loss.isnan()
    assert grad_hidden[0].isnan().all()
    assert grad_hidden[1:].isfinite().all()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", CHUNKED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_products_are_narrow_and_gradients_keep_their_dtypes(dtype: torch.dtype, backend: str) -> None:
    inputs, labels = make(19, 16, 63)

    def autocast(name: str) -> Any:
        def loss(*inputs: Tensor) -> Tensor:
            with torch.autocast(DEVICE, dtype):
                return loss_of(labels, name, label_smoothing=0.1)(*inputs)

        return loss

    exact = results(loss_of(labels, "reference", label_smoothing=0.1), inputs)
    ours, theirs = (results(autocast(name), inputs) for name in (backend, "reference"))
    for actual, expected, truth in zip(ours, theirs, exact, strict=True):
        assert (actual - truth).abs().max() <= 2 * (expected - truth).abs().max() + 1e-6
        assert (actual - truth).abs().max() > 0
    with torch.autocast(DEVICE, dtype):  # a narrow logit is what differs from the exact loss above
        assert abs(loss_of(labels, backend)(*inputs) - loss_of(labels, "reference")(*inputs)) < 1e-2


def test_chunks_are_a_tenth_of_the_rows_in_whole_tiles() -> None:
    assert [chunk_rows(rows) for rows in (0, 1, 1000, 1024, 1025)] == [1, 1, 1000, 1024, 1024]
    assert [chunk_rows(rows) for rows in (10240, 16384, 32768, 10**6)] == [1024, 1664, 3328, 4096]
    assert all(chunk_rows(rows) < 0.15 * rows for rows in range(8192, 200_000, 77))


class Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation inside returned."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, Tensor):
                self.size = max(self.size, x.nbytes)
        return out


@pytest.mark.parametrize("backend", CHUNKED)
def test_no_tensor_is_as_large_as_the_logits(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vocab = 100, 320
    (hidden, weight, bias), labels = make(rows, 4, vocab)
    monkeypatch.setattr(chunks, "MIN_ROWS", 8)
    monkeypatch.setattr(chunks, "MAX_ROWS", rows // 10)
    options = LossOptions(0.1, 1e-4, 0.0, 1.0, -100)
    arguments = hidden, weight, bias, labels
    with Largest() as largest:  # inside the operator, which such a mode does not look into
        if backend == "triton":
            from kernels.gpu.linear_cross_entropy import launch

            launch(*arguments, *options, torch.float32, True, True, True)
        else:
            chunks.chunked_loss(*arguments, options, torch.float32, (True, True, True), chunks.loss_of_logits)
    assert largest.size == 4 * (rows // 10) * vocab


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_on_a_device_is_a_fraction_of_the_logits() -> None:
    rows, vocab = 16384, 50257
    (hidden, weight, _), labels = make(rows, 256, vocab, torch.bfloat16)
    hidden.requires_grad_()
    weight.requires_grad_()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(hidden, weight, labels, backend="triton").backward()
    gradients = 2 * 4 * weight.numel() + 2 * 4 * hidden.numel()  # in float32, and the narrow ones
    assert torch.cuda.max_memory_allocated() - before - gradients < 0.15 * 2 * rows * vocab


@pytest.mark.parametrize("backend", BACKENDS)
def test_mistakes_are_one_sentence(backend: str) -> None:
    (hidden, weight, bias), labels = make(4, 16, 63)
    with pytest.raises(ValueError, match=r"labels must be int64 of shape \(4,\), got torch.int64 of shape \(3,\)"):
        linear_cross_entropy(hidden, weight, labels[:3], backend=backend)
    with pytest.raises(ValueError, match=r"hidden must be .* got \(4, 16\), \(63, 15\)"):
        linear_cross_entropy(hidden, weight[:, 1:], labels, backend=backend)
    with pytest.raises(ValueError, match=r"bias \(vocab,\): got \(4, 16\), \(63, 16\), \(62,\)"):
        linear_cross_entropy(hidden, weight, labels, bias=bias[1:], backend=backend)


@needs_triton
def test_the_operator_is_what_torch_expects() -> None:
    from kernels.gpu.linear_cross_entropy import LINEAR_CROSS_ENTROPY

    (hidden, weight, bias), labels = make(5, 16, 63)
    for given, wanted in ((bias, (True, True, True)), (None, (False, False, False))):
        arguments = hidden, weight, given, labels, 0.1, 1e-4, 5.0, 2.0, -100, torch.float32, *wanted
        torch.library.opcheck(LINEAR_CROSS_ENTROPY, arguments)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.filterwarnings("ignore")  # torch.compile's own
@pytest.mark.parametrize(
    ("backend", "compiler"),
    [*(pytest.param("triton", name, marks=needs_triton) for name in COMPILERS), ("torch", "aot_eager")],
)
def test_it_compiles_in_one_graph(backend: str, compiler: str) -> None:
    inputs, labels = make(19, 16, 63)
    loss = loss_of(labels, backend, label_smoothing=0.1, z_loss=1e-4, softcap=5.0, scale=2.0)
    compiled = torch.compile(lambda *x: 2 * loss(1 * x[0], *x[1:]), fullgraph=True, backend=compiler)
    for actual, expected in zip(results(compiled, inputs), results(lambda *x: 2 * loss(*x), inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@needs_triton
def test_the_kernel_exports() -> None:
    class Module(torch.nn.Module):
        def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            return linear_cross_entropy(hidden, weight, labels, backend="triton")

    (hidden, weight, _), labels = make(5, 16, 63)
    exported = torch.export.export(Module(), (hidden, weight, labels))
    assert "tandem.linear_cross_entropy" in exported.graph_module.print_readable(print_output=False)
    expected = linear_cross_entropy(hidden, weight, labels, backend="reference")
    torch.testing.assert_close(exported.module()(hidden, weight, labels), expected)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_upstream_gradients_of_no_stride(backend: str) -> None:
    (hidden, weight, _), labels = make(18, 16, 63)
    expected = results(loss_of(labels, backend), [hidden, weight])
    batched = hidden.t().contiguous().t().view(3, 6, 16).requires_grad_()
    turned = weight.t().contiguous().t().requires_grad_()
    out = linear_cross_entropy(batched, turned, labels.view(3, 6), backend=backend)
    out.expand(4).sum().backward(retain_graph=True)
    out.backward()  # what is kept for the backward pass must not change in it
    assert batched.grad is not None and turned.grad is not None
    torch.testing.assert_close(out.double(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(batched.grad.view(18, 16).double(), 5 * expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turned.grad.double(), 5 * expected[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", CHUNKED)
def test_a_second_derivative_is_refused(backend: str) -> None:
    (hidden, weight, _), labels = make(4, 16, 63)
    loss = functools.partial(loss_of(labels, backend), weight=weight)
    with pytest.raises(RuntimeError, match="linear_cross_entropy has no second derivative: use backend='reference'"):
        torch.autograd.grad(loss(hidden.requires_grad_()), hidden, create_graph=True)
