"""Cross-entropy of a language model's head without its logits: projection and loss, a chunk of tokens at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels import reference
from kernels.backend import TRITON_DEVICE, TRITON_DTYPES, available, check_devices, choose
from kernels.chunked_loss import ChunkedLoss, LossOptions, Wanted, chunked_loss, loss_of_logits
from kernels.cross_entropy import BACKENDS, check_options

if TRITON_DEVICE is not None:
    from kernels.gpu.linear_cross_entropy import LINEAR_CROSS_ENTROPY

LARGE_VOCABULARY = 16384


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    scale: float = 1.0,
    ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor:
    """``kernels.cross_entropy.cross_entropy`` of the logits of hidden, which are never in memory all at once.

    The logits are (scale * hidden) weight^T + bias, and with a softcap, softcap * tanh(those / softcap). Those of a
    tenth of the tokens are held at a time, in the products' dtype; of 1,024 tokens at least, or the products would
    slow down, and of 4,096 at most.

    Args:
        hidden: (..., dim), a floating dtype. weight: (vocab, dim). bias: (vocab,).
        labels: int64 (...,). label_smoothing, z_loss, ignore_index: as there.
        softcap: 0 for none (Gemma 2, arXiv:2408.00118).
        backend: ``triton`` (products in float32, float16 or bfloat16 on a GPU), ``torch``, in chunks too, or
            ``reference``, with all logits; chosen by ``kernels.backend`` unless given.

    Products are taken in hidden's dtype, or autocast's; the weight's and bias's gradients are summed in float32.
    Returns float32 (), or float64 for float64. Labels outside the vocabulary: as there. Gradients are computed in the
    forward pass, and cannot be differentiated again.
    Raises ValueError for shapes or options that do not fit.
    """
    check_options(labels, hidden.shape[:-1], label_smoothing, z_loss)
    check_devices("linear_cross_entropy", hidden, weight, bias, labels)
    _check_shapes(hidden, weight, bias)
    if not (0 <= softcap < math.inf and math.isfinite(scale)):
        raise ValueError(f"softcap must be positive, or 0 for none, and scale finite, got {softcap} and {scale}")
    options = LossOptions(label_smoothing, z_loss, softcap, scale, ignore_index)
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    dtype = _product_dtype(hidden)
    name = _backend(hidden.device, dtype, backend)
    if name == "reference":
        return reference.linear_cross_entropy(rows, weight, bias, labels, options)
    compute = _triton if name == "triton" else _torch
    wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias))
    with torch.autocast(hidden.device.type, enabled=False):
        return ChunkedLoss.apply(compute, rows, weight, bias, labels, options, dtype, wanted)


def prefers_chunks(hidden: Tensor, weight: Tensor) -> bool:
    """Whether ``linear_cross_entropy`` beats a head and ``cross_entropy``: on a GPU, for a large vocabulary."""
    return weight.shape[0] >= LARGE_VOCABULARY and _backend(hidden.device, _product_dtype(hidden), None) == "triton"


def _backend(device: torch.device, dtype: torch.dtype, requested: str | None) -> str:
    names = available(device, triton=dtype in TRITON_DTYPES)
    return choose("linear_cross_entropy", names, requested, has=BACKENDS)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _check_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if (
        hidden.dim() == 0
        or not hidden.is_floating_point()
        or weight.dim() != 2
        or weight.shape[1] != hidden.shape[-1]
        or (bias is not None and bias.shape != weight.shape[:1])
    ):
        raise ValueError(
            f"hidden must be (..., dim), weight (vocab, dim) and bias (vocab,): got {tuple(hidden.shape)}, "
            f"{tuple(weight.shape)}{'' if bias is None else f', {tuple(bias.shape)}'}"
        )


def _torch(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: LossOptions, dtype: torch.dtype,
    wanted: Wanted,
) -> tuple[Tensor, ...]:  # fmt: skip
    return chunked_loss(hidden, weight, bias, labels, options, dtype, wanted, loss_of_logits)


def _triton(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: LossOptions, dtype: torch.dtype,
    wanted: Wanted,
) -> tuple[Tensor, ...]:  # fmt: skip
    return LINEAR_CROSS_ENTROPY(hidden, weight, bias, labels, *options, dtype, *wanted)
