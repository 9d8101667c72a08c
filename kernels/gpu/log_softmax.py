"""The log-softmax of rows in place: a pass that sums a row's exponentials by blocks, and one that writes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.row_blocks import INFINITY_KEY, LOWEST_KEY, load_keys, scan, value_of

BLOCK = 1024  # scores a block: few sums a row, as each program of the second pass adds them up


@triton.jit
def _write(x_ptr, keys_ptr, sums_ptr, stride, vocab, blocks, B: tl.constexpr, NB: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    keys = load_keys(keys_ptr, row, blocks, NB)
    block = tl.arange(0, NB)
    sums = tl.load(sums_ptr + row * blocks + block, mask=block < blocks, other=0.0)
    top = tl.max(keys, axis=0)
    peak = value_of(top)
    peaks = value_of(tl.maximum(keys, LOWEST_KEY))
    total = tl.sum(tl.where(keys >= LOWEST_KEY, sums * tl.exp(peaks - peak), 0.0), axis=0)
    log_sum = tl.where((top >= LOWEST_KEY) & (top < INFINITY_KEY), tl.log(total), float("nan"))
    column = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(x_ptr + row * stride + column, mask=column < vocab, other=0.0)
    tl.store(x_ptr + row * stride + column, (x - peak) - log_sum, mask=column < vocab)


def log_softmax_(scores: Tensor) -> None:
    """As ``kernels.sampling.log_softmax_``, of float32 scores (rows, vocab) on the device."""
    rows, vocab = scores.shape
    if not rows:
        return
    keys, sums = scan(scores, BLOCK, sums=True)
    blocks, chunk = keys.shape[1], 8192 if rows * vocab > 1 << 22 else 2048
    _write[(triton.cdiv(vocab, chunk), rows)](
        scores, keys, sums, scores.stride(0), vocab, blocks,
        B=BLOCK, NB=triton.next_power_of_2(blocks), CHUNK=chunk, num_warps=8 if chunk == 8192 else 4,
    )  # fmt: skip
