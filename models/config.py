"""An architecture is data: ``TransformerConfig`` says everything a model's code asks about it."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

MODEL_TYPE = "tandem"
LARGEST = 1 << 24  # of any size: well beyond every model there is, and a table of it still fits into memory
PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3

Architecture = Literal["encoder_decoder", "decoder_only"]
Activation = Literal["relu", "gelu", "gelu_new", "silu", "geglu", "swiglu"]
NormKind = Literal["layernorm", "rmsnorm"]
NormPlace = Literal["pre", "post"]
Positions = Literal["rotary", "sinusoidal", "learned", "none"]


class ConfigError(ValueError):
    """A configuration that describes no model we can build; its message is one sentence for the user."""


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of a model.

    Attributes:
        vocab_size: rows of the (source) embedding; ``target_vocab_size`` is the target's, where it differs.
        dim: width of the residual stream. depth: blocks of the decoder; ``encoder_depth`` is depth unless given.
        heads: query heads. kv_heads: key and value heads, heads unless given; divides heads (grouped-query attention).
        head_dim: dim // heads unless given. ffn_dim: 4 * dim unless given.
        activation: of the feed-forward; geglu and swiglu gate it.
        norm, norm_place, norm_eps: which norm, and before (pre) or after (post) each residual branch.
        positions: rotary inside self-attention, or sinusoidal or learned vectors added to the embeddings.
        rope_theta: the rotary base. max_seqlen: longest source, and longest target, the model accepts.
        bias: whether linear layers have one.
        share_embeddings: source and target share one embedding; unless given, where target_vocab_size is not.
        tie_embeddings: the head shares the target embedding's weight.
        scale_embedding: multiply embeddings by sqrt(dim); unless given, where sinusoidal positions are added to them,
            which would drown them otherwise.
        dropout: on embeddings and residual branches; attention_dropout: on attention weights.
    """

    architecture: Architecture
    vocab_size: int
    target_vocab_size: int | None = None
    dim: int = 256
    depth: int = 6
    encoder_depth: int | None = None
    heads: int = 8
    kv_heads: int | None = None
    head_dim: int | None = None
    ffn_dim: int | None = None
    activation: Activation = "gelu"
    norm: NormKind = "layernorm"
    norm_place: NormPlace = "pre"
    norm_eps: float = 1e-5
    positions: Positions = "rotary"
    rope_theta: float = 10_000.0
    max_seqlen: int = 2048
    bias: bool = True
    share_embeddings: bool | None = None
    tie_embeddings: bool = True
    scale_embedding: bool | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        # Fields with a computed default are filled in once, so that no reader repeats the rule.
        _check_types(self)
        self._fill("kv_heads", self.heads)
        if self.head_dim is None and self.heads > 0 and self.dim % self.heads:
            raise ConfigError(f"dim {self.dim} is not a multiple of heads {self.heads}: give head_dim or change one")
        self._fill("head_dim", self.dim // max(self.heads, 1))
        self._fill("ffn_dim", 4 * self.dim)
        self._fill("encoder_depth", self.depth)
        self._fill("share_embeddings", self.target_vocab_size is None)
        self._fill("target_vocab_size", self.vocab_size)
        self._fill("scale_embedding", self.positions == "sinusoidal")
        _check_values(self)

    def _fill(self, name: str, value: object) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    @property
    def is_encoder_decoder(self) -> bool:
        return self.architecture == "encoder_decoder"

    def to_dict(self) -> dict[str, Any]:
        """The fields as config.json holds them."""
        return {"model_type": MODEL_TYPE, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TransformerConfig:
        """The inverse of ``to_dict``. Raises ConfigError for a foreign model_type or an unknown key."""
        values = dict(values)
        if (kind := values.pop("model_type", None)) != MODEL_TYPE:
            raise ConfigError(f"model_type {kind!r} is not supported: expected {MODEL_TYPE!r}")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"unknown model option {unknown[0]!r}: choose from {', '.join(sorted(known))}")
        if missing := [name for name in ("architecture", "vocab_size") if name not in values]:
            raise ConfigError(f"the model's config lacks {missing[0]!r}")
        return cls(**values)


def _check_types(config: TransformerConfig) -> None:
    for name, hint in get_type_hints(TransformerConfig).items():
        value = getattr(config, name)
        if typing.get_origin(hint) is Literal:
            if value not in get_args(hint):
                raise ConfigError(f"{name} is {value!r}: choose one of {', '.join(get_args(hint))}")
            continue
        allowed = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        fits = isinstance(value, allowed) or (float in allowed and type(value) is int)
        if not fits or (isinstance(value, bool) and bool not in allowed):
            expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
            raise ConfigError(f"{name} is {value!r}: expected {expected}")


def _check_values(config: TransformerConfig) -> None:
    at_least_one = ("vocab_size", "target_vocab_size", "dim", "depth", "encoder_depth", "heads", "kv_heads", "head_dim",
                    "ffn_dim", "max_seqlen")  # fmt: skip
    for name in at_least_one:
        if not 1 <= getattr(config, name) <= LARGEST:
            raise ConfigError(f"{name} is {getattr(config, name)}: expected 1 to {LARGEST}")
    assert config.kv_heads is not None and config.head_dim is not None
    if config.heads % config.kv_heads:
        raise ConfigError(f"kv_heads {config.kv_heads} does not divide heads {config.heads}")
    if config.share_embeddings and config.vocab_size != config.target_vocab_size:
        raise ConfigError(
            f"share_embeddings needs one vocabulary, got vocab_size {config.vocab_size} and target_vocab_size "
            f"{config.target_vocab_size}"
        )
    if config.positions == "rotary" and config.head_dim % 2:
        raise ConfigError(f"rotary positions need an even head_dim, got {config.head_dim}")
    if config.positions == "sinusoidal" and config.dim % 2:
        raise ConfigError(f"sinusoidal positions need an even dim, got {config.dim}")
    for name in ("dropout", "attention_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(f"{name} is {getattr(config, name)}: expected a number in [0, 1)")
    for name in ("norm_eps", "rope_theta"):
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name} is {getattr(config, name)}: expected a positive number")
