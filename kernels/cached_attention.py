"""Attention over the native CPU cache of csrc/cache_pages.h, and the append that fills it: C++ only, no gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.attention_options import RelativeBias, score_options
from kernels.extension import _C
from kernels.native_attention import scale_of, scores_of

PAGE = _C.cache_page  # tokens


class CacheFormat(NamedTuple):
    """What a layer's part of every block holds.

    dtype: ``float32``, ``bfloat16`` or ``int8`` (symmetric, with a float32 scale a token and head).
    block_size: tokens, a multiple of ``PAGE``.

    ``layer_bytes`` raises ValueError for a format that cannot be.
    """

    dtype: str
    kv_heads: int
    head_dim: int
    block_size: int

    @property
    def layer_bytes(self) -> int:
        """How many bytes of a block belong to one layer, a multiple of 64."""
        return self.block_size // PAGE * _C.cache_page_bytes(self.dtype, self.kv_heads, self.head_dim)


def append(
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    cache_format: CacheFormat,
    slots: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    q: Tensor | None = None,
) -> None:
    """Writes new keys and values into the cache, in place; with angles, rotates the keys on their way, and q in place.

    Args:
        k, v: float32 (tokens, kv_heads, head_dim), the last dimension contiguous, as columns of a projection are.
        cache: uint8 (num_blocks, layer_bytes), one layer's part of every block, on boundaries of 64 bytes.
        slots: int64 (tokens,), each token's block * block_size + offset, all different.
        cos, sin: float32 (tokens, rotated / 2), the tokens' angles; the rest of a head wider than ``rotated`` stays as
            it is.
        interleaved: elements 2i and 2i + 1 pair; else element i of the first half of what is rotated pairs with
            element i of the second.
        q: float32 (tokens, heads, head_dim).

    Raises ValueError when shapes, types or layouts contradict each other, and for slots outside the cache.
    """
    _C.cache_append(
        cache.numpy(), cache_format, _rows(k), _rows(v), slots.numpy(), None if cos is None else cos.numpy(),
        None if sin is None else sin.numpy(), interleaved, None if q is None else _rows(q), torch.get_num_threads(),
    )  # fmt: skip


def attend(
    q: Tensor,
    cache: Tensor,
    cache_format: CacheFormat,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    relative_bias: RelativeBias | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of packed queries over each sequence's cached keys and values.

    A query's bits do not depend on the batch, the number of threads, or the queries that come with it: decoding gives
    what prefill gives.

    Args:
        q: float32 (tokens, heads, head_dim), the last dimension contiguous, any number of queries a sequence.
        cache: as for ``append``.
        block_table, cache_seqlens, cu_seqlens_q, causal, window, softcap, alibi_slopes, relative_bias: as for
            ``kernels.paged_attention.paged_attention``.
        out: receives the result; float32 in q's shape, the last dimension contiguous, apart from q and the cache.

    Returns out, or a new tensor. Raises ValueError when shapes, types, lengths or block ids contradict each other.
    """
    options = score_options(q.shape[1] if q.dim() == 3 else 0, window, softcap, alibi_slopes, relative_bias)
    out = torch.empty(q.shape) if out is None else out
    _C.cached_attention(
        _rows(q), cache.numpy(), cache_format, block_table.numpy(), cache_seqlens.numpy(), cu_seqlens_q.numpy(),
        causal, scale_of(q, softmax_scale), scores_of(options), _rows(out), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _rows(x: Tensor) -> Any:
    return x.detach().numpy()
