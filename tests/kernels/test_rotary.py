"""Rotary positions against the plain formula: values, gradients, layouts, backends and CPU paths."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import native_elementwise, reference
from kernels.backend import TRITON_DEVICE
from kernels.rotary import rotate
from tests.kernels import operators
from tests.kernels.conftest import DEVICE, RunOnPath, poison
from tests.kernels.operators import COMPILERS, DTYPES, outputs_and_gradients, randn

needs_triton = pytest.mark.skipif(TRITON_DEVICE != DEVICE, reason="Triton does not run here")
PAIRINGS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])

# (batch, seqlen, heads, head_dim), or packed (tokens, heads, head_dim)
SHAPES = [
    (1, 1, 1, 2),
    (2, 63, 3, 32),
    (3, 5, 2, 80),
    (2, 7, 1, 6),
    (1, 1, 64),
    (111, 4, 64),
    (33, 2, 20),
    (2, 1000, 4, 32),
]


def rotary_angles(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    angles = positions[..., None, None] * 0.3 ** torch.arange(head_dim // 2)
    return angles.cos(), angles.sin()


def case(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(shape, requires_grad=True), *rotary_angles(torch.arange(shape[-3]) + 3, shape[-1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape: tuple[int, ...]) -> None:
    x, cos, sin = case(shape)
    grad = torch.randn(shape)
    out, expected = rotate(x, cos, sin), reference.rotate(x, cos, sin)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    actual, theirs = (torch.autograd.grad(y, x, grad)[0] for y in (out, expected))
    torch.testing.assert_close(actual, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("leading", [(2, 9), (18,)], ids=str)
def test_views_into_a_fused_projection(leading: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(*leading, 7, 12, requires_grad=True)
    q, k, _ = qkv.split((4, 2, 1), dim=-2)
    angles = rotary_angles(torch.arange(leading[-1]), 12)
    assert native_elementwise.serves(q)
    results = []
    for function in (rotate, reference.rotate):
        rotated = torch.cat((function(q, *angles), function(k, *angles)), dim=-2)
        results.append((rotated, *torch.autograd.grad(rotated.sin().sum(), qkv, retain_graph=True)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_gradients_and_inputs_in_unusual_layouts() -> None:
    x, cos, sin = case((2, 5, 3, 8))
    strange = x.detach().transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(rotate(strange, cos, sin), reference.rotate(x, cos, sin), rtol=1e-6, atol=1e-6)
    for grad in (torch.randn(2, 5, 8, 3).transpose(2, 3), torch.randn(1).expand(2, 5, 3, 8)):
        actual, expected = (torch.autograd.grad(f(x, cos, sin), x, grad)[0] for f in (rotate, reference.rotate))
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8), (0, 2, 8)], ids=str)
def test_nothing_to_rotate(shape: tuple[int, ...]) -> None:
    x, cos, sin = case(shape)
    assert rotate(x, cos, sin).shape == shape


def test_positions_of_their_own_for_every_sequence() -> None:
    x, _, _ = case((2, 5, 3, 8))
    cos, sin = rotary_angles(torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]]), 8)
    assert torch.equal(rotate(x, cos, sin), reference.rotate(x, cos, sin))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_use_the_formula(dtype: torch.dtype) -> None:
    x, cos, sin = case((2, 5, 3, 8))
    out = rotate(x.to(dtype), cos, sin)
    assert out.dtype == dtype
    assert torch.equal(out, reference.rotate(x.to(dtype), cos, sin))


def test_rotating_back_gives_the_input() -> None:
    x, cos, sin = case((2, 63, 3, 32))
    torch.testing.assert_close(rotate(rotate(x, cos, sin), cos, -sin), x, rtol=1e-5, atol=1e-6)


def test_threads_do_not_change_the_bits() -> None:
    x, cos, sin = case((4, 250, 4, 36))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(rotate(x, cos, sin))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


CHECK_PATH = """
from kernels import reference
from kernels.rotary import rotate
for shape in ((2, 9, 3, 80), (5, 2, 14)):
    x, angles = torch.randn(shape, requires_grad=True), torch.randn(shape[-3], 1, shape[-1] // 2)
    out, expected = (f(x, angles.cos(), angles.sin()) for f in (rotate, reference.rotate))
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    a, b = (torch.autograd.grad(y.square().sum(), x)[0] for y in (out, expected))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
"""


@pytest.mark.parametrize("path", ["generic", "avx2", "avx512"])
def test_each_cpu_path(path: str, run_on_path: RunOnPath) -> None:
    run_on_path(CHECK_PATH, path)


def rotation(
    seqlen: int, rotated: int, interleaved: bool, backend: str | None = "triton", offset: int = 3
) -> Callable[[Tensor], Tensor]:
    """A rotation as a function of x alone, by the angles of positions ``offset`` and on."""
    cos, sin = (angles.to(DEVICE) for angles in rotary_angles(torch.arange(seqlen) + offset, rotated))
    return lambda x: rotate(x, cos, sin, interleaved=interleaved, backend=backend)


@PAIRINGS
def test_a_pair_is_turned_as_a_complex_number_is(interleaved: bool) -> None:
    x, cos, sin = case((5, 2, 8))
    pairs = x.unflatten(-1, (4, 2) if interleaved else (2, 4)).movedim(-1 if interleaved else -2, 0)
    turned = torch.complex(*pairs) * torch.complex(cos, sin)
    expected = torch.stack((turned.real, turned.imag), dim=-1 if interleaved else -2).flatten(-2)
    for name in ("torch", "reference"):
        torch.testing.assert_close(rotate(x, cos, sin, interleaved=interleaved, backend=name), expected)


@needs_triton
@PAIRINGS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "rotated"),
    [((1, 1, 1, 2), 2), ((2, 63, 3, 32), 32), ((3, 5, 2, 80), 80), ((111, 4, 96), 24), ((1000, 1, 20), 12)],
    ids=str,
)
def test_the_kernel_is_as_exact_as_torch(
    shape: tuple[int, ...], rotated: int, dtype: torch.dtype, interleaved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch)
    ours, torchs = (rotation(shape[-3], rotated, interleaved, name) for name in ("triton", "torch"))
    operators.assert_as_exact_as_torch(ours, torchs, [randn(*shape, dtype=dtype)])
    x = randn(*shape, dtype=dtype)
    assert torch.equal(ours(x)[..., rotated:], x[..., rotated:])


@needs_triton
@PAIRINGS
@pytest.mark.parametrize("leading", [(2, 9), (18,)], ids=str)
def test_the_kernel_reads_views_into_a_fused_projection(leading: tuple[int, ...], interleaved: bool) -> None:
    qkv = randn(*leading, 7, 12)
    for view in (qkv[..., :4, :], qkv[..., 4:6, :], qkv[..., 6:, 2:], qkv[..., ::2, :].transpose(-3, -2)):
        ours, torchs = (rotation(view.shape[-3], 8, interleaved, name) for name in ("triton", "torch"))
        results = [
            (rotated, *torch.autograd.grad(rotated.sin().sum(), qkv, retain_graph=True))
            for rotated in (ours(view), torchs(view))
        ]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("positions", [[[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]], [[5, 6, 7, 8, 9]]], ids=str)
def test_the_kernel_knows_positions_of_a_sequences_own(positions: list[list[int]]) -> None:
    x = randn(2, 5, 3, 8)
    cos, sin = (angles.to(DEVICE) for angles in rotary_angles(torch.tensor(positions), 8))
    expected = reference.rotate(x, cos, sin)
    torch.testing.assert_close(rotate(x, cos, sin, backend="triton"), expected, rtol=1e-6, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8), (0, 2, 8)], ids=str)
def test_nothing_for_the_kernel_to_rotate(shape: tuple[int, ...]) -> None:
    out, grad = outputs_and_gradients(rotation(shape[-3], 8, False), [randn(*shape)])
    assert out.shape == grad.shape == shape


@needs_triton
@PAIRINGS
def test_strided_gradients_and_a_second_one(interleaved: bool) -> None:
    operators.assert_strided_gradients_fit(rotation(5, 6, interleaved), [randn(2, 5, 3, 8)])
    operators.assert_no_second_gradient(rotation(5, 6, interleaved), [randn(2, 5, 3, 8)])


@needs_triton
def test_autocast_leaves_the_dtype_alone() -> None:
    x = randn(5, 3, 8)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(rotation(5, 8, False)(x), rotation(5, 8, False)(x.detach()))
        assert rotation(5, 8, False)(x).dtype == torch.float32


@needs_triton
@pytest.mark.filterwarnings("ignore")  # torch.compile's own
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiles_whole(compiler: str) -> None:
    operators.assert_compiles(rotation(5, 6, True), [randn(2, 5, 3, 8)], compiler)


@needs_triton
def test_exports_and_passes_torchs_own_checks() -> None:
    x, cos, sin = (t.detach().to(DEVICE) for t in case((2, 5, 3, 8)))
    operators.assert_exports(lambda *args: rotate(*args, backend="triton"), [x, cos, sin])
    for interleaved in (False, True):
        torch.library.opcheck(torch.ops.tandem.rotate.default, (x[:, :, :2], cos, sin, interleaved, not interleaved))


def test_what_no_kernel_serves_is_refused_by_name() -> None:
    x, cos, sin = case((2, 5, 3, 8))
    with pytest.raises(ValueError, match="rotate has no native backend here"):
        rotate(x, cos, sin, interleaved=True, backend="native")
    with pytest.raises(ValueError, match="rotate has no triton backend here"):
        rotate(x, cos.double(), sin.double(), backend="triton")


def test_angles_that_are_not_the_tokens_are_refused() -> None:
    x, cos, sin = case((2, 5, 3, 8))
    for angles in (
        (cos[:4], sin[:4]),
        (cos, sin[..., :2]),
        (torch.ones(5, 1, 5), torch.ones(5, 1, 5)),
        (cos[:, 0], sin),
    ):
        with pytest.raises(ValueError, match="rotate needs x"):
            rotate(x, *angles)
