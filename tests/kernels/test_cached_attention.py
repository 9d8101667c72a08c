"""Attention over the native CPU cache against the reference in float64, and bit for bit against itself."""

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
from kernels.cached_attention import PAGE, CacheFormat, append, attend
from tests.kernels.conftest import RunOnPath

CPU_PATHS = ("generic", "avx2", "avx512")
DTYPES = ("float32", "bfloat16", "int8")
ELEMENTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def width_of(head_dim: int) -> int:
    return -(-head_dim // 16) * 16


def stored(cache: Tensor, form: CacheFormat) -> tuple[Tensor, Tensor]:
    """The keys and values in a layer of the cache, read back: float32 (num_blocks, block_size, kv_heads, head_dim)."""
    width, element = width_of(form.head_dim), ELEMENTS[form.dtype]
    parts = cache.reshape(cache.shape[0], form.block_size // PAGE, form.kv_heads, 2, -1)
    elements = PAGE * width * element.itemsize
    numbers = parts[..., :elements].contiguous().view(element).float()
    keys = numbers[..., 0, :].unflatten(-1, (width, PAGE)).transpose(-1, -2)
    values = numbers[..., 1, :].unflatten(-1, (PAGE, width))
    if form.dtype == "int8":
        scales = parts[..., elements:].contiguous().view(torch.float32)
        keys, values = keys * scales[..., 0, :, None], values * scales[..., 1, :, None]
    # (num_blocks, pages, kv_heads, PAGE, width) to tokens in order
    return tuple(x.transpose(2, 3).flatten(1, 2)[..., : form.head_dim] for x in (keys, values))  # type: ignore[return-value]


@dataclass
class Batch:
    """Sequences in a cache whose blocks lie out of order; what no token has filled is NaN, or nonsense."""

    keys: list[int]
    queries: list[int]
    heads: int = 4
    form: CacheFormat = field(default_factory=lambda: CacheFormat("float32", 2, 64, 16))

    def __post_init__(self) -> None:
        torch.manual_seed(sum(self.keys) + self.form.head_dim)
        self.q = torch.randn(sum(self.queries), self.heads, self.form.head_dim)
        self.k, self.v = torch.randn(2, sum(self.keys), self.form.kv_heads, self.form.head_dim)
        size = self.form.block_size
        blocks = [-(-n // size) for n in self.keys]
        self.cache = torch.full((sum(blocks) + 1, self.form.layer_bytes), 0xFF, dtype=torch.uint8)
        order = torch.randperm(sum(blocks) + 1).int()
        self.table = torch.full((len(self.keys), max(blocks) + 1), -7, dtype=torch.int32)
        slots, begin = [], 0
        for i, (n, count) in enumerate(zip(self.keys, blocks, strict=True)):
            self.table[i, :count] = order[begin : begin + count]
            begin += count
            place = torch.arange(n)
            slots.append(self.table[i, place // size].long() * size + place % size)
        self.slots = torch.cat(slots)
        append(self.k, self.v, self.cache, self.form, self.slots)

    def part(self, sequence: int, queries: slice, keys: int) -> Batch:
        """Some of a sequence's queries alone, over its first keys in the same cache."""
        part = copy(self)
        first = int(offsets(self.queries)[sequence])
        part.q = self.q[first : first + self.queries[sequence]][queries]
        part.keys, part.queries, part.table = [keys], [len(part.q)], self.table[sequence : sequence + 1]
        return part

    def run(self, **options: Any) -> Tensor:
        lengths = torch.tensor(self.keys).int()
        return attend(self.q, self.cache, self.form, self.table, lengths, offsets(self.queries), **options)

    def expected(self, *, causal: bool = True, softmax_scale: float | None = None, **options: Any) -> Tensor:
        """The reference in float64 on what the cache holds."""
        given = {"window": None, "softcap": 0.0, "alibi_slopes": None, "relative_bias": None} | options
        k, v = (x.double().nan_to_num() for x in stored(self.cache, self.form))
        return reference.paged_attention(
            self.q.double(), k, v, self.table.clamp(min=0), torch.tensor(self.keys), offsets(self.queries),
            causal=causal, softmax_scale=softmax_scale, options=score_options(self.heads, **given),
        )  # fmt: skip


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected.float(), rtol=tolerance, atol=tolerance)


LENGTHS = [1, 15, 16, 17, 63, 111, 1000]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (8, 1)])
@pytest.mark.parametrize("head_dim", [8, 20, 64, 80, 96, 128, 256])
def test_decoding_matches_the_reference(heads: int, kv_heads: int, head_dim: int, dtype: str) -> None:
    batch = Batch(LENGTHS, [1] * len(LENGTHS), heads, CacheFormat(dtype, kv_heads, head_dim, 32))
    assert_close(batch.run(), batch.expected())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 64), (3, 1, 80), (8, 1, 20), (7, 1, 5)])
def test_prefill_matches_the_reference(heads: int, kv_heads: int, head_dim: int, dtype: str, causal: bool) -> None:
    batch = Batch([63, 0, 600, 17, 9], [63, 2, 40, 1, 14], heads, CacheFormat(dtype, kv_heads, head_dim, 16))
    assert_close(batch.run(causal=causal), batch.expected(causal=causal))


def relative_bias(heads: int, buckets: int = 32, reach: int = 128, bidirectional: bool = False) -> RelativeBias:
    return RelativeBias(torch.randn(buckets, heads), reach, bidirectional)


OPTIONS: list[dict[str, Any]] = [
    {"window": 1},
    {"window": 37},
    {"window": 530},
    {"softcap": 2.0},
    {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.01])},
    {"relative_bias": relative_bias(4)},
    {"relative_bias": relative_bias(4, 8, 20, bidirectional=True)},
    {"softmax_scale": 0.3},
    {
        "window": 100,
        "softcap": 3.0,
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.01]),
        "relative_bias": relative_bias(4, 7, 11, bidirectional=True),
        "softmax_scale": 0.2,
    },
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_options_match_the_reference(options: dict[str, Any], causal: bool) -> None:
    batch = Batch([1, 17, 111, 600, 1100], [1, 17, 3, 30, 1], form=CacheFormat("float32", 2, 20, 16))
    assert_close(batch.run(causal=causal, **options), batch.expected(causal=causal, **options))


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("bfloat16", 3e-3), ("int8", 8e-3)])
def test_what_the_cache_costs_in_precision(dtype: str, error: float) -> None:
    """The root mean square of the error against float64 on the tokens as they were, relative to the output's."""
    batch = Batch([200, 90], [1, 90], form=CacheFormat(dtype, 2, 64, 16))
    exact = Batch([200, 90], [1, 90], form=CacheFormat("float32", 2, 64, 16))
    assert torch.equal(batch.k, exact.k)
    expected = exact.expected()
    assert (batch.run() - expected).square().mean().sqrt() <= error * expected.square().mean().sqrt()


def test_bfloat16_is_rounded_as_torch_rounds() -> None:
    batch = Batch([40], [1], form=CacheFormat("bfloat16", 2, 20, 16))
    for cached, original in zip(stored(batch.cache, batch.form), (batch.k, batch.v), strict=True):
        assert torch.equal(cached.flatten(0, 1)[batch.slots], original.bfloat16().float())


def test_int8_is_rounded_to_the_nearest_of_a_tokens_levels() -> None:
    batch = Batch([40], [1], form=CacheFormat("int8", 2, 20, 16))
    batch.k[3] = 0
    batch.k[4, 0, 7] = 100.0
    append(batch.k, batch.v, batch.cache, batch.form, batch.slots)
    for cached, original in zip(stored(batch.cache, batch.form), (batch.k, batch.v), strict=True):
        step = original.abs().amax(-1, keepdim=True) / 127
        assert ((cached.flatten(0, 1)[batch.slots] - original).abs() <= step * 0.501).all()


@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_equals_prefill_bit_for_bit(dtype: str, options: dict[str, Any]) -> None:
    whole = Batch([600], [600], form=CacheFormat(dtype, 2, 20, 16))
    expected = whole.run(**options)
    for n in (1, 2, 15, 16, 17, 64, 65, 511, 512, 513, 600):
        step = whole.part(0, slice(n - 1, n), n)
        assert torch.equal(step.run(**options), expected[n - 1 : n])


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1), (8, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_chunks_of_any_size_give_the_same_bits(heads: int, kv_heads: int, causal: bool) -> None:
    whole = Batch([70], [70], heads, CacheFormat("float32", kv_heads, 64, 16))
    expected = whole.run(causal=causal)
    for begin, end in ((0, 3), (5, 70), (33, 40), (69, 70)):
        chunk = whole.part(0, slice(begin, end), end if causal else 70)
        assert torch.equal(chunk.run(causal=causal), expected[begin:end])


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    keys, queries = [100, 33, 1200, 70, 16], [1, 33, 2, 7, 1]
    batch = Batch(keys, queries)
    out = batch.run()
    for i, (begin, end) in enumerate(itertools.pairwise(offsets(queries).tolist())):
        assert torch.equal(batch.part(i, slice(None), keys[i]).run(), out[begin:end])


@pytest.mark.parametrize(("keys", "queries"), [([1700], [1]), ([1700, 40], [9, 1]), ([64] * 9, [1] * 9)])
def test_the_number_of_threads_changes_nothing(keys: list[int], queries: list[int]) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            batch = Batch(keys, queries, form=CacheFormat("int8", 2, 20, 16))
            windowed = batch.run(window=900), batch.run(window=255, causal=False)
            results.append((batch.cache, batch.run(), *windowed))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_the_size_of_a_block_changes_nothing() -> None:
    small, large = (Batch([100, 40], [30, 1], form=CacheFormat("float32", 2, 20, size)) for size in (16, 48))
    assert torch.equal(small.run(), large.run())


def test_a_query_without_keys_gives_zeros() -> None:
    out = Batch([0, 3], [2, 5]).run()
    assert not out[:4].any()
    assert out[4:].any()


def test_what_is_not_finite_stays_with_those_who_see_it() -> None:
    batch = Batch([30, 30], [30, 30])
    expected = batch.run()
    batch.v[20] = torch.inf
    batch.k[50] = torch.nan
    append(batch.k, batch.v, batch.cache, batch.form, batch.slots)
    out = batch.run()
    assert torch.equal(out[:20], expected[:20])
    assert torch.equal(out[30:50], expected[30:50])
    assert not out[20:30].isfinite().any()
    assert out[50:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_in_the_cache_reaches_the_output(dtype: str) -> None:
    batch = Batch([30], [1], form=CacheFormat(dtype, 2, 20, 16))
    for tokens in (batch.k, batch.v):
        tokens[12, 0, 5] = torch.nan
        append(batch.k, batch.v, batch.cache, batch.form, batch.slots)
        assert batch.run()[:, :2].isnan().any()
        tokens[12, 0, 5] = 1.0


def test_views_into_a_fused_projection_and_a_cache_of_many_layers() -> None:
    batch = Batch([40], [40])
    layers = torch.zeros(batch.cache.shape[0], 3, batch.form.layer_bytes, dtype=torch.uint8)
    fused = torch.cat((batch.q, batch.k, batch.v), dim=1)
    q, k, v = fused.split((4, 2, 2), dim=1)
    append(k, v, layers[:, 1], batch.form, batch.slots)
    assert not layers[:, ::2].any()
    out = torch.zeros(40, 6, 64)
    given = (batch.form, batch.table, torch.tensor([40]).int(), offsets([40]))
    assert attend(q, layers[:, 1], *given, out=out[:, 1:5]) is not None
    assert torch.equal(out[:, 1:5], batch.run())
    assert not out[:, ::5].any()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotated"), [(64, 64), (80, 20), (20, 14), (256, 256)])
def test_append_rotates_keys_and_queries(head_dim: int, rotated: int, interleaved: bool) -> None:
    batch = Batch([50], [50], form=CacheFormat("float32", 2, head_dim, 16))
    angles = torch.arange(50)[:, None] * 0.3 ** torch.arange(rotated // 2)
    cos, sin = angles.cos(), angles.sin()
    fused = torch.cat((batch.q, batch.k, batch.v), dim=1)
    q, k, v = fused.split((4, 2, 2), dim=1)
    append(k, v, batch.cache, batch.form, batch.slots, cos=cos, sin=sin, interleaved=interleaved, q=q)
    keys, values = (x.flatten(0, 1)[batch.slots] for x in stored(batch.cache, batch.form))
    turned = (reference.rotate(x, cos[:, None], sin[:, None], interleaved=interleaved) for x in (batch.q, batch.k))
    for actual, expected in zip((q, keys), turned, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(values, batch.v)
    assert torch.equal(k, batch.k)


def test_nothing_to_do() -> None:
    batch = Batch([20, 5], [1, 0])
    nothing = torch.empty(0, 2, 64)
    before = batch.cache.clone()
    append(nothing, nothing, batch.cache, batch.form, torch.empty(0, dtype=torch.int64))
    assert torch.equal(batch.cache, before)
    batch.keys, batch.queries, batch.q = [20, 5], [0, 0], torch.empty(0, 4, 64)
    assert batch.run().shape == (0, 4, 64)


CHECK_PATH = """
from kernels.cached_attention import CacheFormat
from tests.kernels.test_cached_attention import OPTIONS, Batch, assert_close
for dtype in ("float32", "bfloat16", "int8"):
    for head_dim in (20, 64):
        batch = Batch([17, 600, 63, 5], [1, 3, 63, 9], 6, CacheFormat(dtype, 2, head_dim, 16))
        for causal in (True, False):
            assert_close(batch.run(causal=causal), batch.expected(causal=causal))
    for options in ({}, *OPTIONS):
        whole = Batch([530], [530], form=CacheFormat(dtype, 2, 20, 16))
        expected = whole.run(**options)
        assert_close(expected, whole.expected(**options))
        for n in (1, 17, 513, 530):
            step = whole.part(0, slice(n - 1, n), n)
            assert torch.equal(step.run(**options), expected[n - 1 : n])
"""


@pytest.mark.parametrize("path", CPU_PATHS)
def test_each_cpu_path(path: str, run_on_path: RunOnPath) -> None:
    run_on_path(CHECK_PATH, path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"q": torch.zeros(2, 4, 32)}, r"q must have shape \(2, 4, 64\)"),
        ({"q": torch.zeros(2, 3, 64)}, "2 kv heads do not divide 3 heads"),
        ({"q": torch.zeros(2, 4, 64, dtype=torch.float64)}, "q must be float32"),
        ({"q": torch.zeros(2, 64, 4).transpose(1, 2)}, "last dimension contiguous"),
        ({"form": CacheFormat("float16", 2, 64, 16)}, "float32, bfloat16 or int8, not float16"),
        ({"form": CacheFormat("float32", 2, 64, 24)}, "block_size must be a multiple of 16 up to 1048576, got 24"),
        ({"form": CacheFormat("float32", 2, 300, 16)}, "head_dim must be between 1 and 256, got 300"),
        ({"form": CacheFormat("float32", 0, 64, 16)}, "kv_heads must be between 1 and 65536, got 0"),
        ({"form": CacheFormat("int8", 2, 64, 16)}, r"cache must be uint8 \(num_blocks, 4352\)"),
        ({"table": torch.full((2, 4), 99, dtype=torch.int32)}, "names block 99 of sequence 0"),
        ({"table": torch.full((2, 4), -1, dtype=torch.int32)}, "names block -1 of sequence 0"),
        ({"table": torch.zeros(2, 4)}, "block_table must be int32"),
        ({"lengths": torch.tensor([20, 99]).int()}, "cache_seqlens must be between 0 and 48, got 99 for sequence 1"),
        ({"lengths": torch.tensor([20, -1]).int()}, "cache_seqlens must be between"),
        ({"lengths": torch.tensor([20, 30])}, "cache_seqlens must be contiguous int32"),
        ({"bounds": offsets([1, 2])}, "cu_seqlens_q must rise from 0"),
        ({"bounds": offsets([2])}, "cu_seqlens_q must be contiguous int32"),
        ({"out": torch.zeros(2, 4, 32)}, "out must have shape"),
        ({"window": 0}, "window must be at least 1"),
        ({"relative_bias": relative_bias(2)}, "the relative bias is for 2 heads"),
    ],
)
def test_what_attend_refuses(changes: dict[str, Any], said: str) -> None:
    batch = Batch([20, 30], [1, 1])
    given = {"q": batch.q, "cache": batch.cache, "form": batch.form, "table": batch.table,
             "lengths": torch.tensor(batch.keys).int(), "bounds": offsets(batch.queries)} | changes  # fmt: skip
    arguments = [given.pop(name) for name in ("q", "cache", "form", "table", "lengths", "bounds")]
    with pytest.raises(ValueError, match=said):
        attend(*arguments, **given)


def test_attend_refuses_to_write_where_it_reads() -> None:
    batch = Batch([20, 30], [1, 1])
    with pytest.raises(ValueError, match="out must not overlap q"):
        batch.run(out=batch.q)
    inside = batch.cache.view(-1)[:2048].view(torch.float32).view(2, 4, 64)
    with pytest.raises(ValueError, match="out must not overlap cache"):
        batch.run(out=inside)


def test_a_cache_off_its_boundaries_is_refused() -> None:
    form = CacheFormat("float32", 2, 64, 16)
    memory = torch.zeros(4 * form.layer_bytes + 256, dtype=torch.uint8)
    k = torch.zeros(1, 2, 64)
    for cache, said in (
        (memory[4 : 4 + form.layer_bytes].view(1, -1), "boundary of 64 bytes"),
        (memory.as_strided((2, form.layer_bytes), (form.layer_bytes + 4, 1)), "a multiple of 64 bytes apart"),
        (memory.as_strided((2, form.layer_bytes), (64, 1)), "a multiple of 64 bytes apart"),
    ):
        with pytest.raises(ValueError, match=said):
            append(k, k, cache, form, torch.tensor([0]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"slots": torch.tensor([0, 64])}, "slots must be between 0 and 63, got 64 for token 1"),
        ({"slots": torch.tensor([-1, 0])}, "slots must be between 0 and 63, got -1 for token 0"),
        ({"slots": torch.tensor([1])}, "slots must be contiguous int64"),
        ({"slots": torch.tensor([1, 2]).int()}, "slots must be contiguous int64"),
        ({"v": torch.zeros(2, 1, 64)}, r"v must have shape \(2, 2, 64\)"),
        ({"k": torch.zeros(2, 2, 64, dtype=torch.bfloat16).float()[..., :32]}, "k must have shape"),
        ({"cos": torch.zeros(2, 8)}, "both cos and sin"),
        ({"cos": torch.zeros(2, 8), "sin": torch.zeros(2, 9)}, "sin must be contiguous float32"),
        ({"cos": torch.zeros(3, 8), "sin": torch.zeros(3, 8)}, "cos must be contiguous float32"),
        ({"cos": torch.zeros(2, 40), "sin": torch.zeros(2, 40)}, "turns 80 elements, a head has 64"),
        ({"q": torch.zeros(3, 4, 64)}, r"q must have shape \(2, 4, 64\)"),
    ],
)
def test_what_append_refuses(changes: dict[str, Any], said: str) -> None:
    form = CacheFormat("float32", 2, 64, 16)
    given = {"k": torch.zeros(2, 2, 64), "v": torch.zeros(2, 2, 64), "slots": torch.tensor([3, 4])} | changes
    cache = torch.zeros(4, form.layer_bytes, dtype=torch.uint8)
    arguments = [given.pop(name) for name in ("k", "v")]
    with pytest.raises(ValueError, match=said):
        append(*arguments, cache, form, **given)
