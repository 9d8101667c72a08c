"""What a model's attention looks at, for one prompt and output: one pass with a cache that keeps the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import attention
from kernels.attention_options import AttentionOptions
from kernels.rotary import rotate
from models.cache import Angles
from models.transformer import DecoderOnly, EncoderDecoder


@dataclass
class AttentionWeights:
    """The weights that each token's queries give to the keys; those of a query add up to one.

    Attributes:
        token_ids: the decoder's prompt and the output. encoder_token_ids: the source, None without an encoder.
        decoder: float32 (layers, heads, tokens, tokens), self-attention's.
        cross: float32 (layers, heads, tokens, source tokens), None without an encoder.
    """

    token_ids: list[int]
    encoder_token_ids: list[int] | None
    decoder: Tensor
    cross: Tensor | None


class WatchingCache:
    """A cache (``models.cache.Cache``) of one sequence, whose tokens come at once; it keeps all weights."""

    def __init__(self, source: list[tuple[Tensor, Tensor]]) -> None:
        self.source = source  # keys and values by layer, (source tokens, kv_heads, head_dim) each
        self.decoder: list[Tensor] = []
        self.cross: list[Tensor] = []

    def self_attention(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, rotary: Angles | None
    ) -> Tensor:
        if rotary is not None:
            q, k = (rotate(x, *rotary) for x in (q, k))

        def attend(values: Tensor) -> Tensor:
            return attention(q[None], k[None], values[None], causal=True, backend="reference", **options)[0]

        self.decoder.append(_weights(attend, v))
        return attend(v)

    def cross_attention(self, layer: int, q: Tensor, options: AttentionOptions) -> Tensor:
        k, v = self.source[layer]

        def attend(values: Tensor) -> Tensor:
            return attention(q[None], k[None], values[None], backend="reference", **options)[0]

        self.cross.append(_weights(attend, v))
        return attend(v)


def _weights(attend: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """(heads, queries, keys): what comes out of values that say which key they belong to, as many keys as fit."""
    keys, kv_heads, width = v.shape
    places = torch.eye(keys, device=v.device, dtype=v.dtype)
    places = torch.nn.functional.pad(places, (0, -keys % width))
    parts = [
        attend(places[:, i : i + width, None].transpose(1, 2).expand(keys, kv_heads, width))
        for i in range(0, keys, width)
    ]
    return torch.cat(parts, dim=-1)[..., :keys].transpose(0, 1).float().cpu()


@torch.inference_mode()
def attention_weights(
    model: DecoderOnly | EncoderDecoder, token_ids: list[int], source_ids: list[int] | None
) -> AttentionWeights:
    """One pass over all tokens of a sequence, and its source where the model has an encoder."""
    device = next(model.parameters()).device
    source: list[tuple[Tensor, Tensor]] = []
    if isinstance(model, EncoderDecoder):
        hidden = model.encode(torch.tensor([source_ids], device=device))[0]
        source = model.cross_keys_values(hidden)
    cache = WatchingCache(source)
    model.decode(torch.tensor(token_ids, device=device), torch.arange(len(token_ids), device=device), cache)
    cross = torch.stack(cache.cross) if cache.cross else None
    return AttentionWeights(token_ids, source_ids, torch.stack(cache.decoder), cross)
