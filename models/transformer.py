"""The two models, decoder-only and encoder-decoder, both made of one ``Stack`` of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.cross_entropy import cross_entropy
from kernels.linear_cross_entropy import linear_cross_entropy, prefers_chunks
from models.cache import Cache, Lengths
from models.config import TransformerConfig
from models.generation import GenerationConfig
from models.layers import Block, Linear, add, add_and_norm, initialize, make_norm
from models.positions import Constant, Embedding, Positional, RelativePositions, Rotary, alibi_slopes


class Stack(nn.Module):
    """Embedding, blocks and final norm: the encoder (bidirectional) or the decoder (causal).

    ``activation_checkpointing`` recomputes each block in the backward pass instead of keeping its activations.
    """

    def __init__(
        self, config: TransformerConfig, depth: int, vocab_size: int, *, causal: bool, cross: bool,
        tokens: nn.Embedding | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embedding = Embedding(config, vocab_size, tokens)
        self.embedding_norm = make_norm(config) if config.embedding_norm else None
        self.rotary = Rotary(config) if config.positions == "rotary" else None
        one_table = config.positions == "relative" and not config.relative_per_layer
        self.relative_bias = RelativePositions(config, causal=causal) if one_table else None
        self.alibi = Constant(alibi_slopes(config.heads)) if config.positions == "alibi" else None
        self.blocks = nn.ModuleList(Block(config, layer, causal=causal, cross=cross) for layer in range(depth))
        # A post-norm block ends in its norm already.
        self.norm = make_norm(config) if config.norm_place != "post" else nn.Identity()
        self.activation_checkpointing = False

    def forward(
        self,
        token_ids: Tensor | None,
        *,
        positions: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        lengths: Lengths | None = None,
        encoder_output: Tensor | None = None,
        source_lengths: Lengths | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Hidden states (..., dim) for token ids, or ``inputs_embeds``, of one of the layouts in ``Lengths``.

        ``positions`` are 0, 1, 2, ... along the last axis of padded token ids unless given; packed ones need them.
        """
        given = token_ids if token_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("a model needs token_ids or inputs_embeds")
        if positions is None:
            if cache is not None or (lengths is not None and lengths.cu_seqlens is not None):
                raise ValueError("packed tokens need positions: where each stands in its sequence")
            positions = torch.arange(given.shape[1], device=given.device)
        x = self.embedding(token_ids, positions, inputs_embeds)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        positional = self._positional(positions)
        updates: list[Tensor] = []
        for block in self.blocks:
            x, *updates = self._run(
                block, x, updates, positional=positional, lengths=lengths or Lengths(), encoder_output=encoder_output,
                source_lengths=source_lengths, cache=cache,
            )  # fmt: skip
        return add_and_norm(self.norm, x, updates)[0]

    def _positional(self, positions: Tensor) -> Positional:
        return Positional(
            rotary=None if self.rotary is None else self.rotary(positions),
            relative_bias=None if self.relative_bias is None else self.relative_bias(),
            alibi_slopes=None if self.alibi is None else self.alibi.values,
        )

    def _run(self, block: nn.Module, x: Tensor, updates: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
        if self.activation_checkpointing and self.training:
            # What a block is given is kept for the backward pass: a sum takes less than its terms.
            return checkpoint(block, add(x, updates), use_reentrant=False, **options)
        return block(x, *updates, **options)


class Transformer(nn.Module):
    """What both models share: a causal decoder and the head that turns its hidden states into logits."""

    config: TransformerConfig
    generation: GenerationConfig
    decoder: Stack

    def _finish(self) -> None:
        config = self.config
        assert config.target_vocab_size is not None
        self.lm_head = Linear(config.dim, config.target_vocab_size, bias=config.head_bias)
        self.generation = GenerationConfig()
        initialize(self, config)
        if config.tie_embeddings:
            self.lm_head.weight = self.decoder.embedding.tokens.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., target_vocab_size) for the decoder's hidden states (..., dim)."""
        if self.config.output_scale != 1:
            hidden = hidden * self.config.output_scale
        logits = self.lm_head(hidden)
        if cap := self.config.logits_softcap:
            logits = cap * torch.tanh(logits / cap)
        return logits

    def loss(self, hidden: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
        """Cross-entropy of the decoder's hidden states (..., dim), summed over the labels (...,) that are not -100.

        float32 (); the options are those of ``kernels.cross_entropy``. Where it pays, the logits are never all there.
        """
        if not prefers_chunks(hidden, self.lm_head.weight):
            return cross_entropy(self.logits(hidden), labels, label_smoothing=label_smoothing, z_loss=z_loss)
        return linear_cross_entropy(
            hidden, self.lm_head.weight, labels, bias=self.lm_head.bias, label_smoothing=label_smoothing,
            z_loss=z_loss, softcap=self.config.logits_softcap, scale=self.config.output_scale,
        )  # fmt: skip

    def decode(self, token_ids: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Hidden states (tokens, dim) of packed new tokens, whose earlier ones ``cache`` holds."""
        return self.decoder(token_ids, positions=positions, cache=cache)

    @property
    def stacks(self) -> list[Stack]:
        return [module for module in self.children() if isinstance(module, Stack)]

    def set_activation_checkpointing(self, enabled: bool) -> None:
        for stack in self.stacks:
            stack.activation_checkpointing = enabled

    def compile_blocks(self, compile_module: Callable[[nn.Module], None]) -> None:
        """Applies ``compile_module`` to every block: a stack's first then has a compiled graph, all others share one.

        The first shares theirs where they have nothing to add either: post-norm, or with activation checkpointing.
        """
        for stack in self.stacks:
            for block in stack.blocks:
                compile_module(block)


class DecoderOnly(Transformer):
    """A language model: causal blocks over one sequence."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        assert config.target_vocab_size is not None
        self.decoder = Stack(config, config.depth, config.target_vocab_size, causal=True, cross=False)
        self._finish()

    def forward(
        self,
        token_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Tensor:
        """Logits (batch, seqlen, vocab) for right-padded token ids, or (tokens, vocab) for packed ones with a cache.

        With ``labels`` (batch, seqlen), their ``loss`` instead.
        """
        hidden = self.decoder(token_ids, inputs_embeds=inputs_embeds, positions=positions, cache=cache)
        if labels is not None:
            return self.loss(hidden, labels, label_smoothing=label_smoothing, z_loss=z_loss)
        return self.logits(hidden)


class EncoderDecoder(Transformer):
    """A sequence-to-sequence model: a bidirectional encoder, and a causal decoder that attends to its output."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        assert config.encoder_depth is not None and config.target_vocab_size is not None
        self.encoder = Stack(config, config.encoder_depth, config.vocab_size, causal=False, cross=False)
        self.decoder = Stack(
            config, config.depth, config.target_vocab_size, causal=True, cross=True,
            tokens=self.encoder.embedding.tokens if config.share_embeddings else None,
        )  # fmt: skip
        self._finish()

    def encode(
        self,
        source_ids: Tensor | None,
        lengths: Lengths | None = None,
        *,
        positions: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """The encoder's hidden states, (..., dim), in the layout of ``lengths``; whole rows unless given."""
        return self.encoder(source_ids, positions=positions, inputs_embeds=inputs_embeds, lengths=lengths)

    def cross_keys_values(self, encoder_output: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each decoder layer's keys and values of the source, (..., kv_heads, head_dim): what a cache keeps of it."""
        return [block.cross_attention.keys_values(encoder_output) for block in self.decoder.blocks]  # type: ignore[union-attr, operator]

    def forward(
        self,
        source_ids: Tensor | None = None,
        target_ids: Tensor | None = None,
        *,
        source_lengths: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_output: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Tensor:
        """Logits (batch, seqlen, target_vocab) of the right-padded target ids, given the source.

        source_ids is (batch, source_seqlen), right-padded where ``source_lengths`` (batch,) says so; ``inputs_embeds``
        stands for its embeddings, ``encoder_output`` for the whole encoder. With a cache, target ids are packed. With
        ``labels`` (batch, seqlen), their ``loss`` instead.
        """
        source = Lengths(key_lengths=source_lengths)
        if encoder_output is None and cache is None:
            encoder_output = self.encode(source_ids, source, inputs_embeds=inputs_embeds)
        hidden = self.decoder(
            target_ids, positions=positions, encoder_output=encoder_output, source_lengths=source, cache=cache
        )
        if labels is not None:
            return self.loss(hidden, labels, label_smoothing=label_smoothing, z_loss=z_loss)
        return self.logits(hidden)


def build_model(config: TransformerConfig) -> DecoderOnly | EncoderDecoder:
    """A freshly initialised model of the config's architecture."""
    return EncoderDecoder(config) if config.is_encoder_decoder else DecoderOnly(config)
