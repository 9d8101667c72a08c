"""Programs: a step equals its formula, and what would read or write beyond its memory is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kernels.cached_attention import CacheFormat
from kernels.extension import _C
from kernels.packed_linear import PackedWeight, pack
from kernels.quantization import quantize
from tests.kernels.packed_weights import rounded

VOCAB, DIM, HEADS, BLOCKS = 50, 32, 2, 6
FORMAT = CacheFormat("float32", 2, 16, 16)
NO_SCORES = (0, 0.0, None, None)
NONE = -1
Array = NDArray[Any]


def numbers(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(sum(shape) + seed).standard_normal(shape, dtype=np.float32)


def packed(*shape: int, seed: int = 0) -> PackedWeight:
    return pack(torch.from_numpy(numbers(*shape, seed=seed)))


def norm_of(program: Any, x: int, out: int, **changes: Any) -> None:
    given = {"weight": np.ones(DIM, np.float32), "bias": None, "eps": 1e-5, "mean": True, "column": 0, "heads": 1,
             "added": NONE, "bytes": NONE, "selected": False} | changes  # fmt: skip
    weight, bias, eps, mean, column, heads, added, rounded, selected = given.values()
    program.norm(x, weight, bias, eps, mean, out, column, heads, added, rounded, selected)


def ids(*values: int) -> Array:
    return np.array(values, np.int64)


def ints(*values: int) -> Array:
    return np.array(values, np.int32)


def cache(blocks: int = BLOCKS) -> Array:
    size = FORMAT.layer_bytes
    memory = np.zeros(blocks * size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + blocks * size].reshape(blocks, size)


def attention_program() -> Any:
    """Embedding, one layer of attention over the cache, and logits."""
    program = _C.Program()
    program.cache(FORMAT, 1)
    x, qkv, mixed = program.floats(DIM), program.floats(3 * DIM), program.floats(DIM)
    program.embed(packed(VOCAB, DIM), 1.0, None, 0, x)
    program.linear(packed(3 * DIM, DIM), None, "none", False, x, NONE, NONE, qkv)
    program.append(0, HEADS, qkv, HEADS * 16, 0)
    program.attend(0, HEADS, NO_SCORES, 0.25, qkv, mixed, False)
    program.linear(packed(DIM, DIM, seed=1), None, "none", False, mixed, NONE, x, x)
    program.head(packed(VOCAB, DIM, seed=2), None, x, NONE, 0.0)
    return program


def step(program: Any, threads: int = 1, **changes: Any) -> Array:
    """Runs a step of two sequences: four tokens of one, three of another that has five keys already."""
    given: dict[str, Any] = {
        "token_ids": ids(1, 2, 3, 4, 5, 6, 7), "positions": ids(0, 1, 2, 3, 5, 6, 7), "cu_seqlens": ints(0, 4, 7),
        "slots": ids(16, 17, 18, 19, 37, 38, 39), "lengths": ints(4, 8),
        "blocks": np.array([[1, -5], [2, -5]], np.int32), "source_lengths": None, "source_blocks": None,
        "cache": cache(), "selected": ids(3, 6), "out": np.full((2, VOCAB), np.nan, np.float32),
    }  # fmt: skip
    given |= changes
    program.run(*given.values(), threads)
    return given["out"]


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_small_program_equals_numpy(bits: int | None) -> None:
    table, weight, head = numbers(VOCAB, DIM), numbers(40, DIM, seed=1), numbers(VOCAB, 40, seed=2)
    positions, scale, offset = numbers(12, DIM), numbers(DIM, seed=3), numbers(DIM, seed=4)
    bias, logit_bias = numbers(40, seed=5), numbers(VOCAB, seed=6)
    stored = torch.from_numpy(weight) if bits is None else quantize(torch.from_numpy(weight), bits)
    dense = weight if bits is None else stored.dequantize().numpy()  # type: ignore[union-attr]
    program = _C.Program()
    x, y, z = program.floats(DIM), program.floats(DIM), program.floats(40)
    layer = pack(stored)
    rows = NONE if bits is None else program.bytes(layer)
    program.embed(pack(torch.from_numpy(table)), 2.0, positions, 2, x)
    norm_of(program, x, y, weight=scale, bias=offset, bytes=rows)
    program.linear(layer, bias, "relu", False, y if bits is None else NONE, rows, NONE, z)
    selected = program.floats(40)
    program.select(z, selected, 0.5)
    program.head(pack(torch.from_numpy(head)), logit_bias, selected, NONE, 3.0)

    tokens, places, chosen = ids(3, 49, 0, 7, 7), ids(0, 1, 2, 0, 9), ids(4, 0, 4)
    out = np.full((3, VOCAB), np.nan, np.float32)
    program.run(tokens, places, ints(0, 5), None, None, None, None, None, None, chosen, out, 2)
    embedded = table[tokens].astype(np.float64) * 2 + positions[places + 2]
    centred = embedded - embedded.mean(1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) * scale + offset
    if bits is not None:
        integers, scales, outliers = rounded(torch.from_numpy(normed.astype(np.float32)))
        normed = (integers * scales.double() + outliers).numpy()
    logits = np.maximum(normed @ dense.T + bias, 0)[chosen] * 0.5 @ head.T + logit_bias
    # A number that falls half-way between two integers may be rounded either way.
    tolerance = 1e-4 if bits is None else 5e-2
    np.testing.assert_allclose(out, 3 * np.tanh(logits / 3), rtol=tolerance, atol=tolerance)


def test_rows_are_delivered_as_selected() -> None:
    program, table = _C.Program(), numbers(VOCAB, DIM)
    x = program.floats(DIM)
    program.embed(pack(torch.from_numpy(table)), 1.0, None, 0, x)
    program.deliver(x)
    out = np.full((2, DIM), np.nan, np.float32)
    program.run(ids(3, 9, 4), ids(0, 1, 2), ints(0, 3), None, None, None, None, None, None, ids(2, 0), out, 1)
    assert np.array_equal(out, table[[4, 3]])
    assert program.nbytes > 0
    nothing = np.empty((0, DIM), np.float32)
    program.run(ids(), ids(), ints(0), None, None, None, None, None, None, ids(), nothing, 1)


def test_a_steps_bits_do_not_depend_on_threads_or_steps_before() -> None:
    expected = step(attention_program())
    assert np.isfinite(expected).all()
    program = attention_program()
    for threads in (3, 1, 2):
        assert np.array_equal(step(program, threads), expected)
    assert all(seconds > 0 for seconds in program.take_seconds())
    assert not any(program.take_seconds())


def test_one_program_called_from_several_threads_at_once_takes_turns() -> None:
    program, other = attention_program(), attention_program()
    expected = step(attention_program())
    results: list[Array] = []

    def work(own: Any) -> None:
        for size in (1, 30, 200) * 5:
            many = {"token_ids": np.ones(size, np.int64), "positions": np.arange(size), "cu_seqlens": ints(0, size),
                    "slots": np.arange(size), "lengths": ints(size), "blocks": np.arange(13, dtype=np.int32)[None],
                    "selected": ids(0), "out": np.zeros((1, VOCAB), np.float32), "cache": cache(13)}  # fmt: skip
            step(own, 2, **many)
            results.append(step(own, 2))

    threads = [threading.Thread(target=work, args=(own,)) for own in (program, program, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 45
    assert all(np.array_equal(result, expected) for result in results)


MISALIGNED = np.zeros(8 * 7 + 1, np.uint8)[1:].view(np.int64)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"token_ids": ids(1, 2, 3, VOCAB, 5, 6, 7)}, "token_ids holds 50, not between 0 and 49"),
        ({"token_ids": ids(1, 2, 3, -1, 5, 6, 7)}, "token_ids holds -1"),
        ({"token_ids": np.ones(7, np.int32)}, "token_ids must be contiguous int64"),
        ({"token_ids": np.ones(14, np.int64)[::2]}, "token_ids must be contiguous"),
        ({"token_ids": MISALIGNED}, "token_ids must .* off the boundaries"),
        ({"token_ids": np.ones(7, ">i8")}, "token_ids must be contiguous int64"),
        ({"positions": ids(0, 1, 2, -3, 5, 6, 7)}, "positions holds -3"),
        ({"positions": ids(0)}, "positions must be contiguous int64 of 7"),
        ({"cu_seqlens": ints(0, 4, 8)}, "cu_seqlens must rise from 0 to the number of tokens, 7"),
        ({"cu_seqlens": ints(1, 4, 7)}, "cu_seqlens must rise"),
        ({"cu_seqlens": ints(0, 8, 7)}, "cu_seqlens must rise"),
        ({"cu_seqlens": ints()}, "cu_seqlens must be"),
        ({"cu_seqlens": ids(0, 4, 7)}, "cu_seqlens must be contiguous int32"),
        ({"slots": None}, "needs slots"),
        ({"slots": ids(0, 1, 2, 3, 4, 5, 16 * BLOCKS)}, "slots holds 96, not between 0 and 95"),
        ({"slots": ids(0, 1, 2, 3, 4, 5, -1)}, "slots holds -1"),
        ({"slots": ids(0, 1)}, "slots must be contiguous int64 of 7"),
        ({"lengths": ints(3, 8)}, "the blocks of sequence 0 do not hold its keys"),
        ({"lengths": ints(4, 33)}, "the blocks of sequence 1 do not hold its keys"),
        ({"lengths": ints(4, 2**31 - 1)}, "the blocks of sequence 1"),
        ({"lengths": ints(4, -1)}, "the blocks of sequence 1"),
        ({"lengths": ints(4)}, "lengths must be contiguous int32 of 2"),
        ({"lengths": None}, "needs lengths and blocks"),
        ({"blocks": None}, "needs lengths and blocks"),
        ({"blocks": np.array([[1], [BLOCKS]], np.int32)}, "the blocks of sequence 1"),
        ({"blocks": np.array([[-1], [2]], np.int32)}, "the blocks of sequence 0"),
        ({"blocks": np.zeros((2, 0), np.int32)}, "the blocks of sequence 0"),
        ({"blocks": np.zeros((3, 1), np.int32)}, "blocks must be int32"),
        ({"blocks": np.zeros((2, 1), np.int64)}, "blocks must be contiguous int32"),
        ({"blocks": np.zeros((2, 4), np.int32)[:, ::2]}, "blocks must be contiguous"),
        ({"cache": None}, "the program needs a cache"),
        ({"cache": cache()[:, :-64]}, "cache must be contiguous uint8"),
        ({"cache": cache().view(np.int8)}, "cache must be contiguous uint8"),
        ({"cache": cache().reshape(-1)[4 : 4 + FORMAT.layer_bytes].reshape(1, -1)}, "boundary of 64 bytes"),
        ({"cache": cache()[::2]}, "cache must be contiguous"),
        ({"cache": np.broadcast_to(cache()[:1], cache().shape)}, "cache must be contiguous"),
        ({"selected": ids(0, 7)}, "selected holds 7, not between 0 and 6"),
        ({"selected": ids(0, -1)}, "selected holds -1"),
        ({"out": np.zeros((1, VOCAB), np.float32)}, r"out must be contiguous float32 \(2, 50\)"),
        ({"out": np.zeros((2, VOCAB))}, "out must be contiguous float32"),
        ({"out": np.zeros((2, VOCAB + 1), np.float32)[:, :VOCAB]}, "out must be contiguous"),
        ({"threads": 0}, "num_threads must be between 1 and 1024"),
    ],
)
def test_what_a_step_refuses(changes: dict[str, Any], said: str) -> None:
    program = attention_program()
    with pytest.raises(ValueError, match=said):
        step(program, **changes)
    assert np.isfinite(step(program)).all()


def test_a_step_does_not_write_where_it_reads() -> None:
    memory = np.zeros(4096, np.uint8)
    memory = memory[-memory.ctypes.data % 64 :]
    out = memory[: 2 * VOCAB * 4].view(np.float32).reshape(2, VOCAB)
    for name, size in (("token_ids", 7), ("slots", 7), ("selected", 2)):
        with pytest.raises(ValueError, match="out must not overlap what is read"):
            step(attention_program(), out=out, **{name: memory[: size * 8].view(np.int64)})
    blocks = cache()
    with pytest.raises(ValueError, match="cache must not overlap what is read"):
        step(attention_program(), cache=blocks, blocks=blocks[0, :8].view(np.int32).reshape(2, 1))
    with pytest.raises(ValueError, match="out must not overlap cache"):
        step(attention_program(), cache=blocks, out=blocks[0, : 2 * VOCAB * 4].view(np.float32).reshape(2, VOCAB))
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out must be"):
        step(attention_program(), out=out)
    blocks.flags.writeable = False
    with pytest.raises(ValueError, match="cache must be"):
        step(attention_program(), cache=blocks)


def embed(p: Any, positions: Array | None = None, offset: int = 0, width: int = DIM) -> None:
    p.embed(packed(VOCAB, DIM), 1.0, positions, offset, p.floats(width))


def linear(p: Any, weight: Any = None, bias: Array | None = None, **changes: Any) -> None:
    x, out = p.floats(DIM), p.floats(DIM)
    given = {"activation": "none", "gated": False, "x": x, "bytes": NONE, "residual": NONE, "out": out} | changes
    p.linear(packed(DIM, DIM) if weight is None else weight, bias, *given.values())


def with_cache(p: Any) -> Any:
    p.cache(FORMAT, 1)
    return p


def eight_bits(inputs: int = DIM) -> PackedWeight:
    return pack(quantize(torch.from_numpy(numbers(DIM, inputs)), 8))


def four_bits(inputs: int, group: int) -> PackedWeight:
    return pack(quantize(torch.from_numpy(numbers(DIM, inputs)), 4, group=group))


def select_itself(p: Any) -> None:
    x = p.floats(DIM)
    p.select(x, x, 1.0)


def attend(p: Any, heads: int, width: int, out_width: int, layer: int = 0, scores: Any = NO_SCORES) -> None:
    p.attend(layer, heads, scores, 1.0, p.floats(width), p.floats(out_width), False)


def attend_within(p: Any, heads: int = 2, kv_heads: int = 2, head_dim: int = 16, width: int = 96, out_width: int = 32,
                  rotated: int = 0) -> None:  # fmt: skip
    p.attend_within(heads, kv_heads, head_dim, NO_SCORES, 1.0, p.floats(width), p.floats(out_width), False, rotated)


ONES = np.ones(DIM, np.float32)
BUILDERS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda p: p.floats(0), "width must be between 1 and"),
    (lambda p: p.floats(2**40), "width must be between 1 and"),
    (lambda p: p.bytes(packed(8, 8)), "weights of floats take rows of floats"),
    (lambda p: p.embed(packed(8, 8), 1.0, None, 0, 0), "out names no rows of floats: 0"),
    (lambda p: p.embed(packed(8, 8), 1.0, None, 0, -1), "out names no rows of floats: -1"),
    (lambda p: p.embed(None, 1.0, None, 0, p.floats(8)), "needs a packed weight, not None"),
    (lambda p: embed(p, width=DIM + 1), "out is 33 numbers wide, not 32"),
    (lambda p: embed(p, numbers(4, DIM), offset=5), "offset must be between 0 and 4, got 5"),
    (lambda p: embed(p, numbers(4, DIM), offset=-1), "offset must be between 0 and 4, got -1"),
    (lambda p: embed(p, numbers(4, DIM).astype(np.float64)), "positions must be contiguous float32"),
    (lambda p: [embed(p), embed(p)], "a program embeds its tokens once"),
    (lambda p: p.rotary(np.ones(4), 1.0), "frequencies must be contiguous float32"),
    (lambda p: norm_of(p, 0, 0), "x names no rows of floats"),
    (lambda p: norm_of(p, p.floats(DIM - 1), p.floats(DIM)), "too wide for its rows"),
    (lambda p: norm_of(p, p.floats(DIM), p.floats(DIM - 1)), "too wide for its rows"),
    (lambda p: norm_of(p, p.floats(DIM), p.floats(DIM), weight=ONES[:0]), "too wide for its rows"),
    (lambda p: norm_of(p, p.floats(DIM), p.floats(DIM), weight=ONES[:8], heads=5), "too wide for its rows"),
    (lambda p: norm_of(p, p.floats(DIM), p.floats(DIM), weight=ONES[:8], column=25), "too wide for its rows"),
    (lambda p: norm_of(p, p.floats(DIM), p.floats(DIM), heads=2**60), "heads must be between"),
    (lambda p: norm_of(p, p.floats(DIM), p.floats(DIM), column=2**62), "column must be between"),
    (lambda p: norm_of(p, p.floats(DIM), p.floats(DIM), column=-1), "column must be between"),
    (lambda p: norm_of(p, p.floats(DIM), p.floats(DIM), bias=ONES[:8]), "bias must be contiguous float32 of 32"),
    (lambda p: norm_of(p, p.floats(DIM), p.floats(DIM), added=9), "added names no rows"),
    (lambda p: norm_of(p, p.floats(DIM), p.floats(DIM), added=p.floats(8)), "added is 8 numbers wide, not 32"),
    (lambda p: norm_of(p, p.floats(DIM), p.floats(DIM), bytes=0), "bytes names no rows of bytes"),
    (lambda p: norm_of(p, p.floats(DIM), p.floats(DIM), bytes=p.bytes(eight_bits(96))), "made for another weight"),
    (lambda p: norm_of(p, p.floats(DIM), p.floats(DIM), weight=ONES[:8], heads=2, bytes=p.bytes(eight_bits(8))),
     "only the norm of a whole row"),
    (lambda p: norm_of(p, 0, p.floats(DIM), selected=True), "a norm of selected rows goes to other rows"),
    (lambda p: p.select(p.floats(8), p.floats(9), 1.0), "out is 9 numbers wide, not 8"),
    (select_itself, "out must be other rows than x"),
    (lambda p: p.quantize(p.floats(DIM), 0, False), "bytes names no rows of bytes: 0"),
    (lambda p: p.quantize(p.floats(DIM), p.bytes(eight_bits(65)), False), "made for another weight"),
    (lambda p: p.linear(None, None, "none", False, p.floats(8), NONE, NONE, p.floats(8)), "not None"),
    (lambda p: linear(p, x=NONE), "takes rows of floats, or of bytes"),
    (lambda p: linear(p, bytes=0), "takes rows of floats, or of bytes"),
    (lambda p: linear(p, eight_bits()), "takes rows of floats, or of bytes"),
    (lambda p: linear(p, x=NONE, bytes=p.bytes(eight_bits())), "takes rows of floats, or of bytes"),
    (lambda p: linear(p, four_bits(128, 32), x=NONE, bytes=p.bytes(four_bits(128, 64))), "made for another weight"),
    (lambda p: linear(p, eight_bits(), x=NONE, bytes=7), "bytes names no rows of bytes: 7"),
    (lambda p: linear(p, x=7), "x names no rows of floats: 7"),
    (lambda p: linear(p, packed(DIM, DIM + 1)), "x is narrower than the weight's 33 inputs"),
    (lambda p: linear(p, packed(DIM + 1, DIM)), "out is 32 numbers wide, not 33"),
    (lambda p: linear(p, out=0), "out must be other rows than x"),
    (lambda p: linear(p, gated=True), "a gated layer needs a multiple of 64 outputs"),
    (lambda p: linear(p, packed(64, DIM), gated=True, out=p.floats(64)), "out is 64 numbers wide, not 32"),
    (lambda p: linear(p, residual=p.floats(DIM + 1)), "residual is 33 numbers wide, not 32"),
    (lambda p: linear(p, activation="tanh"), "activation must be none"),
    (lambda p: linear(p, bias=ONES[:8]), "bias must be contiguous float32 of 32"),
    (lambda p: p.head(None, None, p.floats(8), NONE, 0.0), "not None"),
    (lambda p: p.head(packed(9, 8), None, p.floats(7), NONE, 0.0), "x is narrower"),
    (lambda p: [p.deliver(p.floats(8)), p.head(packed(9, 8), None, p.floats(8), NONE, 0.0)], "a program has one head"),
    (lambda p: [p.head(packed(9, 8), None, p.floats(8), NONE, 0.0), p.deliver(p.floats(8))], "a program has one head"),
    (lambda p: p.deliver(0), "x names no rows of floats"),
    (lambda p: p.cache(("float16", 2, 16, 16), 1), "float32, bfloat16 or int8, not float16"),
    (lambda p: p.cache(("float32", 2, 16, 24), 1), "block_size must be a multiple of 16"),
    (lambda p: p.cache(("float32", 2, 16, 2**62), 1), "block_size must be a multiple of 16"),
    (lambda p: p.cache(("float32", 2**60, 16, 16), 1), "kv_heads must be between"),
    (lambda p: p.cache(("float32", 2, 0, 16), 1), "head_dim must be between 1 and 256"),
    (lambda p: p.cache(FORMAT, 0), "layers must be between 1 and"),
    (lambda p: p.cache(FORMAT, 2**60), "layers must be between 1 and"),
    (lambda p: with_cache(with_cache(p)), "a program has one cache"),
    (lambda p: attend(p, 2, 96, 32), "the cache has no layer 0"),
    (lambda p: attend(with_cache(p), 2, 96, 32, layer=1), "the cache has no layer 1"),
    (lambda p: attend(with_cache(p), 2, 96, 32, layer=-1), "the cache has no layer -1"),
    (lambda p: attend(with_cache(p), 3, 96, 48), "2 kv heads do not divide 3 heads"),
    (lambda p: attend(with_cache(p), 0, 96, 32), "do not divide 0 heads"),
    (lambda p: attend(with_cache(p), 2**62, 96, 32), "do not divide"),
    (lambda p: attend(with_cache(p), 2, 97, 32), "x is 97 numbers wide, not heads times head_dim"),
    (lambda p: attend(with_cache(p), 2, 96, 33), "out is 33 numbers wide, not 32"),
    (lambda p: attend(with_cache(p), 2, 96, 32, scores=(0, 0.0, ONES[:3], None)), "alibi_slopes must be"),
    (lambda p: attend(with_cache(p), 2, 96, 32, scores=(0, 0.0, None, np.ones((2, 4), np.float32))), "distance_bias"),
    (lambda p: attend(with_cache(p), 2, 96, 32, scores=(-1, 0.0, None, None)), "must not be negative"),
    (lambda p: attend(with_cache(p), 2, 96, 32, scores=(0, float("nan"), None, None)), "must not be negative"),
    (lambda p: p.append(0, 2, p.floats(96), 32, 0), "the cache has no layer 0"),
    (lambda p: with_cache(p).append(0, 2, p.floats(96), 16, 0), "keys begin at column 0, or behind the queries"),
    (lambda p: with_cache(p).append(0, 2, p.floats(95), 32, 0), "x is 95 numbers wide, not 96"),
    (lambda p: with_cache(p).append(0, 2, p.floats(96), 32, 8), "as many elements as there are angles"),
    (lambda p: [p.rotary(ONES, 1.0), with_cache(p).append(0, 2, p.floats(96), 32, 64)], "as many elements as there"),
    (lambda p: attend_within(p, width=95), "x is 95 numbers wide"),
    (lambda p: attend_within(p, out_width=31), "out is 31 numbers wide"),
    (lambda p: attend_within(p, kv_heads=3), "3 kv heads do not divide 2 heads"),
    (lambda p: attend_within(p, kv_heads=0), "kv_heads must be between"),
    (lambda p: attend_within(p, head_dim=257), "head_dim must be between 1 and 256"),
    (lambda p: attend_within(p, rotated=8), "as many elements as there are angles"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "said"), BUILDERS, ids=range(len(BUILDERS)))
def test_what_is_no_program(build: Callable[[Any], Any], said: str) -> None:
    program = _C.Program()
    with pytest.raises(ValueError, match=said):
        build(program)


@pytest.mark.parametrize(
    "build",
    [
        lambda p: p.floats(8), lambda p: p.bytes(eight_bits()), embed, lambda p: p.rotary(ONES, 1.0),
        lambda p: norm_of(p, 0, 2), lambda p: p.select(0, 2, 1.0), lambda p: p.quantize(0, 0, False),
        lambda p: p.linear(packed(DIM, DIM), None, "none", False, 0, NONE, NONE, 2), with_cache, lambda p: p.deliver(0),
        lambda p: p.head(packed(VOCAB, DIM), None, 0, NONE, 0.0), lambda p: p.append(0, HEADS, 1, 32, 0),
        lambda p: p.attend(0, HEADS, NO_SCORES, 1.0, 1, 2, False),
        lambda p: p.attend_within(2, 2, 16, NO_SCORES, 1.0, 1, 2, False, 0),
    ],
)  # fmt: skip
def test_a_program_that_has_run_is_finished(build: Callable[[Any], Any]) -> None:
    program = attention_program()
    expected = step(program)
    with pytest.raises(ValueError, match="a program that has run takes no more operations"):
        build(program)
    assert np.array_equal(step(program), expected)


def test_positions_end_where_their_table_does() -> None:
    program = _C.Program()
    x = program.floats(DIM)
    program.embed(packed(VOCAB, DIM), 1.0, numbers(5, DIM), 2, x)
    program.deliver(x)
    out = np.zeros((1, DIM), np.float32)
    program.run(ids(0), ids(2), ints(0, 1), None, None, None, None, None, None, ids(0), out, 1)
    with pytest.raises(ValueError, match="positions holds 3, not between 0 and 2"):
        program.run(ids(0), ids(3), ints(0, 1), None, None, None, None, None, None, ids(0), out, 1)


def test_a_program_without_tokens_or_output_runs_none() -> None:
    with pytest.raises(ValueError, match="token_ids holds 0"):
        _C.Program().run(
            ids(0), ids(0), ints(0, 1), None, None, None, None, None, None, ids(), np.zeros((0, 0), np.float32), 1
        )
