"""What a model asks of a key-value cache. The engine implements it; a model never knows how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kernels.attention_options import AttentionOptions

Angles = tuple[Tensor, Tensor]


class Cache(Protocol):
    """One step's view of the cache: new tokens are packed, (tokens, heads, head_dim), in the order of the batch."""

    def self_attention(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, rotary: Angles | None
    ) -> Tensor:
        """Appends k and v to ``layer``'s keys and values, then attends causally over all of each sequence's.

        With ``rotary``, cos and sin as ``kernels.rotary.rotate`` takes them, q and k are turned first.
        """
        ...

    def cross_attention(self, layer: int, q: Tensor, options: AttentionOptions) -> Tensor:
        """Attends over the source's keys and values, written once when the source was encoded."""
        ...


@dataclass(frozen=True)
class Lengths:
    """How sequences lie in a batch without a cache.

    Padded: (batch, seqlen, ...), with ``key_lengths`` (batch,) telling how many of each are real, or None for all.
    Packed: (tokens, ...), with ``cu_seqlens`` int32 (batch + 1,) and the longest length, ``max_seqlen``.
    ``backend`` is the one attention over them is asked to run on, None for the best there is.
    """

    key_lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    backend: str | None = None
