"""What a Hugging Face folder says about its tokenizer beside the vocabulary: its class, special and added tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from models.config import LARGEST, ConfigError

CONFIG_FILE = "tokenizer_config.json"
# Where tokenizer_config.json names no class, the model's config.json tells: its model_type has one.
CLASS_OF_MODEL = {
    "t5": "T5", "mt5": "T5", "umt5": "T5", "longt5": "T5", "byt5": "ByT5", "pegasus": "Pegasus", "mbart": "MBart",
    "m2m_100": "M2M100", "marian": "Marian", "bart": "Bart", "blenderbot": "Bart", "roberta": "Roberta", "led": "Bart",
    "gpt2": "GPT2", "llama": "Llama", "mistral": "Llama", "mixtral": "Llama",
}  # fmt: skip
SAME_CLASS = {"MT5": "T5", "Roberta": "Bart", "LED": "Bart", "Blenderbot": "Bart", "Mvp": "Bart"}
SENTENCEPIECE_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
NO_BOS = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
FAIRSEQ_TOKENS = {**SENTENCEPIECE_TOKENS, "sep_token": "</s>", "cls_token": "<s>", "mask_token": "<mask>"}
DEFAULT_TOKENS = {
    "T5": NO_BOS, "ByT5": NO_BOS, "Marian": NO_BOS, "Pegasus": {**NO_BOS, "mask_token": "<mask_2>"},
    "MBart": FAIRSEQ_TOKENS, "MBart50": {k: v for k, v in FAIRSEQ_TOKENS.items() if k != "bos_token"},
    "Nllb": FAIRSEQ_TOKENS, "Bart": FAIRSEQ_TOKENS,
    "M2M100": {**SENTENCEPIECE_TOKENS, "sep_token": "</s>"},
    "Llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT2": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
}  # fmt: skip


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer files of a folder that are not a vocabulary.

    Attributes:
        kind: the tokenizer's class without "Tokenizer" and "Fast", such as T5 or MBart50; "" where nothing tells.
        values: tokenizer_config.json, with special_tokens_map.json's entries where the former predates them.
        named: the special tokens with a role, such as {"eos_token": "</s>"}, the class's defaults included.
        stated: those of ``named`` that a file states.
        extra: further special tokens, such as language codes. added: tokens with a fixed id.
    """

    kind: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)
    stated: tuple[str, ...] = ()
    extra: list[str] = field(default_factory=list)
    added: dict[int, AddedToken] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> TokenizerConfig:
        """Raises ConfigError, in one sentence, for a file that is broken."""
        values = read_json_object(folder / CONFIG_FILE)
        try:
            return cls._of(folder, _with_special_tokens_map(values, folder))
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise ConfigError(f"{folder / CONFIG_FILE} describes no tokenizer: {error}") from None

    @classmethod
    def _of(cls, folder: Path, values: dict[str, Any]) -> TokenizerConfig:
        kind = _kind(values, folder)
        extra = values.get("extra_special_tokens") or values.get("additional_special_tokens") or []
        stated = {key: value for key, value in values.items() if key.endswith("_token") and _is_token(value)}
        if isinstance(extra, dict):  # of models with tokens of their own, such as image_token
            stated, extra = {**stated, **extra}, []
        named = {**DEFAULT_TOKENS.get(kind, {}), **{key: _content(value) for key, value in stated.items()}}
        named = {key: token for key, token in named.items() if values.get(key, "") is not None}
        return cls(kind, values, named, tuple(stated), [_content(token) for token in extra], _added(values, folder))

    def count(self, key: str, default: int) -> int:
        """A number that tokenizer_config.json may state. Raises ConfigError for anything but a count."""
        value = self.values.get(key, default)
        if type(value) is not int or not 0 <= value <= LARGEST:
            raise ConfigError(f"{CONFIG_FILE} has {value!r} as {key}: expected a number of tokens")
        return value

    def token(self, role: str) -> str:
        """The special token of a role its family needs. Raises ConfigError where the files take it away."""
        if role not in self.named:
            raise ConfigError(f"{CONFIG_FILE} gives no {role}, which a {self.kind}Tokenizer needs")
        return self.named[role]

    def unstated(self) -> dict[str, Any]:
        """What the tokenizer's files leave to others: the class to the model's config.json, tokens to the class."""
        found: dict[str, Any] = {key: token for key, token in self.named.items() if key not in self.values}
        if self.kind and not self.values.get("tokenizer_class"):
            found["tokenizer_class"] = f"{self.kind}Tokenizer"
        return found

    def added_token(self, content: str) -> AddedToken:
        """A special token, with the spacing rules of its entry in the files where it has one."""
        known = {token.content: token for token in self.added.values()}
        return known.get(content) or AddedToken(content, special=True)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file's object, {} where there is no file. Raises ConfigError for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return values


def _kind(values: dict[str, Any], folder: Path) -> str:
    model = read_json_object(folder / "config.json")
    name = values.get("tokenizer_class") or model.get("tokenizer_class")
    kind = name.removesuffix("Fast").removesuffix("Tokenizer") if isinstance(name, str) else ""
    if kind in ("", "PreTrained", "PreTrainedTokenizer", "TokenizersBackend"):
        kind = CLASS_OF_MODEL.get(str(model.get("model_type")), "")
    return SAME_CLASS.get(kind, kind)


def _with_special_tokens_map(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    # A tokenizer_config.json with added_tokens_decoder holds all that special_tokens_map.json does.
    if "added_tokens_decoder" in values:
        return values
    return {**values, **read_json_object(folder / "special_tokens_map.json")}


def _added(values: dict[str, Any], folder: Path) -> dict[int, AddedToken]:
    if "added_tokens_decoder" in values:
        return {int(token_id): _token(token) for token_id, token in values["added_tokens_decoder"].items()}
    special = {_content(value) for key, value in values.items() if key.endswith("_token") and _is_token(value)}
    special |= {_content(token) for token in values.get("additional_special_tokens") or []}
    return {
        int(token_id): AddedToken(name, special=name in special, normalized=name not in special)
        for name, token_id in read_json_object(folder / "added_tokens.json").items()
    }


def _is_token(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _token(values: dict[str, Any]) -> AddedToken:
    return AddedToken(**{key: value for key, value in values.items() if key != "__type"})
