"""What a checkpoint says about generating with it: special tokens, and defaults of its makers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from models.config import BOS_ID, EOS_ID, LARGEST, PAD_ID, ConfigError

# The keys of generation_config.json that set how tokens are chosen where the caller does not.
DEFAULTS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(
        ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty"), (float, int)
    ),
    **dict.fromkeys(
        (
            "top_k",
            "no_repeat_ngram_size",
            "min_length",
            "max_length",
            "min_new_tokens",
            "max_new_tokens",
            "num_beams",
            "num_return_sequences",
            "num_beam_groups",
        ),
        (int,),
    ),
    "diversity_penalty": (float, int),
    **{"do_sample": (bool,), "early_stopping": (bool, str)},
}


SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
# What else would change the output, and the values at which it does not.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale"), (1, None)),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff"), (0, None)),
    **dict.fromkeys(("exponential_decay_length_penalty", "penalty_alpha", "sequence_bias", "stop_strings"), (None,)),
    **dict.fromkeys(("constraints", "force_words_ids", "dola_layers", "prompt_lookup_num_tokens"), (None,)),
}  # fmt: skip


@dataclass(frozen=True)
class GenerationConfig:
    """The special tokens of a model, and its makers' defaults; as it stands, those of models trained here.

    Attributes:
        start_id: what an encoder-decoder's output starts from; None: there is none, so each prompt brings its own.
        eos_ids: tokens that end an output. pad_id: the filler of a batch.
        forced_bos_id: the first token after the start. forced_eos_id: the last one at the longest length.
        suppress_ids: tokens never generated; begin_suppress_ids: not as the first. bad_words: sequences of tokens never
            completed.
        renormalize: whether a beam's log-probabilities sum to one again after the rules have struck tokens out.
        defaults: the makers' settings, by the names of generation_config.json.
        unsupported: those of them that we cannot follow.
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
    renormalize: bool = False
    unsupported: tuple[str, ...] = ()
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
            "renormalize_logits": self.renormalize or None,
            "task_specific_params": {task: dict(settings) for task, settings in self.tasks.items()},
        }
        return {name: value for name, value in {**ids, **self.defaults}.items() if value not in (None, [], {})}


def read_generation(
    config: Mapping[str, Any], generation: Mapping[str, Any] | None, vocab_size: int = LARGEST
) -> GenerationConfig:
    """From config.json and generation_config.json, None where there is none: older files keep its keys in config.json.

    Ids beyond ``vocab_size`` never come, so that nothing has to end at them or suppress them. Raises ConfigError for a
    value that is no token id, and for such an id where a token is forced.
    """
    settings = dict(config)
    if generation is not None:
        # Newer files may leave a special token to config.json; everything else counts where it stands alone.
        ids = {key: config[key] for key in SPECIAL if key in config}
        tasks = {"task_specific_params": config.get("task_specific_params")}
        settings = {**ids, **tasks, **{key: value for key, value in generation.items() if value is not None}}

    def known(key: str) -> tuple[int, ...]:
        return tuple(token_id for token_id in _ids(key, settings.get(key)) if token_id < vocab_size)

    def forced(key: str) -> int | None:
        token_id = _first(_ids(key, settings.get(key)))
        if token_id is not None and token_id >= vocab_size:
            raise ConfigError(f"{key} is {token_id}, beyond the vocabulary of {vocab_size}")
        return token_id

    bos, start = _first(known("bos_token_id")), forced("decoder_start_token_id")
    return GenerationConfig(
        start_id=bos if start is None else start,
        bos_id=bos,
        eos_ids=known("eos_token_id"),
        pad_id=_first(known("pad_token_id")),
        forced_bos_id=forced("forced_bos_token_id"),
        forced_eos_id=forced("forced_eos_token_id"),
        suppress_ids=known("suppress_tokens"),
        begin_suppress_ids=known("begin_suppress_tokens"),
        bad_words=tuple(word for word in _bad_words(settings.get("bad_words_ids")) if max(word) < vocab_size),
        renormalize=settings.get("renormalize_logits") is True,
        unsupported=tuple(key for key, idle in UNSUPPORTED.items() if settings.get(key) not in idle),
        defaults=_defaults(settings),
        tasks=_tasks(settings.get("task_specific_params")),
    )


def _defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: settings[key] for key in DEFAULTS if settings.get(key) is not None}
    for key, value in found.items():
        if type(value) not in DEFAULTS[key]:
            kinds = " or ".join(kind.__name__ for kind in DEFAULTS[key])
            raise ConfigError(f"{key} is {str(value)[:80]!r}: expected {kinds}")
    return found


def _bad_words(value: Any) -> list[tuple[int, ...]]:
    words = [] if value is None else value
    if not isinstance(words, list) or not all(isinstance(word, list) and word for word in words):
        raise ConfigError(f"bad_words_ids is {str(value)[:80]}: expected a list of lists of token ids")
    return [found for word in words if (found := _ids("bad_words_ids", word))]


def _tasks(value: Any) -> Mapping[str, Mapping[str, Any]]:
    tasks = {} if value is None else value
    if not isinstance(tasks, dict) or not all(isinstance(task, dict) for task in tasks.values()):
        raise ConfigError(f"task_specific_params is {str(value)[:80]}: expected settings by task")
    if wrong := [task["prefix"] for task in tasks.values() if not isinstance(task.get("prefix") or "", str)]:
        raise ConfigError(f"the prefix of a task is {str(wrong[0])[:80]}: expected a string")
    return tasks


def _ids(key: str, value: Any) -> tuple[int, ...]:
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
        raise ConfigError(f"{key} is {str(value)[:80]}: expected a token id or a list of them")
    # Some configs say -1 for none.
    return tuple(token_id for token_id in ids if token_id >= 0)


def _first(ids: tuple[int, ...]) -> int | None:
    return ids[0] if ids else None
