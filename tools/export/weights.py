"""A model's tensors under the names of a family: the mapping that families are read by, inverted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from models.config import TransformerConfig
from models.families.family import Family, one_row, source_of, transpose
from models.families.gpt_neox import by_kind
from models.transformer import DecoderOnly, EncoderDecoder

Convert = Callable[[Tensor, TransformerConfig], Tensor]


def by_head(x: Tensor, config: TransformerConfig) -> Tensor:
    """Rows of all q, all k, all v, to those of each head together."""
    return x.unflatten(0, (3, config.heads, -1)).transpose(0, 1).flatten(0, 2)


INVERSE: dict[Convert, Convert] = {transpose: transpose, one_row: lambda x, config: x[None], by_kind: by_head}


def to_family(model: DecoderOnly | EncoderDecoder, family: Family) -> dict[str, Tensor]:
    """The model's weights as the family's files hold them, one that several names share under one of them."""
    assert family.weights is not None
    mapping = family.weights(model.config)
    tensors = {}
    for name, parameter in model.named_parameters():
        source = source_of(name, mapping)
        names = [file_name(aliases.split("|"), model.config) for aliases in source.names]
        for theirs, part in zip(names, split(parameter.detach(), len(names), model.config), strict=True):
            converted = part if source.convert is None else INVERSE[source.convert](part, model.config)
            tensors[theirs] = converted.contiguous()
    return tensors


def file_name(aliases: list[str], config: TransformerConfig) -> str:
    """Of the names a tensor may have, the one that transformers 5 gives it."""
    shared = [name for name in aliases if name.endswith("shared.weight")]
    return shared[0] if shared and config.share_embeddings else aliases[0]


def split(rows: Tensor, parts: int, config: TransformerConfig) -> tuple[Tensor, ...]:
    """Stacked rows apart again: q, k and v, or two of a size."""
    if parts < 3:
        return rows.chunk(parts)
    assert config.head_dim is not None and config.kv_heads is not None
    key_rows = config.kv_heads * config.head_dim
    return rows.split([config.heads * config.head_dim, key_rows, key_rows])


def bart_extras(model: DecoderOnly | EncoderDecoder) -> dict[str, Tensor]:
    """What else the files of BART and its relatives hold: a bias of the logits, whether or not it says something, the
    sinusoids, and copies of shared embeddings where the head is not tied, for then transformers ties nothing."""
    config = model.config
    assert isinstance(model, EncoderDecoder) and config.target_vocab_size is not None
    extras = {"final_logits_bias": torch.zeros(1, config.target_vocab_size)}
    for side, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
        if stack.embedding.sinusoids is not None:
            extras[f"model.{side}.embed_positions.weight"] = stack.embedding.sinusoids.clone()
        if config.share_embeddings and not config.tie_embeddings:
            extras[f"model.{side}.embed_tokens.weight"] = stack.embedding.tokens.weight.detach().clone()
    return extras
