"""Attention in Triton against the formula in float64: interpreted on small shapes, or on the GPU that is there."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.attention import attention
from kernels.attention_options import RelativeBias
from tests.kernels.conftest import DEVICE, poison

pytest.importorskip("triton")
from kernels.gpu import attention_configs

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """One call. ``distance`` is the relative bias's max_distance; lengths are of packed sequences or padded keys."""

    seqlen_q: int
    seqlen_k: int
    head_dim: int = 16
    heads: int = 2
    kv_heads: int = 2
    batch: int = 2
    causal: bool = False
    key_lengths: tuple[int, ...] | None = None
    packed: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    window: int | None = None
    softcap: float = 0.0
    alibi: bool = False
    distance: int | None = None
    dense: tuple[int, ...] | None = None
    scale: float | None = None

    def inputs(self) -> dict[str, Tensor]:
        """What has a gradient, float64: q, k, v, and where the case has them the table and the dense bias."""
        torch.manual_seed(self.seqlen_q * 1000 + self.seqlen_k + self.head_dim)
        shape_q = (self.batch, self.seqlen_q) if self.packed is None else (sum(self.packed[0]),)
        shape_k = (self.batch, self.seqlen_k) if self.packed is None else (sum(self.packed[1]),)
        tensors = {
            "q": torch.randn(*shape_q, self.heads, self.head_dim),
            "k": torch.randn(*shape_k, self.kv_heads, self.head_dim),
            "v": torch.randn(*shape_k, self.kv_heads, self.head_dim),
        }
        if self.distance is not None:
            tensors["table"] = torch.randn(8, self.heads)
        if self.dense is not None:
            tensors["bias"] = torch.randn(self.dense)
        return {name: x.double().to(DEVICE) for name, x in tensors.items()}

    def run(self, tensors: dict[str, Tensor], backend: str, **options: object) -> tuple[Tensor, Tensor]:
        """The output and the log-sum-exp on one backend."""
        q, k, v = (tensors[name] for name in "qkv")
        if self.packed is not None:
            bounds = [torch.tensor([0, *n], device=DEVICE).cumsum(0).int() for n in self.packed]
            options |= {"cu_seqlens_q": bounds[0], "cu_seqlens_k": bounds[1]}
            options |= {"max_seqlen_q": max(self.packed[0]), "max_seqlen_k": max(self.packed[1])}
        if self.key_lengths is not None:
            options["key_lengths"] = torch.tensor(self.key_lengths, device=DEVICE)
        if self.distance is not None:
            options["relative_bias"] = RelativeBias(tensors["table"], self.distance, bidirectional=not self.causal)
        if self.alibi:
            options["alibi_slopes"] = torch.linspace(0.1, 0.5, self.heads, device=DEVICE)
        out, lse = attention(
            q, k, v, causal=self.causal, window=self.window, softcap=self.softcap, bias=tensors.get("bias"),
            softmax_scale=self.scale, return_lse=True, backend=backend, **options,
        )  # fmt: skip
        return out, lse

    def results(self, dtype: torch.dtype, backend: str, **options: object) -> dict[str, Tensor]:
        """Output, log-sum-exp and the gradients of every input, for fixed gradients of the first two."""
        given = self.inputs()
        wide = torch.promote_types(dtype, torch.float32)  # the biases' own
        tensors = {name: x.to(dtype if name in ("q", "k", "v") else wide).requires_grad_() for name, x in given.items()}
        out, lse = self.run(tensors, backend, **options)
        torch.manual_seed(1)
        above, above_lse = torch.randn(out.shape).to(out), torch.randn(lse.shape).to(lse)
        loss = (out * above).sum() + torch.where(lse.isfinite(), lse * above_lse, 0.0).sum()
        gradients = torch.autograd.grad(loss, list(tensors.values()))
        return {"out": out.detach(), "lse": lse.detach()} | {
            f"d{name}": x for name, x in zip(tensors, gradients, strict=True)
        }


# Together they cover every pair of options, lengths around the tiles' borders, and rows without keys.
CASES = [
    Case(1, 1),
    Case(63, 63, head_dim=32, causal=True),
    Case(33, 111, head_dim=80, causal=True, kv_heads=1),
    Case(70, 40, causal=True, scale=0.4),
    Case(40, 65, head_dim=96, kv_heads=1, key_lengths=(0, 50)),
    Case(63, 63, causal=True, key_lengths=(63, 20), alibi=True),
    Case(63, 100, head_dim=20, window=20, kv_heads=1),
    Case(100, 100, causal=True, window=17, softcap=3.0, alibi=True),
    Case(130, 100, distance=20),
    Case(100, 130, causal=True, distance=20, kv_heads=1, head_dim=80),
    Case(100, 100, distance=12, key_lengths=(37, 99), softcap=5.0, head_dim=32),
    Case(70, 70, distance=15, window=30, alibi=True, dense=(2, 1, 70, 70)),
    Case(70, 70, causal=True, distance=200, window=33, key_lengths=(70, 0)),
    Case(50, 40, dense=(1, 2, 50, 40), softcap=4.0, kv_heads=1),
    Case(40, 50, dense=(2, 1, 1, 50), causal=True, window=11, key_lengths=(30, 50), head_dim=24),
    Case(0, 0, packed=((40, 0, 1, 63), (40, 5, 20, 63)), causal=True, kv_heads=1),
    Case(0, 0, packed=((40, 33), (70, 33)), distance=16, head_dim=40),
    Case(0, 0, packed=((40, 33), (70, 33)), causal=True, distance=16, softcap=3.0, window=50),
    Case(0, 0, packed=((20, 30), (70, 33)), window=25, alibi=True, head_dim=72),
    Case(17, 33, head_dim=256, batch=1, heads=1, kv_heads=1),
]


def check(case: Case, dtype: torch.dtype, **options: object) -> None:
    """Errors of at most twice those of the formula on the same inputs, and a rounding of numbers around 1."""
    truth = case.results(torch.float64, "reference")
    peer = case.results(dtype, "reference")
    ours = case.results(dtype, "triton", **options)
    rounding = 1e-6 if dtype is torch.float32 else torch.finfo(dtype).eps
    for name, exact in truth.items():
        actual, theirs = ours[name].double(), peer[name].double()
        finite = exact.isfinite()
        assert actual.shape == exact.shape
        assert torch.equal(actual[~finite], exact[~finite].double()), name  # -inf where there is no key
        if finite.any():
            scale = max(1.0, exact[finite].abs().max().item())
            allowed = 2 * (theirs - exact)[finite].abs().max().item() + rounding * scale
            error = (actual - exact)[finite].abs().max().item()
            assert error <= allowed, f"{name}: {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    check(case, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", [CASES[i] for i in (2, 4, 9, 10, 13, 15)], ids=str)
def test_half_precision_errs_no_more_than_twice_as_much_as_the_formula(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch)
    check(case, dtype)


@pytest.mark.skipif(DEVICE == "cpu", reason="too long to interpret")
@pytest.mark.parametrize("case", [CASES[i] for i in (1, 2, 4, 7, 8, 9, 10, 15, 16)], ids=str)
def test_long_sequences_on_a_gpu(case: Case) -> None:
    times = 9

    def longer(lengths: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(n * times for n in lengths)

    stretched = replace(
        case, seqlen_q=case.seqlen_q * times, seqlen_k=case.seqlen_k * times,
        key_lengths=case.key_lengths and longer(case.key_lengths),
        packed=case.packed and (longer(case.packed[0]), longer(case.packed[1])),
        dense=case.dense and (*case.dense[:2], *(n if n == 1 else n * times for n in case.dense[2:])),
    )  # fmt: skip
    check(stretched, torch.bfloat16)


@pytest.mark.skipif(DEVICE == "cpu", reason="interpreted programs run one after another")
@pytest.mark.parametrize("case", [CASES[i] for i in (1, 8, 9, 15)], ids=str)
def test_deterministic_gradients_are_the_same_bit_for_bit(case: Case) -> None:
    first, second = (case.results(torch.bfloat16, "triton", deterministic=True) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("case", [CASES[i] for i in (2, 4, 6, 15)], ids=str)
def test_one_pass_backward(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = attention_configs.choose

    def one_pass(kernel: str, *rest: object) -> attention_configs.Config:
        config = choose(kernel, *rest)  # type: ignore[arg-type]
        return replace(config, one_pass=True) if kernel == "keys" else config

    monkeypatch.setattr(attention_configs, "choose", one_pass)
    check(case, torch.float32)


def test_without_the_copy_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = attention_configs.choose
    monkeypatch.setattr(attention_configs, "choose", lambda *call: replace(choose(*call), descriptors=False))
    for case in (CASES[2], CASES[4], CASES[15]):
        check(case, torch.float32)


def test_strided_views_of_one_projection() -> None:
    qkv = torch.randn(2, 33, 8, 20, device=DEVICE, requires_grad=True)
    q, k, v = qkv.split((4, 2, 2), dim=2)
    results = []
    for backend in ("triton", "torch"):
        out = attention(q, k, v, causal=True, backend=backend)
        results.append((out, *torch.autograd.grad(out.sum(), qkv)))  # a gradient of stride 0
    strange = [x.detach().transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    results.append((attention(*strange, causal=True, backend="triton"),))
    for values in zip(results[0], results[1], strict=True):
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[2][0], results[0][0])


@pytest.mark.parametrize("case", [Case(40, 50), Case(33, 33, causal=True, distance=9, kv_heads=1)], ids=str)
def test_dropout_drops_what_philox_says(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    seed, p = -1234567890123, 0.3
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([seed], device=DEVICE))
    ours = case.results(torch.float32, "triton", dropout_p=p)
    keeps = reference.dropout_keeps(seed, p, case.batch, case.heads, case.seqlen_q, case.seqlen_k).to(DEVICE)
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda weights, _: weights * keeps / (1 - p))
    truth = case.results(torch.float64, "reference")
    for name, exact in truth.items():
        torch.testing.assert_close(ours[name].double(), exact.double(), rtol=1e-4, atol=1e-5, msg=name)


def test_dropped_weights_are_as_many_as_asked_and_others_each_time() -> None:
    keeps = reference.dropout_keeps(7, 0.3, 2, 3, 200, 200)
    assert abs(keeps.float().mean().item() - 0.7) < 5 * math.sqrt(0.21 / keeps.numel())
    assert not torch.equal(keeps, reference.dropout_keeps(8, 0.3, 2, 3, 200, 200))
    tensors = {name: x.float() for name, x in Case(20, 20).inputs().items()}
    first, second = (Case(20, 20).run(tensors, "triton", dropout_p=0.5)[0] for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    third, _ = Case(20, 20).run(tensors, "triton", dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(third, Case(20, 20).run(tensors, "triton", dropout_p=0.5)[0])


@pytest.mark.parametrize("descriptors", [True, False])
def test_a_sequence_keeps_its_nan_to_itself(descriptors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = attention_configs.choose
    monkeypatch.setattr(attention_configs, "choose", lambda *call: replace(choose(*call), descriptors=descriptors))
    case = Case(0, 0, packed=((20, 21, 22), (20, 21, 22)), head_dim=16)
    clean = case.inputs()
    spoilt = {name: torch.cat((x[:20], torch.full_like(x[20:41], torch.nan), x[41:])) for name, x in clean.items()}
    results = []
    for tensors in (clean, spoilt):
        leaves = {name: x.float().requires_grad_() for name, x in tensors.items()}
        out, _ = case.run(leaves, "triton")
        results.append((out, *torch.autograd.grad((out * out).sum(), list(leaves.values()))))
    for whole, partly in zip(*results, strict=True):
        assert torch.equal(whole[:20], partly[:20])
        assert torch.equal(whole[41:], partly[41:])
        assert partly[20:41].isnan().all()


def test_padding_keeps_its_nan_to_itself() -> None:
    case = Case(20, 40, key_lengths=(17, 40))
    tensors = {name: x.float() for name, x in case.inputs().items()}
    expected, _ = case.run(tensors, "triton")
    for name in "kv":
        tensors[name][0, 17:] = torch.nan
    out, _ = case.run(tensors, "triton")
    assert torch.equal(out, expected)


@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min], ids=str)
def test_a_dense_bias_may_hide_whole_tiles_of_keys(hidden: float) -> None:
    results = []
    for backend in ("triton", "reference"):
        q, k, v = (x.float().requires_grad_() for x in Case(40, 40).inputs().values())
        bias = torch.zeros(2, 1, 1, 40, device=DEVICE)
        bias[0, ..., :20], bias[1, ..., 25:] = hidden, hidden
        out = attention(q, k, v, bias=bias, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_the_far_ends_of_the_table_are_exact_where_heads_look_near(causal: bool) -> None:
    """Far gradients are small there: inferring them from the near ones would leave nothing but rounding."""
    case = Case(120, 120, distance=12, causal=causal, batch=1)
    gradients = {}
    for dtype, backend in ((torch.float64, "reference"), (torch.bfloat16, "reference"), (torch.bfloat16, "triton")):
        torch.manual_seed(2)
        tensors = {name: x.to(dtype) for name, x in case.inputs().items()}
        table = torch.zeros(8, 2, device=DEVICE, dtype=torch.promote_types(dtype, torch.float32))
        table[7 if causal else 3], table[7] = -9.0, -9.0
        tensors["table"] = table.requires_grad_()
        out, _ = case.run(tensors, backend)
        above = torch.randn(out.shape).to(out)
        (gradients[dtype, backend],) = torch.autograd.grad((out * above).sum(), table)
    exact, peer, ours = gradients.values()
    for bucket in (3, 7):
        error = (ours[bucket] - exact[bucket]).abs().max()
        assert error <= 2 * (peer[bucket] - exact[bucket]).abs().max() + 0.02 * exact[bucket].abs().max() + 1e-4


def test_lengths_of_any_stride_and_windows_of_any_width() -> None:
    q, k, v = (x.float() for x in Case(20, 40).inputs().values())
    lengths = torch.tensor([[17, 1], [40, 1]], device=DEVICE)[:, 0]
    for options in (
        {"key_lengths": lengths},
        {"key_lengths": lengths[:1].expand(2)},
        {"window": 2**40, "causal": True},
    ):
        actual, expected = (attention(q, k, v, backend=backend, **options) for backend in ("triton", "reference"))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    bounds = torch.tensor([[0, 0], [15, 0], [40, 0]], device=DEVICE)[:, 0]  # int64, two apart
    packed = [x.flatten(0, 1) for x in (q, q, q)]
    longest = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": 25, "max_seqlen_k": 25}
    actual, expected = (attention(*packed, **longest, backend=backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_memory_at_any_address_and_strides_of_dimensions_of_one() -> None:
    shape = (1, 20, 1, 16)
    base = torch.randn(2 * 320 + 2, device=DEVICE)
    odd, strange = base[1:321].view(shape), base.as_strided(shape, (321, 16, 1, 1))
    for x in (odd, strange):
        leaf = x.detach().requires_grad_()
        out = attention(leaf, leaf * 1, leaf + 1, backend="triton")
        (grad,) = torch.autograd.grad(out.sum(), leaf)
        copy = x.clone().requires_grad_()
        expected = attention(copy, copy * 1, copy + 1, backend="reference")
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grad, *torch.autograd.grad(expected.sum(), copy), rtol=1e-4, atol=1e-5)


def test_memory_grows_with_the_length_not_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    for name in ("empty", "zeros", "empty_like", "zeros_like"):
        make = getattr(torch, name)

        def recorded(*args: object, make: object = make, **kwargs: object) -> Tensor:
            out = make(*args, **kwargs)  # type: ignore[operator]
            sizes.append(out.numel())
            return out

        monkeypatch.setattr(torch, name, recorded)
    case = Case(300, 300, batch=1, heads=1, kv_heads=1, distance=9)
    case.results(torch.float32, "triton")
    assert max(sizes) < 300 * 300 / 4


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_attend_to(seqlen_q: int, seqlen_k: int) -> None:
    result = Case(seqlen_q, seqlen_k, distance=9).results(torch.float32, "triton")
    assert not result["out"].any()
    assert (result["lse"] == -torch.inf).all()
    assert not any(result[f"d{name}"].any() for name in ("q", "k", "v", "table"))


def test_calls_it_does_not_serve_are_refused_by_name() -> None:
    q, k, v = (x.float() for x in Case(4, 4).inputs().values())
    wide = torch.zeros(1, 4, 2, 257, device=DEVICE)
    for inputs, options in (((q, k.half(), v), {}), ((wide,) * 3, {}), ((q, k, v), {"softmax_scale": -1.0})):
        with pytest.raises(ValueError, match="no triton backend here"):
            attention(*inputs, backend="triton", **options)
    with pytest.raises(ValueError, match="dropout_p must be from 0 to 1"):
        attention(q, k, v, dropout_p=1.5)
    for bias in (torch.zeros(2, 2, 4, 5), torch.zeros(4, 4), torch.zeros(2, 2, 4, 4).int()):
        with pytest.raises(ValueError, match="bias must be floating point and broadcast to"):
            attention(q, k, v, bias=bias.to(DEVICE))
    case = Case(0, 0, packed=((4,), (4,)), batch=1)
    tensors = case.inputs() | {"bias": torch.zeros(1, 1, 4, 4, device=DEVICE)}
    with pytest.raises(ValueError, match="a dense bias belongs to padded batches"):
        case.run(tensors, "torch")


@pytest.mark.parametrize("architecture", ["sm80", "sm86", "sm90", "sm100", "gfx942"])
def test_every_call_has_a_configuration(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = attention_configs.entries()
    assert 0 < len(rows) <= 60
    assert len({(r.kernel, r.architecture, r.bits, r.head_dim, r.features) for r in rows}) == len(rows)
    monkeypatch.setattr(attention_configs, "architecture", lambda: architecture)
    attention_configs.choose.cache_clear()
    sets = [f for n in range(4) for f in itertools.combinations(attention_configs.FEATURES, n)]
    for bits, head_dim, features in itertools.product((16, 32), (5, 16, 64, 80, 100, 128, 160, 256), sets):
        chosen = {
            name: attention_configs.choose(name, bits, head_dim, features) for name in attention_configs.INTERPRETED
        }
        own, counted = chosen["bias_gradient"], chosen["queries"]
        assert own.block_m == own.block_n
        assert counted.block_m % own.block_m == counted.block_n % own.block_m == 0
        if bits * head_dim % 128:
            assert not any(config.descriptors for config in chosen.values())
    attention_configs.choose.cache_clear()
