"""Attention's window, soft cap, ALiBi slopes and relative bias on every backend against a plain formula in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.attention import attention
from kernels.attention_options import RelativeBias
from kernels.paged_attention import paged_attention
from tests.kernels.conftest import RunOnPath
from tests.kernels.test_attention import CPU_PATHS, Case, Paged, offsets, pack

BACKENDS = ("native", "torch", "reference")


@dataclass(frozen=True)
class Shape:
    """Which options a test gives; ``bias`` is (num_buckets, max_distance, bidirectional)."""

    window: int | None = None
    softcap: float = 0.0
    alibi: bool = False
    bias: tuple[int, int, bool] | None = None

    def slopes(self, heads: int) -> Tensor | None:
        return 2.0 ** -torch.arange(1.0, heads + 1) if self.alibi else None

    def table(self, heads: int) -> Tensor | None:
        if self.bias is None:
            return None
        return torch.randn(self.bias[0], heads, generator=torch.Generator().manual_seed(3))

    def options(self, heads: int, table: Tensor | None = None) -> dict[str, Any]:
        table = self.table(heads) if table is None else table
        bias = None if self.bias is None or table is None else RelativeBias(table, *self.bias[1:])
        slopes = self.slopes(heads)
        return {"window": self.window, "softcap": self.softcap, "alibi_slopes": slopes, "relative_bias": bias}


def bucket(distance: int, buckets: int, most: int, bidirectional: bool) -> int:
    """T5's rule, for one distance, as transformers' `_relative_position_bucket` has it."""
    first = 0
    if bidirectional:
        buckets //= 2
        first = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    wide = torch.log(torch.tensor(distance).float() / exact) / math.log(most / exact) * (buckets - exact)
    return first + min(exact + int(wide), buckets - 1)


def plain(q: Tensor, k: Tensor, v: Tensor, case: Case, shape: Shape, table: Tensor | None) -> tuple[Tensor, Tensor]:
    """The formula, sharing nothing with the kernels: output and log-sum-exp of a padded batch."""
    groups, rows, keys = case.heads // case.kv_heads, range(case.seqlen_q), range(case.seqlen_k)
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (case.scale or case.head_dim**-0.5)
    if shape.softcap:
        scores = (scores / shape.softcap).tanh() * shape.softcap
    distance = torch.tensor([[j - (i + case.seqlen_k - case.seqlen_q) for j in keys] for i in rows])
    if shape.alibi:
        scores = scores - shape.slopes(case.heads)[:, None, None].to(q) * distance.abs()
    if table is not None:
        place = torch.tensor([[bucket(d, len(table), *shape.bias[1:]) for d in row] for row in distance.tolist()])
        scores = scores + table.to(q)[place].permute(2, 0, 1)
    seen = torch.ones(case.batch, 1, case.seqlen_q, case.seqlen_k, dtype=torch.bool)
    seen &= distance <= 0 if case.causal else distance < (shape.window or math.inf)
    seen &= distance > -(shape.window or math.inf)
    if case.lengths is not None:
        seen &= (torch.arange(case.seqlen_k) < case.lengths[:, None])[:, None, None]
    scores = scores.masked_fill(~seen, -math.inf)
    weights = scores.softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0)
    return torch.einsum("bhij,bjhd->bihd", weights, v), scores.logsumexp(-1)


def gradients(
    case: Case, shape: Shape, backend: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The output, the log-sum-exp, and the gradients of q, k, v and the table for one gradient of the output."""
    inputs = [x.to(dtype).requires_grad_() for x in case.inputs()]
    table = shape.table(case.heads)
    wanted = inputs if table is None else [*inputs, table.requires_grad_()]
    if backend == "plain":
        out, lse = plain(*inputs, case, shape, table)
    else:
        given = {"causal": case.causal, "softmax_scale": case.scale, "key_lengths": case.lengths, "backend": backend}
        given |= shape.options(case.heads, table)
        out, lse = attention(*inputs, **given, return_lse=True)
        assert torch.is_tensor(attention(*inputs, **given))
        out = attention(*inputs, **given)
    torch.manual_seed(1)
    return out.detach(), lse.detach(), list(torch.autograd.grad(out, wanted, torch.randn(out.shape).to(dtype)))


T5 = (32, 128, True)
T5_DECODER = (32, 128, False)
CASES = [
    (Case(63, 63), Shape(window=9)),
    (Case(111, 111, head_dim=12, kv_heads=1, causal=True), Shape(window=1)),
    (Case(111, 63, head_dim=12, causal=True), Shape(window=20)),
    (Case(20, 200, head_dim=12), Shape(window=70)),
    (Case(63, 111, head_dim=80, heads=6, kv_heads=2), Shape(softcap=2.0)),
    (Case(63, 63, head_dim=12, heads=3, kv_heads=3, causal=True), Shape(softcap=0.5)),
    (Case(111, 111, head_dim=16, heads=4, kv_heads=4, causal=True), Shape(alibi=True)),
    (Case(63, 111, head_dim=96, heads=6, kv_heads=2), Shape(alibi=True)),
    (Case(63, 63, head_dim=12, heads=4, kv_heads=2, key_lengths=(63, 0, 20)), Shape(bias=T5)),
    (Case(1, 200, head_dim=64, causal=True), Shape(bias=T5_DECODER)),
    (Case(111, 111, head_dim=16, heads=3, kv_heads=1, causal=True), Shape(bias=(8, 20, False))),
    (Case(1, 1), Shape(window=1, softcap=1.0, alibi=True, bias=T5)),
    (Case(200, 200, head_dim=12, heads=1, kv_heads=1, causal=True), Shape(window=30, softcap=3.0)),
    (Case(63, 111, heads=4, kv_heads=2, key_lengths=(0, 5, 111), scale=0.3), Shape(12, 3.0, True, (7, 11, True))),
    (Case(150, 70, head_dim=12, heads=6, kv_heads=2, causal=True), Shape(33, 3.0, True, T5_DECODER)),
]


@pytest.mark.parametrize(("case", "shape"), CASES, ids=str)
def test_matches_the_plain_formula(case: Case, shape: Shape) -> None:
    truth, truth_lse, truth_grads = gradients(case, shape, "plain", torch.float64)
    for backend in BACKENDS:
        out, lse, grads = gradients(case, shape, backend)
        torch.testing.assert_close(out, truth.float(), rtol=1e-5, atol=4e-6)
        torch.testing.assert_close(lse, truth_lse.float(), rtol=1e-5, atol=4e-6)
        for actual, expected in zip(grads, truth_grads, strict=True):
            torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_one_by_one(backend: str, causal: bool) -> None:
    lengths_q, lengths_k = [40, 0, 1, 63], [40, 5, 20, 63]
    q, k, v = Case(63, 63, heads=4, kv_heads=2, batch=4).inputs()
    packed = pack(q, lengths_q), pack(k, lengths_k), pack(v, lengths_k)
    places = {"cu_seqlens_q": offsets(lengths_q), "cu_seqlens_k": offsets(lengths_k)}
    places |= {"max_seqlen_q": 63, "max_seqlen_k": 63}
    for shape in (Shape(11, 2.0, True, T5), Shape(window=5)):
        given = shape.options(4) | {"causal": causal, "backend": backend}
        out, begin = attention(*packed, **places, **given), 0
        for i, (n, m) in enumerate(zip(lengths_q, lengths_k, strict=True)):
            alone = attention(q[i : i + 1, :n], k[i : i + 1, :m], v[i : i + 1, :m], **given)
            tolerance = {"rtol": 0, "atol": 0} if backend == "native" else {"rtol": 1e-5, "atol": 1e-5}
            torch.testing.assert_close(out[begin : begin + n], alone[0], **tolerance)
            begin += n


PAGED = (Shape(11, 2.0, True, T5), Shape(alibi=True), Shape(window=5), Shape(bias=T5_DECODER), Shape(softcap=1.0))


def run_paged(batch: Paged, shape: Shape, causal: bool, backend: str) -> Tensor:
    inputs = (batch.q, batch.k_cache, batch.v_cache, batch.block_table, batch.cache_seqlens, batch.cu_seqlens_q)
    longest = int(batch.cu_seqlens_q.diff().max())
    given = shape.options(batch.q.shape[1])
    return paged_attention(*inputs, max_seqlen_q=longest, causal=causal, **given, backend=backend)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", [[1, 1, 1], [3, 30, 1]])
def test_paged_equals_contiguous(queries: list[int], causal: bool) -> None:
    batch = Paged.build([200, 30, 17], queries, 4, 2, 12)
    native = [run_paged(batch, shape, causal, "native") for shape in PAGED]
    # The gathering backend masks what it gathers, and a masked NaN is still one.
    batch.k_cache.nan_to_num_()
    batch.v_cache.nan_to_num_()
    batch.block_table.clamp_(min=0)
    for shape, out in zip(PAGED, native, strict=True):
        for other in ("torch", "reference"):
            torch.testing.assert_close(run_paged(batch, shape, causal, other), out, rtol=1e-5, atol=4e-6)
        for i in range(3):
            alone = attention(*batch.contiguous(i), **shape.options(4), causal=causal, backend="native")[0]
            assert torch.equal(out[slice(*batch.cu_seqlens_q[i : i + 2].tolist())], alone)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("shape", [*PAGED, Shape(window=70)], ids=str)
def test_decoding_equals_prefill_bit_for_bit(shape: Shape, kv_heads: int) -> None:
    batch = Paged.build([210], [210], 4, kv_heads, 12)
    whole = run_paged(batch, shape, True, "native")
    for n in (1, 17, 64, 65, 80, 140, 210):
        place = (batch.k_cache, batch.v_cache, batch.block_table, torch.tensor([n]).int(), offsets([1]))
        assert torch.equal(run_paged(Paged(batch.q[n - 1 : n], *place), shape, True, "native"), whole[n - 1 : n])


def test_keys_behind_the_window_are_not_read() -> None:
    q, k, v = Case(1, 300, heads=4, kv_heads=4).inputs()
    expected = attention(q, k, v, window=90, causal=True, backend="native")
    for x in (k, v):
        x[:, :210] = torch.nan
    assert torch.equal(attention(q, k, v, window=90, causal=True, backend="native"), expected)
    assert attention(q, k, v, window=91, causal=True, backend="native").isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_not_read(backend: str) -> None:
    case, shape = Case(40, 50, key_lengths=(0, 50, 7)), Shape(6, 2.0, True, T5)
    out, lse, (grad_q, grad_k, grad_v, _) = gradients(case, shape, backend)
    # Queries stand at 10 to 49, so of those with 7 keys only the first few have one in their window.
    blind = torch.tensor([[True] * 40, [False] * 40, [i + 10 - 5 > 6 for i in range(40)]])
    assert not out[blind].any() and not grad_q[blind].any()
    assert out[~blind].all()
    assert lse.transpose(1, 2)[blind].isneginf().all()
    assert not grad_k[0].any() and not grad_v[0].any() and not grad_v[2, 7:].any()


def test_the_number_of_threads_changes_nothing() -> None:
    before, results = torch.get_num_threads(), []
    case = Case(70, 70, heads=4, kv_heads=2, batch=9, causal=True)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, lse, grads = gradients(case, Shape(40, 2.0, True, T5), "native")
            results.append([out, lse, *grads])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_the_cap_is_a_hyperbolic_tangent() -> None:
    """A query with one key has its score for a log-sum-exp."""
    sizes = torch.logspace(-6, 3, 4001)
    q = torch.cat((sizes, -sizes, torch.zeros(1), torch.tensor([torch.inf, -torch.inf]))).reshape(1, -1, 1, 1)
    one = torch.ones(1, 1, 1, 1)
    _, lse = attention(q, one, one, softcap=5.0, return_lse=True, backend="native")
    torch.testing.assert_close(lse[0, 0].double(), 5 * (q.flatten().double() / 5).tanh(), rtol=6e-7, atol=1e-12)


def test_a_nan_reaches_the_output() -> None:
    q, k, v = Case(20, 20).inputs()
    q[1, 3, 0, 7] = torch.nan
    out = attention(q, k, v, **Shape(30, 2.0, True, T5).options(2), backend="native")
    assert out[1, 3, 0].isnan().all()
    assert out.isnan().sum() == out.shape[-1]


def test_only_the_table_wants_a_gradient() -> None:
    """Every query but the nearest keys' is in the last bucket, whose gradient sums a hundred thousand numbers."""
    q, k, v = Case(500, 500, batch=1).inputs()

    def gradient(dtype: torch.dtype, backend: str) -> Tensor:
        table = Shape(bias=(8, 20, True)).table(2).to(dtype).requires_grad_()
        out = attention(*(x.to(dtype) for x in (q, k, v)), relative_bias=RelativeBias(table, 20, True), backend=backend)
        return torch.autograd.grad(out.square().sum(), table)[0]

    torch.testing.assert_close(
        gradient(torch.float32, "native").double(), gradient(torch.float64, "reference"), rtol=1e-5, atol=1e-5
    )


def test_an_empty_batch_has_no_gradient() -> None:
    table = Shape(bias=T5).table(2).requires_grad_()
    out = attention(*torch.zeros(3, 0, 5, 2, 16), relative_bias=RelativeBias(table, 128, True), backend="native")
    assert not torch.autograd.grad(out.sum(), table)[0].any()


def test_gradient_through_the_log_sum_exp() -> None:
    def run(backend: str) -> tuple[Tensor, ...]:
        inputs = [x.requires_grad_() for x in Case(20, 30, kv_heads=1, causal=True).inputs()]
        table = Shape(bias=T5).table(2).requires_grad_()
        options = Shape(9, 2.0, True, T5).options(2, table)
        out, lse = attention(*inputs, causal=True, **options, return_lse=True, backend=backend)
        return torch.autograd.grad(out.square().sum() + lse.sin().sum(), (*inputs, table))

    for actual, expected in zip(run("native"), run("reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (32, 20), (8, 7), (9, 100), (64, 1000)])
def test_buckets_are_those_of_transformers(buckets: int, most: int, bidirectional: bool) -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distances = torch.arange(-most - 50, most + 51)
    expected = t5.T5Attention._relative_position_bucket(distances, bidirectional, buckets, most)
    row = RelativeBias(torch.arange(buckets).float()[:, None], most, bidirectional).distance_bias[0]
    assert torch.equal(row[distances.clamp(-most, most) + most].long(), expected)
    assert [bucket(d, buckets, most, bidirectional) for d in distances.tolist()] == expected.tolist()


def test_layers_share_a_bias_and_its_gradient() -> None:
    q, k, v = Case(9, 9).inputs()
    table = torch.randn(32, 2, requires_grad=True)
    bias = RelativeBias(table, 128, True)
    twice = sum(attention(q, k, v, relative_bias=bias).sin().sum() for _ in range(2))
    once = attention(q, k, v, relative_bias=RelativeBias(table, 128, True)).sin().sum()
    (both,), (one,) = torch.autograd.grad(twice, table), torch.autograd.grad(once, table)
    torch.testing.assert_close(both, 2 * one)


def test_buckets_first_found_in_inference_serve_training() -> None:
    with torch.inference_mode():
        RelativeBias(torch.randn(10, 2), 37, True)
    table = torch.randn(10, 2, requires_grad=True)
    RelativeBias(table, 37, True).distance_bias.sum().backward()
    assert table.grad is not None


def test_gradients_in_float64() -> None:
    inputs = [torch.randn(2, n, h, 4, dtype=torch.float64, requires_grad=True) for n, h in ((3, 2), (5, 1), (5, 1))]
    table = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    options = Shape(window=3, softcap=1.5, alibi=True).options(2)

    def run(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, softcap: float) -> Tensor:
        return attention(q, k, v, **options | {"softcap": softcap, "relative_bias": RelativeBias(rows, 5, True)})

    for softcap in (0.0, 1.5):
        assert torch.autograd.gradcheck(run, (*inputs, table, softcap))


def test_torch_compile_traces_the_options() -> None:
    q, k, v = Case(9, 9).inputs()
    table, slopes = torch.randn(32, 2), torch.tensor([0.5, 0.25])

    def run(rows: Tensor) -> Tensor:
        bias = RelativeBias(rows, 128, False)
        return attention(q, k, v, causal=True, window=4, alibi_slopes=slopes, relative_bias=bias)

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    options = {"alibi_slopes": slopes, "relative_bias": RelativeBias(table, 128, False)}
    expected = attention(q, k, v, causal=True, window=4, **options, backend="torch")
    torch.testing.assert_close(compiled(table), expected)


CHECK_PATH = """
from kernels.attention import attention
from kernels.attention_options import RelativeBias
torch.manual_seed(0)
for n, m, d, heads in ((40, 70, 20, 3), (1, 130, 64, 1), (1, 130, 64, 3)):
    inputs = [torch.randn(2, s, h, d, requires_grad=True) for s, h in ((n, 3), (m, heads), (m, heads))]
    inputs.append(torch.randn(32, 3, requires_grad=True))
    q, k, v, table = inputs
    options = {"window": 60, "softcap": 2.0, "alibi_slopes": torch.rand(3), "causal": True}
    out, exact = (attention(q, k, v, relative_bias=RelativeBias(table, 50, True), backend=backend, **options)
                  for backend in ("native", "reference"))
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=4e-6)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), inputs) for x in (out, exact))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
"""


@pytest.mark.parametrize("path", CPU_PATHS)
def test_each_cpu_path(path: str, run_on_path: RunOnPath) -> None:
    run_on_path(CHECK_PATH, path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_options_are_refused(backend: str) -> None:
    q, k, v = Case(5, 7, heads=4, kv_heads=2).inputs()
    wrong = {
        "window must be at least 1, got 0": {"window": 0},
        "softcap must be positive": {"softcap": -1.0},
        "softcap must be positive, or 0 for none, got nan": {"softcap": math.nan},
        r"alibi_slopes must be float32 \(4,\)": {"alibi_slopes": torch.ones(2)},
        "got torch.float64": {"alibi_slopes": torch.ones(4).double()},
        "is for 3 heads, q has 4": {"relative_bias": RelativeBias(torch.zeros(32, 3), 128, True)},
    }
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            attention(q, k, v, **options, backend=backend)
        with pytest.raises(ValueError, match=message):
            paged_attention(q[0], k, v, *[offsets([1])] * 3, max_seqlen_q=1, **options, backend=backend)


def test_wrong_tables_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \(num_buckets, heads\), got \(32,\)"):
        RelativeBias(torch.zeros(32), 128, True)
    for buckets, most, bidirectional in ((32, 8, True), (32, 16, False), (3, 10, True), (1, 10, False)):
        with pytest.raises(ValueError, match="cannot reach max_distance"):
            RelativeBias(torch.zeros(buckets, 2), most, bidirectional)
