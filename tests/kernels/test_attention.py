"""Attention on every backend against the reference in float64: outputs, gradients and what is refused."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels import native_attention, reference
from kernels.attention import attention
from kernels.paged_attention import append_to_cache, paged_attention
from tests.kernels.conftest import RunOnPath

BACKENDS = ("native", "torch")
CPU_PATHS = ("generic", "avx2", "avx512")


@dataclass(frozen=True)
class Case:
    seqlen_q: int
    seqlen_k: int
    head_dim: int = 32
    heads: int = 2
    kv_heads: int = 2
    batch: int = 3
    causal: bool = False
    key_lengths: tuple[int, ...] | None = None
    scale: float | None = None

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(self.seqlen_q * 1000 + self.head_dim)
        q = torch.randn(self.batch, self.seqlen_q, self.heads, self.head_dim)
        k = torch.randn(self.batch, self.seqlen_k, self.kv_heads, self.head_dim)
        return q, k, torch.randn_like(k)

    @property
    def lengths(self) -> Tensor | None:
        return None if self.key_lengths is None else torch.tensor(self.key_lengths)


CASES = [
    Case(1, 1),
    Case(63, 63, head_dim=16, causal=True),
    Case(111, 111, head_dim=80, kv_heads=1, causal=True),
    Case(1000, 1000, head_dim=64, batch=1),
    Case(1000, 1000, batch=1, heads=1, kv_heads=1, causal=True),
    Case(63, 111, head_dim=96, causal=True),
    Case(111, 63, head_dim=128, causal=True),
    Case(1, 111, head_dim=20, heads=6, kv_heads=2),
    Case(32, 32, head_dim=32, heads=8, kv_heads=8),
    Case(12, 12, head_dim=5, causal=True),
    Case(63, 111, heads=4, kv_heads=2, key_lengths=(0, 5, 111)),
    Case(63, 63, heads=4, kv_heads=1, causal=True, key_lengths=(63, 0, 20)),
    Case(63, 111, head_dim=256, scale=0.3, kv_heads=1),
]


def gradients(case: Case, dtype: torch.dtype, backend: str, with_lse: bool = False) -> tuple[Tensor, list[Tensor]]:
    """The output and the gradients of q, k and v for one fixed gradient of the output (and of the lse)."""
    inputs = [x.to(dtype).requires_grad_() for x in case.inputs()]
    out = attention(*inputs, causal=case.causal, softmax_scale=case.scale, key_lengths=case.lengths, backend=backend)
    assert isinstance(out, Tensor)
    torch.manual_seed(1)
    return out.detach(), list(torch.autograd.grad(out, inputs, torch.randn(out.shape).to(dtype)))


def assert_close(actual: Tensor, peer: Tensor, truth: Tensor) -> None:
    """An error of at most twice torch's own, and a few roundings of numbers around 1, as the inputs are."""
    allowed = 2 * (peer - truth).abs().max() + 1e-6
    assert actual.isfinite().all()
    assert (actual - truth).abs().max() <= allowed


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(case: Case) -> None:
    truth, truth_grads = gradients(case, torch.float64, "reference")
    peer, peer_grads = gradients(case, torch.float32, "torch")
    out, grads = gradients(case, torch.float32, "native")
    assert_close(out, peer, truth)
    for actual, theirs, exact in zip(grads, peer_grads, truth_grads, strict=True):
        assert_close(actual, theirs, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES[:7] + CASES[10:12], ids=str)
def test_log_sum_exp(case: Case, backend: str) -> None:
    q, k, v = case.inputs()
    options = {"causal": case.causal, "softmax_scale": case.scale, "key_lengths": case.lengths}
    _, truth = reference.attention(q.double(), k.double(), v.double(), **options)
    result = attention(q, k, v, **options, return_lse=True, backend=backend)
    torch.testing.assert_close(result[1], truth, rtol=1e-6, atol=2e-6)


def test_gradient_through_the_log_sum_exp() -> None:
    def run(backend: str) -> tuple[Tensor, ...]:
        inputs = [x.requires_grad_() for x in Case(20, 30, kv_heads=1, causal=True).inputs()]
        out, lse = attention(*inputs, causal=True, return_lse=True, backend=backend)
        only_lse = torch.autograd.grad(lse.sin().sum(), inputs[:2], retain_graph=True)
        return *only_lse, *torch.autograd.grad(out.square().sum() + lse.sin().sum(), inputs)

    for actual, expected in zip(run("native"), run("reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_keys_are_zero_and_so_are_their_gradients(backend: str) -> None:
    case = Case(40, 50, key_lengths=(0, 50, 7))
    out, (grad_q, grad_k, grad_v) = gradients(case, torch.float32, backend)
    assert not out[0].any()
    assert not grad_q[0].any()
    for grad in (grad_k, grad_v):
        assert not grad[0].any()
        assert not grad[2, 7:].any()


def test_causal_queries_before_the_first_key_are_zero() -> None:
    out, (grad_q, _, _) = gradients(Case(50, 20, causal=True), torch.float32, "native")
    assert not out[:, :30].any()
    assert not grad_q[:, :30].any()
    assert out[:, 30:].any()


def pack(x: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)])


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_one_by_one(backend: str, causal: bool) -> None:
    lengths_q, lengths_k = [40, 0, 1, 63], [40, 5, 20, 63]
    case = Case(63, 63, heads=4, kv_heads=2, batch=4)
    q, k, v = case.inputs()
    packed = [x.requires_grad_() for x in (pack(q, lengths_q), pack(k, lengths_k), pack(v, lengths_k))]
    options = {"cu_seqlens_q": offsets(lengths_q), "cu_seqlens_k": offsets(lengths_k)}
    out, lse = attention(
        *packed, **options, max_seqlen_q=63, max_seqlen_k=63, causal=causal, return_lse=True, backend=backend
    )
    grads = torch.autograd.grad(out.square().sum(), packed)
    begin = 0
    for i, (n, m) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        alone = [x.requires_grad_() for x in (q[i : i + 1, :n], k[i : i + 1, :m], v[i : i + 1, :m])]
        expected, expected_lse = attention(*alone, causal=causal, return_lse=True, backend=backend)
        tolerance = {"rtol": 0, "atol": 0} if backend == "native" else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(out[begin : begin + n], expected[0], **tolerance)
        torch.testing.assert_close(lse[:, begin : begin + n], expected_lse[0], **tolerance)
        if n:
            (grad_q,) = torch.autograd.grad(expected.square().sum(), alone[:1])
            torch.testing.assert_close(grads[0][begin : begin + n], grad_q[0], **tolerance)
        begin += n


def test_strided_views_of_one_tensor() -> None:
    qkv = torch.randn(3, 33, 8, 20, requires_grad=True)
    q, k, v = qkv.split((4, 2, 2), dim=2)
    strided = attention(q, k, v, causal=True, backend="native")
    copied = attention(*(x.contiguous() for x in (q, k, v)), causal=True, backend="native")
    assert torch.equal(strided, copied)
    transposed = [x.detach().transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    assert torch.equal(attention(*transposed, causal=True, backend="native"), copied)
    (actual,) = torch.autograd.grad(strided.sum(), qkv)
    (expected,) = torch.autograd.grad(attention(q, k, v, causal=True, backend="torch").sum(), qkv)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    case = Case(70, 70, head_dim=40, heads=4, kv_heads=2, batch=9, causal=True)
    out, grads = gradients(case, torch.float32, "native")
    inputs = [x[4:5].clone().requires_grad_() for x in case.inputs()]
    torch.manual_seed(1)
    grad_out = torch.randn(out.shape)[4:5]
    alone = attention(*inputs, causal=True, backend="native")
    assert torch.equal(alone, out[4:5])
    for one, all_of_them in zip(torch.autograd.grad(alone, inputs, grad_out), grads, strict=True):
        assert torch.equal(one, all_of_them[4:5])


def test_the_number_of_threads_changes_nothing() -> None:
    case = Case(70, 70, heads=4, kv_heads=2, batch=9)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, grads = gradients(case, torch.float32, "native")
            results.append([out, *grads])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_a_nan_reaches_the_output() -> None:
    q, k, v = Case(20, 20).inputs()
    q[1, 3, 0, 7] = torch.nan
    out = attention(q, k, v, backend="native")
    assert out[1, 3, 0].isnan().all()
    assert out.isnan().sum() == out.shape[-1]


def test_scores_of_any_size() -> None:
    q, k, v = (100 * x for x in Case(20, 100).inputs())
    out = attention(q, k, v, backend="native")
    expected, _ = reference.attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(out, expected.float(), rtol=1e-3, atol=1e-2)


def test_gradients_of_the_torch_backend_in_float64() -> None:
    inputs = [torch.randn(2, n, h, 4, dtype=torch.float64, requires_grad=True) for n, h in ((3, 2), (5, 1), (5, 1))]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, causal=True), inputs)


def test_a_second_derivative_is_refused() -> None:
    q, k, v = (x.requires_grad_() for x in Case(5, 5).inputs())
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(attention(q, k, v, backend="native").sum(), q, create_graph=True)


@dataclass
class Paged:
    """Ragged sequences in a cache whose blocks lie out of order; what no sequence holds is NaN."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    cache_seqlens: Tensor
    cu_seqlens_q: Tensor

    @classmethod
    def build(
        cls,
        keys: list[int],
        queries: list[int],
        heads: int,
        kv_heads: int,
        head_dim: int,
        block_size: int = 16,
    ) -> Paged:
        torch.manual_seed(sum(keys) + head_dim)
        blocks = [-(-n // block_size) for n in keys]
        order = torch.randperm(sum(blocks) + 1).int()
        table = torch.full((len(keys), max(blocks) + 1), -7, dtype=torch.int32)
        k_cache, v_cache = torch.full((2, sum(blocks) + 1, block_size, kv_heads, head_dim), torch.nan)
        begin = 0
        for i, (n, count) in enumerate(zip(keys, blocks, strict=True)):
            table[i, :count] = order[begin : begin + count]
            begin += count
            place = torch.arange(n)
            slots = table[i, place // block_size].long() * block_size + place % block_size
            append_to_cache(*torch.randn(2, n, kv_heads, head_dim), k_cache, v_cache, slots)
        q = torch.randn(sum(queries), heads, head_dim)
        return cls(q, k_cache, v_cache, table, torch.tensor(keys).int(), offsets(queries))

    def run(self, backend: str, causal: bool = True) -> Tensor:
        inputs = (self.q, self.k_cache, self.v_cache, self.block_table, self.cache_seqlens, self.cu_seqlens_q)
        longest = int(self.cu_seqlens_q.diff().max())
        return paged_attention(*inputs, max_seqlen_q=longest, causal=causal, backend=backend)

    def contiguous(self, sequence: int) -> tuple[Tensor, Tensor, Tensor]:
        """A sequence's q, k and v, padded layout."""
        start, end = self.cu_seqlens_q[sequence : sequence + 2].tolist()
        n = int(self.cache_seqlens[sequence])
        table = self.block_table[sequence][: -(-n // self.k_cache.shape[1])].long()
        k, v = (cache[table].flatten(0, 1)[None, :n] for cache in (self.k_cache, self.v_cache))
        return self.q[None, start:end], k, v


PAGED = [
    ([200, 1, 16, 17, 65, 128], [1] * 6, 4, 4, 32),
    ([200, 30, 16, 90], [3, 30, 1, 40], 4, 2, 32),
    ([33, 70], [1, 1], 8, 1, 20),
    ([0, 70], [1, 2], 2, 1, 80),
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("keys", "queries", "heads", "kv_heads", "head_dim"), PAGED)
def test_paged_attention(
    keys: list[int], queries: list[int], heads: int, kv_heads: int, head_dim: int, causal: bool
) -> None:
    batch = Paged.build(keys, queries, heads, kv_heads, head_dim)
    out = batch.run("native", causal)
    assert out.isfinite().all()
    for i in range(len(keys)):
        q, k, v = batch.contiguous(i)
        expected, _ = reference.attention(q.double(), k.double(), v.double(), causal=causal)
        begin, end = batch.cu_seqlens_q[i : i + 2].tolist()
        torch.testing.assert_close(out[begin:end], expected[0].float(), rtol=1e-5, atol=2e-6)
        # The cache only changes where keys lie, not what is computed of them.
        assert torch.equal(out[begin:end], attention(q, k, v, causal=causal, backend="native")[0])


def test_the_gathering_backend_agrees() -> None:
    batch = Paged.build([200, 30, 16, 90], [3, 30, 1, 40], 4, 2, 32)
    # It masks what it gathers, and a masked NaN is still one.
    batch.k_cache.nan_to_num_()
    batch.v_cache.nan_to_num_()
    batch.block_table.clamp_(min=0)
    torch.testing.assert_close(batch.run("native"), batch.run("torch"), rtol=1e-5, atol=2e-6)


def test_decoding_equals_prefill_bit_for_bit() -> None:
    batch = Paged.build([90], [90], 4, 2, 32)
    whole = batch.run("native")
    for n in (1, 17, 64, 90):
        step = Paged(
            batch.q[n - 1 : n],
            batch.k_cache,
            batch.v_cache,
            batch.block_table,
            torch.tensor([n]).int(),
            offsets([1]),
        )
        assert torch.equal(step.run("native"), whole[n - 1 : n])


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_shapes_are_refused(backend: str) -> None:
    q, k, v = Case(5, 7, heads=4, kv_heads=2).inputs()
    with pytest.raises(ValueError, match="k and v alike"):
        attention(q, k, v[:, :3], backend=backend)
    with pytest.raises(ValueError, match="k and v alike"):
        attention(q[..., :8], k, v, backend=backend)
    with pytest.raises(ValueError, match="do not divide"):
        attention(q[:, :, :3], k, v, backend=backend)
    with pytest.raises(ValueError, match="holds 1 sequences"):
        attention(q[:1], k, v, backend=backend)
    with pytest.raises(ValueError, match="key_lengths must be"):
        attention(q, k, v, key_lengths=torch.tensor([1]), backend=backend)
    with pytest.raises(ValueError, match="packed attention needs"):
        attention(q[0], k[0], v[0], cu_seqlens_q=offsets([5]), backend=backend)
    with pytest.raises(ValueError, match="do not divide"):
        paged_attention(q[0, :, :3], k, v, *[offsets([1])] * 3, max_seqlen_q=1, backend=backend)


def test_wrong_lengths_are_refused() -> None:
    q, k, v = Case(5, 7).inputs()
    with pytest.raises(ValueError, match="key_lengths must be between 0 and 7, got 8 for sequence 1"):
        attention(q, k, v, key_lengths=torch.tensor([7, 8, 1]), backend="native")
    packed = {"max_seqlen_q": 5, "max_seqlen_k": 7, "cu_seqlens_k": offsets([7]), "backend": "native"}
    with pytest.raises(ValueError, match="cu_seqlens_q must rise from 0"):
        attention(q[0], k[0], v[0], cu_seqlens_q=offsets([4]), **packed)
    batch = Paged.build([20, 30], [1, 1], 2, 2, 16)
    batch.block_table[1, 1] = 99
    with pytest.raises(ValueError, match="names block 99 of sequence 1"):
        batch.run("native")
    batch.cache_seqlens[0] = 1000
    with pytest.raises(ValueError, match="cache_seqlens must be between"):
        batch.run("native")


def test_native_is_refused_where_it_does_not_serve() -> None:
    q, k, v = Case(5, 7).inputs()
    with pytest.raises(ValueError, match="has no native backend here"):
        attention(q, k, v, dropout_p=0.5, backend="native")
    with pytest.raises(ValueError, match="has no native backend here"):
        attention(q.double(), k.double(), v.double(), backend="native")
    assert native_attention.serves(q, k, v)
    assert not native_attention.serves(q.double(), k, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert not native_attention.serves(q, k, v)


def test_torch_compile_traces_the_torch_backend() -> None:
    q, k, v = Case(9, 9).inputs()
    compiled = torch.compile(lambda *x: attention(*x, causal=True), backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), attention(q, k, v, causal=True, backend="torch"))


CHECK_PATH = """
from kernels import reference
from kernels.attention import attention
torch.manual_seed(0)
for n, m, d, heads in ((40, 70, 20, 3), (1, 130, 64, 1)):
    q, k, v = (torch.randn(2, s, h, d, requires_grad=True) for s, h in ((n, 3), (m, heads), (m, heads)))
    out = attention(q, k, v, causal=True, backend="native")
    exact = attention(q, k, v, causal=True, backend="reference")
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=2e-6)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, exact))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.parametrize("path", CPU_PATHS)
def test_each_cpu_path(path: str, run_on_path: RunOnPath) -> None:
    run_on_path(CHECK_PATH, path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cu_seqlens_q": torch.tensor([0, 3, 5])}, "of as many sequences"),
        ({"cu_seqlens_k": torch.tensor([0.0, 5.0])}, "must be integers"),
        ({"cu_seqlens_k": torch.tensor([0, 4])}, "must rise from 0 to the 5 tokens of k"),
        ({"max_seqlen_q": 4}, "max_seqlen_q is 4, but a sequence has 5 tokens"),
        ({"softmax_scale": float("nan")}, "softmax_scale must be a finite number"),
    ],
    ids=str,
)
def test_packed_lengths_that_do_not_fit_are_refused(changes: dict[str, object], said: str) -> None:
    q = torch.randn(5, 2, 8)
    bounds = torch.tensor([0, 5])
    given = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": 5, "max_seqlen_k": 5} | changes
    with pytest.raises(ValueError, match=said):
        attention(q, q, q, backend="torch", **given)


def test_tensors_elsewhere_and_lengths_of_no_kind_are_refused() -> None:
    q, k, v = Case(5, 5).inputs()
    with pytest.raises(ValueError, match="on one device, got cpu and meta"):
        attention(q, k, v, bias=torch.zeros(1, 1, 5, 5, device="meta"))
    with pytest.raises(ValueError, match="key_lengths must be integers"):
        attention(q, k, v, key_lengths=torch.ones(3))
