"""The Triton attention of kernels/gpu behind torch tensors, as ``kernels.attention.attention`` calls it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.attention_options import ScoreOptions
from kernels.backend import triton_serves
from kernels.gpu import attention as gpu

NO_OPTIONS = ScoreOptions(None, 0.0, None, None)


def serves(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, dropout_p: float) -> bool:
    """Whether the kernels take these tensors."""
    return (
        triton_serves(q, k, v)
        and q.dtype == k.dtype == v.dtype
        and 0 < q.shape[-1] <= gpu.MAX_HEAD_DIM
        and (softmax_scale is None or softmax_scale > 0)
        and dropout_p < 1
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[Tensor | None],
    longest: Sequence[int | None],
    causal: bool,
    softmax_scale: float | None,
    options: ScoreOptions | None,
    dropout_p: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """See ``kernels.attention.attention``, which has checked the shapes."""
    options = options or NO_OPTIONS
    max_seqlen_q, max_seqlen_k = longest
    assert max_seqlen_q is not None
    assert max_seqlen_k is not None
    cu_seqlens_q, cu_seqlens_k, key_lengths = lengths
    table, slopes = options.distance_bias, options.alibi_slopes
    call = gpu.Call(
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        key_lengths=key_lengths,
        slopes=None if slopes is None else slopes.detach().contiguous(),
        table=None if table is None else table.float().contiguous(),
        bias=options.dense_bias,
        # Drawn where torch's own generator stands, so that seeds and activation checkpointing hold for it too.
        seed=torch.randint(-(2**63), 2**63 - 1, (1,), device=q.device) if dropout_p > 0 else None,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        causal=causal,
        scale=1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale,
        window=options.window,
        softcap=options.softcap,
        dropout_p=dropout_p,
    )
    return gpu.attention(q, k, v, call, deterministic)
