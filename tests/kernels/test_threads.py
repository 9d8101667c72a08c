"""Every loop that the core shares out among threads gives on several of them what it gives on one.

``make sanitize`` runs these under ThreadSanitizer, which watches the core alone: they call it, and torch does not
compute meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels.extension import _C
from kernels.sampling import SamplingBatch, sample
from tests.kernels.packed_weights import KINDS, Kind
from tests.kernels.test_packed_linear import numbers as tensor
from tests.kernels.test_program import FORMAT, NO_SCORES, attention_program, cache, ints, numbers, step

Array = NDArray[Any]
Run = Callable[[int], list[Array]]  # what a number of threads gives


def empty(*shape: int) -> Array:
    return np.full(shape, np.nan, np.float32)


def linear(kind: Kind) -> Run:
    packed, _ = kind.pack(tensor(130, 64))
    x = numbers(37, 64)

    def run(threads: int) -> list[Array]:
        out = empty(37, 130)
        _C.linear(x, packed, None, "silu", False, None, kind.widen, out, threads)
        return [out]

    return run


def packing(threads: int) -> list[Array]:
    weight = _C.PackedWeight.from_floats(numbers(200, 30), False, None, threads)
    return [weight.rows(np.arange(200))]


def program(threads: int) -> list[Array]:
    memory = cache()
    return [step(attention_program(), threads, cache=memory), memory]


def cached_attention(threads: int) -> list[Array]:
    """Long enough to be cut into parts, which are put together again."""
    memory, length = cache(100), 1500
    k, v, q, out = numbers(length, 2, 16), numbers(length, 2, 16, seed=1), numbers(9, 4, 16), empty(9, 4, 16)
    _C.cache_append(memory, FORMAT, k, v, np.arange(length), None, None, False, None, threads)
    table = np.arange(100, dtype=np.int32)[None].repeat(2, 0)
    bounds, lengths = ints(0, 1, 9), ints(length, 900)
    _C.cached_attention(q, memory, FORMAT, table, lengths, bounds, True, 0.25, NO_SCORES, out, threads)
    return [memory, out]


def attention(threads: int) -> list[Array]:
    q, k, v, grad = (numbers(2, 70, 4, 16, seed=seed) for seed in range(4))
    out, lse, grads = empty(*q.shape), empty(2, 4, 70), [empty(*q.shape) for _ in range(3)]
    given = (None, None, None, True, 0.25, NO_SCORES)
    _C.attention_forward(q, k, v, *given, out, lse, threads)
    _C.attention_backward(q, k, v, *given, out, lse, grad, None, *grads, None, threads)
    return [out, lse, *grads]


def elementwise(threads: int) -> list[Array]:
    x = numbers(300, 200)
    activated, turned, sums = empty(*x.shape), empty(200, 300), empty(200)
    _C.gelu(x, False, activated, threads)
    _C.transpose(x, turned, sums, threads)
    return [activated, turned, sums]


def sampling(threads: int) -> list[Array]:
    batch = SamplingBatch.build(12, temperature=0.8, top_k=40, top_p=0.9, num_logprobs=5)
    result = sample(tensor(12, 3000), batch, num_threads=threads)
    return [x.numpy() for x in (result.token_ids, result.logprobs, result.ranks, result.top_ids, result.top_logprobs)]


RUNS: dict[str, Run] = {
    **{f"linear-{kind.name}": linear(kind) for kind in KINDS}, "packing": packing, "program": program,
    "cached_attention": cached_attention, "attention": attention, "elementwise": elementwise, "sampling": sampling,
}  # fmt: skip


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_several_threads_give_what_one_gives(run: Run) -> None:
    expected = run(1)
    for threads in (2, 3, 5):
        assert all(map(np.array_equal, run(threads), expected))


def test_calls_from_several_threads_at_once_do_not_meet() -> None:
    names = ["program", "cached_attention", "linear-int4-32", "sampling"]
    expected = {name: RUNS[name](1) for name in names}
    results: list[tuple[str, list[Array]]] = []

    def work(name: str) -> None:
        for _ in range(3):
            results.append((name, RUNS[name](2)))

    callers = [threading.Thread(target=work, args=(name,)) for name in names]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 12
    assert all(np.array_equal(a, b) for name, result in results for a, b in zip(result, expected[name], strict=True))
