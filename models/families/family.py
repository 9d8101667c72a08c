"""What a family of checkpoints is: how its config.json and its weights' names read in our terms."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from models.config import LARGEST, Activation, ConfigError, RopeKind, RopeScaling, TransformerConfig

T = TypeVar("T")
Values = Mapping[str, Any]  # of config.json

ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "silu": "silu",
    "swish": "silu",
}
GATED: dict[Activation, Activation] = {"relu": "reglu", "gelu": "geglu", "gelu_new": "geglu_new", "silu": "swiglu"}
BEYOND = 1e38
UNLIMITED = LARGEST  # the max_seqlen of a model whose positions have no end
ROPE_TYPES: dict[str, RopeKind | None] = {"default": None, "linear": "linear", "llama3": "llama3", "yarn": "yarn"}


@dataclass(frozen=True)
class Source:
    """Where one of our tensors comes from.

    Attributes:
        names: of their tensors, whose rows are stacked. Each may be several names for one tied tensor, joined by "|".
        convert: changes each of theirs, given the model's config, before its rows are stacked.
        moves_rows: whether convert does nothing but reorder rows, which quantised ones go through too.
    """

    names: tuple[str, ...]
    convert: Callable[[Tensor, TransformerConfig], Tensor] | None = None
    moves_rows: bool = False


Entry = str | tuple[str, ...] | Source


@dataclass(frozen=True)
class Family:
    """A family of checkpoints, as data: it has no forward pass of its own.

    Attributes:
        config: from config.json and the names of the file's tensors to ours. Raises ConfigError for what we lack.
        weights: for a config of ours, by the name of our module (or parameter) theirs: a name, several to stack, or a
            ``Source``. ``{i}`` stands for a layer's number. None: theirs are ours.
        prefix: of their names, which files may lack. ignored: patterns of names that hold nothing to load.
    """

    config: Callable[[Values, Collection[str]], TransformerConfig]
    weights: Callable[[TransformerConfig], Mapping[str, Entry]] | None
    prefix: str = ""
    ignored: tuple[str, ...] = ()

    def is_ignored(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self.ignored)


def source_of(parameter: str, weights: Mapping[str, Entry]) -> Source:
    """Where the tensor of our ``parameter`` comes from. Raises KeyError for one that ``weights`` does not name."""
    layer = re.search(r"\.(\d+)\.", parameter)
    pattern = parameter if layer is None else parameter.replace(layer[0], ".{i}.", 1)
    module, _, kind = pattern.rpartition(".")
    exact = pattern in weights
    entry = weights[pattern if exact else module]
    source = entry if isinstance(entry, Source) else Source((entry,) if isinstance(entry, str) else entry)
    number = "" if layer is None else layer[1]
    names = (name if exact else "|".join(f"{alias}.{kind}" for alias in name.split("|")) for name in source.names)
    return replace(source, names=tuple(name.replace("{i}", number) for name in names))


def transpose(x: Tensor, config: TransformerConfig) -> Tensor:
    """GPT-2's layers keep (in, out) where ours keep (out, in); a bias has but one side."""
    return x.t()


def plus_one(x: Tensor, config: TransformerConfig) -> Tensor:
    """Gemma stores what its norms' weights differ from one by."""
    return (x.float() + 1).to(x.dtype)


def one_row(x: Tensor, config: TransformerConfig) -> Tensor:
    """BART's bias of the logits has a batch dimension."""
    return x.flatten()


def need(values: Values, name: str, kind: type[T]) -> T:
    """A key that config.json must have. Raises ConfigError, naming it."""
    if name not in values:
        raise ConfigError(f"config.json lacks {name!r}")
    return _checked(name, values[name], kind)


def optional(values: Values, name: str, default: T) -> T:
    """A key that config.json may lack or hold null for. Raises ConfigError for a value of another type."""
    value = values.get(name)
    return default if value is None else _checked(name, value, type(default))


def _checked(name: str, value: Any, kind: type[T]) -> T:
    fits = isinstance(value, int | float if kind is float else kind) and isinstance(value, bool) == (kind is bool)
    # A number that no model has, such as 1e400, which JSON reads as infinity.
    if not fits or (isinstance(value, int | float) and not abs(value) < BEYOND):
        raise ConfigError(f"{name} in config.json is {str(value)[:80]!r}: expected {kind.__name__}")
    return value


def refuse_unless(values: Values, name: str, expected: object) -> None:
    """Raises ConfigError for an option of theirs that we do not have: only ``expected``, or its absence, is fine."""
    if name in values and values[name] not in (expected, None):
        raise ConfigError(f"{name} {values[name]!r} is not supported: expected {expected!r}")


def activation(values: Values, name: str, default: str, *, gated: bool = False) -> Activation:
    """Our name for an activation function of theirs, of a gated feed-forward where asked."""
    theirs = optional(values, name, default)
    if theirs not in ACTIVATIONS:
        raise ConfigError(f"{name} {theirs!r} is not supported: choose from {', '.join(sorted(ACTIVATIONS))}")
    return GATED[ACTIVATIONS[theirs]] if gated else ACTIVATIONS[theirs]


def rope(values: Values, *, fraction: float = 1.0, base: str = "rope_theta", part: str = "partial_rotary_factor",
         theta: float = 10_000.0) -> dict[str, Any]:  # fmt: skip
    """Our rotary options, from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before).

    ``base`` and ``part`` are the older keys of the base and of the fraction that is rotated.
    """
    given = {name: value for key in ("rope_scaling", "rope_parameters")
             for name, value in optional(values, key, dict[str, Any]()).items()}  # fmt: skip
    if any(isinstance(value, dict) for value in given.values()):
        raise ConfigError("rope_parameters that differ from layer to layer are not supported")
    return {
        "positions": "rotary",
        "rope_theta": float(optional(given, "rope_theta", optional(values, base, theta))),
        "rope_fraction": float(optional(given, "partial_rotary_factor", optional(values, part, fraction))),
        "rope_scaling": rope_scaling(given, optional(values, "max_position_embeddings", 2048)),
    }


def rope_scaling(given: Values, max_seqlen: int) -> RopeScaling | None:
    theirs = optional(given, "rope_type", optional(given, "type", "default"))
    if theirs not in ROPE_TYPES:
        raise ConfigError(f"rope_type {theirs!r} is not supported: choose from {', '.join(ROPE_TYPES)}")
    kind = ROPE_TYPES[theirs]
    if kind is None:
        return None
    factor = need(given, "factor", float)
    ours: dict[str, Any] = {"original_max_seqlen": optional(given, "original_max_position_embeddings", max_seqlen)}
    names = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_fast", "beta_slow", "truncate")}
    ours |= {name: given[name] for name in names.get(kind, ()) if given.get(name) is not None}
    if kind == "yarn":
        ours["attention_factor"] = _yarn_attention_factor(given, factor)
    return RopeScaling(kind, float(factor), **ours)


def _yarn_attention_factor(given: Values, factor: float) -> float:
    def of(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1

    mscale, of_all = optional(given, "mscale", 0.0), optional(given, "mscale_all_dim", 0.0)
    return optional(given, "attention_factor", of(mscale) / of(of_all) if mscale > 0 and of_all > 0 else of(1))


def windows(values: Values, depth: int, default_layers: Collection[int]) -> dict[str, Any]:
    """Our window options: their ``sliding_window``, in the layers that ``layer_types`` says, or the default ones."""
    window = values.get("sliding_window")
    if types := optional(values, "layer_types", list[Any]()):
        if unknown := [kind for kind in types if kind not in ("sliding_attention", "full_attention")]:
            raise ConfigError(f"layer_types holds {unknown[0]!r}: expected sliding_attention or full_attention")
        default_layers = [i for i, kind in enumerate(types) if kind == "sliding_attention"]
    layers = [i for i in default_layers if i < depth]
    if window is None or not layers:
        return {}
    return {"window": window, "window_layers": None if len(layers) == depth else layers}
