"""A model on the C++ core: its weights packed, and its stacks as programs of csrc/program.h.

A program is data made of the same modules that torch runs, whatever the family of the model. One call then takes a step
from token ids to logits, without Python or torch in between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kernels.cached_attention import CacheFormat
from kernels.extension import _C
from kernels.packed_linear import PackedWeight, gated_order, pack
from kernels.quantization import QuantizedWeight, quantize
from models.assembly import NamedWeights, is_linear, is_vocabulary, parameter_names
from models.config import TransformerConfig
from models.layers import GATES, Attention, Block, FeedForward, LayerNorm, Linear, RMSNorm
from models.sources import BITS, bits_of
from models.transformer import DecoderOnly, EncoderDecoder, Stack

Floats = NDArray[np.float32]
NONE = -1  # no rows
Scores = tuple[int, float, Floats | None, Floats | None]


class Weights:
    """A model's weights by the names its modules give them: matrices packed, everything else float32 arrays."""

    def __init__(self, model: nn.Module, given: NamedWeights) -> None:
        self._names = {module: name for name, module in model.named_modules(remove_duplicate=False)}
        orders = {f"{self._names[ffn]}.up": _order(ffn) for ffn in model.modules() if isinstance(ffn, FeedForward)}
        self._values: dict[str, Any] = {}
        for names, weight in given:
            order = orders.get(names[0].rpartition(".")[0])
            if isinstance(weight, QuantizedWeight) or is_linear(model, names[0]):
                value: Any = pack(weight, order=order)
            else:
                value = _array(weight, order)
            self._values |= dict.fromkeys(names, value)

    @property
    def are_exact(self) -> bool:
        """Whether all matrices are in float32."""
        packed = (value for value in self._values.values() if isinstance(value, PackedWeight))
        return all(weight.storage == "float32" for weight in packed)

    def matrix(self, module: nn.Module) -> PackedWeight:
        return self._values[f"{self._names[module]}.weight"]

    def vector(self, module: nn.Module, name: str = "weight") -> Floats | None:
        """None where the module has none."""
        return self._values.get(f"{self._names[module]}.{name}")


def _order(ffn: FeedForward) -> Tensor | None:
    return gated_order(ffn.up.out_features // 2) if ffn.activation in GATES else None


def _array(weight: Tensor, order: Tensor | None) -> Floats:
    values = weight.detach().float().contiguous()
    return (values if order is None else torch.where(order >= 0, values[order.clamp(min=0)], 0.0)).numpy()


def live_weights(model: nn.Module, quantization: str | None) -> NamedWeights:
    """A model's weights as they are now, quantised if asked, as ``models.checkpoint.open_model`` gives a file's."""
    for parameter, own in parameter_names(model).items():
        weight = parameter.detach()
        if quantization in BITS and is_linear(model, own[0]):
            yield own, quantize(weight, bits_of(quantization, weight.shape[1], any(map(is_vocabulary, own))))
        else:
            yield own, weight


@dataclass
class StackProgram:
    """One stack on its way into a program: which rows hold what, and which of them are there rounded already."""

    config: TransformerConfig
    weights: Weights
    program: _C.Program = field(default_factory=_C.Program)
    rotated: int = 0
    _floats: dict[tuple[str, int], int] = field(default_factory=dict)
    _bytes: dict[tuple[int, int], int] = field(default_factory=dict)
    _rounded: tuple[int, int] | None = None  # rows of floats, and the rows of bytes that hold the same

    def rows(self, what: str, width: int) -> int:
        """Rows of floats for a purpose, the same for the same purpose."""
        key = (what, width)
        if key not in self._floats:
            self._floats[key] = self.program.floats(width)
        return self._floats[key]

    def norm(
        self,
        module: nn.Module,
        x: int,
        out: int,
        *,
        feeds: PackedWeight | None = None,
        added: int = NONE,
        selected: bool = False,
        scale: float = 1.0,
    ) -> None:
        """``feeds``: the weight that reads the norm, and may want it rounded."""
        takes = NONE if feeds is None or not feeds.takes_bytes else self._bytes_for(feeds)
        self._norm(module, x, out, added=added, takes=takes, selected=selected, scale=scale)
        self._rounded = (out, takes) if takes != NONE else None

    def head_norm(self, module: nn.Module | None, x: int, column: int, heads: int) -> None:
        if module is not None:
            self._norm(module, x, x, column=column, heads=heads)

    def _norm(
        self,
        module: nn.Module,
        x: int,
        out: int,
        *,
        column: int = 0,
        heads: int = 1,
        added: int = NONE,
        takes: int = NONE,
        selected: bool = False,
        scale: float = 1.0,
    ) -> None:
        assert isinstance(module, RMSNorm | LayerNorm)
        weight, bias = self.weights.vector(module), self.weights.vector(module, "bias")
        assert weight is not None
        if scale != 1:
            weight, bias = weight * np.float32(scale), None if bias is None else bias * np.float32(scale)
        is_layer_norm = isinstance(module, LayerNorm)
        self.program.norm(x, weight, bias, module.eps, is_layer_norm, out, column, heads, added, takes, selected)

    def linear(
        self,
        module: nn.Module,
        x: int,
        out: int,
        *,
        activation: str = "none",
        gated: bool = False,
        residual: int = NONE,
    ) -> None:
        weight = self.weights.matrix(module)
        feeds = self.fed(weight, x)
        self.program.linear(weight, self.weights.vector(module, "bias"), activation, gated, *feeds, residual, out)
        if self._rounded is not None and self._rounded[0] == out:
            self._rounded = None

    def fed(self, weight: PackedWeight, x: int, selected: bool = False) -> tuple[int, int]:
        """The rows of floats, or of bytes, that the weight takes for x; the other is NONE."""
        if not weight.takes_bytes:
            return x, NONE
        takes = self._bytes_for(weight)
        if self._rounded != (x, takes):
            self.program.quantize(x, takes, selected)
            self._rounded = (x, takes)
        return NONE, takes

    def _bytes_for(self, weight: PackedWeight) -> int:
        layout = weight.byte_layout
        if layout not in self._bytes:
            self._bytes[layout] = self.program.bytes(weight)
        return self._bytes[layout]

    def written(self, x: int) -> None:
        """x has been written by something else than a linear layer or a norm."""
        if self._rounded is not None and self._rounded[0] == x:
            self._rounded = None

    def embed(self, stack: Stack) -> int:
        """The embeddings of the step's tokens."""
        embedding, x = stack.embedding, self.rows("residual", self.config.dim)
        table = None
        if embedding.positions is not None:
            table = self.weights.vector(embedding.positions)
        elif embedding.sinusoids is not None:
            table = embedding.sinusoids.float().numpy()
        self.program.embed(self.weights.matrix(embedding.tokens), embedding.scale or 1.0, table, embedding.offset, x)
        if stack.embedding_norm is not None:
            self.norm(stack.embedding_norm, x, x)
        if stack.rotary is not None:
            self.program.rotary(stack.rotary.values.numpy(), stack.rotary.factor)
            self.rotated = 2 * len(stack.rotary.values)
        return x

    def blocks(self, stack: Stack, x: int) -> None:
        for block in stack.blocks:
            assert isinstance(block, Block)
            self._block(stack, block, x)

    def _block(self, stack: Stack, block: Block, x: int) -> None:
        if block.parallel:
            return self._parallel(stack, block, x)
        branches: list[tuple[str, Callable[[int, int, int], None]]] = [
            ("attention", lambda y, out, residual: self._attend_to_self(stack, block.attention, y, out, residual)),
            ("ffn", lambda y, out, residual: self._feed_forward(block.ffn, y, out, residual)),
        ]
        cross = block.cross_attention
        if cross is not None:
            branches.insert(
                1, ("cross_attention", lambda y, out, residual: self._attend_to_source(cross, y, out, residual))
            )
        y = self.rows("branch", self.config.dim)
        for name, branch in branches:
            norm = getattr(block, f"{name}_norm")
            if block.place == "post":
                branch(x, y, x)
                self.norm(norm, y, x)
                continue
            self.norm(norm, x, y, feeds=self._reader(block, name))
            if block.place == "pre":
                branch(y, x, x)
                continue
            z = self.rows("update", self.config.dim)
            branch(y, z, NONE)
            self.norm(getattr(block, f"{name}_post_norm"), z, x, added=x)
        return None

    def _parallel(self, stack: Stack, block: Block, x: int) -> None:
        y = self.rows("branch", self.config.dim)
        self.norm(block.attention_norm, x, y, feeds=self._reader(block, "attention"))
        z = y
        if block.ffn_norm is not None:
            z = self.rows("update", self.config.dim)
            self.norm(block.ffn_norm, x, z)
        self._attend_to_self(stack, block.attention, y, x, x)
        self._feed_forward(block.ffn, z, x, x)

    def _reader(self, block: Block, name: str) -> PackedWeight:
        """The weight that reads a branch's norm."""
        modules = {"attention": block.attention, "cross_attention": block.cross_attention, "ffn": block.ffn}
        module = modules[name]
        if isinstance(module, FeedForward):
            return self.weights.matrix(module.up)
        assert isinstance(module, Attention)
        return self.weights.matrix(module.q if module.cross else module.qkv)

    def _feed_forward(self, ffn: FeedForward, y: int, out: int, residual: int) -> None:
        gated = ffn.activation in GATES
        up = self.weights.matrix(ffn.up)
        hidden = self.rows("hidden", up.outputs // 2 if gated else up.outputs)
        self.linear(ffn.up, y, hidden, activation=GATES.get(ffn.activation, ffn.activation), gated=gated)
        self.linear(ffn.down, hidden, out, residual=residual)

    def _attend_to_self(self, stack: Stack, attention: Attention, y: int, out: int, residual: int) -> None:
        heads, kv_heads, width = attention.heads, attention.kv_heads, attention.head_dim
        qkv = self.rows("qkv", (heads + 2 * kv_heads) * width)
        mixed = self.rows("mixed", heads * width)
        self.linear(attention.qkv, y, qkv)
        self.head_norm(attention.q_norm, qkv, 0, heads)
        self.head_norm(attention.k_norm, qkv, heads * width, kv_heads)
        scores, scale = self._scores(stack, attention), self._softmax_scale(attention)
        if attention.causal:
            self.program.append(attention.layer, heads, qkv, heads * width, self.rotated)
            self.program.attend(attention.layer, heads, scores, scale, qkv, mixed, False)
        else:
            self.program.attend_within(heads, kv_heads, width, scores, scale, qkv, mixed, False, self.rotated)
        self.written(mixed)
        self.linear(attention.out, mixed, out, residual=residual)

    def _attend_to_source(self, attention: Attention, y: int, out: int, residual: int) -> None:
        width = attention.heads * attention.head_dim
        q, mixed = self.rows("query", width), self.rows("mixed", width)
        self.linear(attention.q, y, q)
        self.head_norm(attention.q_norm, q, 0, attention.heads)
        scores, scale = self._scores(None, attention), self._softmax_scale(attention)
        self.program.attend(attention.layer, attention.heads, scores, scale, q, mixed, True)
        self.written(mixed)
        self.linear(attention.out, mixed, out, residual=residual)

    def write_source(self, attention: Attention, x: int) -> None:
        """Writes the keys and values of the source's rows x into the cache, for a layer's cross-attention."""
        width = attention.kv_heads * attention.head_dim
        kv = self.rows("source", 2 * width)
        self.linear(attention.kv, x, kv)
        self.head_norm(attention.k_norm, kv, 0, attention.kv_heads)
        self.program.append(attention.layer, attention.heads, kv, 0, 0)

    def _softmax_scale(self, attention: Attention) -> float:
        scale = attention.options.get("softmax_scale")
        return attention.head_dim**-0.5 if scale is None else scale

    def _scores(self, stack: Stack | None, attention: Attention) -> Scores:
        """Window, soft-cap, slopes and biases by distance; cross-attention, without a stack, has no distances."""
        slopes = bias = None
        if stack is not None:
            relative = attention.relative_bias or stack.relative_bias
            if relative is not None:
                table = torch.from_numpy(self.weights.vector(relative, "table"))
                bias = relative.biases(table).distance_bias.numpy()
            slopes = None if stack.alibi is None else stack.alibi.values.numpy()
        return attention.options.get("window") or 0, attention.options.get("softcap", 0.0), slopes, bias

    def finish(self, stack: Stack, head: Linear, x: int) -> None:
        """The final norm and the head, on the rows that the step selects."""
        config, weight = self.config, self.weights.matrix(head)
        y = self.rows("branch", config.dim)
        if isinstance(stack.norm, nn.Identity):
            self.program.select(x, y, config.output_scale)
            self.written(y)
        else:
            self.norm(stack.norm, x, y, feeds=weight, selected=True, scale=config.output_scale)
        feeds = self.fed(weight, y, selected=True)
        self.program.head(weight, self.weights.vector(head, "bias"), *feeds, config.logits_softcap)


@dataclass(frozen=True)
class NativeModel:
    """The programs of a model. ``decode`` gives the selected rows' logits; ``encode`` writes sources into the cache."""

    config: TransformerConfig
    cache_format: CacheFormat
    decode: _C.Program
    encode: _C.Program | None


def lower(model: DecoderOnly | EncoderDecoder, weights: Weights, cache_format: CacheFormat) -> NativeModel:
    """The programs of a model, whose own weights are not read."""
    config = model.config
    decoder = StackProgram(config, weights)
    decoder.program.cache(cache_format, config.depth)
    x = decoder.embed(model.decoder)
    decoder.blocks(model.decoder, x)
    decoder.finish(model.decoder, model.lm_head, x)
    if not isinstance(model, EncoderDecoder):
        return NativeModel(config, cache_format, decoder.program, None)
    encoder = StackProgram(config, weights)
    encoder.program.cache(cache_format, config.depth)
    x = encoder.embed(model.encoder)
    encoder.blocks(model.encoder, x)
    hidden = x
    if not isinstance(model.encoder.norm, nn.Identity):
        hidden = encoder.rows("branch", config.dim)
        encoder.norm(model.encoder.norm, x, hidden)
    for block in model.decoder.blocks:
        encoder.write_source(block.cross_attention, hidden)  # type: ignore[arg-type]
    encoder.program.deliver(hidden)
    return NativeModel(config, cache_format, decoder.program, encoder.program)
