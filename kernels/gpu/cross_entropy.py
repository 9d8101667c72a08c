"""Cross-entropy of rows of logits: one read of them forward; one read, and one write of their gradients, backward.

A row is walked in tiles of chunks of 16 bytes, what a thread loads at once, beginning at the aligned chunk that holds
the row's first logit, so that rows of an odd vocabulary load as fast as others. The walk keeps a running maximum and
sum a chunk of the tile (Milakov and Gimelshein, arXiv:1805.02867), so threads meet only once, at the row's end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.library import first_derivative_only, operator

LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, so that a row may hold -inf


@triton.jit
def row_pointer(logits_ptr, row, stride, CHUNK: tl.constexpr):
    """The chunk that a row begins in, and how many elements of that chunk are the row before's."""
    start = row * stride
    aligned = start // CHUNK * CHUNK
    return logits_ptr + aligned, (start - aligned).to(tl.int32)


@triton.jit
def tile_columns(first, skipped, vocab, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Of the tile at chunk ``first``: (CHUNKS, CHUNK) offsets, columns, which are the row's; which chunks hold any.

    A touched chunk may be loaded whole, beyond the row too: an aligned 16 bytes lie in memory if one of them does.
    """
    chunk = first + tl.arange(0, CHUNKS)
    offset = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    column = offset - skipped
    return offset, column, (column >= 0) & (column < vocab), chunk * CHUNK < skipped + vocab


@triton.jit
def soft_cap(x, cap):
    """cap * tanh(x / cap)."""
    return cap * (1 - 2 / (1 + tl.exp(x * (2 / cap))))


@triton.jit
def row_statistics(
    row_ptr, skipped, vocab, pivot, softcap,
    SMOOTH: tl.constexpr, CAP: tl.constexpr, EDGES: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """A row's largest logit; the log of the sum of exp(logit - largest); with SMOOTH, the mean of logit - pivot."""
    peaks = tl.full([CHUNKS], LOWEST, tl.float32)
    sums = tl.zeros([CHUNKS], tl.float32)
    shifts = tl.zeros([CHUNKS], tl.float32)
    for first in range(0, tl.cdiv(skipped + vocab, CHUNK), CHUNKS):
        offset, _, inside, touched = tile_columns(first, skipped, vocab, CHUNK, CHUNKS)
        x = tl.load(row_ptr + offset, mask=touched[:, None], other=float("-inf")).to(tl.float32)
        if CAP:
            x = soft_cap(x, softcap)
        if EDGES or CAP:
            x = tl.where(inside, x, float("-inf"))
        highest = tl.maximum(peaks, tl.max(x, axis=1))
        sums = sums * tl.exp(peaks - highest) + tl.sum(tl.exp(x - highest[:, None]), axis=1)
        peaks = highest
        if SMOOTH:
            shifts += tl.sum(tl.where(inside, x - pivot, 0.0), axis=1)
    peak = tl.max(peaks, axis=0)
    return peak, tl.log(tl.sum(sums * tl.exp(peaks - peak), axis=0)), tl.sum(shifts, axis=0) / vocab


@triton.jit
def row_loss(
    row_ptr, skipped, label, vocab, label_smoothing, z_loss, softcap,
    SMOOTH: tl.constexpr, Z: tl.constexpr, CAP: tl.constexpr,
    EDGES: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """A row's loss, largest logit and log-sum beside it; loss and log-sum are NaN where the label is no column."""
    is_column = (label >= 0) & (label < vocab)
    target = tl.load(row_ptr + skipped + label, mask=is_column, other=0.0).to(tl.float32)
    if CAP:
        target = soft_cap(target, softcap)
    # Differences from a logit of the row: sums of large logits would lose the small ones' digits.
    pivot = tl.where(tl.abs(target) < float("inf"), target, 0.0)
    peak, log_sum, shift = row_statistics(
        row_ptr, skipped, vocab, pivot, softcap, SMOOTH, CAP, EDGES, CHUNK, CHUNKS
    )  # fmt: skip
    log_sum = tl.where(is_column, log_sum, float("nan"))
    loss = log_sum + (peak - target)
    if SMOOTH:
        loss = (1 - label_smoothing) * loss + label_smoothing * (log_sum + (peak - pivot) - shift)
    if Z:
        lse = peak + log_sum
        loss += z_loss * lse * lse
    return loss, peak, log_sum


@triton.jit
def logit_gradient(x, column, label, peak, log_sum, vocab, label_smoothing, z_loss, Z: tl.constexpr):
    """The loss's slope by the logits x of a tile."""
    p = tl.exp(x - peak - log_sum)
    slope = tl.where(column == label, p - (1 - label_smoothing), p) - label_smoothing / vocab
    if Z:
        slope += p * (2 * z_loss * (peak + log_sum))
    return slope


@triton.jit(do_not_specialize=["ignore_index"])
def _forward(
    logits_ptr, labels_ptr, losses_ptr, lse_ptr, stride, vocab, label_smoothing, z_loss, ignore_index,
    SMOOTH: tl.constexpr, Z: tl.constexpr, EDGES: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    kept = label != ignore_index
    length = tl.where(kept, vocab, 0)  # an ignored row is not read
    row_ptr, skipped = row_pointer(logits_ptr, row, stride, CHUNK)
    loss, peak, log_sum = row_loss(
        row_ptr, skipped, label, length, label_smoothing, z_loss, 0.0, SMOOTH, Z, False, EDGES, CHUNK, CHUNKS
    )
    tl.store(losses_ptr + row, tl.where(kept, loss, 0.0))
    tl.store(lse_ptr + 2 * row, tl.where(kept, peak, 0.0))
    tl.store(lse_ptr + 2 * row + 1, tl.where(kept, log_sum, 0.0))


@triton.jit(do_not_specialize=["ignore_index"])
def _backward(
    grad_ptr, logits_ptr, labels_ptr, lse_ptr, out_ptr, stride, vocab, tiles, label_smoothing, z_loss, ignore_index,
    Z: tl.constexpr, EDGES: tl.constexpr, ALIKE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """A tile of a row a program: nothing is left to sum, so few rows of a large vocabulary fill a GPU too."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * CHUNKS
    label = tl.load(labels_ptr + row)
    kept = label != ignore_index
    row_ptr, skipped = row_pointer(logits_ptr, row, stride, CHUNK)
    offset, column, inside, touched = tile_columns(first, skipped, vocab, CHUNK, CHUNKS)
    x = tl.load(row_ptr + offset, mask=(touched & kept)[:, None], other=0.0).to(tl.float32)
    peak, log_sum = tl.load(lse_ptr + 2 * row), tl.load(lse_ptr + 2 * row + 1)
    slope = logit_gradient(x, column, label, peak, log_sum, vocab, label_smoothing, z_loss, Z)
    slope = tl.where(kept, slope * tl.load(grad_ptr), 0.0).to(out_ptr.dtype.element_ty)
    out_row_ptr, _ = row_pointer(out_ptr, row, vocab, CHUNK)
    if not EDGES:
        tl.store(out_row_ptr + offset, slope, mask=touched[:, None])
    elif ALIKE:
        # Rows of the gradient begin within chunks as the logits' do. A store must keep to the row: whole chunks at
        # once, the two at its ends one by one.
        begin = (first + tl.arange(0, CHUNKS)) * CHUNK - skipped
        whole = ((begin >= 0) & (begin + CHUNK <= vocab))[:, None]
        tl.store(out_row_ptr + offset, slope, mask=whole)
        tl.store(out_row_ptr + offset, slope, mask=inside & (whole == 0))
    else:
        tl.store(out_ptr + row * vocab + column, slope, mask=inside)


class Tiling(NamedTuple):
    """Tiles of ``chunks`` chunks of ``chunk`` elements; ``edges``: a row may begin or end within a chunk."""

    chunk: int
    chunks: int
    edges: bool
    warps: int


def tiling(logits: Tensor, stride: int, loads: int = 4) -> Tiling:
    """For rows, contiguous each: ``loads`` chunks a thread, one by one where logits do not begin at 16 bytes."""
    vocab = logits.shape[1]
    chunk = 16 // logits.element_size() if logits.data_ptr() % 16 == 0 else 1
    edges = vocab % chunk != 0 or stride % chunk != 0
    loads = loads if chunk > 1 else 16
    chunks = triton.next_power_of_2(triton.cdiv(vocab + (chunk - 1 if edges else 0), chunk))
    chunks = min(chunks, 256 * loads)
    return Tiling(chunk, chunks, edges, min(max(chunks // (32 * loads), 1), 8))


def _contiguous_rows(logits: Tensor) -> tuple[Tensor, int]:
    """The logits and the elements from a row to the next; a copy unless rows lie contiguous and close together."""
    rows, vocab = logits.shape
    if logits.stride(1) != 1 or (rows > 1 and not vocab <= logits.stride(0) <= 2 * vocab):
        logits = logits.contiguous()
    return logits, logits.stride(0) if rows > 1 else vocab


def forward(
    logits: Tensor, labels: Tensor, label_smoothing: float, z_loss: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The summed loss of logits (rows, vocab), float32 (), and float32 (rows, 2): each row's largest logit and the
    log of the sum of exponentials beside it, which make its log-sum-exp without losing a digit of either."""
    rows, vocab = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    lse = torch.empty(rows, 2, dtype=torch.float32, device=logits.device)
    if rows:
        logits, stride = _contiguous_rows(logits)
        tile = tiling(logits, stride)
        _forward[(rows,)](
            logits, labels.contiguous(), losses, lse, stride, vocab, label_smoothing, z_loss, ignore_index,
            SMOOTH=label_smoothing != 0, Z=z_loss != 0, EDGES=tile.edges, CHUNK=tile.chunk, CHUNKS=tile.chunks,
            num_warps=tile.warps,
        )  # fmt: skip
    return losses.sum(), lse


def _forward_shapes(
    logits: Tensor, labels: Tensor, label_smoothing: float, z_loss: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    return (
        logits.new_empty((), dtype=torch.float32),
        torch.empty(logits.shape[0], 2, dtype=torch.float32, device=logits.device),
    )


def backward(
    grad: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, label_smoothing: float, z_loss: float, ignore_index: int
) -> Tensor:
    """The logits' gradient (rows, vocab) in their dtype; ``grad`` is the loss's, float32 ()."""
    rows, vocab = logits.shape
    out = torch.empty(rows, vocab, dtype=logits.dtype, device=logits.device)
    if rows:
        logits, stride = _contiguous_rows(logits)
        tile = tiling(logits, stride)
        tiles = triton.cdiv(vocab + (tile.chunk - 1 if tile.edges else 0), tile.chunk * tile.chunks)
        _backward[(rows * tiles,)](
            grad, logits, labels.contiguous(), lse, out, stride, vocab, tiles, label_smoothing, z_loss, ignore_index,
            Z=z_loss != 0, EDGES=tile.edges, ALIKE=stride == vocab, CHUNK=tile.chunk, CHUNKS=tile.chunks,
            num_warps=tile.warps,
        )  # fmt: skip
    return out


def _backward_shapes(
    grad: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, label_smoothing: float, z_loss: float, ignore_index: int
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


FORWARD = operator(
    "cross_entropy(Tensor logits, Tensor labels, float label_smoothing, float z_loss, int ignore_index)"
    " -> (Tensor loss, Tensor lse)",
    forward,
    _forward_shapes,
)
BACKWARD = operator(
    "cross_entropy_backward(Tensor grad, Tensor logits, Tensor labels, Tensor lse, float label_smoothing,"
    " float z_loss, int ignore_index) -> Tensor",
    backward,
    _backward_shapes,
)


class CrossEntropy(torch.autograd.Function):
    """Keeps the logits and two numbers a row."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, label_smoothing: float, z_loss: float, ignore_index: int
    ) -> Tensor:
        loss, lse = FORWARD(logits, labels, label_smoothing, z_loss, ignore_index)
        ctx.save_for_backward(logits, labels, lse)
        ctx.options = label_smoothing, z_loss, ignore_index
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        first_derivative_only("cross_entropy")
        return BACKWARD(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None
