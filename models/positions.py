"""Where a token stands: rotary angles for q and k, sinusoidal or learned vectors for embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.config import TransformerConfig


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin for ``rotate``, float32 (..., 1, head_dim / 2), for integer positions (...) (arXiv:2104.09864)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.to(torch.float32)[..., None, None] * theta**-exponent
    return angles.cos(), angles.sin()


def sinusoids(max_seqlen: int, dim: int) -> Tensor:
    """The fixed position vectors of arXiv:1706.03762, float32 (max_seqlen, dim): sines first, then cosines."""
    exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    angles = torch.arange(max_seqlen, dtype=torch.float32)[:, None] * 10_000.0**-exponent
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


class Embedding(nn.Module):
    """Token embeddings, scaled and with absolute positions added where the config says so."""

    def __init__(self, config: TransformerConfig, vocab_size: int, tokens: nn.Embedding | None = None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, config.dim) if tokens is None else tokens
        self.scale = config.dim**0.5 if config.scale_embedding else None
        self.dropout = nn.Dropout(config.dropout)
        self.positions = nn.Embedding(config.max_seqlen, config.dim) if config.positions == "learned" else None
        self.sinusoids: Tensor | None
        fixed = sinusoids(config.max_seqlen, config.dim) if config.positions == "sinusoidal" else None
        self.register_buffer("sinusoids", fixed, persistent=False)

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """Token vectors, (..., dim), scaled but without positions: what ``inputs_embeds`` stands for."""
        x = self.tokens(token_ids)
        return x * self.scale if self.scale is not None else x

    def forward(self, token_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        """(..., dim) for token ids, or for ``inputs_embeds`` in their place; positions broadcast over the batch."""
        if inputs_embeds is None:
            assert token_ids is not None
            inputs_embeds = self.embed_tokens(token_ids)
        if self.positions is not None:
            inputs_embeds = inputs_embeds + self.positions(positions)
        elif self.sinusoids is not None:
            inputs_embeds = inputs_embeds + self.sinusoids[positions].to(inputs_embeds.dtype)
        return self.dropout(inputs_embeds)
