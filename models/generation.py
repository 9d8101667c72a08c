"""What a checkpoint says about generating with it: special tokens, and defaults of its makers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from models.config import BOS_ID, EOS_ID, PAD_ID, ConfigError

# The keys of generation_config.json that set how tokens are chosen where the caller does not.
DEFAULTS = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size",
    "max_length", "max_new_tokens", "num_beams", "length_penalty", "early_stopping", "num_return_sequences",
)  # fmt: skip


@dataclass(frozen=True)
class GenerationConfig:
    """The special tokens of a model, and its makers' defaults; as it stands, those of models trained here.

    Attributes:
        start_id: what an encoder-decoder's output starts from; None: there is none, so each prompt brings its own.
        eos_ids: tokens that end an output. pad_id: the filler of a batch.
        forced_bos_id: the first token after the start. forced_eos_id: the last one at the longest length.
        suppress_ids: tokens never generated; begin_suppress_ids: not as the first. bad_words: sequences of tokens never
            completed.
        defaults: the makers' settings, by the names of generation_config.json.
        tasks: ``task_specific_params``: by task, a ``prefix`` of the source and settings.
    """

    start_id: int | None = BOS_ID
    bos_id: int | None = BOS_ID
    eos_ids: tuple[int, ...] = (EOS_ID,)
    pad_id: int | None = PAD_ID
    forced_bos_id: int | None = None
    forced_eos_id: int | None = None
    suppress_ids: tuple[int, ...] = ()
    begin_suppress_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields as generation_config.json holds them."""
        ids = {
            "decoder_start_token_id": self.start_id,
            "bos_token_id": self.bos_id,
            "eos_token_id": list(self.eos_ids),
            "pad_token_id": self.pad_id,
            "forced_bos_token_id": self.forced_bos_id,
            "forced_eos_token_id": self.forced_eos_id,
            "suppress_tokens": list(self.suppress_ids),
            "begin_suppress_tokens": list(self.begin_suppress_ids),
            "bad_words_ids": [list(word) for word in self.bad_words],
        }
        return {name: value for name, value in {**ids, **self.defaults}.items() if value not in (None, [])}


def read_generation(config: Mapping[str, Any], generation: Mapping[str, Any] | None) -> GenerationConfig:
    """From config.json and generation_config.json, None where there is none: older files keep its keys in config.json.

    Raises ConfigError for a value that is no token id.
    """
    # Files of either age may leave one id in config.json alone.
    settings = {**config, **{key: value for key, value in (generation or {}).items() if value is not None}}
    pad, bos, eos = (_ids(settings, f"{name}_token_id") for name in ("pad", "bos", "eos"))
    start = _ids(settings, "decoder_start_token_id") or bos
    return GenerationConfig(
        start_id=_first(start),
        bos_id=_first(bos),
        eos_ids=eos,
        pad_id=_first(pad),
        forced_bos_id=_first(_ids(settings, "forced_bos_token_id")),
        forced_eos_id=_first(_ids(settings, "forced_eos_token_id")),
        suppress_ids=_ids(settings, "suppress_tokens"),
        begin_suppress_ids=_ids(settings, "begin_suppress_tokens"),
        bad_words=tuple(_ids({"bad_words_ids": word}, "bad_words_ids") for word in settings.get("bad_words_ids") or ()),
        # Sampling is what these files ask for, greedy search what they mean by silence.
        defaults={"do_sample": False, **{key: settings[key] for key in DEFAULTS if settings.get(key) is not None}},
        tasks=config.get("task_specific_params") or {},
    )


def _ids(settings: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = settings.get(key)
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
        raise ConfigError(f"{key} is {value!r}: expected a token id or a list of them")
    # Some configs say -1 for none.
    return tuple(token_id for token_id in ids if token_id >= 0)


def _first(ids: tuple[int, ...]) -> int | None:
    return ids[0] if ids else None
