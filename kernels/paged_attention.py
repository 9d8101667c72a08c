"""Attention over a paged key-value cache, and the append that fills it, for decoding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels import native_attention, reference
from kernels.attention import sdpa_masked, sdpa_with_options, unpack
from kernels.attention_options import RelativeBias, ScoreOptions, score_options
from kernels.backend import TRITON_DEVICE, TRITON_DTYPES, available, check_devices, choose, triton_serves

if TRITON_DEVICE is not None:
    from kernels.gpu import cache_append as gpu_append
    from kernels.gpu import paged_attention as gpu
    from kernels.gpu.attention import MAX_HEAD_DIM
    from kernels.gpu.target import is_amd, serves_float8

BACKENDS = ("triton", "native", "torch", "reference")
APPEND_BACKENDS = ("triton", "torch", "reference")
FLOAT8 = torch.float8_e4m3fn


def append_to_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    q: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Writes new keys and values into the cache, in place; with angles, rotates the keys on their way, and q in place.

    Args:
        k, v: (tokens, kv_heads, head_dim); views into a fused projection will do.
        k_cache, v_cache, k_scale, v_scale: as for ``paged_attention``. int8 is rounded to the nearest of a token's
            levels, scale = largest magnitude / 127, float8 saturates.
        slots: int64 (tokens,), each token's block * block_size + offset, all different; negative: it is not stored.
        cos, sin: float32 (tokens, rotated / 2) or (tokens, 1, rotated / 2), the tokens' angles; the rest of a head
            wider than ``rotated`` stays as it is.
        interleaved: as for ``kernels.rotary.rotate``.
        q: (tokens, heads, head_dim), rotated where it lies; needs the angles.
        backend: ``triton`` (one launch; no gradients), ``torch`` or ``reference``; chosen by ``kernels.backend``
            unless given.

    Raises ValueError when shapes or types contradict each other.
    """
    _check_append(k, v, k_cache, v_cache, slots, cos, sin, q)
    _check_cache(k_cache, v_cache, k_scale, v_scale)
    cos, sin = (None if x is None else x.reshape(x.shape[0], x.shape[-1]) for x in (cos, sin))
    serves = _triton_serves(k, k_cache, v_cache) and triton_serves(v, q) and (q is None or q.stride(-1) == 1)
    serves = serves and _wants_no_gradient(k, v, q)
    names = tuple(name for name in available(k.device, triton=serves) if name in APPEND_BACKENDS)
    if choose("append_to_cache", names, backend, has=APPEND_BACKENDS) == "triton":
        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
        gpu_append.append(k, v, k_cache, v_cache, slots, k_scale, v_scale, cos, sin, interleaved, q)
        return
    reference.append_to_cache(
        k, v, k_cache, v_cache, slots,
        k_scale=k_scale, v_scale=v_scale, cos=cos, sin=sin, interleaved=interleaved, q=q,
    )  # fmt: skip


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
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Attention of packed queries over each sequence's cached keys and values.

    Args:
        q: (tokens, heads, head_dim), any number of queries a sequence.
        k_cache, v_cache: (num_blocks, block_size, kv_heads, head_dim), of one dtype: floats, int8 with scales, or
            float8_e4m3fn. A view such as one layer of (num_blocks, layers, ...) will do.
        block_table: int32 (batch, max_blocks), the blocks of each sequence in order; entries past its end are
            ignored.
        cache_seqlens: int32 (batch,), how many keys each sequence has in the cache, the queries' own
            included.
        cu_seqlens_q: int32 (batch + 1,), where each sequence's queries begin in q. On ``triton`` and ``reference`` q
            may have rows beyond the last one's, and they give zeros.
        max_seqlen_q: the most queries of one sequence.
        causal: aligned bottom-right, so the last query of a sequence sees all its keys.
        window, softcap, alibi_slopes, relative_bias: as for ``kernels.attention.attention``; p is the query's
            own place in its sequence, cache_seqlens less the queries that come after it and itself.
        k_scale, v_scale: of an int8 cache: float32 (num_blocks, block_size, kv_heads), what a token's and head's
            numbers are multiplied with.
        batch_invariant: a query's bits depend neither on the other sequences nor on the other queries of its own; on
            ``native`` they never do, on ``triton`` it costs speed, ``torch`` does not have it.
        backend: ``triton`` (no gradients; on the device, lengths and tables are read by the kernels alone, and a CUDA
            graph of the call serves all that its shapes allow), ``native`` (C++, reads the blocks in place; float32 on
            a CPU, head_dim at most 256, no gradients), ``torch`` (gathers the blocks for SDPA) or ``reference``;
            chosen by ``kernels.backend`` unless given.

    Returns (tokens, heads, head_dim) in q's dtype. Raises ValueError when shapes contradict each other.
    """
    _check(q, k_cache, v_cache)
    _check_cache(k_cache, v_cache, k_scale, v_scale)
    options = score_options(q.shape[1], window, softcap, alibi_slopes, relative_bias)
    inputs = (q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q)
    name = choose("paged_attention", _available(q, k_cache, v_cache, options, batch_invariant), backend, has=BACKENDS)
    if name == "triton":
        check_devices("paged_attention", q, *inputs[1:], k_scale, v_scale, *(options.tensors() if options else ()))
        _check_sequences(block_table, cache_seqlens, cu_seqlens_q)
        return gpu.paged_attention(*inputs, _call(q, max_seqlen_q, causal, softmax_scale, options, k_scale, v_scale,
                                                  batch_invariant))  # fmt: skip
    if name == "native":
        return native_attention.paged_attention(*inputs, causal, softmax_scale, options)
    if name == "reference":
        return reference.paged_attention(
            *inputs, causal=causal, softmax_scale=softmax_scale, options=options, k_scale=k_scale, v_scale=v_scale
        )
    return _gathered(*inputs, max_seqlen_q, causal, softmax_scale, options, k_scale, v_scale)


def _call(
    q: Tensor, max_seqlen_q: int, causal: bool, softmax_scale: float | None, options: ScoreOptions | None,
    k_scale: Tensor | None, v_scale: Tensor | None, batch_invariant: bool,
) -> gpu.Call:  # fmt: skip
    given = options or ScoreOptions(None, 0.0, None, None)
    return gpu.Call(
        max_seqlen_q=max_seqlen_q,
        causal=causal,
        scale=1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale,
        window=given.window,
        softcap=given.softcap,
        slopes=None if given.alibi_slopes is None else given.alibi_slopes.contiguous(),
        table=None if given.distance_bias is None else given.distance_bias.float(),
        k_scale=k_scale,
        v_scale=v_scale,
        batch_invariant=batch_invariant,
    )


def _gathered(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, cu_seqlens_q: Tensor,
    max_seqlen_q: int, causal: bool, softmax_scale: float | None, options: ScoreOptions | None,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """By SDPA, which reads rectangles: each sequence's blocks side by side, and a mask of what lies past its end."""
    table = block_table.long()
    cached = reference.read_cache(k_cache, table, k_scale), reference.read_cache(v_cache, table, v_scale)
    k, v = (x.flatten(1, 2).to(q.dtype) for x in cached)
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


def _check_sequences(block_table: Tensor, cache_seqlens: Tensor, cu_seqlens_q: Tensor) -> None:
    """Of shapes alone: the numbers are on the device."""
    batch = block_table.shape[0]
    fits = block_table.dim() == 2 and cache_seqlens.shape == (batch,) and cu_seqlens_q.shape == (batch + 1,)
    if not fits or any(x.is_floating_point() for x in (block_table, cache_seqlens, cu_seqlens_q)):
        raise ValueError(
            "block_table must be int32 (batch, max_blocks), cache_seqlens (batch,) and cu_seqlens_q (batch + 1,), got "
            f"{tuple(block_table.shape)}, {tuple(cache_seqlens.shape)} and {tuple(cu_seqlens_q.shape)}"
        )


def _check_cache(k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    if k_cache.dtype != v_cache.dtype:
        raise ValueError(f"the caches must be of one dtype, got {k_cache.dtype} and {v_cache.dtype}")
    if not k_cache.is_floating_point() and k_cache.dtype != torch.int8:
        raise ValueError(f"a cache is of floats, int8 or float8_e4m3fn, got {k_cache.dtype}")
    for scale in (k_scale, v_scale):
        if (scale is not None) != (k_cache.dtype == torch.int8):
            raise ValueError("an int8 cache needs both k_scale and v_scale, and no other takes them")
        if scale is not None and (scale.dtype != torch.float32 or scale.shape != k_cache.shape[:3]):
            got = f"{scale.dtype} {tuple(scale.shape)}"
            raise ValueError(f"k_scale and v_scale must be float32 {tuple(k_cache.shape[:3])}, got {got}")


def _check_append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, cos: Tensor | None, sin: Tensor | None,
    q: Tensor | None,
) -> None:  # fmt: skip
    fits = k.dim() == 3 and k.shape == v.shape and k_cache.dim() == 4 and k_cache.shape == v_cache.shape
    if not fits or k.shape[1:] != k_cache.shape[2:]:
        raise ValueError(
            "k and v must be (tokens, kv_heads, head_dim) alike, the caches (num_blocks, block_size, kv_heads, "
            f"head_dim): got {tuple(k.shape)}, {tuple(v.shape)}, {tuple(k_cache.shape)}, {tuple(v_cache.shape)}"
        )
    if slots.dtype != torch.int64 or slots.shape != k.shape[:1]:
        raise ValueError(f"slots must be int64 ({k.shape[0]},), got {slots.dtype} {tuple(slots.shape)}")
    if (cos is None) != (sin is None) or (q is not None and cos is None):
        raise ValueError("rotating needs both cos and sin")
    for angles in (cos, sin):
        if angles is not None and not _are_angles(angles, k):
            raise ValueError(
                f"cos and sin must be float32 ({k.shape[0]}, at most {k.shape[2] // 2}), "
                f"got {angles.dtype} {tuple(angles.shape)}"
            )
    if cos is not None and sin is not None and cos.shape != sin.shape:
        raise ValueError(f"cos and sin must be alike, got {tuple(cos.shape)} and {tuple(sin.shape)}")
    if q is not None and (q.dim() != 3 or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2])):
        raise ValueError(f"q must be ({k.shape[0]}, heads, {k.shape[2]}), got {tuple(q.shape)}")
    check_devices("append_to_cache", k, v, k_cache, v_cache, slots, cos, sin, q)


def _are_angles(angles: Tensor, k: Tensor) -> bool:
    shapes = (angles.dim() == 2 or (angles.dim() == 3 and angles.shape[1] == 1)) and angles.shape[0] == k.shape[0]
    return shapes and angles.dtype == torch.float32 and 0 < 2 * angles.shape[-1] <= k.shape[2]


def _available(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, options: ScoreOptions | None, batch_invariant: bool
) -> tuple[str, ...]:
    bias = None if options is None else options.distance_bias
    no_gradient = _wants_no_gradient(q, k_cache, v_cache, bias)
    native = no_gradient and native_attention.serves(q, k_cache, v_cache, options)
    triton = no_gradient and _triton_serves(q, k_cache, v_cache) and not is_amd()  # whose compiler fails on it
    names = available(q.device, triton=triton, native=native)
    return tuple(name for name in names if name != "torch") if batch_invariant else names


def _triton_serves(x: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether the kernels take queries, or keys, like x over these caches."""
    if not triton_serves(x) or not 0 < x.shape[-1] <= MAX_HEAD_DIM or torch.compiler.is_compiling():
        return False
    bytes_served = k_cache.dtype == torch.int8 or (k_cache.dtype == FLOAT8 and serves_float8())
    strides = k_cache.stride(-1) == v_cache.stride(-1) == 1
    return strides and k_cache.device.type == TRITON_DEVICE and (bytes_served or k_cache.dtype in TRITON_DTYPES)


def _wants_no_gradient(*tensors: Tensor | None) -> bool:
    return not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in tensors)
