"""Scaled dot-product attention over padded or packed batches, for training, prefill and encoders."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels import native_attention, reference
from kernels.attention_options import RelativeBias, ScoreOptions, score_options, with_dense_bias
from kernels.backend import TRITON_DEVICE, available, check_devices, choose, in_autocast_dtype

if TRITON_DEVICE is not None:
    from kernels import triton_attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    key_lengths: Tensor | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    relative_bias: RelativeBias | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T * softmax_scale) v for each sequence of a batch.

    Args:
        q: (batch, seqlen_q, heads, head_dim), or packed (tokens_q, heads, head_dim) with ``cu_seqlens_q``.
        k, v: the same layout with kv_heads, which divides heads; query head h reads kv head
            h // (heads // kv_heads).
        causal: aligned bottom-right: query i of a sequence sees keys j <= i + seqlen_k - seqlen_q.
        softmax_scale: 1 / sqrt(head_dim) unless given.
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), where each packed sequence begins, from 0 to tokens. Documents
            packed into one row of training text are such sequences: none sees another.
        max_seqlen_q, max_seqlen_k: the longest packed sequence; needed when packed.
        key_lengths: int (batch,), how many of the padded keys are real.
        window: a query sees the keys j with |j - p| < window (Mistral, arXiv:2310.06825). Query i stands at key
            position p = i + seqlen_k - seqlen_q, of the padded lengths where padded.
        softcap: after the scale a score becomes softcap * tanh(score / softcap); 0 for none (Gemma 2,
            arXiv:2408.00118).
        alibi_slopes: float32 (heads,), without gradient: a score is lowered by slope * |j - p| (ALiBi,
            arXiv:2108.12409).
        relative_bias: adds a learned number a head and distance j - p to a score (T5, arXiv:1910.10683).
        bias: added to the scores of a padded batch, broadcast to (batch, heads, seqlen_q, seqlen_k). Its gradient takes
            that much memory, in float32.
        dropout_p: drops attention weights; the caller passes 0 outside training. 1 drops all of them.
        deterministic: the same gradients bit for bit each time, where a backend has a faster way that is not.
        return_lse: also return the scores' log-sum-exp, float32: (batch, heads, seqlen_q) or packed
            (heads, tokens_q).
        backend: ``triton`` (CUDA; float32, float16 and bfloat16, head_dim at most 256, gradients once), ``native``
            (C++; float32 on a CPU, no dropout or dense bias, head_dim at most 256, gradients once), ``torch`` (SDPA)
            or ``reference``; chosen by ``kernels.backend`` unless given. What SDPA lacks, torch takes from the formula:
            a soft-cap, the log-sum-exp, deterministic gradients on a GPU.

    Returns the output in q's shape and dtype. A query that sees no key gives zeros (lse -inf).
    Raises ValueError when shapes or options contradict each other.
    """
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    lengths = (cu_seqlens_q, cu_seqlens_k, key_lengths)
    _check_lengths(lengths, max_seqlen_q, max_seqlen_k)
    check_devices("attention", q, k, v, bias, alibi_slopes, *lengths)
    _check(q, k, v, packed, key_lengths)
    if softmax_scale is not None and not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be a finite number, got {softmax_scale}")
    options = score_options(q.shape[-2], window, softcap, alibi_slopes, relative_bias)
    if bias is not None:
        options = with_dense_bias(options, bias, q, k, packed)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be from 0 to 1, got {dropout_p}")
    q, k, v = in_autocast_dtype(q, k, v)
    triton = TRITON_DEVICE is not None and triton_attention.serves(q, k, v, softmax_scale, dropout_p)
    native = dropout_p == 0 and bias is None and native_attention.serves(q, k, v, options)
    name = choose("attention", available(q.device, triton=triton, native=native), backend)
    if name == "native":
        return native_attention.attention(q, k, v, lengths, causal, softmax_scale, options, return_lse)
    if packed:
        check_packed("q", q, cu_seqlens_q, max_seqlen_q)
        check_packed("k", k, cu_seqlens_k, max_seqlen_k)
    longest = (max_seqlen_q, max_seqlen_k) if packed else (q.shape[1], k.shape[1])
    if name == "triton":
        out, lse = triton_attention.attention(
            q, k, v, lengths, longest, causal, softmax_scale, options, dropout_p, deterministic
        )
        return (out, lse) if return_lse else out
    # SDPA's kernels for CUDA add gradients up in any order, and it has no log-sum-exp to return.
    formula = name == "reference" or return_lse or (deterministic and q.is_cuda)
    result, sums = _by_torch(q, k, v, lengths, longest, causal, softmax_scale, options, dropout_p, formula)
    if not return_lse:
        return result
    assert sums is not None
    return result, sums


def _by_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[Tensor | None, Tensor | None, Tensor | None],
    longest: tuple[int | None, int | None],
    causal: bool,
    softmax_scale: float | None,
    options: ScoreOptions | None,
    dropout_p: float,
    formula: bool,
) -> tuple[Tensor, Tensor | None]:
    """The output, and the log-sum-exp if ``formula``, the plain one, is asked for in SDPA's place."""
    cu_seqlens_q, cu_seqlens_k, key_lengths = lengths
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        max_seqlen_q, max_seqlen_k = longest
        assert max_seqlen_q is not None
        assert max_seqlen_k is not None
        return _packed(
            q, k, v, causal, softmax_scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options, dropout_p,
            want_lse=formula,
        )  # fmt: skip
    if not formula:
        return _sdpa(q, k, v, causal, softmax_scale, key_lengths, options, dropout_p), None
    return reference.attention(
        q,
        k,
        v,
        causal=causal,
        softmax_scale=softmax_scale,
        key_lengths=key_lengths,
        options=options,
        dropout_p=dropout_p,
    )


def _check_lengths(
    lengths: tuple[Tensor | None, Tensor | None, Tensor | None], max_seqlen_q: int | None, max_seqlen_k: int | None
) -> None:
    cu_seqlens_q, cu_seqlens_k, key_lengths = lengths
    if cu_seqlens_q is None and cu_seqlens_k is None:
        return
    if cu_seqlens_q is None or cu_seqlens_k is None or max_seqlen_q is None or max_seqlen_k is None:
        raise ValueError("packed attention needs cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        got = f"{tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}"
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must be of as many sequences, got {got}")
    if key_lengths is not None:
        raise ValueError("key_lengths belongs to padded batches, cu_seqlens to packed ones: give one of them")


def _check(q: Tensor, k: Tensor, v: Tensor, packed: bool, key_lengths: Tensor | None) -> None:
    rank = 3 if packed else 4
    if q.dim() != rank or k.dim() != rank or k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        layout = "(tokens, heads, head_dim)" if packed else "(batch, seqlen, heads, head_dim)"
        raise ValueError(
            f"q, k, v must be {layout} "
            f"with one head_dim, and k and v alike: got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"{k.shape[-2]} kv heads do not divide {q.shape[-2]} heads")
    if not packed and q.shape[0] != k.shape[0]:
        raise ValueError(f"q holds {q.shape[0]} sequences and k {k.shape[0]}")
    if key_lengths is not None and (key_lengths.shape != q.shape[:1] or not _integral(key_lengths)):
        got = f"{key_lengths.dtype} {tuple(key_lengths.shape)}"
        raise ValueError(f"key_lengths must be integers ({q.shape[0]},), got {got}")


def check_packed(name: str, x: Tensor, cu_seqlens: Tensor | None, longest: int | None) -> None:
    """Raises ValueError for offsets that are none of x's rows, as far as that is known without waiting for a GPU."""
    assert cu_seqlens is not None
    assert longest is not None
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0 or not _integral(cu_seqlens):
        got = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        raise ValueError(f"cu_seqlens_{name} must be integers (batch + 1,), got {got}")
    if not cu_seqlens.is_cpu or torch.compiler.is_compiling():
        return
    offsets = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(offsets)]
    if offsets[0] != 0 or offsets[-1] != x.shape[0] or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens_{name} must rise from 0 to the {x.shape[0]} tokens of {name}, got {offsets}")
    if max(lengths, default=0) > longest:
        raise ValueError(f"max_seqlen_{name} is {longest}, but a sequence has {max(lengths)} tokens")


def _integral(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype is torch.bool)


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    softmax_scale: float | None,
    key_lengths: Tensor | None,
    options: ScoreOptions | None,
    dropout_p: float,
) -> Tensor:
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    if options is not None:
        mask = reference.attention_mask(seqlen_q, seqlen_k, causal=causal, key_lengths=key_lengths, device=q.device)
        distance = reference.distances(seqlen_q, seqlen_k, device=q.device)
        return sdpa_with_options(q, k, v, mask, distance, options, softmax_scale, dropout_p)
    # SDPA's own causal mask is aligned top-left, so it serves square scores only; one query sees every key.
    square = causal and seqlen_q == seqlen_k and key_lengths is None
    mask = None
    if not square:
        mask = reference.attention_mask(
            seqlen_q, seqlen_k, causal=causal and seqlen_q > 1, key_lengths=key_lengths, device=q.device
        )
    return sdpa_masked(q, k, v, mask, softmax_scale, dropout_p, is_causal=square)


def sdpa_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    softmax_scale: float | None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """torch's SDPA on (batch, seqlen, heads, head_dim).

    A query that sees no key gives zeros. On a CPU that is torch's own behaviour, which a test holds it to; not all of
    its kernels for a GPU agree, so there they are made zeros.
    """
    out = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=softmax_scale,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)
    if mask is None or not q.is_cuda:
        return out
    hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf
    return out.masked_fill(hidden.all(-1, keepdim=True).transpose(1, 2), 0.0)


def sdpa_with_options(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    distance: Tensor | None,
    options: ScoreOptions | None,
    softmax_scale: float | None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Window and biases are a mask to SDPA; it cannot cap scores, so that takes the plain formula."""
    if options is None:
        return sdpa_masked(q, k, v, mask, softmax_scale, dropout_p)
    assert distance is not None
    if options.softcap:
        return reference.masked_attention(q, k, v, mask, softmax_scale, dropout_p, options, distance)[0]
    mask, bias = options.narrow(mask, distance), options.bias(distance, q.dtype)
    if bias is not None:
        mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
    return sdpa_masked(q, k, v, mask, softmax_scale, dropout_p)


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    softmax_scale: float | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: ScoreOptions | None,
    dropout_p: float,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Unpacks into rectangles, since SDPA knows no other shape, and packs the result again."""
    lengths_q, lengths_k = cu_seqlens_q.diff().long(), cu_seqlens_k.diff().long()
    keys = torch.arange(max_seqlen_k, device=q.device)
    mask = (keys[None, :] < lengths_k[:, None])[:, None, None]
    distance = None
    if causal or options is not None:
        rows = torch.arange(max_seqlen_q, device=q.device)[None, :] + (lengths_k - lengths_q)[:, None]
        mask = mask & (keys[None, None, :] <= rows[:, :, None])[:, None] if causal else mask
        distance = None if options is None else keys[None, None, :] - rows[:, :, None]
    real_q = torch.arange(max_seqlen_q, device=q.device)[None, :] < lengths_q[:, None]
    real_k = keys[None, :] < lengths_k[:, None]
    padded = unpack(q, real_q), unpack(k, real_k), unpack(v, real_k)
    if want_lse:
        out, lse = reference.masked_attention(*padded, mask, softmax_scale, dropout_p, options, distance)
        return out[real_q], lse.transpose(0, 1)[:, real_q]
    return sdpa_with_options(*padded, mask, distance, options, softmax_scale, dropout_p)[real_q], None


def unpack(x: Tensor, real: Tensor) -> Tensor:
    """Packed (tokens, ...) to padded (batch, seqlen, ...), zeros where ``real`` (batch, seqlen) is False."""
    padded = x.new_zeros(*real.shape, *x.shape[1:])
    return padded.masked_scatter(real.reshape(*real.shape, *[1] * (x.dim() - 1)), x)
