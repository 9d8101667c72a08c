"""The C++ attention of csrc/attention.h behind torch tensors: float32 on a CPU, with its gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.attention_options import ScoreOptions
from kernels.extension import _C

MAX_HEAD_DIM = _C.max_head_dim

Lengths = tuple[Tensor | None, Tensor | None, Tensor | None]  # cu_seqlens_q, cu_seqlens_k, key_lengths


def serves(q: Tensor, k: Tensor, v: Tensor, options: ScoreOptions | None = None) -> bool:
    """Whether the C++ kernels take these tensors. torch.compile and autocast have plans of their own."""
    return (
        q.dtype is torch.float32
        and k.dtype is torch.float32
        and v.dtype is torch.float32
        and not torch.compiler.is_compiling()
        and q.is_cpu
        and k.is_cpu
        and v.is_cpu
        and 0 < q.shape[-1] <= MAX_HEAD_DIM
        and not torch.is_autocast_enabled("cpu")
        and (options is None or all(x.is_cpu and x.dtype is torch.float32 for x in options.tensors()))
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Lengths,
    causal: bool,
    softmax_scale: float | None,
    options: ScoreOptions | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """See ``kernels.attention.attention``, which has checked the shapes."""
    bias = None if options is None else options.distance_bias
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad or needs_gradient(bias)):
        out, lse = _Attention.apply(q, k, v, bias, lengths, causal, softmax_scale, options)
    else:
        out, lse = forward(q, k, v, lengths, causal, softmax_scale, options, want_lse=return_lse)
    return (out, lse) if return_lse else out


def needs_gradient(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Lengths,
    causal: bool,
    softmax_scale: float | None,
    options: ScoreOptions | None,
    *,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    out = torch.empty(q.shape)
    lse = None
    if want_lse:
        shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
        lse = torch.empty(shape)
    _C.attention_forward(
        _rows(q), _rows(k), _rows(v), *_lengths(lengths), causal, scale_of(q, softmax_scale),
        scores_of(options), out.numpy(), _floats(lse), torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    causal: bool,
    softmax_scale: float | None,
    options: ScoreOptions | None,
) -> Tensor:
    """Reads the cache's blocks in place: see ``kernels.paged_attention.paged_attention``."""
    out = torch.empty(q.shape)
    _C.paged_attention(
        _rows(q), k_cache.detach().numpy(), v_cache.detach().numpy(), _integers(block_table),
        _integers(cache_seqlens), _integers(cu_seqlens_q), causal, scale_of(q, softmax_scale), scores_of(options),
        out.numpy(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _rows(x: Tensor) -> Any:
    """A numpy view whose last dimension is contiguous; only an unusual layout is copied."""
    x = x.detach()
    return (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()).numpy()


def _floats(x: Tensor | None) -> Any:
    return None if x is None else x.detach().contiguous().numpy()


def _integers(x: Tensor | None) -> Any:
    return None if x is None else x.to(torch.int32).contiguous().numpy()


def _lengths(lengths: Sequence[Tensor | None]) -> tuple[Any, Any, Any]:
    cu_seqlens_q, cu_seqlens_k, key_lengths = map(_integers, lengths)
    return cu_seqlens_q, cu_seqlens_k, key_lengths


def scale_of(q: Tensor, softmax_scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale


def scores_of(options: ScoreOptions | None) -> tuple[int, float, Any, Any]:
    if options is None:
        return 0, 0.0, None, None
    return options.window or 0, options.softcap, _floats(options.alibi_slopes), _floats(options.distance_bias)


class _Attention(torch.autograd.Function):
    """Keeps the output and the log-sum-exp; the backward pass computes the probabilities again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        lengths: Lengths,
        causal: bool,
        softmax_scale: float | None,
        options: ScoreOptions | None,
    ) -> tuple[Tensor, Tensor | None]:
        out, lse = forward(q, k, v, lengths, causal, softmax_scale, options, want_lse=True)
        ctx.save_for_backward(q, k, v, out, lse, *lengths)
        ctx.set_materialize_grads(False)
        ctx.causal, ctx.softmax_scale, ctx.options = causal, softmax_scale, options
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("native attention has no second derivative: use backend='torch' for create_graph")
        q, k, v, out, lse, *lengths = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grad_q, grad_k, grad_v = torch.empty(q.shape), torch.empty(k.shape), torch.empty(v.shape)
        grad_bias = torch.empty(ctx.options.distance_bias.shape) if ctx.needs_input_grad[3] else None
        _C.attention_backward(
            _rows(q), _rows(k), _rows(v), *_lengths(lengths), ctx.causal, scale_of(q, ctx.softmax_scale),
            scores_of(ctx.options), out.numpy(), lse.numpy(), _rows(grad_out), _floats(grad_lse), grad_q.numpy(),
            grad_k.numpy(), grad_v.numpy(), _floats(grad_bias), torch.get_num_threads(),
        )  # fmt: skip
        return grad_q, grad_k, grad_v, grad_bias, None, None, None, None
