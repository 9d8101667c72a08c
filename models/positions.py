"""Where a token stands: rotary angles for q and k, sinusoidal or learned vectors for embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.attention_options import RelativeBias
from models.config import SINUSOIDAL, RopeScaling, TransformerConfig


@dataclass(frozen=True)
class Positional:
    """What one forward pass tells every layer's self-attention about positions.

    ``rotary`` is cos and sin for ``rotate``, (seqlen, 1, rotated / 2); ``alibi_slopes`` float32 (heads,).
    """

    rotary: tuple[Tensor, Tensor] | None = None
    relative_bias: RelativeBias | None = None
    alibi_slopes: Tensor | None = None


class Constant(nn.Module):
    """A float32 tensor that follows its module's device, but stays float32 whatever the model's dtype."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values: Tensor
        self.register_buffer("values", values, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Constant:
        exact = self.values
        super()._apply(fn, recurse)
        self.values = exact.to(self.values.device)
        return self


class Rotary(Constant):
    """Rotary angles (arXiv:2104.09864)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(rotary_frequencies(config))
        self.factor = 1.0 if config.rope_scaling is None else config.rope_scaling.attention_factor

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for ``rotate``, float32 (..., 1, rotated / 2), for integer positions (...)."""
        angles = positions[..., None, None] * self.values
        if self.factor == 1:
            return angles.cos(), angles.sin()
        return angles.cos() * self.factor, angles.sin() * self.factor


def rotary_frequencies(config: TransformerConfig) -> Tensor:
    """Radians a position, float32 (rotary_dim / 2,), fastest first, stretched as the config's ``rope_scaling`` says."""
    exponent = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device="cpu") / config.rotary_dim
    frequencies = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    kept = _kept_llama3(frequencies, scaling) if scaling.kind == "llama3" else _kept_yarn(config, scaling)
    return frequencies / scaling.factor * (1 - kept) + frequencies * kept


def _kept_llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """How much of each frequency is kept: all of the fast ones, none of the slow ones, a ramp between them."""
    turns = scaling.original_max_seqlen * frequencies / (2 * math.pi)
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return ramp.clamp(0, 1)


def _kept_yarn(config: TransformerConfig, scaling: RopeScaling) -> Tensor:
    """The same with YaRN's ramp (arXiv:2309.00071), which runs over the index of the frequency."""
    dim = config.rotary_dim

    def index_of(turns: float) -> float:
        return dim * math.log(scaling.original_max_seqlen / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)
    return 1 - ramp.clamp(0, 1)


class RelativePositions(nn.Module):
    """T5's learned bias of scores by distance (arXiv:1910.10683): a table of buckets, one number a head."""

    def __init__(self, config: TransformerConfig, *, causal: bool) -> None:
        super().__init__()
        self.max_distance, self.bidirectional = config.relative_max_distance, not causal
        self.table = nn.Parameter(torch.zeros(config.relative_buckets, config.heads))

    def forward(self) -> RelativeBias:
        return self.biases(self.table)

    def biases(self, table: Tensor) -> RelativeBias:
        """Those of a table that is not this module's own."""
        return RelativeBias(table, self.max_distance, self.bidirectional)


def alibi_slopes(heads: int) -> Tensor:
    """Each head's slope, float32 (heads,): a geometric series, between whose terms a number of heads that is no power
    of two takes every other one of the next finer series (arXiv:2108.12409)."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    finer = [2 ** (-4 * i / power) for i in range(1, 2 * power, 2)]
    return torch.tensor([*slopes, *finer[: heads - power]], dtype=torch.float32, device="cpu")


def sinusoids(max_seqlen: int, dim: int, slowest: float) -> Tensor:
    """Fixed position vectors (arXiv:1706.03762), float32 (max_seqlen, dim): sines first, then cosines.

    Wavelengths grow geometrically from 2 pi towards 10,000 times that, which index ``slowest`` of the pairs has.
    """
    exponent = torch.arange(dim // 2, dtype=torch.float64, device="cpu") / slowest
    angles = torch.arange(max_seqlen, dtype=torch.float64, device="cpu")[:, None] * 10_000.0**-exponent
    return torch.cat((angles.sin(), angles.cos()), dim=-1).float()


class Table(nn.Embedding):
    """torch's embedding, drawn only where it has memory."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Embedding(nn.Module):
    """Token embeddings, scaled and with absolute positions added where the config says so."""

    def __init__(self, config: TransformerConfig, vocab_size: int, tokens: nn.Embedding | None = None) -> None:
        super().__init__()
        self.tokens = Table(vocab_size, config.dim) if tokens is None else tokens
        self.scale = config.dim**0.5 if config.scale_embedding else None
        self.offset = config.position_offset
        self.widen = config.float32_residual
        self.dropout = nn.Dropout(config.dropout)
        rows = config.max_seqlen + self.offset
        self.positions = Table(rows, config.dim) if config.positions == "learned" else None
        self.sinusoids: Tensor | None
        fixed = None
        if config.positions in SINUSOIDAL:
            half = config.dim // 2
            fixed = sinusoids(rows, config.dim, half if config.positions == "sinusoidal" else half - 1)
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
            inputs_embeds = inputs_embeds + F.embedding(positions, self.positions.weight[self.offset :])
        elif self.sinusoids is not None:
            inputs_embeds = inputs_embeds + self.sinusoids[self.offset :][positions].to(inputs_embeds.dtype)
        if self.widen and inputs_embeds.dtype == torch.float16:
            inputs_embeds = inputs_embeds.float()
        return self.dropout(inputs_embeds)
