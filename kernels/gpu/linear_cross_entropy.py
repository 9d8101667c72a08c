"""Loss and gradient of a chunk of logits in one kernel, the gradient written where the logits were."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.chunked_loss import LossOptions, chunked_loss, empty_results
from kernels.gpu.cross_entropy import logit_gradient, row_loss, soft_cap, tile_columns, tiling
from kernels.gpu.library import operator

ALIGNMENT = 16  # elements: where the kernel loads, and a matrix library multiplies, fastest


@triton.jit(do_not_specialize=["ignore_index"])
def _loss_and_gradient(
    logits_ptr, labels_ptr, losses_ptr, stride, vocab, label_smoothing, z_loss, softcap, ignore_index,
    GRADIENT: tl.constexpr, SMOOTH: tl.constexpr, Z: tl.constexpr, CAP: tl.constexpr,
    EDGES: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Rows begin at whole chunks, and the rest of a row's last chunk is nobody's: it may be written, with zeros."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    kept = label != ignore_index
    row_ptr = logits_ptr + row * stride // CHUNK * CHUNK
    length = tl.where(kept, vocab, 0)  # an ignored row is not read
    loss, peak, log_sum = row_loss(
        row_ptr, 0, label, length, label_smoothing, z_loss, softcap, SMOOTH, Z, CAP, EDGES, CHUNK, CHUNKS
    )
    tl.store(losses_ptr + row, tl.where(kept, loss, 0.0))
    if GRADIENT:
        tl.debug_barrier()  # no thread writes before all have read
        tiles = tl.cdiv(vocab, CHUNK * CHUNKS)
        for tile in range(0, tiles):
            # From the end, which was read last: what a cache holds of the row is there.
            first = (tiles - 1 - tile) * CHUNKS
            offset, column, inside, touched = tile_columns(first, 0, vocab, CHUNK, CHUNKS)
            x = tl.load(row_ptr + offset, mask=(touched & kept)[:, None], other=0.0).to(tl.float32)
            if CAP:
                x = soft_cap(x, softcap)
            slope = logit_gradient(x, column, label, peak, log_sum, vocab, label_smoothing, z_loss, Z)
            if CAP:
                slope *= 1 - (x / softcap) * (x / softcap)
            slope = tl.where(inside & kept, slope, 0.0).to(logits_ptr.dtype.element_ty)
            tl.store(row_ptr + offset, slope, mask=touched[:, None])


def loss_of_logits(logits: Tensor, labels: Tensor, options: LossOptions, gradients: bool) -> Tensor:
    """``kernels.chunked_loss.LossOfLogits``; logits are rows of a buffer that begin at 16 bytes each."""
    rows, vocab = logits.shape
    tile = tiling(logits, logits.stride(0), loads=2 if options.softcap else 4)  # the cap takes registers
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _loss_and_gradient[(rows,)](
        logits, labels, losses, logits.stride(0), vocab,
        options.label_smoothing, options.z_loss, options.softcap or 1.0, options.ignore_index,
        GRADIENT=gradients, SMOOTH=options.label_smoothing != 0, Z=options.z_loss != 0, CAP=options.softcap != 0,
        EDGES=tile.edges, CHUNK=tile.chunk, CHUNKS=tile.chunks, num_warps=tile.warps,
    )  # fmt: skip
    return losses.sum()


def launch(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_smoothing: float, z_loss: float,
    softcap: float, scale: float, ignore_index: int, dtype: torch.dtype, of_hidden: bool, of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``kernels.chunked_loss.chunked_loss`` with the kernel."""
    options = LossOptions(label_smoothing, z_loss, softcap, scale, ignore_index)
    wanted = of_hidden, of_weight, of_bias
    return chunked_loss(hidden, weight, bias, labels.contiguous(), options, dtype, wanted, loss_of_logits, ALIGNMENT)


def _shapes(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_smoothing: float, z_loss: float,
    softcap: float, scale: float, ignore_index: int, dtype: torch.dtype, of_hidden: bool, of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return empty_results(hidden, weight, (of_hidden, of_weight, of_bias), torch.float32)


LINEAR_CROSS_ENTROPY = operator(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float label_smoothing,"
    " float z_loss, float softcap, float scale, int ignore_index, ScalarType dtype, bool of_hidden, bool of_weight,"
    " bool of_bias) -> (Tensor loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    launch,
    _shapes,
)
