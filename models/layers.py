"""The parts every model is made of: norm, feed-forward, attention, and the block that joins them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.activation import Gate, gelu, gelu_new, glu
from kernels.attention import attention
from kernels.attention_options import AttentionOptions
from kernels.linear import linear
from kernels.norm import layer_norm, rms_norm
from kernels.rotary import rotate
from models.cache import Cache, Lengths
from models.config import TransformerConfig
from models.positions import Positional, RelativePositions

Branch = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Branch] = {"relu": F.relu, "gelu": gelu, "gelu_new": gelu_new, "silu": F.silu}
GATES: dict[str, Gate] = {"reglu": "relu", "geglu": "gelu", "geglu_new": "gelu_new", "swiglu": "silu"}


class Linear(nn.Linear):
    """torch's linear layer over our kernel."""

    def reset_parameters(self) -> None:
        # Drawing numbers for weights without memory would do nothing but import a second's worth of torch.
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm over our kernel; what comes in as float32 to a smaller model leaves in the model's dtype."""

    eps: float

    def forward(self, x: Tensor, residual: Tensor | None = None, other: Tensor | None = None) -> Any:
        """The norm of x; given a residual, that of x + residual or of (x + other) + residual, and that sum."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps, residual=residual, other=other)


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm over our kernel."""

    def forward(self, x: Tensor, residual: Tensor | None = None, other: Tensor | None = None) -> Any:
        """The norm of x; given a residual, that of x + residual or of (x + other) + residual, and that sum."""
        if residual is None:
            return layer_norm(x, self.weight, self.bias, self.eps)
        return layer_norm(x, self.weight, self.bias, self.eps, residual=residual, other=other)


def make_norm(config: TransformerConfig) -> RMSNorm | LayerNorm:
    kind = LayerNorm if config.norm == "layernorm" else RMSNorm
    return kind(config.dim, eps=config.norm_eps)


def add_and_norm(norm: nn.Module, x: Tensor, updates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The norm of x and its updates, none to two, added up in the same call, and that sum."""
    return norm(updates[0], x, *updates[1:]) if updates else (norm(x), x)


def add(x: Tensor, updates: Sequence[Tensor]) -> Tensor:
    """That sum alone."""
    return functools.reduce(operator.add, updates) + x if updates else x


class FeedForward(nn.Module):
    """Two linear layers around an activation; a gated one multiplies by a second projection (arXiv:2002.05202)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.ffn_dim is not None and config.ffn_bias is not None
        self.activation = config.activation
        # gate and up are one product: their rows are stacked, gate first.
        self.up = Linear(config.dim, config.ffn_dim * (2 if config.gated else 1), bias=config.ffn_bias)
        self.down = Linear(config.ffn_dim, config.dim, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        if self.down.weight.dtype != self.up.weight.dtype:
            # The second layer of a float16 model may be float32: then so is all that could overflow before it.
            hidden = hidden.to(self.down.weight.dtype)
        if self.activation in GATES:
            return self.down(glu(hidden, GATES[self.activation]))
        return self.down(ACTIVATIONS[self.activation](hidden))


class Attention(nn.Module):
    """Multi-head attention, over its own input (self) or over the encoder's output (cross).

    x is (..., dim) in either layout of ``Lengths``, or packed when a cache holds the keys.
    """

    def __init__(self, config: TransformerConfig, layer: int, *, causal: bool, cross: bool = False) -> None:
        super().__init__()
        assert config.head_dim is not None and config.kv_heads is not None
        assert config.qkv_bias is not None and config.out_bias is not None
        self.layer, self.causal, self.cross = layer, causal, cross
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.dropout = config.attention_dropout
        query_width, key_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if cross:
            self.q = Linear(config.dim, query_width, bias=config.qkv_bias)
            self.kv = Linear(config.dim, 2 * key_width, bias=config.qkv_bias)
        else:
            self.qkv = Linear(config.dim, query_width + 2 * key_width, bias=config.qkv_bias)
        self.out = Linear(query_width, config.dim, bias=config.out_bias)
        self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        own_table = config.positions == "relative" and config.relative_per_layer and not cross
        self.relative_bias = RelativePositions(config, causal=causal) if own_table else None
        self.options = attention_options(config, layer, cross=cross)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def keys_values(self, encoder_output: Tensor) -> tuple[Tensor, Tensor]:
        """The source's keys and values for cross-attention, each (..., kv_heads, head_dim)."""
        k, v = self._split(self.kv(encoder_output)).chunk(2, dim=-2)
        return k if self.k_norm is None else self.k_norm(k), v

    def forward(
        self,
        x: Tensor,
        *,
        positional: Positional | None = None,
        encoder_output: Tensor | None = None,
        lengths: Lengths,
        cache: Cache | None = None,
    ) -> Tensor:
        if self.cross:
            mixed = self._attend_to_source(self._split(self.q(x)), encoder_output, lengths, cache)
        else:
            mixed = self._attend_to_self(self._split(self.qkv(x)), positional or Positional(), lengths, cache)
        return self.out(mixed.flatten(-2))

    def _attend_to_self(self, qkv: Tensor, positional: Positional, lengths: Lengths, cache: Cache | None) -> Tensor:
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split((self.heads, self.kv_heads), dim=-2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=-2)
        options = self._with_bias(positional)
        if cache is None and positional.rotary is not None:
            qk = rotate(qk, *positional.rotary)
        q, k = qk.split((self.heads, self.kv_heads), dim=-2)
        if cache is not None:
            return cache.self_attention(self.layer, q, k, v, options, positional.rotary)
        return self._attend(q, k, v, lengths, options)

    def _with_bias(self, positional: Positional) -> AttentionOptions:
        options = self.options
        bias = positional.relative_bias if self.relative_bias is None else self.relative_bias()
        if bias is not None:
            options = {**options, "relative_bias": bias}
        if positional.alibi_slopes is not None:
            options = {**options, "alibi_slopes": positional.alibi_slopes}
        return options

    def _attend_to_source(
        self, q: Tensor, encoder_output: Tensor | None, lengths: Lengths, cache: Cache | None
    ) -> Tensor:
        q = q if self.q_norm is None else self.q_norm(q)
        if cache is not None:
            return cache.cross_attention(self.layer, q, self.options)
        assert encoder_output is not None
        return self._attend(q, *self.keys_values(encoder_output), lengths, self.options)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, options: AttentionOptions) -> Tensor:
        mixed = attention(
            q,
            k,
            v,
            causal=self.causal,
            key_lengths=lengths.key_lengths,
            cu_seqlens_q=lengths.cu_seqlens,
            cu_seqlens_k=lengths.cu_seqlens,
            max_seqlen_q=lengths.max_seqlen,
            max_seqlen_k=lengths.max_seqlen,
            dropout_p=self.dropout if self.training else 0.0,
            backend=lengths.backend,
            **options,
        )
        assert isinstance(mixed, Tensor)
        return mixed


def attention_options(config: TransformerConfig, layer: int, *, cross: bool) -> AttentionOptions:
    """What a layer's attention differs in from the plain one; the options that hold for every input."""
    options: AttentionOptions = {}
    if config.softmax_scale is not None:
        options["softmax_scale"] = config.softmax_scale
    if config.attention_softcap:
        options["softcap"] = config.attention_softcap
    if not cross and (window := config.window_of(layer)) is not None:
        options["window"] = window
    return options


class Block(nn.Module):
    """Self-attention, cross-attention where asked, and feed-forward, each a residual branch with its norm."""

    def __init__(self, config: TransformerConfig, layer: int, *, causal: bool, cross: bool) -> None:
        super().__init__()
        self.place, self.parallel = config.norm_place, config.parallel_residual
        self.attention = Attention(config, layer, causal=causal)
        self.attention_norm = make_norm(config)
        self.cross_attention = Attention(config, layer, causal=False, cross=True) if cross else None
        self.cross_attention_norm = make_norm(config) if cross else None
        self.ffn = FeedForward(config)
        self.ffn_norm = None if config.shared_norm else make_norm(config)
        sandwich = config.norm_place == "sandwich"
        self.attention_post_norm = make_norm(config) if sandwich else None
        self.cross_attention_post_norm = make_norm(config) if sandwich and cross else None
        self.ffn_post_norm = make_norm(config) if sandwich else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        *updates: Tensor,
        positional: Positional,
        lengths: Lengths,
        encoder_output: Tensor | None = None,
        source_lengths: Lengths | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, ...]:
        """Hidden states come and go as the terms of their sum, (..., dim) each: whose norm is next adds them up."""

        def attend(y: Tensor) -> Tensor:
            return self.attention(y, positional=positional, lengths=lengths, cache=cache)

        def attend_to_source(y: Tensor) -> Tensor:
            assert self.cross_attention is not None
            around = source_lengths or Lengths()
            return self.cross_attention(y, encoder_output=encoder_output, lengths=around, cache=cache)

        if self.parallel:
            return self._parallel_branches(x, updates, attend)
        branches: list[tuple[str, Branch]] = [("attention", attend), ("ffn", self.ffn)]
        if self.cross_attention is not None:
            branches.insert(1, ("cross_attention", attend_to_source))
        if self.place == "post":
            return (self._norm_after(add(x, updates), branches),)
        return self._norm_before(x, updates, branches)

    def _norm_after(self, x: Tensor, branches: list[tuple[str, Branch]]) -> Tensor:
        for name, branch in branches:
            x, _ = getattr(self, f"{name}_norm")(self.dropout(branch(x)), x)
        return x

    def _norm_before(
        self, x: Tensor, updates: tuple[Tensor, ...], branches: list[tuple[str, Branch]]
    ) -> tuple[Tensor, ...]:
        for name, branch in branches:
            normed, x = add_and_norm(getattr(self, f"{name}_norm"), x, updates)
            y = branch(normed)
            if self.place == "sandwich":
                y = getattr(self, f"{name}_post_norm")(y)
            updates = (self.dropout(y),)
        return x, *updates

    def _parallel_branches(self, x: Tensor, updates: tuple[Tensor, ...], attend: Branch) -> tuple[Tensor, ...]:
        y, x = add_and_norm(self.attention_norm, x, updates)
        z = y if self.ffn_norm is None else self.ffn_norm(x)
        return x, self.dropout(attend(y)), self.dropout(self.ffn(z))


def initialize(module: nn.Module, config: TransformerConfig) -> None:
    """Normal weights of standard deviation 1/sqrt(fan_in), zero biases, relative ones too; a pre-norm stack's residual
    branches are shrunk by the root of their number, so that their sum starts at unit size whatever the depth (GPT-2's
    rule)."""
    assert config.encoder_depth is not None
    decoder_branches = (3 if config.is_encoder_decoder else 2) * config.depth
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            continue
        if parameter.dim() < 2:
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            continue
        if "relative_bias" in name:
            nn.init.zeros_(parameter)
            continue
        is_embedding = "tokens" in name or "positions" in name
        std = config.dim**-0.5 if is_embedding else parameter.shape[1] ** -0.5
        if name.endswith(("out.weight", "down.weight")) and config.norm_place == "pre":
            std *= (2 * config.encoder_depth if name.startswith("encoder.") else decoder_branches) ** -0.5
        torch.nn.init.normal_(parameter, std=std)
