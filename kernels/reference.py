"""Plain-PyTorch definitions of every kernel: slow, obvious, and what the fast ones are tested against."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from kernels.attention_options import ScoreOptions

if TYPE_CHECKING:
    from kernels.chunked_loss import LossOptions
    from kernels.sampling import LogitEdits, SamplingBatch


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


def distances(seqlen_q: int, seqlen_k: int, *, device: torch.device) -> Tensor:
    """Key positions less query positions, aligned bottom-right: int64 (1, seqlen_q, seqlen_k)."""
    rows = torch.arange(seqlen_q, device=device)[:, None] + (seqlen_k - seqlen_q)
    return (torch.arange(seqlen_k, device=device)[None, :] - rows)[None]


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    softmax_scale: float | None,
    dropout_p: float = 0.0,
    options: ScoreOptions | None = None,
    distance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale) v and the log-sum-exp of the scores; a query that sees no key gives zeros and -inf.

    q is (batch, seqlen_q, heads, head_dim), k and v (batch, seqlen_k, kv_heads, head_dim), mask as ``attention_mask``,
    distance, needed with options, (batch or 1, seqlen_q, seqlen_k).
    Returns the output in q's shape and dtype, and lse as float32 (batch, heads, seqlen_q).
    """
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    groups = q.shape[2] // k.shape[2]
    precision = torch.promote_types(q.dtype, torch.float32)
    queries = q.transpose(1, 2).to(precision)
    keys = k.transpose(1, 2).to(precision).repeat_interleave(groups, dim=1)
    values = v.transpose(1, 2).to(precision).repeat_interleave(groups, dim=1)
    scores = queries @ keys.transpose(-1, -2) * scale
    if options is not None:
        assert distance is not None
        scores, mask = _shaped(scores, mask, options, distance)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1).nan_to_num(neginf=0.0)).exp()
    weights = torch.nn.functional.dropout(weights, dropout_p)
    return (weights @ values).transpose(1, 2).to(q.dtype), lse.float()


def _shaped(
    scores: Tensor, mask: Tensor | None, options: ScoreOptions, distance: Tensor
) -> tuple[Tensor, Tensor | None]:
    if options.softcap:
        scores = options.softcap * (scores / options.softcap).tanh()
    bias = options.bias(distance, scores.dtype)
    return scores if bias is None else scores + bias, options.narrow(mask, distance)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    key_lengths: Tensor | None = None,
    options: ScoreOptions | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention over padded batches: see ``kernels.attention.attention``. Returns (output, lse)."""
    mask = attention_mask(q.shape[1], k.shape[1], causal=causal, key_lengths=key_lengths, device=q.device)
    distance = None if options is None else distances(q.shape[1], k.shape[1], device=q.device)
    return masked_attention(q, k, v, mask, softmax_scale, dropout_p, options, distance)


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
    options: ScoreOptions | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Attention over a paged cache, a sequence at a time: see ``kernels.paged_attention.paged_attention``."""
    out = torch.empty_like(q)
    bounds = cu_seqlens_q.tolist()
    out[bounds[-1] :] = 0  # padding
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        length = int(cache_seqlens[i])
        table = block_table[i, : -(-length // k_cache.shape[1])].long()
        cached = read_cache(k_cache, table, k_scale), read_cache(v_cache, table, v_scale)
        k, v = (x.flatten(0, 1)[None, :length] for x in cached)
        queries = q[None, start:end]
        out[start:end] = attention(queries, k, v, causal=causal, softmax_scale=softmax_scale, options=options)[0][0]
    return out


def read_cache(cache: Tensor, blocks: Tensor, scale: Tensor | None) -> Tensor:
    """What some blocks of a cache hold, in its dtype, or float32 where that is a byte: (..., *cache.shape[1:])."""
    if cache.dtype is torch.float8_e4m3fn:
        return cache.view(torch.uint8)[blocks].view(cache.dtype).float()
    return cache[blocks] if scale is None else cache[blocks].float() * scale[blocks].unsqueeze(-1)


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
) -> None:
    """See ``kernels.paged_attention.append_to_cache``; angles are (tokens, rotated / 2)."""
    if cos is not None and sin is not None:
        cos, sin = cos[:, None], sin[:, None]
        precision = torch.promote_types(k.dtype, torch.float32)
        k = rotate(k.to(precision), cos, sin, interleaved=interleaved)
        if q is not None:
            q.copy_(rotate(q.to(precision), cos, sin, interleaved=interleaved))
    stored = slots >= 0
    places = slots[stored].div(k_cache.shape[1], rounding_mode="floor"), slots[stored] % k_cache.shape[1]
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        new = x[stored]
        if scale is not None:
            largest = new.float().abs().amax(-1)
            scale[places] = largest / 127
            factor = torch.where(largest > 0, 127 / largest, 0.0)
            cache[places] = (new.float() * factor[..., None]).round().to(torch.int8)
        elif cache.dtype is torch.float8_e4m3fn:
            cache.view(torch.uint8)[places] = new.float().clamp(-448, 448).to(cache.dtype).view(torch.uint8)
        else:
            cache[places] = new.to(cache.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``kernels.norm.rms_norm``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).to(weight.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """See ``kernels.norm.layer_norm``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    out = (wide - wide.mean(-1, keepdim=True)) * (wide.var(-1, correction=0, keepdim=True) + eps).rsqrt() * weight
    return (out if bias is None else out + bias).to(weight.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """See ``kernels.rotary.rotate``. cos and sin may be anything that broadcasts to half of what is rotated."""
    rotated = 2 * cos.shape[-1]
    if rotated < x.shape[-1]:
        turned = rotate(x[..., :rotated], cos, sin, interleaved=interleaved)
        return torch.cat((turned, x[..., rotated:]), dim=-1)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    pair = first * cos - second * sin, second * cos + first * sin
    return torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)


def gelu(x: Tensor) -> Tensor:
    """See ``kernels.activation.gelu``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * 0.5 * (1 + torch.erf(wide * 2**-0.5))).to(x.dtype)


def gelu_new(x: Tensor) -> Tensor:
    """See ``kernels.activation.gelu_new``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (wide + 0.044715 * wide**3)))).to(x.dtype)


def glu(x: Tensor, activation: str) -> Tensor:
    """See ``kernels.activation.glu``."""
    gate, up = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    functions = {"relu": torch.relu, "silu": lambda x: x * torch.sigmoid(x), "gelu": gelu, "gelu_new": gelu_new}
    return (functions[activation](gate) * up).to(x.dtype)


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float, z_loss: float, ignore_index: int) -> Tensor:
    """The summed loss of logits (rows, vocab): see ``kernels.cross_entropy.cross_entropy``."""
    ignored = labels == ignore_index
    labels = labels.masked_fill(ignored, 0)
    # Zeros for what is ignored: no gradient passes, not even of what is no number.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(ignored[:, None], 0.0)
    surprise = -logits.log_softmax(-1)
    loss = (1 - label_smoothing) * surprise.gather(-1, labels[:, None])[:, 0]
    if label_smoothing:
        loss = loss + label_smoothing * surprise.mean(-1)
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(-1).square()
    return loss.masked_fill(ignored, 0.0).sum()


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: LossOptions
) -> Tensor:
    """The same of hidden (rows, dim) before its head: see ``kernels.linear_cross_entropy.linear_cross_entropy``."""
    logits = linear(hidden * options.scale, weight, bias)
    if options.softcap:
        logits = options.softcap * (logits / options.softcap).tanh()
    return cross_entropy(logits, labels, options.label_smoothing, options.z_loss, options.ignore_index)


def sampling_probabilities(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """What `kernels.sampling.sample` draws from: float64 (rows, vocab), 0 for tokens filtered out."""
    return torch.stack([_row_probabilities(row.double(), batch, i) for i, row in enumerate(logits)])


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Token ids, int64 (rows,): the first whose cumulative probability exceeds the row's random number."""
    cumulative = sampling_probabilities(logits, batch).cumsum(-1)
    numbers = [uniform(int(s), int(p)) for s, p in zip(batch.seed, batch.position, strict=True)]
    targets = torch.tensor(numbers, dtype=torch.float64)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from Philox4x32-10 (Salmon et al. 2011) with key `seed` and counter `position`."""
    low = 0xFFFFFFFF
    seed %= 1 << 64
    key = [seed & low, seed >> 32]
    counter = [position & low, position >> 32, 0, 0]
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [b >> 32 ^ counter[1] ^ key[0], b & low, a >> 32 ^ counter[3] ^ key[1], a & low]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return ((counter[0] << 32 | counter[1]) >> 11) * 2.0**-53


def _row_probabilities(logits: Tensor, batch: SamplingBatch, row: int) -> Tensor:
    logits = _penalised(logits, batch, row)
    temperature = float(batch.temperature[row])
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), logits.shape[0]).double()
    probabilities = (logits / temperature).softmax(-1)
    probabilities[probabilities < float(batch.min_p[row]) * probabilities.max()] = 0
    # A stable sort puts the lower id first among equals.
    by_logit = torch.sort(logits, descending=True, stable=True).indices
    if top_k := int(batch.top_k[row]):
        probabilities[by_logit[top_k:]] = 0
    if (top_p := float(batch.top_p[row])) < 1:
        mass = probabilities[by_logit].cumsum(-1) / probabilities.sum()
        probabilities[by_logit[1:][mass[:-1] >= top_p]] = 0
    if (typical_p := float(batch.typical_p[row])) < 1:
        probabilities = _typical(probabilities / probabilities.sum(), typical_p)
    return probabilities / probabilities.sum()


def _typical(probabilities: Tensor, typical_p: float) -> Tensor:
    """Locally typical sampling (Meister et al. 2022, arXiv:2202.00666)."""
    entropy = torch.special.entr(probabilities).sum()
    by_distance = torch.sort((-probabilities.log() - entropy).abs(), stable=True).indices
    mass = probabilities[by_distance].cumsum(-1)
    dropped = by_distance[1:][mass[:-1] >= typical_p]
    return probabilities.index_fill(0, dropped, 0.0)


def _penalised(logits: Tensor, batch: SamplingBatch, row: int) -> Tensor:
    history = _history(batch, row)
    output = history[int(batch.prompt_lengths[row]) :]
    penalty = batch.repetition_penalty[row]
    repeated = torch.where(logits > 0, logits / penalty, logits * penalty)
    seen = torch.zeros_like(logits, dtype=torch.bool).index_fill(0, history, True)
    count = torch.bincount(output, minlength=logits.shape[0])
    logits = torch.where(seen, repeated, logits)
    return logits - batch.frequency_penalty[row] * count - batch.presence_penalty[row] * (count > 0)


def edit_logits(scores: Tensor, edits: LogitEdits) -> Tensor:
    """What `kernels.sampling.edit_logits` makes of float32 scores (rows, vocab), which stay as they are."""
    scores = scores.clone()
    for i, row in enumerate(edits.rows.tolist()):
        _edit(scores[row], edits, i)
    return scores


def _edit(row: Tensor, edits: LogitEdits, i: int) -> None:
    history, vocab = _history(edits, i), row.shape[0]
    seen, penalty = history.unique(), edits.repetition_penalty[i]
    row[seen] = torch.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
    if size := int(edits.no_repeat_ngram_size[i]):
        ids = history.tolist()
        for end in range(size, len(ids) + 1):
            if ids[end - size : end - 1] == ids[len(ids) - size + 1 :]:
                row[ids[end - 1]] = -math.inf
    for j in range(*edits.bias_offsets[i : i + 2].tolist()):
        row[edits.bias_ids[j]] += edits.bias_values[j]
    forced, mask = int(edits.forced[i]), int(edits.mask[i])
    if forced >= 0 and not row.isnan().any():
        row.copy_(torch.full_like(row, -math.inf).index_fill(0, torch.tensor([forced]), 0.0))
    if mask >= 0:
        allowed = edits.masks[mask][:, None] >> torch.arange(32) & 1
        row.masked_fill_(allowed.flatten()[:vocab] == 0, -math.inf)


def _history(batch: SamplingBatch | LogitEdits, row: int) -> Tensor:
    start, length = int(batch.history_starts[row]), int(batch.history_lengths[row])
    return batch.history_ids[start : start + length].long()


def dropout_keeps(seed: int, dropout_p: float, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> Tensor:
    """Which weights the Triton attention keeps: bool (batch, heads, seqlen_q, seqlen_k).

    24 bits of Philox4x32 with 7 rounds, key ``seed``, counter (key position, query, batch * heads + head, 0).
    """
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = torch.meshgrid(
        torch.arange(seqlen_k), torch.arange(seqlen_q), torch.arange(batch * heads), torch.arange(1), indexing="ij"
    )
    k0, k1 = seed % (1 << 64) & low, seed % (1 << 64) >> 32
    for _ in range(7):
        # The products of two 32-bit numbers, in halves, since int64 holds no more than 63 bits of them.
        high0, low0 = _product(0xD2511F53, c0)
        high2, low2 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    kept = (c0 >> 8) >= round(dropout_p * (1 << 24))
    return kept[..., 0].permute(2, 1, 0).unflatten(0, (batch, heads))


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of a * b, of numbers below 2^32 in int64."""
    lower, upper = a * (b & 0xFFFF), a * (b >> 16)
    middle = (lower >> 16) + upper
    return middle >> 16, (middle & 0xFFFF) << 16 | lower & 0xFFFF
