"""The calls whose kernels have a budget: each launches on small CPU tensors inside ``budget.compiled``; nothing runs.

A case is a line: its name, "operation/what", and what it calls. Triton specialises on what a launcher passes, so a case
stands for all calls of its dtype, options and divisibility by 16, not for one size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch


def attention(
    head_dim: int, dtype: torch.dtype = torch.bfloat16, *, causal: bool = False, table: bool = False,
    softcap: float = 0.0, dropout: float = 0.0, window: int | None = None, deterministic: bool = False,
) -> None:  # fmt: skip
    from kernels.gpu import attention as gpu

    q, k, v = (torch.zeros(1, 256, 2, head_dim, dtype=dtype) for _ in range(3))
    biases = torch.zeros(2, 257) if table else None
    seed = torch.zeros(1, dtype=torch.int64) if dropout else None
    call = gpu.Call(None, None, None, None, biases, None, seed, 256, 256, causal, 0.125, window, softcap, dropout)
    out, lse = gpu.forward(q, k, v, *call)
    gpu.backward(out, None, q, k, v, out, lse, *call, deterministic, table, False)


def norm(width: int, *, center: bool = False, residual: bool = False, dtype: torch.dtype = torch.bfloat16) -> None:
    from kernels.gpu.norm import backward, forward

    x, weight = torch.zeros(2, width, dtype=dtype), torch.zeros(width, dtype=dtype)
    out, total, statistics = forward(x, x if residual else None, weight, weight if center else None, 1e-6, center)
    normed, grad_total = (total, out) if residual else (x, None)
    backward(out, grad_total, normed, weight, statistics, center, None)


def rotary(interleaved: bool, rotated: int = 128) -> None:
    from kernels.gpu.rotary import rotate

    x, angles = torch.zeros(1, 16, 2, 128, dtype=torch.bfloat16), torch.zeros(16, 1, rotated // 2)
    for back in (False, True):
        rotate(x, angles, angles, interleaved, back)


def activation(name: str) -> None:
    from kernels.gpu.activation import backward, forward

    x = torch.zeros(2, 8192, dtype=torch.bfloat16)
    backward(forward(x, name), x, name)


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
    "attention/d64": partial(attention, 64),
    "attention/d64-causal": partial(attention, 64, causal=True),
    "attention/d64-t5": partial(attention, 64, table=True),
    "attention/d64-causal-t5": partial(attention, 64, causal=True, table=True),
    "attention/d64-deterministic": partial(attention, 64, deterministic=True),
    "attention/d64-dropout": partial(attention, 64, dropout=0.1),
    "attention/d64-fp32": partial(attention, 64, torch.float32),
    "attention/d80-causal": partial(attention, 80, causal=True),
    "attention/d128": partial(attention, 128),
    "attention/d128-causal": partial(attention, 128, causal=True),
    "attention/d128-causal-softcap-window": partial(attention, 128, causal=True, softcap=50.0, window=64),
    "attention/d256-causal": partial(attention, 256, causal=True),
    "norm/rms-768": partial(norm, 768),
    "norm/rms-4096": partial(norm, 4096),
    "norm/rms-4096-residual": partial(norm, 4096, residual=True),
    "norm/rms-4096-fp32": partial(norm, 4096, dtype=torch.float32),
    "norm/rms-16384": partial(norm, 16384),
    "norm/layer-1024-residual": partial(norm, 1024, center=True, residual=True),
    "norm/layer-8192": partial(norm, 8192, center=True),
    "rotary/halves": partial(rotary, False),
    "rotary/interleaved": partial(rotary, True),
    "rotary/partial": partial(rotary, False, rotated=32),
    "activation/silu": partial(activation, "silu"),
    "activation/gelu": partial(activation, "gelu"),
    "activation/gelu_new": partial(activation, "gelu_new"),
    "cross_entropy/bf16-32000": partial(cross_entropy, torch.bfloat16, 32_000),
    "cross_entropy/bf16-50257": partial(cross_entropy, torch.bfloat16, 50_257),
    "cross_entropy/fp32-32000": partial(cross_entropy, torch.float32, 32_000),
    "cross_entropy/bf16-32000-smoothed": partial(cross_entropy, torch.bfloat16, 32_000, 0.1, 1e-4),
    "linear_cross_entropy/bf16": partial(linear_cross_entropy, torch.bfloat16),
    "linear_cross_entropy/bf16-softcap": partial(linear_cross_entropy, torch.bfloat16, 0.1, 1e-4, 30.0),
}

# Those that also have to compile for AMD's gfx942; what they take there is not held to anything.
AMD_CASES = (
    "attention/d64-causal", "norm/rms-4096-residual", "rotary/halves", "activation/silu", "cross_entropy/bf16-32000",
    "linear_cross_entropy/bf16",
)  # fmt: skip
