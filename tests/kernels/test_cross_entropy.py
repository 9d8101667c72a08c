"""Cross-entropy: values and gradients of every backend, the edges of rows and of numbers, and torch's machinery."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import reference
from kernels.backend import TRITON_DEVICE
from kernels.cross_entropy import cross_entropy
from tests.kernels.losses import COMPILERS, DEVICE, DTYPES, assert_follows_the_error_rule, poison, results

needs_triton = pytest.mark.skipif(TRITON_DEVICE is None, reason="needs triton")
BACKENDS = [pytest.param("triton", marks=needs_triton), "torch", "reference"]
OPTIONS = [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-4}, {"label_smoothing": 0.1, "z_loss": 1e-4}]


def make(rows: int, vocab: int, dtype: torch.dtype = torch.float32, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits and labels, every third of them ignored from the second on."""
    generator = torch.Generator().manual_seed(rows * vocab)
    logits = spread * torch.randn(rows, vocab, generator=generator)
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[1::3] = -100
    return logits.to(DEVICE, dtype), labels.to(DEVICE)


def check(logits: Tensor, labels: Tensor, backend: str, **options: float) -> None:
    ours, theirs = (
        functools.partial(cross_entropy, labels=labels, backend=name, **options) for name in (backend, "reference")
    )
    assert_follows_the_error_rule(ours, theirs, [logits], upstream=0.37)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_reference_is_torchs_loss_and_the_square_of_the_normaliser(smoothing: float, options: dict) -> None:
    logits, labels = make(7, 13, torch.float64)
    options = options | {"label_smoothing": smoothing}
    kept = labels != -100
    expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    expected += options.get("z_loss", 0.0) * logits[kept].logsumexp(-1).square().sum()
    for backend in ("reference", "torch"):
        torch.testing.assert_close(cross_entropy(logits, labels, backend=backend, **options), expected)


@needs_triton
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 2), (63, 63), (5, 1000), (2, 4097), (2, 32000)])
def test_the_kernel_follows_the_error_rule(
    rows: int, vocab: int, dtype: torch.dtype, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, labels = make(rows, vocab, dtype)
    poison(monkeypatch)
    check(logits, labels, "triton", **options)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1e4, -3e4])
def test_huge_logits_lose_no_more_digits_than_torchs(dtype: torch.dtype, offset: float) -> None:
    logits, labels = make(4, 1000)
    check((logits + offset).to(dtype), labels, "triton", label_smoothing=0.1)
    check((1e3 * logits).to(dtype), labels, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_infinity_is_a_token_without_probability(backend: str) -> None:
    logits, labels = make(4, 63)
    labels[:] = torch.tensor([5, 60, 7, 8])
    logits[0, 40:] = -torch.inf  # beside the label
    logits[1, 60] = -torch.inf  # the label itself: an infinite loss, a finite gradient
    logits[2, :7] = logits[2, 8:] = -torch.inf  # all but the label
    check(logits[:1], labels[:1], backend)
    check(logits[1:2], labels[1:2], backend)
    check(logits[2:3], labels[2:3], backend, z_loss=1e-4)
    check(logits[:1], labels[:1], backend, label_smoothing=0.1)  # infinite: smoothing asks for what cannot be
    logits[3] = -torch.inf  # no token at all
    loss, gradient = results(functools.partial(cross_entropy, labels=labels[3:], backend=backend), [logits[3:]])
    assert loss.isnan()
    assert gradient.isnan().all()


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("ignore_index", [-100, 0, 7])
def test_ignored_rows_cost_nothing_whatever_their_logits(ignore_index: int, backend: str) -> None:
    logits, labels = make(6, 63)
    labels[1::2] = ignore_index
    labels[::2] = 9
    expected = results(functools.partial(cross_entropy, labels=labels[::2], backend=backend), [logits[::2]])
    logits[1], logits[3, 5], logits[5] = torch.nan, torch.inf, -torch.inf
    ours = functools.partial(
        cross_entropy, labels=labels, ignore_index=ignore_index, label_smoothing=0.0, backend=backend
    )
    loss, gradient = results(ours, [logits])
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(gradient[::2], expected[1])
    assert (gradient[1::2] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_but_ignored_rows_and_no_rows_at_all(backend: str) -> None:
    logits, labels = make(3, 63)
    for chosen in (logits, logits[:0]):
        ours = functools.partial(cross_entropy, labels=labels[: len(chosen)].fill_(-100), z_loss=1e-4, backend=backend)
        loss, gradient = results(ours, [chosen])
        assert loss == 0
        assert gradient.shape == chosen.shape
        assert (gradient == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_and_infinity_are_not_hidden(backend: str) -> None:
    logits, labels = make(1, 63)
    for value in (torch.nan, torch.inf):
        logits[0, 50] = value
        assert cross_entropy(logits, labels, backend=backend).isnan()


@needs_triton
@pytest.mark.parametrize("label", [63, -1, 2**40])
def test_a_label_outside_the_vocabulary_makes_the_kernels_loss_not_a_number(label: int) -> None:
    logits, labels = make(3, 63)
    labels[0] = label
    loss, gradient = results(functools.partial(cross_entropy, labels=labels, backend="triton"), [logits])
    assert loss.isnan()
    assert gradient[0].isnan().all()
    assert gradient[1:].isfinite().all()


@pytest.mark.skipif(DEVICE == "cuda", reason="a wrong label ends a CUDA context")
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_label_outside_the_vocabulary_is_torchs_error(backend: str) -> None:
    logits, labels = make(3, 63)
    labels[0] = 63
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        cross_entropy(logits, labels, backend=backend)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["padded", "shifted", "odd rows", "transposed", "expanded", "far apart", "batched"])
def test_logits_may_lie_in_memory_in_any_way(layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    wide, labels = make(6, 300, dtype)
    logits = {
        "padded": wide[:, :257],
        "shifted": wide[:, 3:260],
        "odd rows": wide.flatten()[: 6 * 259].view(6, 259)[:, 1:258],
        "transposed": wide.t().contiguous().t(),
        "expanded": wide[:1].expand(6, 300),
        "far apart": wide[:, :20],
        "batched": wide.view(2, 3, 300)[:, :, :257],
    }[layout]
    labels = labels.remainder(20).where(labels != -100, -100).view(logits.shape[:-1])
    poison(monkeypatch)
    check(logits, labels, "triton", label_smoothing=0.1)


@needs_triton
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_a_row_writes_that_row_alone(dtype: torch.dtype, padding: int) -> None:
    from kernels.gpu import cross_entropy as gpu

    logits, labels = make(3, 67 + padding, dtype)
    logits = logits[:, :67]
    labels[:] = 3
    _, lse = gpu.forward(logits, labels, 0.0, 0.0, -100)
    tile = gpu.tiling(logits, logits.stride(0))
    assert tile.edges
    for rows in (1, 2):
        out = torch.full((3, 67), 7.0, dtype=dtype, device=DEVICE)
        gpu._backward[(rows,)](
            torch.ones((), device=DEVICE), logits, labels, lse, out, logits.stride(0), 67, 1, 0.0, 0.0, -100,
            Z=False, EDGES=True, ALIKE=padding == 0, CHUNK=tile.chunk, CHUNKS=tile.chunks, num_warps=tile.warps,
        )  # fmt: skip
        assert (out[:rows] <= 1).all()
        assert (out[rows:] == 7).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_mistakes_are_one_sentence(backend: str) -> None:
    logits, labels = make(3, 63)
    for wrong in (labels[:2], labels.int(), labels[:, None]):
        with pytest.raises(ValueError, match=r"labels must be int64 of shape \(3,\), got torch.int"):
            cross_entropy(logits, wrong, backend=backend)
    with pytest.raises(ValueError, match=r"label_smoothing is 1\.5: expected a number in"):
        cross_entropy(logits, labels, label_smoothing=1.5, backend=backend)
    with pytest.raises(ValueError, match="z_loss is -1: expected 0 or more"):
        cross_entropy(logits, labels, z_loss=-1, backend=backend)


def test_the_kernel_serves_no_float64() -> None:
    logits, labels = make(3, 63, torch.float64)
    with pytest.raises(ValueError, match="cross_entropy has no triton backend here"):
        cross_entropy(logits, labels, backend="triton")


@needs_triton
def test_the_operators_are_what_torch_expects() -> None:
    from kernels.gpu import cross_entropy as gpu

    logits, labels = make(3, 63)
    loss, lse = gpu.FORWARD(logits, labels, 0.1, 1e-4, -100)
    torch.library.opcheck(gpu.FORWARD, (logits, labels, 0.1, 1e-4, -100))
    torch.library.opcheck(gpu.BACKWARD, (torch.ones_like(loss), logits, labels, lse, 0.1, 1e-4, -100))
    torch.library.opcheck(gpu.BACKWARD, (torch.ones_like(loss), logits[:, :31], labels, lse, 0.1, 1e-4, -100))


@needs_triton
@pytest.mark.filterwarnings("ignore")  # torch.compile's own
@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_kernel_compiles_in_one_graph(compiler: str) -> None:
    logits, labels = make(6, 63)
    loss = functools.partial(cross_entropy, labels=labels, label_smoothing=0.1, z_loss=1e-4, backend="triton")
    compiled = torch.compile(lambda x: 2 * loss(1 * x), fullgraph=True, backend=compiler)
    for actual, expected in zip(results(compiled, [logits]), results(lambda x: 2 * loss(x), [logits]), strict=True):
        torch.testing.assert_close(actual, expected)


@needs_triton
def test_the_kernel_exports() -> None:
    class Module(torch.nn.Module):
        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            return cross_entropy(logits, labels, backend="triton")

    logits, labels = make(6, 63)
    exported = torch.export.export(Module(), (logits, labels))
    assert "tandem.cross_entropy" in exported.graph_module.code
    torch.testing.assert_close(exported.module()(logits, labels), cross_entropy(logits, labels, backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradients_of_no_stride_and_a_frozen_input(backend: str) -> None:
    logits, labels = make(6, 63)
    expected = results(functools.partial(cross_entropy, labels=labels, backend=backend), [logits])[1]
    x = logits.clone().requires_grad_()
    cross_entropy(x, labels, backend=backend).expand(4).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), 4 * expected)
    assert not cross_entropy(logits, labels, backend=backend).requires_grad


@needs_triton
def test_autocast_leaves_the_dtypes_alone() -> None:
    logits, labels = make(6, 63, torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = cross_entropy(logits, labels, backend="triton")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference.cross_entropy(logits, labels, 0.0, 0.0, -100))


@needs_triton
def test_a_second_derivative_is_refused() -> None:
    logits, labels = make(2, 63)
    logits.requires_grad_()
    with pytest.raises(RuntimeError, match="cross_entropy has no second derivative on triton"):
        torch.autograd.grad(cross_entropy(logits, labels, backend="triton"), logits, create_graph=True)
