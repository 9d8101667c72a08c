"""The calls whose kernels have a budget: each launches on small CPU tensors, inside ``budget.compiled``, where nothing runs.

A case is a line: its name, "operation/what", and what it calls. Triton specialises on what a launcher passes, so a case
stands for all calls of its dtype, options and divisibility by 16, not for one size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch


def cross_entropy(dtype: torch.dtype, vocab: int, label_smoothing: float = 0.0, z_loss: float = 0.0) -> None:
    from kernels.gpu.cross_entropy import backward, forward

    logits, labels = torch.zeros(2, vocab, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    _, lse = forward(logits, labels, label_smoothing, z_loss, -100)
    backward(torch.ones(()), logits, labels, lse, label_smoothing, z_loss, -100)


def linear_cross_entropy(
    dtype: torch.dtype, label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float = 0.0
) -> None:
    from kernels.chunked_loss import LossOptions
    from kernels.gpu.linear_cross_entropy import loss_of_logits

    logits, labels = torch.zeros(2, 32_000, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    for gradients in (False, True):
        loss_of_logits(logits, labels, LossOptions(label_smoothing, z_loss, softcap, 1.0, -100), gradients)


CASES: dict[str, Callable[[], None]] = {
    "cross_entropy/bf16-32000": partial(cross_entropy, torch.bfloat16, 32_000),
    "cross_entropy/bf16-50257": partial(cross_entropy, torch.bfloat16, 50_257),
    "cross_entropy/fp32-32000": partial(cross_entropy, torch.float32, 32_000),
    "cross_entropy/bf16-32000-smoothed": partial(cross_entropy, torch.bfloat16, 32_000, 0.1, 1e-4),
    "linear_cross_entropy/bf16": partial(linear_cross_entropy, torch.bfloat16),
    "linear_cross_entropy/bf16-softcap": partial(linear_cross_entropy, torch.bfloat16, 0.1, 1e-4, 30.0),
}

# Those that also have to compile for AMD's gfx942; what they take there is not held to anything.
AMD_CASES = ("cross_entropy/bf16-32000", "linear_cross_entropy/bf16")
