"""The Triton attention over a paged cache, and the append that fills it, against the reference in float64."""

from __future__ import annotations

import itertools
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.attention_options import RelativeBias, score_options
from kernels.backend import TRITON_DEVICE
from kernels.paged_attention import append_to_cache, paged_attention
from tests.kernels.conftest import DEVICE, poison

pytest.importorskip("triton")

from kernels.gpu import paged_configs

pytestmark = pytest.mark.skipif(TRITON_DEVICE is None, reason="needs a GPU, or Triton's interpreter")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FLOAT8 = torch.float8_e4m3fn
LENGTHS = [0, 1, 15, 16, 17, 100]
# Of the output's scale: what rounding to a query's dtype, its scores and weights costs.
TOLERANCE = {torch.float32: 1e-5 if DEVICE == "cuda" else 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
LAYERS = 3


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@dataclass
class Case:
    """Ragged sequences in one layer of a cache whose blocks lie out of order.

    What no token fills is NaN, table entries that no sequence needs are nonsense, and q has rows of no sequence.
    """

    keys: list[int]
    queries: list[int]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    padding: int = 3
    scales: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.q = randn(sum(self.queries) + self.padding, self.heads, self.head_dim).to(self.dtype)
        shape = (sum(self.keys), self.kv_heads, self.head_dim)
        self.k, self.v = (randn(*shape, seed=i).to(self.dtype) for i in (1, 2))
        blocks = [-(-n // self.block_size) for n in self.keys]
        store = self.cache_dtype or self.dtype
        whole = (sum(blocks) + 1, LAYERS, self.block_size, self.kv_heads, self.head_dim)
        if store.itemsize == 1:  # the bits of NaN, and of a level that int8 does not use
            caches = [torch.full(whole, 0xFF, dtype=torch.uint8, device=DEVICE).view(store)[:, 1] for _ in "kv"]
        else:
            caches = [torch.full(whole, torch.nan, dtype=store, device=DEVICE)[:, 1] for _ in "kv"]
        if store == torch.int8:
            both = (torch.full(whole[:-1], torch.nan, device=DEVICE)[:, 1] for _ in "kv")
            self.scales = dict(zip(("k_scale", "v_scale"), both, strict=True))
        self.k_cache, self.v_cache = caches
        order = torch.randperm(sum(blocks) + 1, generator=torch.Generator().manual_seed(3)).int()
        table = torch.full((len(self.keys), max(blocks) + 1), -(1 << 30), dtype=torch.int32)
        slots, begin = [], 0
        for i, (n, count) in enumerate(zip(self.keys, blocks, strict=True)):
            table[i, :count] = order[begin : begin + count]
            begin += count
            place = torch.arange(n)
            slots.append(table[i, place // self.block_size].long() * self.block_size + place % self.block_size)
        self.table, self.slots = table.to(DEVICE), torch.cat(slots).to(DEVICE)
        self.lengths, self.bounds = torch.tensor(self.keys).int().to(DEVICE), offsets(self.queries)
        self.append()

    def append(self, **options: Any) -> None:
        append_to_cache(self.k, self.v, self.k_cache, self.v_cache, self.slots, **self.scales, **options)

    def run(self, **options: Any) -> Tensor:
        given = {"max_seqlen_q": max(self.queries), "backend": "triton"} | self.scales | options
        inputs = (self.q, self.k_cache, self.v_cache, self.table, self.lengths, self.bounds)
        return paged_attention(*inputs, **given)

    def expected(self, causal: bool = True, softmax_scale: float | None = None, **options: Any) -> Tensor:
        """The reference in float64, of what the cache holds."""
        given = {"window": None, "softcap": 0.0, "alibi_slopes": None, "relative_bias": None} | options
        k, v = (
            reference.read_cache(cache, torch.arange(len(cache), device=DEVICE), scale).double()
            for cache, scale in zip(
                (self.k_cache, self.v_cache), self.scales.values() if self.scales else (None, None), strict=True
            )
        )
        return reference.paged_attention(
            self.q.double(), k, v, self.table, self.lengths, self.bounds,
            causal=causal, softmax_scale=softmax_scale, options=score_options(self.heads, **given),
        )  # fmt: skip

    def check(self, **options: Any) -> None:
        shape = {name: value for name, value in options.items() if name not in ("batch_invariant",)}
        actual, expected = self.run(**options), self.expected(**shape)
        assert actual.dtype == self.dtype
        tolerance = TOLERANCE[self.dtype]
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


@pytest.fixture(params=[1, 3], ids=["whole", "split"])
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(paged_configs, "splits", lambda *_: request.param)
    return request.param


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [(2, 2, 64, 16), (8, 1, 128, 16), (6, 2, 80, 32), (1, 1, 96, 32), (20, 1, 20, 16)],
)
def test_decoding_matches_the_reference(heads: int, kv_heads: int, head_dim: int, block_size: int, splits: int) -> None:
    Case(LENGTHS, [1] * len(LENGTHS), heads, kv_heads, head_dim, block_size).check()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries"), [(2, 2, [1, 2, 3, 0, 5]), (1, 1, [70, 1, 0, 17, 1]), (5, 1, [30, 1, 0, 17, 1])]
)
def test_many_queries_match_the_reference(
    heads: int, kv_heads: int, queries: list[int], causal: bool, splits: int
) -> None:
    Case([100, 40, 3, 17, 33], queries, heads, kv_heads, 16).check(causal=causal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [[1] * 6, [0, 1, 15, 2, 17, 30]])
def test_half_precision_matches_the_reference(queries: list[int], dtype: torch.dtype) -> None:
    Case(LENGTHS, queries, 4, 1, dtype=dtype).check()


@pytest.mark.parametrize("cache_dtype", [torch.int8, FLOAT8, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_caches_of_any_type(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    Case([17, 50], [1, 1], head_dim=80, dtype=dtype, cache_dtype=cache_dtype).check()
    Case([40], [20], 4, 1, 32, dtype=dtype, cache_dtype=cache_dtype).check()


def relative_bias(heads: int, buckets: int = 32, reach: int = 128, bidirectional: bool = False) -> RelativeBias:
    return RelativeBias(randn(buckets, heads), reach, bidirectional)


def every_option(heads: int) -> list[dict[str, Any]]:
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.01], device=DEVICE)[:heads]
    return [
        {"window": 1},
        {"window": 37},
        {"window": 1000},
        {"softcap": 2.0},
        {"alibi_slopes": slopes},
        {"relative_bias": relative_bias(heads)},
        {"relative_bias": relative_bias(heads, 8, 20, bidirectional=True)},
        {"softmax_scale": 0.3},
        {
            "window": 50,
            "softcap": 3.0,
            "alibi_slopes": slopes,
            "relative_bias": relative_bias(heads, 7, 11, bidirectional=True),
            "softmax_scale": 0.2,
        },
    ]


@pytest.mark.parametrize(("queries", "causal"), [([1, 1], True), ([30, 1], True), ([30, 1], False)])
@pytest.mark.parametrize("options", every_option(4), ids=lambda options: "-".join(options))
def test_options_match_the_reference(
    options: dict[str, Any], queries: list[int], causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_configs, "splits", lambda *_: 2)
    Case([150, 17], queries, 4, 1, 16).check(causal=causal, **options)


def test_a_bias_in_half_precision() -> None:
    bias = RelativeBias(randn(32, 4).bfloat16(), 20, bidirectional=False)
    assert bias.distance_bias.dtype == torch.float32
    Case([100, 20], [1, 20], dtype=torch.bfloat16).check(relative_bias=bias)


def test_negative_scales_and_large_scores() -> None:
    Case([40, 70], [1, 2]).check(softmax_scale=-0.5)
    case = Case([40, 70], [1, 2])
    torch.testing.assert_close(
        case.run(softmax_scale=30.0).double(), case.expected(softmax_scale=30.0), rtol=0, atol=0.01
    )


@pytest.mark.parametrize("number", [None, 1, 5, 8], ids=["plain", "window", "bias", "all"])
def test_batch_invariance(number: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded alone, decoded among others, and as part of a prompt: the same bits."""
    monkeypatch.setattr(paged_configs, "SPLIT_KEYS", 64)
    options = {} if number is None else every_option(4)[number]
    whole = Case([70, 3, 90], [40, 1, 3], 4, 2, 16, dtype=torch.bfloat16)
    whole.check(batch_invariant=True, **options)
    expected = whole.run(batch_invariant=True, **options)
    for sequence, n, others in ((0, 31, []), (0, 64, [2]), (0, 70, [1, 2]), (2, 90, []), (2, 89, [0])):
        step = copy(whole)
        behind = [whole.keys[sequence] - n, *[0] * len(others)]
        rows = [int(whole.bounds[i + 1]) - 1 - less for i, less in zip([sequence, *others], behind, strict=True)]
        step.q, step.queries, step.bounds = whole.q[rows], [1] * len(rows), offsets([1] * len(rows))
        step.table = whole.table[[sequence, *others], : None if others else -(-n // 16)].contiguous()
        step.lengths = torch.tensor([n, *(whole.keys[i] for i in others)]).int().to(DEVICE)
        assert torch.equal(step.run(batch_invariant=True, **options), expected[rows])


def test_shapes_may_promise_more_than_there_is() -> None:
    """As they do in a CUDA graph."""
    case = Case([20, 33], [1, 1])
    case.table = torch.nn.functional.pad(case.table, (0, 9), value=1 << 30)
    torch.testing.assert_close(case.run(max_seqlen_q=40), case.expected().float(), rtol=1e-5, atol=1e-5)


def test_no_queries_and_no_keys() -> None:
    case = Case([20, 5], [1, 1])
    case.q = case.q[:0]
    assert case.run().shape == (0, 4, 64)
    case = Case([0, 0], [1, 2])
    assert not case.run().any()
    case.table = case.table[:, :0]
    assert not case.run().any()


def test_padding_gives_zeros(splits: int) -> None:
    for queries in ([1, 1], [1, 40]):
        case = Case([20, 50], queries, 4, 1, 16, padding=9)
        assert not case.run()[sum(queries) :].any()
        case.check()


def test_queries_in_a_fused_projection() -> None:
    case = Case([20, 5], [2, 1])
    expected = case.run()
    case.q = torch.cat((case.q, case.q, case.q), dim=1)[:, 4:8]
    assert torch.equal(case.run(), expected)
    case.q = case.q.mT.contiguous().mT
    assert torch.equal(case.run(), expected)


def test_other_backends_read_every_cache() -> None:
    for cache_dtype in (torch.int8, FLOAT8, torch.bfloat16):
        case = Case([20, 50], [1, 3], padding=0, cache_dtype=cache_dtype)
        expected = case.expected().float()
        torch.testing.assert_close(case.run(backend="reference"), expected, rtol=1e-5, atol=1e-5)
        case.table.clamp_(min=0)
        for x in (*case.scales.values(), *([] if case.scales else [case.k_cache, case.v_cache])):
            x.copy_(x.float().nan_to_num(0.0).to(x.dtype))
        torch.testing.assert_close(case.run(backend="torch"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, FLOAT8])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotated"), [(64, 64), (80, 20), (20, 14), (96, 0)])
def test_append(head_dim: int, rotated: int, interleaved: bool, cache_dtype: torch.dtype) -> None:
    """Into the same bits as torch's, up to a rounding of the rotation; tokens without a slot leave no trace."""
    results = []
    for backend in ("triton", "torch"):
        case = Case([50, 3], [50, 3], 4, 2, head_dim, padding=0, cache_dtype=cache_dtype)
        case.slots[[0, 7, 52]] = -1
        options: dict[str, Any] = {"backend": backend, "interleaved": interleaved}
        fused = torch.cat((case.q, case.k, case.v), dim=1)
        q, case.k, case.v = fused.split((4, 2, 2), dim=1)
        before = case.k.clone(), case.v.clone()
        if rotated:
            angles = torch.arange(53, device=DEVICE)[:, None] * 0.3 ** torch.arange(rotated // 2, device=DEVICE)
            options |= {"cos": angles.cos()[:, None], "sin": angles.sin()[:, None], "q": q}
        for x in (case.k_cache, case.v_cache, *case.scales.values()):
            x.zero_()
        case.append(**options)
        assert torch.equal(case.k, before[0])
        assert torch.equal(case.v, before[1])
        caches = (case.k_cache, case.v_cache)
        scales = case.scales.values() if case.scales else (None, None)
        blocks = torch.arange(len(case.k_cache), device=DEVICE)
        results.append([q, *(reference.read_cache(x, blocks, s).float() for x, s in zip(caches, scales, strict=True))])
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2e-6, atol=2e-6)
    step = {torch.int8: 0.03, FLOAT8: 0.13, torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(cache_dtype, 2e-6)
    for ours, theirs in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=step, atol=step)
        differ = (ours - theirs).abs() > 1e-6 * theirs.abs()  # on a GPU torch divides by 127 by multiplying
        assert differ.float().mean() < (0.05 if cache_dtype != torch.float32 else 1)  # of ties
    assert torch.equal(results[0][2], results[1][2]) or cache_dtype == torch.int8


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_append_rounds_to_the_nearest_level(backend: str) -> None:
    case = Case([40], [1], cache_dtype=torch.int8, head_dim=20)
    case.k[3] = 0
    case.k[4, 0, 7] = 100.0
    case.v[5, 1, 2] = torch.nan
    case.append(backend=backend)
    blocks = torch.arange(len(case.k_cache), device=DEVICE)
    stored = [
        reference.read_cache(cache, blocks, scale).flatten(0, 1)[case.slots]
        for cache, scale in zip((case.k_cache, case.v_cache), case.scales.values(), strict=True)
    ]
    step = case.k.abs().amax(-1, keepdim=True) / 127
    assert ((stored[0] - case.k).abs() <= step * 0.501).all()
    torch.testing.assert_close(case.scales["k_scale"].flatten(0, 1)[case.slots], step[..., 0], rtol=2e-7, atol=0)
    assert stored[1][5, 1].isnan().all()
    assert stored[1].isnan().sum() == 20


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_float8_saturates(backend: str) -> None:
    case = Case([5], [1], cache_dtype=FLOAT8)
    case.k[2] *= 1000
    case.k[3, 0, 0] = torch.nan
    case.append(backend=backend)
    stored = reference.read_cache(case.k_cache, torch.arange(2, device=DEVICE), None).flatten(0, 1)[case.slots]
    assert stored.nan_to_num().abs().max() == 448
    assert stored.isnan().sum() == 1


def test_append_nothing() -> None:
    case = Case([5], [1])
    before = case.k_cache.clone()
    case.k, case.v, case.slots = case.k[:0], case.v[:0], case.slots[:0]
    case.append(backend="triton")
    assert before.nan_to_num().equal(case.k_cache.nan_to_num())


def test_gradients_are_left_to_others() -> None:
    case = Case([20], [1], padding=0)
    case.q.requires_grad_()
    with pytest.raises(ValueError, match="has no triton backend here"):
        case.run()
    with torch.no_grad():
        case.run()
    case.k.requires_grad_()
    with pytest.raises(ValueError, match="has no triton backend here"):
        case.append(backend="triton")


@pytest.mark.parametrize(
    ("cache_dtype", "changes", "said"),
    [
        (None, {"v_cache": torch.zeros(3, 16, 2, 32)}, "the caches alike"),
        (None, {"v_cache": torch.zeros(2, 16, 2, 64).half()}, "of one dtype"),
        (torch.int8, {"v_scale": None}, "needs both k_scale and v_scale"),
        (torch.int8, {"v_scale": torch.zeros(2, 16, 1)}, r"must be float32 \(2, 16, 2\)"),
        (None, {"k_scale": torch.zeros(2, 16, 2)}, "no other takes them"),
        (None, {"k_cache": torch.zeros(2, 16, 2, 64).int(), "v_cache": torch.zeros(2, 16, 2, 64).int()}, "of floats"),
        (None, {"table": torch.zeros(2, 1).int()}, r"cu_seqlens_q \(batch \+ 1,\)"),
        (None, {"table": torch.zeros(1, 1)}, "block_table must be int32"),
        (None, {"window": 0}, "window must be at least 1"),
        (None, {"q": torch.zeros(1, 3, 64)}, "2 kv heads do not divide 3 heads"),
        (None, {"batch_invariant": True, "backend": "torch"}, "has no torch backend here"),
        (None, {"backend": "cuda"}, "unknown backend"),
    ],
)
def test_what_is_refused(cache_dtype: torch.dtype | None, changes: dict[str, Any], said: str) -> None:
    case = Case([10], [1], cache_dtype=cache_dtype)
    moved = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in changes.items()}
    for name in ("q", "k_cache", "v_cache", "table"):
        setattr(case, name, moved.pop(name, getattr(case, name)))
    with pytest.raises(ValueError, match=said):
        case.run(**moved)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"v": torch.zeros(2, 1, 64)}, "alike"),
        ({"slots": torch.tensor([1])}, r"slots must be int64 \(2,\)"),
        ({"slots": torch.tensor([1, 2]).int()}, r"slots must be int64 \(2,\)"),
        ({"cos": torch.zeros(2, 8)}, "both cos and sin"),
        ({"q": torch.zeros(2, 4, 64)}, "both cos and sin"),
        ({"cos": torch.zeros(2, 8), "sin": torch.zeros(2, 9)}, "must be alike"),
        ({"cos": torch.zeros(3, 8), "sin": torch.zeros(3, 8)}, "cos and sin must be float32"),
        ({"cos": torch.zeros(2, 40), "sin": torch.zeros(2, 40)}, "at most 32"),
        ({"q": torch.zeros(3, 4, 64), "cos": torch.zeros(2, 8), "sin": torch.zeros(2, 8)}, r"q must be \(2, heads, 64"),
    ],
)
def test_what_append_refuses(changes: dict[str, Any], said: str) -> None:
    given = {"k": torch.zeros(2, 2, 64), "v": torch.zeros(2, 2, 64), "slots": torch.tensor([3, 4])} | changes
    given = {name: x.to(DEVICE) for name, x in given.items()}
    cache = torch.zeros(4, 16, 2, 64, device=DEVICE)
    with pytest.raises(ValueError, match=said):
        append_to_cache(given.pop("k"), given.pop("v"), cache, cache, given.pop("slots"), **given)


@pytest.mark.parametrize("most_keys", [1, 128, 2048, 1 << 20])
@pytest.mark.parametrize("programs", [1, 8, 32, 300, 512, 100_000])
def test_splits_fill_the_gpu_or_run_out_of_keys(programs: int, most_keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_configs, "multiprocessors", lambda: 132)
    config = paged_configs.Config(16, 64, 4, 3, 3, 3)
    count = paged_configs.splits(programs, most_keys, config, False)
    assert 1 <= count <= max(1, most_keys // 128)
    waves = programs * count / (132 * 3)
    enough = count == min(128, max(1, most_keys // 128))
    assert enough or waves / -(-waves // 1) >= 0.85
    assert paged_configs.splits(programs, most_keys, config, True) == -(-most_keys // 512)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8, FLOAT8])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (16, 16, 64), (12, 12, 64)])
def test_long_sequences(heads: int, kv_heads: int, head_dim: int, cache_dtype: torch.dtype) -> None:
    keys = [1, 2047, 8192]
    for queries in ([1, 1, 1], [1, 4, 4], [1, 100, 700]):
        case = Case(keys, queries, heads, kv_heads, head_dim, 16, torch.bfloat16, cache_dtype)
        case.check()
        case.check(batch_invariant=True)
        case.check(relative_bias=relative_bias(heads))
    assert torch.equal(case.run(), case.run())


@pytest.mark.gpu
@on_a_gpu
def test_long_sequences_in_float32() -> None:
    for queries in ([1, 1, 1], [1, 100, 700]):
        Case([1, 2047, 8192], queries, 8, 4, 64).check()


@pytest.mark.gpu
@on_a_gpu
def test_a_cuda_graph_serves_all_lengths() -> None:
    """Captured once, replayed with other lengths, tables, slots and numbers."""
    cases = [
        Case(keys, [1] * 4, 8, 2, 128, 16, torch.bfloat16, padding=0)
        for keys in ([300, 1, 17, 900], [899, 640, 1, 30], [0, 100, 900, 16])
    ]
    blocks = max(len(case.k_cache) for case in cases)
    k_cache, v_cache = (torch.zeros(blocks, 16, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q, k, v = torch.zeros_like(cases[0].q), *(torch.zeros(4, 2, 128, device="cuda").bfloat16() for _ in range(2))
    width = max(case.table.shape[1] for case in cases)
    table = torch.zeros(4, width, dtype=torch.int32, device="cuda")
    lengths, slots = torch.zeros(4, dtype=torch.int32, device="cuda"), torch.full((4,), -1, device="cuda")
    bounds = offsets([1] * 4)

    def step() -> Tensor:
        append_to_cache(k, v, k_cache, v_cache, slots, backend="triton")
        return paged_attention(q, k_cache, v_cache, table, lengths, bounds, max_seqlen_q=1, backend="triton")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for case in cases:
        ends = list(itertools.accumulate(case.keys))
        last = [end - 1 for end in ends]
        k_cache.fill_(torch.nan)
        v_cache.fill_(torch.nan)
        k_cache[: len(case.k_cache)], v_cache[: len(case.v_cache)] = case.k_cache, case.v_cache
        q.copy_(case.q)
        k.copy_(case.k[last])
        v.copy_(case.v[last])
        slots.copy_(torch.where(case.lengths > 0, case.slots[last], -1))
        table.fill_(-5)
        table[:, : case.table.shape[1]] = case.table
        lengths.copy_(case.lengths)
        graph.replay()
        torch.testing.assert_close(out.double(), case.expected(), rtol=1e-2, atol=1e-2)
