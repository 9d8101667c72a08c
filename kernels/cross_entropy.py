"""Cross-entropy of logits against labels, summed, in float32 whatever the logits' dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import reference
from kernels.backend import TRITON_DEVICE, TRITON_DTYPES, available, choose

if TRITON_DEVICE is not None:
    from kernels.gpu import cross_entropy as gpu

BACKENDS = ("triton", "torch", "reference")


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor:
    """The sum over tokens of (1 - s) * -log p(label) + s * mean over the vocabulary of -log p + z * log-sum-exp^2.

    Args:
        logits: (..., vocab), a floating dtype.
        labels: int64 (...,).
        label_smoothing: s in [0, 1], the mass spread over the vocabulary (arXiv:1512.00567), as torch defines it.
        z_loss: z, what keeps logits from drifting (arXiv:2204.02311, section 5).
        ignore_index: a label that counts nothing: its loss and its logits' gradient are 0, whatever the logits are
            (on the ``torch`` backend NaN or inf among them still make that gradient NaN).
        backend: ``triton`` (float32, float16 and bfloat16 on a GPU), ``torch`` or ``reference``; chosen by
            ``kernels.backend`` unless given.

    Returns float32 (), or float64 for float64 logits. A label outside the vocabulary is torch's error; on the
    ``triton`` backend it makes the loss, and the gradient of its row, NaN.
    Raises ValueError for shapes or options that do not fit.
    """
    check_options(labels, logits.shape[:-1], label_smoothing, z_loss)
    rows, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    names = available(logits.device, triton=logits.dtype in TRITON_DTYPES)
    name = choose("cross_entropy", names, backend, has=BACKENDS)
    if name == "triton":
        return gpu.CrossEntropy.apply(rows, labels, label_smoothing, z_loss, ignore_index)
    if name == "reference":
        return reference.cross_entropy(rows, labels, label_smoothing, z_loss, ignore_index)
    return _torch(rows, labels, label_smoothing, z_loss, ignore_index)


def check_options(labels: Tensor, expected: torch.Size, label_smoothing: float, z_loss: float) -> None:
    if labels.dtype != torch.int64 or labels.shape != expected:
        raise ValueError(
            f"labels must be int64 of shape {tuple(expected)}, got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}: expected a number in [0, 1]")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss is {z_loss}: expected 0 or more")


def _torch(logits: Tensor, labels: Tensor, label_smoothing: float, z_loss: float, ignore_index: int) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing)
    if z_loss:
        squares = logits.logsumexp(-1).square()
        loss = loss + z_loss * squares.masked_fill(labels == ignore_index, 0.0).sum()
    return loss
