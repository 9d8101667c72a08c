"""The parts every model is made of: norm, feed-forward, attention, and the block that joins them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.activation import gelu, gelu_new
from kernels.attention import attention
from kernels.linear import linear
from kernels.rotary import rotate
from models.cache import Cache, Lengths
from models.config import TransformerConfig

Rotary = tuple[Tensor, Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": gelu,
    "gelu_new": gelu_new,
    "silu": F.silu,
    "geglu": gelu,
    "swiglu": F.silu,
}
GATED = {"geglu", "swiglu"}


class Linear(nn.Linear):
    """torch's linear layer over our kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def make_norm(config: TransformerConfig) -> nn.Module:
    kind = nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm
    return kind(config.dim, eps=config.norm_eps)


class FeedForward(nn.Module):
    """Two linear layers around an activation; a gated one multiplies by a second projection (arXiv:2002.05202)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.ffn_dim is not None
        self.activation = ACTIVATIONS[config.activation]
        self.gated = config.activation in GATED
        # gate and up are one product: their rows are stacked, gate first.
        self.up = Linear(config.dim, config.ffn_dim * (2 if self.gated else 1), bias=config.bias)
        self.down = Linear(config.ffn_dim, config.dim, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            return self.down(self.activation(gate) * hidden)
        return self.down(self.activation(hidden))


class Attention(nn.Module):
    """Multi-head attention, over its own input (self) or over the encoder's output (cross).

    x is (..., dim) in either layout of ``Lengths``, or packed when a cache holds the keys.
    """

    def __init__(self, config: TransformerConfig, layer: int, *, causal: bool, cross: bool = False) -> None:
        super().__init__()
        assert config.head_dim is not None and config.kv_heads is not None
        self.layer, self.causal, self.cross = layer, causal, cross
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.dropout = config.attention_dropout
        self.softmax_scale: float | None = None
        query_width, key_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if cross:
            self.q = Linear(config.dim, query_width, bias=config.bias)
            self.kv = Linear(config.dim, 2 * key_width, bias=config.bias)
        else:
            self.qkv = Linear(config.dim, query_width + 2 * key_width, bias=config.bias)
        self.out = Linear(query_width, config.dim, bias=config.bias)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def keys_values(self, encoder_output: Tensor) -> tuple[Tensor, Tensor]:
        """The source's keys and values for cross-attention, each (..., kv_heads, head_dim)."""
        k, v = self._split(self.kv(encoder_output)).chunk(2, dim=-2)
        return k, v

    def forward(
        self,
        x: Tensor,
        *,
        rotary: Rotary | None = None,
        encoder_output: Tensor | None = None,
        lengths: Lengths,
        cache: Cache | None = None,
    ) -> Tensor:
        if self.cross:
            mixed = self._attend_to_source(self._split(self.q(x)), encoder_output, lengths, cache)
        else:
            mixed = self._attend_to_self(self._split(self.qkv(x)), rotary, lengths, cache)
        return self.out(mixed.flatten(-2))

    def _attend_to_self(self, qkv: Tensor, rotary: Rotary | None, lengths: Lengths, cache: Cache | None) -> Tensor:
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=-2)
        if rotary is not None:
            qk = rotate(qk, *rotary)
        q, k = qk.split((self.heads, self.kv_heads), dim=-2)
        if cache is not None:
            return cache.self_attention(self.layer, q, k, v, self.softmax_scale)
        return self._attend(q, k, v, lengths)

    def _attend_to_source(
        self, q: Tensor, encoder_output: Tensor | None, lengths: Lengths, cache: Cache | None
    ) -> Tensor:
        if cache is not None:
            return cache.cross_attention(self.layer, q, self.softmax_scale)
        assert encoder_output is not None
        return self._attend(q, *self.keys_values(encoder_output), lengths)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> Tensor:
        mixed = attention(
            q,
            k,
            v,
            causal=self.causal,
            softmax_scale=self.softmax_scale,
            key_lengths=lengths.key_lengths,
            cu_seqlens_q=lengths.cu_seqlens,
            cu_seqlens_k=lengths.cu_seqlens,
            max_seqlen_q=lengths.max_seqlen,
            max_seqlen_k=lengths.max_seqlen,
            dropout_p=self.dropout if self.training else 0.0,
            backend=lengths.backend,
        )
        assert isinstance(mixed, Tensor)
        return mixed


class Block(nn.Module):
    """Self-attention, cross-attention where asked, and feed-forward, each a residual branch with its norm."""

    def __init__(self, config: TransformerConfig, layer: int, *, causal: bool, cross: bool) -> None:
        super().__init__()
        self.post_norm = config.norm_place == "post"
        self.attention = Attention(config, layer, causal=causal)
        self.attention_norm = make_norm(config)
        self.cross_attention = Attention(config, layer, causal=False, cross=True) if cross else None
        self.cross_attention_norm = make_norm(config) if cross else None
        self.ffn = FeedForward(config)
        self.ffn_norm = make_norm(config)
        self.dropout = nn.Dropout(config.dropout)

    def _residual(self, x: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor]) -> Tensor:
        if self.post_norm:
            return norm(x + self.dropout(branch(x)))
        return x + self.dropout(branch(norm(x)))

    def forward(
        self,
        x: Tensor,
        *,
        rotary: Rotary | None,
        lengths: Lengths,
        encoder_output: Tensor | None = None,
        source_lengths: Lengths | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        x = self._residual(
            x, self.attention_norm, lambda y: self.attention(y, rotary=rotary, lengths=lengths, cache=cache)
        )
        if self.cross_attention is not None:
            attend, norm = self.cross_attention, self.cross_attention_norm
            assert norm is not None
            around = source_lengths or Lengths()
            x = self._residual(x, norm, lambda y: attend(y, encoder_output=encoder_output, lengths=around, cache=cache))
        return self._residual(x, self.ffn_norm, self.ffn)


def initialize(module: nn.Module, config: TransformerConfig) -> None:
    """Normal weights of standard deviation 1/sqrt(fan_in), zero biases; a pre-norm stack's residual branches are
    shrunk by the root of their number, so that their sum starts at unit size whatever the depth (GPT-2's rule)."""
    assert config.encoder_depth is not None
    decoder_branches = (3 if config.is_encoder_decoder else 2) * config.depth
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2:
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            continue
        is_embedding = "tokens" in name or "positions" in name
        std = config.dim**-0.5 if is_embedding else parameter.shape[1] ** -0.5
        if name.endswith(("out.weight", "down.weight")) and config.norm_place == "pre":
            std *= (2 * config.encoder_depth if name.startswith("encoder.") else decoder_branches) ** -0.5
        torch.nn.init.normal_(parameter, std=std)
