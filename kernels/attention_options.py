"""What attention may do to a score between the product and the softmax: cap it, bias it by distance, window it.

A distance is a key's position less the query's, j - p: queries are aligned with the last keys, so query i stands at
p = i + seqlen_k - seqlen_q.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """T5's bias (Raffel et al., arXiv:1910.10683): a number a head and bucket of distances, added to the scores.

    table: (num_buckets, heads). max_distance: all keys from here on share a bucket. bidirectional: keys ahead of
        the query get half of the buckets; else they count as distance 0.

    Make one object a forward pass, outside what is checkpointed, and share it between layers: ``distance_bias`` is
    computed here, once, and carries the gradient back to the table. Where the table does not change, as in serving, one
    object a model serves all steps.
    Raises ValueError for a table or a max_distance without buckets.
    """

    table: Tensor
    max_distance: int
    bidirectional: bool
    # (heads, 2 * max_distance + 1), for distances from -max_distance on; float32 or wider, as all kernels want it.
    distance_bias: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if self.table.dim() != 2:
            raise ValueError(f"a relative bias's table must be (num_buckets, heads), got {tuple(self.table.shape)}")
        find = relative_buckets if torch.compiler.is_compiling() else _relative_buckets_once
        buckets = find(self.table.shape[0], self.max_distance, self.bidirectional, self.table.device)
        precision = torch.promote_types(self.table.dtype, torch.float32)
        # Unlike index_select's, an embedding's gradient adds up in the same order each time on a GPU.
        rows = functional.embedding(buckets, self.table).t()
        # One copy, whether it casts or only transposes.
        rows = rows.to(precision, memory_format=torch.contiguous_format).contiguous()
        object.__setattr__(self, "distance_bias", rows)


def relative_buckets(num_buckets: int, max_distance: int, bidirectional: bool, device: torch.device) -> Tensor:
    """The bucket of every distance from -max_distance to max_distance: int64 (2 * max_distance + 1,).

    Near distances have a bucket each, farther ones share logarithmically wider ones. The arithmetic is float32's,
    as in the models this has to agree with.
    """
    per_side = num_buckets // 2 if bidirectional else num_buckets
    exact = per_side // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(f"a relative bias of {num_buckets} buckets cannot reach max_distance {max_distance}")
    distance = torch.arange(-max_distance, max_distance + 1, device=device)
    steps = distance.abs() if bidirectional else -distance.clamp(max=0)
    logarithm = torch.log(steps.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    wide = (exact + (logarithm * (per_side - exact)).long()).clamp(max=per_side - 1)
    buckets = torch.where(steps < exact, steps, wide)
    return buckets + (distance > 0) * per_side if bidirectional else buckets


@functools.cache
def _relative_buckets_once(num_buckets: int, max_distance: int, bidirectional: bool, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # whoever comes first, a later caller may want a gradient
        return relative_buckets(num_buckets, max_distance, bidirectional, device)


class AttentionOptions(TypedDict, total=False):
    """Keyword arguments of ``attention`` and ``paged_attention`` that belong to a model rather than to a call."""

    softmax_scale: float | None
    window: int | None
    softcap: float
    alibi_slopes: Tensor | None
    relative_bias: RelativeBias | None


class ScoreOptions(NamedTuple):
    """The options of a call that has any; ``kernels.attention.attention`` explains them."""

    window: int | None
    softcap: float
    alibi_slopes: Tensor | None
    relative_bias: RelativeBias | None
    dense_bias: Tensor | None = None  # broadcasts to (batch, heads, seqlen_q, seqlen_k)

    @property
    def distance_bias(self) -> Tensor | None:
        return None if self.relative_bias is None else self.relative_bias.distance_bias

    def tensors(self) -> list[Tensor]:
        return [x for x in (self.alibi_slopes, self.distance_bias) if x is not None]

    def narrow(self, mask: Tensor | None, distance: Tensor) -> Tensor | None:
        """The mask, less the keys outside the window. distance is (batch or 1, seqlen_q, seqlen_k)."""
        if self.window is None:
            return mask
        near = (distance.abs() < self.window)[:, None]
        return near if mask is None else mask & near

    def bias(self, distance: Tensor, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores: (batch or 1, heads, seqlen_q, seqlen_k), or None."""
        bias = None
        if self.relative_bias is not None:
            reach = self.relative_bias.max_distance
            place = distance.clamp(-reach, reach) + reach
            bias = self.relative_bias.distance_bias.to(dtype)[:, place].transpose(0, 1)
        if self.alibi_slopes is not None:
            slope = self.alibi_slopes.detach().to(dtype)[:, None, None]
            penalty = slope * distance.abs()[:, None]
            bias = -penalty if bias is None else bias - penalty
        if self.dense_bias is not None:
            dense = self.dense_bias.to(dtype)
            bias = dense if bias is None else bias + dense
        return bias


def score_options(
    heads: int,
    window: int | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    relative_bias: RelativeBias | None,
) -> ScoreOptions | None:
    """None where no option is given. Raises ValueError for one that makes no sense or belongs to other heads."""
    if window is None and softcap == 0 and alibi_slopes is None and relative_bias is None:
        return None
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap must be positive, or 0 for none, got {softcap}")
    if alibi_slopes is not None and (alibi_slopes.shape != (heads,) or alibi_slopes.dtype is not torch.float32):
        got = f"{alibi_slopes.dtype} {tuple(alibi_slopes.shape)}"
        raise ValueError(f"alibi_slopes must be float32 ({heads},), one a head, got {got}")
    if relative_bias is not None and relative_bias.table.shape[1] != heads:
        raise ValueError(f"the relative bias is for {relative_bias.table.shape[1]} heads, q has {heads}")
    return ScoreOptions(window, softcap, alibi_slopes, relative_bias)


def with_dense_bias(options: ScoreOptions | None, bias: Tensor, q: Tensor, k: Tensor, packed: bool) -> ScoreOptions:
    """The options and a dense bias. Raises ValueError for a packed batch or a bias of another shape."""
    if packed:
        raise ValueError("a dense bias belongs to padded batches; packed ones take relative_bias or alibi_slopes")
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    fits = bias.dim() == 4 and all(have in (1, want) for have, want in zip(bias.shape, shape, strict=True))
    if not fits or not bias.is_floating_point():
        raise ValueError(f"bias must be floating point and broadcast to {shape}, got {bias.dtype} {tuple(bias.shape)}")
    return (options or ScoreOptions(None, 0.0, None, None))._replace(dense_bias=bias)
