"""Attention over a paged key-value cache, and the append that fills it, for decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native_attention, reference
from kernels.attention import sdpa_masked, sdpa_with_options, unpack
from kernels.attention_options import RelativeBias, ScoreOptions, score_options
from kernels.backend import choose

AVAILABLE = ("torch", "reference")
AVAILABLE_NATIVE = ("native", *AVAILABLE)


def append_to_cache(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Writes new keys and values into the cache, in place.

    Args:
        k, v: (tokens, kv_heads, head_dim).
        k_cache, v_cache: (num_blocks, block_size, kv_heads, head_dim).
        slots: int64 (tokens,), each token's block * block_size + offset.
    """
    k_cache.view(-1, *k_cache.shape[2:]).index_copy_(0, slots, k)
    v_cache.view(-1, *v_cache.shape[2:]).index_copy_(0, slots, v)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    max_seqlen_q: int,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    relative_bias: RelativeBias | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of packed queries over each sequence's cached keys and values.

    Args:
        q: (tokens, heads, head_dim), any number of queries a sequence.
        k_cache, v_cache: (num_blocks, block_size, kv_heads, head_dim).
        block_table: int32 (batch, max_blocks), the blocks of each sequence in order; entries past its end are
            ignored.
        cache_seqlens: int32 (batch,), how many keys each sequence has in the cache, the queries' own
            included.
        cu_seqlens_q: int32 (batch + 1,), where each sequence's queries begin in q.
        max_seqlen_q: the most queries of one sequence.
        causal: aligned bottom-right, so the last query of a sequence sees all its keys.
        window, softcap, alibi_slopes, relative_bias: as for ``kernels.attention.attention``; p is the query's
            own place in its sequence, cache_seqlens less the queries that come after it and itself.
        backend: ``native`` (C++, reads the blocks in place; float32 on a CPU, head_dim at most 256, no
            gradients), ``torch`` (gathers the blocks for SDPA) or ``reference``; chosen by
            ``kernels.backend`` unless given.

    Returns (tokens, heads, head_dim) in q's dtype. Raises ValueError when shapes contradict each other.
    """
    _check(q, k_cache, v_cache)
    options = score_options(q.shape[1], window, softcap, alibi_slopes, relative_bias)
    native = _wants_no_gradient(q, k_cache, v_cache, options) and native_attention.serves(q, k_cache, v_cache, options)
    name = choose("paged_attention", AVAILABLE_NATIVE if native else AVAILABLE, backend, has=AVAILABLE_NATIVE)
    if name == "native":
        return native_attention.paged_attention(
            q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q, causal, softmax_scale, options
        )
    if name == "reference":
        return reference.paged_attention(
            q,
            k_cache,
            v_cache,
            block_table,
            cache_seqlens,
            cu_seqlens_q,
            causal=causal,
            softmax_scale=softmax_scale,
            options=options,
        )
    # SDPA reads rectangles: gather each sequence's blocks side by side and mask what lies past its end.
    table = block_table.long()
    k, v = k_cache[table].flatten(1, 2), v_cache[table].flatten(1, 2)
    keys = torch.arange(k.shape[1], device=q.device)
    mask = (keys[None, :] < cache_seqlens[:, None])[:, None, None]
    if max_seqlen_q == 1 and options is None:
        return sdpa_masked(q.unsqueeze(1), k, v, mask, softmax_scale).squeeze(1)
    lengths_q = cu_seqlens_q.diff()
    rows = torch.arange(max_seqlen_q, device=q.device)[None, :]
    real = rows < lengths_q[:, None]
    distance = None
    if causal or options is not None:
        places = rows + (cache_seqlens - lengths_q)[:, None]
        mask = mask & (keys[None, None, :] <= places[:, :, None])[:, None] if causal else mask
        distance = None if options is None else keys[None, None, :] - places[:, :, None]
    return sdpa_with_options(unpack(q, real), k, v, mask, distance, options, softmax_scale)[real]


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    fits = q.dim() == 3 and k_cache.dim() == 4 and k_cache.shape == v_cache.shape
    if not fits or q.shape[-1] != k_cache.shape[-1]:
        raise ValueError(
            "q must be (tokens, heads, head_dim), the caches alike "
            "(num_blocks, block_size, kv_heads, head_dim) with that head_dim: "
            f"got {tuple(q.shape)}, {tuple(k_cache.shape)}, {tuple(v_cache.shape)}"
        )
    if q.shape[1] % k_cache.shape[2]:
        raise ValueError(f"{k_cache.shape[2]} kv heads do not divide {q.shape[1]} heads")


def _wants_no_gradient(q: Tensor, k_cache: Tensor, v_cache: Tensor, options: ScoreOptions | None) -> bool:
    if not torch.is_grad_enabled():
        return True
    bias = None if options is None else options.distance_bias
    return not (
        q.requires_grad or k_cache.requires_grad or v_cache.requires_grad or native_attention.needs_gradient(bias)
    )
