"""How a model generates when the caller says nothing: as its makers' generation_config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.beam_params import BeamSearchParams
from engine.sampling import SamplingParams

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
BEAMS = (
    "length_penalty", "early_stopping", "no_repeat_ngram_size", "num_return_sequences", "repetition_penalty",
    "num_beam_groups", "diversity_penalty",
)  # fmt: skip
FOREIGN_LENGTH = 20  # tokens where makers set no length: what transformers does then


def default_params(
    defaults: Mapping[str, Any], prompt_length: int, beams: bool
) -> SamplingParams | BeamSearchParams:  # fmt: skip
    """The parameters for a prompt of so many decoder tokens: ours where the model has no defaults.

    A model made for beams is searched with ``beams``, where they are allowed. Raises ValueError for a default that is
    out of range.
    """
    length = _max_tokens(defaults, prompt_length)
    least = max(0, defaults.get("min_new_tokens", defaults.get("min_length", 0) - prompt_length))
    lengths: dict[str, Any] = {"max_tokens": length, "min_tokens": least if length is None else min(least, length)}
    if defaults.get("num_beams", 1) != 1 and defaults.get("do_sample"):
        raise ValueError("the model's generation_config.json asks for beams that sample: give params instead")
    if beams and defaults.get("num_beams", 1) != 1:
        search = {"num_return_sequences": 1, **_chosen(defaults, BEAMS)}
        return BeamSearchParams(defaults["num_beams"], **lengths, **search)
    shared = _chosen(defaults, ("repetition_penalty", "no_repeat_ngram_size"))
    if "do_sample" not in defaults:
        return SamplingParams(**lengths, **shared)
    if not defaults["do_sample"]:
        return SamplingParams(**lengths, temperature=0.0, **shared)
    samples = defaults.get("num_return_sequences", 1)
    return SamplingParams(n=samples, **lengths, **shared, **_chosen(defaults, SAMPLING))


def _max_tokens(defaults: Mapping[str, Any], prompt_length: int) -> int | None:
    if "max_new_tokens" in defaults:
        return defaults["max_new_tokens"]
    if "max_length" in defaults:
        room = defaults["max_length"] - prompt_length
        if room < 1:
            raise ValueError(
                f"the prompt is {prompt_length} tokens, the model's own max_length {defaults['max_length']}"
            )
        return room
    return FOREIGN_LENGTH if "do_sample" in defaults else SamplingParams.max_tokens


def _chosen(defaults: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: defaults[name] for name in names if name in defaults}
