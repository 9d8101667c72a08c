"""The loss of hidden weight^T + bias, and its gradients, with only a chunk of the logits in memory at a time.

The gradients come in the forward pass, while a chunk's logits are there, for an upstream gradient of one; the backward
pass multiplies them by the real one (Liger Kernel, arXiv:2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

MIN_ROWS, MAX_ROWS = 1024, 4096  # of a chunk: fewer starve the products of work, more save no time


class LossOptions(NamedTuple):
    """What ``kernels.linear_cross_entropy`` takes besides tensors."""

    label_smoothing: float
    z_loss: float
    softcap: float
    scale: float
    ignore_index: int


# (logits (rows, vocab), labels, options, want_gradients) -> the summed loss; the logits become their gradients.
LossOfLogits = Callable[[Tensor, Tensor, LossOptions, bool], Tensor]
Wanted = tuple[bool, bool, bool]  # the gradients of hidden, weight and bias


def chunk_rows(rows: int) -> int:
    """Rows of logits held at once: a tenth, in whole tiles of a product, within ``MIN_ROWS`` and ``MAX_ROWS``."""
    tenth = -(-rows // 10)
    return max(1, min(rows, MAX_ROWS, max(MIN_ROWS, -(-tenth // 128) * 128)))


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    options: LossOptions,
    dtype: torch.dtype,
    wanted: Wanted,
    loss_of_logits: LossOfLogits,
    alignment: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The summed loss and the gradients of hidden, weight and bias, empty where not wanted.

    hidden is (rows, dim), weight (vocab, dim), bias (vocab,), labels (rows,); products are taken in ``dtype``. The
    loss and the gradients of weight and bias are float32 or wider, that of hidden has hidden's dtype. Rows of the
    logits begin at multiples of ``alignment`` elements.
    """
    total = torch.promote_types(dtype, torch.float32)
    loss, grad_hidden, grad_weight, grad_bias = empty_results(hidden, weight, wanted, total)
    loss.zero_()
    grad_bias.zero_()
    rows, vocab = hidden.shape[0], weight.shape[0]
    if rows == 0:
        grad_weight.zero_()
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    size = chunk_rows(rows)
    buffer = hidden.new_empty(size, -(-vocab // alignment) * alignment, dtype=dtype)
    buffer[:, vocab:] = 0  # oneDNN's bfloat16 products read a few elements behind a row, and multiply them by zero
    for start in range(0, rows, size):
        some = slice(start, min(start + size, rows))
        inputs = _scaled(hidden[some], options.scale).to(dtype)
        # A compiler sees to memory itself, and torch 2.11's loses track of a buffer that is written again and again.
        logits = None if torch.compiler.is_compiling() else buffer[: inputs.shape[0], :vocab]
        if bias is None:
            logits = torch.mm(inputs, weight.t(), out=logits)
        else:
            logits = torch.addmm(bias, inputs, weight.t(), out=logits)
        loss += loss_of_logits(logits, labels[some], options, any(wanted))
        if wanted[0]:
            grad_hidden[some] = _scaled((logits @ weight).to(hidden.dtype), options.scale)
        if wanted[1]:
            _add_product(grad_weight, logits.t(), inputs, first=start == 0)
        if wanted[2]:
            grad_bias += logits.sum(0, dtype=total)
    return loss, grad_hidden, grad_weight, grad_bias


def empty_results(
    hidden: Tensor, weight: Tensor, wanted: Wanted, total: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for what ``chunked_loss`` returns; ``total`` is the dtype of sums."""
    return (
        hidden.new_empty((), dtype=total),
        torch.empty(hidden.shape if wanted[0] else (0,), dtype=hidden.dtype, device=hidden.device),
        torch.empty(weight.shape if wanted[1] else (0,), dtype=total, device=hidden.device),
        torch.empty(weight.shape[:1] if wanted[2] else (0,), dtype=total, device=hidden.device),
    )


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x * scale


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += a b in total's precision; ``first``: total = a b, whatever is in it."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, beta=0 if first else 1, out_dtype=total.dtype, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


def loss_of_logits(logits: Tensor, labels: Tensor, options: LossOptions, gradients: bool) -> Tensor:
    """``LossOfLogits`` in plain torch."""
    smoothing, kept = options.label_smoothing, labels != options.ignore_index
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if options.softcap:
        x = options.softcap * (x / options.softcap).tanh()
    targets = labels.where(kept, 0)[:, None]
    log_p = x.log_softmax(-1)
    loss = -(1 - smoothing) * log_p.gather(1, targets)[:, 0]
    if smoothing:
        loss -= smoothing * log_p.mean(-1)
    lse = x.logsumexp(-1) if options.z_loss else None
    if lse is not None:
        loss += options.z_loss * lse.square()
    if gradients:
        p = log_p.exp_()
        slope = p - smoothing / logits.shape[1]
        slope.scatter_add_(1, targets, torch.full_like(targets, smoothing - 1, dtype=slope.dtype))
        if lse is not None:
            slope += p * (2 * options.z_loss * lse)[:, None]
        if options.softcap:
            slope *= 1 - (x / options.softcap).square()
        logits.copy_(slope.masked_fill_(~kept[:, None], 0.0))
    return loss.masked_fill(~kept, 0.0).sum()


class ChunkedLoss(torch.autograd.Function):
    """Keeps the gradients for an upstream gradient of one. ``compute`` takes what follows it, up to ``wanted``."""

    @staticmethod
    def forward(
        ctx: Any, compute: Callable[..., tuple[Tensor, ...]], hidden: Tensor, weight: Tensor, bias: Tensor | None,
        labels: Tensor, options: LossOptions, dtype: torch.dtype, wanted: Wanted,
    ) -> Tensor:  # fmt: skip
        loss, *gradients = compute(hidden, weight, bias, labels, options, dtype, wanted)
        ctx.save_for_backward(*gradients)
        ctx.wanted, ctx.dtypes = wanted, [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "linear_cross_entropy has no second derivative: use backend='reference' for create_graph"
            )
        each = zip(ctx.wanted, ctx.saved_tensors, ctx.dtypes, strict=True)
        of_hidden, of_weight, of_bias = (_times(x, grad).to(dtype) if want else None for want, x, dtype in each)
        return None, of_hidden, of_weight, of_bias, None, None, None, None


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor, a number on the device, which must not be rounded to the dtype of a narrow x."""
    return x.to(torch.promote_types(x.dtype, factor.dtype)) * factor
