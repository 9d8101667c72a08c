"""Random shapes, storages and options of linear layers, attention over the cache, programs and edits, by formulas."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.attention_options import RelativeBias
from kernels.cached_attention import CacheFormat
from kernels.extension import _C
from kernels.packed_linear import gated_order
from tests.kernels.packed_weights import ACTIVATIONS, KINDS, exact, linear, product
from tests.kernels.test_cached_attention import DTYPES, Batch, assert_close
from tests.kernels.test_logit_edits import edited, make_scores, random_edits

NONE = -1
NO_SCORES = (0, 0.0, None, None)
FLOATS = [kind for kind in KINDS if not kind.rounds]


def maybe(draw: random.Random, value: Any, otherwise: Any = None) -> Any:
    return value if draw.random() < 0.5 else otherwise


def check_linear(draw: random.Random) -> None:
    kind = draw.choice(KINDS)
    inputs, outputs = kind.group * draw.randint(1, max(1, 300 // kind.group)), draw.randint(1, 200)
    rows, width, gated = draw.choice([0, 1, 2, 5, 17, draw.randint(1, 120)]), draw.randint(1, 100), draw.random() < 0.3
    weight = torch.randn(2 * width if gated else outputs, inputs) * 10 ** draw.uniform(-2, 1)
    order = gated_order(width) if gated else maybe(draw, torch.randint(-1, outputs, (draw.randint(1, 200),)))
    packed, stored = kind.pack(weight, order)
    count = len(stored) // 2 if gated else len(stored)
    activation = draw.choice(list(ACTIVATIONS))
    x = (torch.randn(rows, inputs + 9) * 10 ** draw.uniform(-2, 2))[:, 3 : 3 + inputs]
    bias, residual = maybe(draw, torch.randn(len(stored))), maybe(draw, torch.randn(rows, count))
    sums, magnitude = product(kind, x, stored)
    if bias is not None:
        sums, magnitude = sums + bias, magnitude + bias.abs()
    if gated:
        gates, factors = (half.flatten(1) for half in sums.unflatten(1, (-1, 2, 32)).unbind(2))
        first, second = (half.flatten(1) for half in magnitude.unflatten(1, (-1, 2, 32)).unbind(2))
        expected = ACTIVATIONS[activation](gates) * factors
        magnitude = first * (factors.abs() + second)
    else:
        expected = ACTIVATIONS[activation](sums)
    if residual is not None:
        expected, magnitude = expected + residual, magnitude + residual.abs()
    out = residual if draw.random() < 0.3 else None
    actual = linear(x, packed, bias=bias, activation=activation, gated=gated, residual=residual, out=out,
                    widen=kind.widen, threads=draw.randint(1, 3))  # fmt: skip
    assert ((actual - expected).abs() <= 2e-6 * magnitude + 1e-30).all()


def check_cached_attention(draw: random.Random) -> None:
    kv_heads, head_dim = draw.randint(1, 3), draw.randint(1, 96)
    heads, sequences = kv_heads * draw.choice([1, 2, 3, 5, 8]), draw.randint(1, 4)
    keys = [draw.choice([0, 1, 16, draw.randint(1, 90), draw.randint(1, 700)]) for _ in range(sequences)]
    queries = [min(n, draw.choice([0, 1, 1, 3, draw.randint(0, 40)])) for n in keys]
    queries[0], keys[0] = max(queries[0], 1), max(keys[0], 1)
    form = CacheFormat(draw.choice(DTYPES), kv_heads, head_dim, 16 * draw.randint(1, 3))
    reach, buckets = draw.randint(8, 60), draw.choice([4, 8, 32])
    options = {
        "causal": draw.random() < 0.7, "window": maybe(draw, draw.randint(1, 200)),
        "softcap": maybe(draw, draw.uniform(1, 9), 0.0), "alibi_slopes": maybe(draw, torch.rand(heads)),
        "relative_bias": maybe(draw, RelativeBias(torch.randn(buckets, heads), reach * 4, draw.random() < 0.5)),
        "softmax_scale": maybe(draw, draw.uniform(0.05, 0.5)),
    }  # fmt: skip
    batch = Batch(keys, queries, heads, form)
    assert_close(batch.run(**options), batch.expected(**options), 2e-5)


class Chain:
    """A program of random operations, and what its rows should hold, in float64."""

    def __init__(self, draw: random.Random) -> None:
        self.draw, self.program = draw, _C.Program()
        self.lengths = [draw.randint(1, 20) for _ in range(draw.randint(1, 4))]
        self.tokens = sum(self.lengths)
        self.width = 64 * draw.randint(1, 2)
        table, self.ids = torch.randn(31, self.width), torch.randint(0, 31, (self.tokens,))
        packed, stored = draw.choice(FLOATS).pack(table)
        self.x = self.program.floats(self.width)
        self.program.embed(packed, 0.5, None, 0, self.x)
        self.value = stored[self.ids] * 0.5

    def norm(self) -> None:
        heads = self.draw.choice([1, 2, 4])
        width = self.width // heads
        scale, bias, mean = torch.randn(width), maybe(self.draw, torch.randn(width)), self.draw.random() < 0.5
        value = self.value.unflatten(1, (heads, width))
        value = value - value.mean(-1, keepdim=True) if mean else value
        value = value / (value.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale
        self.value = (value if bias is None else value + bias).flatten(1)
        given = None if bias is None else bias.numpy()
        self.program.norm(self.x, scale.numpy(), given, 1e-5, mean, self.x, 0, heads, NONE, NONE, False)

    def linear(self) -> None:
        kind, gated = self.draw.choice(FLOATS), self.draw.random() < 0.4
        width = 64 * self.draw.randint(1, 2)
        weight = torch.randn(2 * width if gated else width, self.width) * self.width**-0.5
        packed, _ = kind.pack(weight, gated_order(width) if gated else None)
        activation = self.draw.choice(list(ACTIVATIONS))
        value = self.value @ exact(kind.store(weight)).T
        gates, factors = value.split(width, dim=1) if gated else (value, torch.ones(1))
        value = ACTIVATIONS[activation](gates) * factors
        residual = NONE
        if width == self.width and self.draw.random() < 0.5:
            residual, value = self.x, value + self.value
        out = self.program.floats(width)
        self.program.linear(packed, None, activation, gated, self.x, NONE, residual, out)
        self.x, self.value, self.width = out, value, width

    def attention(self) -> None:
        heads, causal = self.draw.choice([1, 2, 4]), self.draw.random() < 0.5
        head_dim = self.width // heads
        weight = torch.randn(3 * self.width, self.width) * self.width**-0.5
        packed, stored = KINDS[0].pack(weight)
        qkv, out = self.program.floats(3 * self.width), self.program.floats(self.width)
        self.program.linear(packed, None, "none", False, self.x, NONE, NONE, qkv)
        self.program.attend_within(heads, heads, head_dim, NO_SCORES, head_dim**-0.5, qkv, out, causal, 0)
        parts = (self.value @ stored.T).split(self.lengths)
        mixed = [
            reference.attention(*each.view(1, len(each), 3, heads, head_dim).unbind(2), causal=causal)[0][0]
            for each in parts
        ]
        self.x, self.value = out, torch.cat(mixed).flatten(1)

    def run(self) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(0, self.tokens, (self.draw.randint(1, 9),))
        out = torch.full((len(chosen), self.width), torch.nan)
        self.program.deliver(self.x)
        offsets = np.cumsum([0, *self.lengths]).astype(np.int32)
        self.program.run(self.ids.numpy(), np.arange(self.tokens), offsets, None, None, None, None, None, None,
                         chosen.numpy(), out.numpy(), self.draw.randint(1, 3))  # fmt: skip
        return out, self.value[chosen]


def check_program(draw: random.Random) -> None:
    chain = Chain(draw)
    for _ in range(draw.randint(1, 6)):
        draw.choice([chain.norm, chain.linear, chain.linear, chain.attention])()
    actual, expected = chain.run()
    assert ((actual - expected).abs() <= 1e-4 * expected.abs().amax().clamp(min=1)).all()


def check_edits(draw: random.Random) -> None:
    rows, vocab = draw.randint(1, 9), draw.choice([draw.randint(1, 200), draw.randint(1, 3000)])
    scores = make_scores(rows, vocab, draw.randint(0, 999))
    for _ in range(draw.choice([0, 0, 3])):
        scores[draw.randrange(rows), draw.randrange(vocab)] = draw.choice([math.nan, math.inf, -math.inf])
    edited(scores, random_edits(draw, rows, vocab), num_threads=draw.randint(1, 3))


CHECKS = pytest.mark.parametrize("check", [check_linear, check_cached_attention, check_program, check_edits])


def run(check: Callable[[random.Random], None], seeds: range) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        try:
            check(random.Random(seed))
        except AssertionError as error:
            raise AssertionError(f"{check.__name__} fails for seed {seed}") from error


@CHECKS
def test_what_is_drawn_at_random_is_what_the_formula_says(check: Callable[[random.Random], None]) -> None:
    run(check, range(40))


@pytest.mark.slow
@CHECKS
def test_much_of_what_is_drawn_at_random_is_what_the_formula_says(check: Callable[[random.Random], None]) -> None:
    run(check, range(40, 2000))
