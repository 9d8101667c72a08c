"""An architecture is data: ``TransformerConfig`` says everything a model's code asks about it."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

MODEL_TYPE = "tandem"
LARGEST = 1 << 24  # of any size: well beyond every model there is, and a table of it still fits into memory
DEEPEST = 1024  # blocks of a stack
LARGEST_TABLE = 1 << 26  # numbers in a table of fixed positions, which no file has to hold: 256 MiB
PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3

Architecture = Literal["encoder_decoder", "decoder_only"]
Activation = Literal["relu", "gelu", "gelu_new", "silu", "reglu", "geglu", "geglu_new", "swiglu"]
NormKind = Literal["layernorm", "rmsnorm"]
NormPlace = Literal["pre", "post", "sandwich"]
Positions = Literal["rotary", "sinusoidal", "sinusoidal_t2t", "learned", "relative", "alibi", "none"]
RopeKind = Literal["linear", "llama3", "yarn"]
SINUSOIDAL = ("sinusoidal", "sinusoidal_t2t")


class ConfigError(ValueError):
    """A configuration that describes no model we can build; its message is one sentence for the user."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the model was first trained on.

    Attributes:
        kind: linear divides all of them by factor; llama3 only the slow ones; yarn blends (arXiv:2309.00071).
        original_max_seqlen: the length trained on first.
        low_freq_factor, high_freq_factor: llama3's band between stretched and kept frequencies.
        beta_fast, beta_slow, truncate: yarn's band, in turns over the original length, rounded outwards or not.
        attention_factor: multiplies yarn's cosines and sines.
    """

    kind: RopeKind
    factor: float
    original_max_seqlen: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        _check_types(self)
        if not self.factor >= 1:
            raise ConfigError(f"rope_scaling.factor is {self.factor}: expected at least 1")
        if not 1 <= self.original_max_seqlen <= LARGEST:
            raise ConfigError(
                f"rope_scaling.original_max_seqlen is {self.original_max_seqlen}: expected 1 to {LARGEST}"
            )
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError("rope_scaling needs 0 < low_freq_factor < high_freq_factor")
        for name in ("beta_fast", "beta_slow", "attention_factor"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"rope_scaling.{name} is {getattr(self, name)}: expected a positive number")


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of a model.

    Attributes:
        vocab_size: rows of the (source) embedding; ``target_vocab_size`` is the target's, where it differs.
        dim: width of the residual stream. depth: blocks of the decoder; ``encoder_depth`` is depth unless given.
        heads: query heads. kv_heads: key and value heads, heads unless given; divides heads (grouped-query attention).
        head_dim: dim // heads unless given. ffn_dim: 4 * dim unless given.
        activation: of the feed-forward; reglu, geglu, geglu_new and swiglu gate it with relu, gelu, gelu_new and silu.
        norm, norm_place, norm_eps: which norm, and before (pre) or after (post) each residual branch, or before and
            after the branch but within it (sandwich).
        embedding_norm: whether a stack begins with a norm. qk_norm: whether each head's q and k are normed.
        parallel_residual: attention and feed-forward read the same input. shared_norm: through one norm.
        positions: rotary inside self-attention, sinusoidal or learned vectors added to the embeddings (sinusoidal_t2t
            spaces its frequencies as tensor2tensor did), T5's relative bias or ALiBi's added to the scores.
        position_offset: the row of a sequence's first position in the table of learned or sinusoidal vectors.
        rope_theta: the rotary base. rope_fraction: of each head that is rotated. rope_scaling: see ``RopeScaling``.
        relative_buckets, relative_max_distance: T5's. relative_per_layer: each layer has a table of its own.
        window: keys a token sees up to and with itself, None for all; window_layers: the layers that have it, all
            unless given.
        attention_softcap, logits_softcap: c * tanh(x / c) of scores and logits, 0 for none.
        softmax_scale: of scores, 1 / sqrt(head_dim) unless given.
        max_seqlen: longest source, and longest target, the model accepts; ``LARGEST``: no limit.
        bias: whether linear layers have one; qkv_bias, out_bias (attention's last layer), ffn_bias and head_bias
            (no unless given) may differ.
        share_embeddings: source and target share one embedding; unless given, where target_vocab_size is not.
        tie_embeddings: the head shares the target embedding's weight.
        scale_embedding: multiply embeddings by sqrt(dim); unless given, where sinusoidal positions are added to them,
            which would drown them otherwise.
        output_scale: multiplies the last hidden states.
        float32_residual: the residual stream and the feed-forward's second layer stay float32 where the model is
            float16, whose range T5's activations leave.
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
    embedding_norm: bool = False
    qk_norm: bool = False
    parallel_residual: bool = False
    shared_norm: bool = False
    positions: Positions = "rotary"
    position_offset: int = 0
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0
    rope_scaling: RopeScaling | None = None
    relative_buckets: int = 32
    relative_max_distance: int = 128
    relative_per_layer: bool = False
    window: int | None = None
    window_layers: list[int] | None = None
    attention_softcap: float = 0.0
    logits_softcap: float = 0.0
    softmax_scale: float | None = None
    max_seqlen: int = 2048
    bias: bool = True
    qkv_bias: bool | None = None
    out_bias: bool | None = None
    ffn_bias: bool | None = None
    head_bias: bool = False
    share_embeddings: bool | None = None
    tie_embeddings: bool = True
    scale_embedding: bool | None = None
    output_scale: float = 1.0
    float32_residual: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, dict):
            object.__setattr__(self, "rope_scaling", _rope_scaling(self.rope_scaling))
        _check_types(self)
        # Fields with a computed default are filled in once, so that no reader repeats the rule.
        self._fill("kv_heads", self.heads)
        if self.head_dim is None and self.heads > 0 and self.dim % self.heads:
            raise ConfigError(f"dim {self.dim} is not a multiple of heads {self.heads}: give head_dim or change one")
        self._fill("head_dim", self.dim // max(self.heads, 1))
        self._fill("ffn_dim", 4 * self.dim)
        self._fill("encoder_depth", self.depth)
        self._fill("share_embeddings", self.target_vocab_size is None)
        self._fill("target_vocab_size", self.vocab_size)
        self._fill("scale_embedding", self.positions in SINUSOIDAL)
        for name in ("qkv_bias", "out_bias", "ffn_bias"):
            self._fill(name, self.bias)
        _check_values(self)

    def _fill(self, name: str, value: object) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    @property
    def gated(self) -> bool:
        """Whether the feed-forward multiplies its activation by a second projection."""
        return self.activation in ("reglu", "geglu", "geglu_new", "swiglu")

    @property
    def rotary_dim(self) -> int:
        """How many of a head's numbers are rotated."""
        assert self.head_dim is not None
        return int(self.head_dim * self.rope_fraction)

    def window_of(self, layer: int) -> int | None:
        """The window of a layer's self-attention."""
        return self.window if self.window_layers is None or layer in self.window_layers else None

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


def _rope_scaling(values: dict[str, Any]) -> RopeScaling:
    try:
        return RopeScaling(**values)
    except TypeError:
        known = ", ".join(field.name for field in dataclasses.fields(RopeScaling))
        raise ConfigError(f"rope_scaling is {values!r}: expected kind and factor, and of {known}") from None


def _check_types(config: TransformerConfig | RopeScaling) -> None:
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if not any(_fits(value, kind) for kind in kinds):
            literal = typing.get_origin(hint) is Literal
            expected = f"choose one of {', '.join(get_args(hint))}" if literal else f"expected {_described(kinds)}"
            raise ConfigError(f"{name} is {value!r}: {expected}")


def _fits(value: object, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in get_args(kind)
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, get_args(kind)[0]) for item in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind) or (kind is float and isinstance(value, int))


def _described(kinds: tuple[Any, ...]) -> str:
    names = {type(None): "null", RopeScaling: "a mapping"}
    return " or ".join(str(names.get(kind, getattr(kind, "__name__", kind))) for kind in kinds)


def _check_values(config: TransformerConfig) -> None:
    sizes = ("vocab_size", "target_vocab_size", "dim", "heads", "kv_heads", "head_dim", "ffn_dim", "max_seqlen",
             "relative_buckets", "relative_max_distance")  # fmt: skip
    for name, largest in [*dict.fromkeys(sizes, LARGEST).items(), ("depth", DEEPEST), ("encoder_depth", DEEPEST)]:
        if not 1 <= getattr(config, name) <= largest:
            raise ConfigError(f"{name} is {getattr(config, name)}: expected 1 to {largest}")
    assert config.kv_heads is not None and config.head_dim is not None
    if config.heads % config.kv_heads:
        raise ConfigError(f"kv_heads {config.kv_heads} does not divide heads {config.heads}")
    if config.share_embeddings and config.vocab_size != config.target_vocab_size:
        raise ConfigError(
            f"share_embeddings needs one vocabulary, got vocab_size {config.vocab_size} and target_vocab_size "
            f"{config.target_vocab_size}"
        )
    if config.positions == "rotary":
        if not 0 < config.rope_fraction <= 1:
            raise ConfigError(f"rope_fraction is {config.rope_fraction}: expected a number in (0, 1]")
        if not config.rope_theta > 1:
            raise ConfigError(f"rope_theta is {config.rope_theta}: expected a number above 1")
        if config.rotary_dim % 2 or not config.rotary_dim:
            raise ConfigError(
                f"rotary positions need an even head_dim, got {config.rotary_dim} rotated of {config.head_dim}"
            )
    if not 0 <= config.position_offset <= LARGEST:
        raise ConfigError(f"position_offset is {config.position_offset}: expected 0 to {LARGEST}")
    if config.positions in SINUSOIDAL:
        _check_sinusoids(config)
    if config.positions == "relative" and (config.relative_buckets < 4 or config.relative_buckets % 4):
        raise ConfigError(f"relative_buckets is {config.relative_buckets}: expected a multiple of 4")
    if config.positions == "relative" and config.relative_max_distance <= config.relative_buckets // 2:
        raise ConfigError(
            f"relative_max_distance is {config.relative_max_distance}: expected more than half of relative_buckets"
        )
    _check_attention(config)
    if config.parallel_residual and (config.is_encoder_decoder or config.norm_place != "pre"):
        raise ConfigError("parallel_residual needs a decoder-only model with norm_place pre")
    if config.shared_norm and not config.parallel_residual:
        raise ConfigError("shared_norm needs parallel_residual")
    for name in ("dropout", "attention_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(f"{name} is {getattr(config, name)}: expected a number in [0, 1)")
    for name in ("norm_eps", "rope_theta", "output_scale"):
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name} is {getattr(config, name)}: expected a positive number")


def _check_sinusoids(config: TransformerConfig) -> None:
    if config.dim % 2:
        raise ConfigError(f"sinusoidal positions need an even dim, got {config.dim}")
    if (config.max_seqlen + config.position_offset) * config.dim > LARGEST_TABLE:
        raise ConfigError(
            f"max_seqlen {config.max_seqlen} of dim {config.dim} is too much for sinusoidal positions: "
            f"expected at most {LARGEST_TABLE // config.dim}"
        )


def _check_attention(config: TransformerConfig) -> None:
    for name in ("attention_softcap", "logits_softcap"):
        if not getattr(config, name) >= 0:
            raise ConfigError(f"{name} is {getattr(config, name)}: expected 0 or more")
    if config.softmax_scale is not None and not config.softmax_scale > 0:
        raise ConfigError(f"softmax_scale is {config.softmax_scale}: expected a positive number")
    if config.window is not None and not 1 <= config.window <= LARGEST:
        raise ConfigError(f"window is {config.window}: expected 1 to {LARGEST}")
    if any(not 0 <= layer < config.depth for layer in config.window_layers or ()):
        raise ConfigError(f"window_layers is {config.window_layers}: expected layers from 0 to {config.depth - 1}")
