"""Plain-PyTorch definitions of every kernel: slow, obvious, and what the fast ones are tested against."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention_mask(
    seqlen_q: int, seqlen_k: int, *, causal: bool, key_lengths: Tensor | None, device: torch.device
) -> Tensor | None:
    """Which keys a query sees: bool, broadcastable to (batch, 1, seqlen_q, seqlen_k), or None for all of them.

    Causal is aligned bottom-right: query i sees keys j <= i + seqlen_k - seqlen_q.
    """
    mask = None
    if causal:
        rows = torch.arange(seqlen_q, device=device)[:, None] + (seqlen_k - seqlen_q)
        mask = (torch.arange(seqlen_k, device=device)[None, :] <= rows)[None, None]
    if key_lengths is not None:
        keys = torch.arange(seqlen_k, device=device)[None, :] < key_lengths[:, None]
        mask = keys[:, None, None] if mask is None else mask & keys[:, None, None]
    return mask


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softmax_scale: float | None, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale) v and the log-sum-exp of the scores; a query that sees no key gives zeros and -inf.

    q is (batch, seqlen_q, heads, head_dim), k and v (batch, seqlen_k, kv_heads, head_dim), mask as ``attention_mask``.
    Returns the output in q's shape and dtype, and lse as float32 (batch, heads, seqlen_q).
    """
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    groups = q.shape[2] // k.shape[2]
    precision = torch.promote_types(q.dtype, torch.float32)
    queries = q.transpose(1, 2).to(precision)
    keys = k.transpose(1, 2).to(precision).repeat_interleave(groups, dim=1)
    values = v.transpose(1, 2).to(precision).repeat_interleave(groups, dim=1)
    scores = queries @ keys.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1).nan_to_num(neginf=0.0)).exp()
    weights = torch.nn.functional.dropout(weights, dropout_p)
    return (weights @ values).transpose(1, 2).to(q.dtype), lse.float()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    key_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention over padded batches: see ``kernels.attention.attention``. Returns (output, lse)."""
    mask = attention_mask(q.shape[1], k.shape[1], causal=causal, key_lengths=key_lengths, device=q.device)
    return masked_attention(q, k, v, mask, softmax_scale, dropout_p)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attention over a paged cache, a sequence at a time: see ``kernels.paged_attention.paged_attention``."""
    out = torch.empty_like(q)
    bounds = cu_seqlens_q.tolist()
    for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        length = int(cache_seqlens[i])
        k, v = (c[block_table[i].long()].flatten(0, 1)[None, :length] for c in (k_cache, v_cache))
        out[start:end] = attention(q[None, start:end], k, v, causal=causal, softmax_scale=softmax_scale)[0][0]
    return out
