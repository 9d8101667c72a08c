"""Text to token ids and back: our own tokenizers, and those of Hugging Face folders read as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Vocabulary

from models.chat.template import read_chat_template, render_chat
from models.config import ConfigError
from models.text_stream import TextStream, clean_up
from models.vocabularies.languages import Languages
from models.vocabularies.token_texts import TokenTexts, token_texts
from models.vocabularies.tokenizer_config import CONFIG_FILE, TokenizerConfig, read_json_object
from models.vocabularies.tokenizer_files import TOKENIZER_FILES, VOCABULARY_FILE, read_vocabularies
from models.vocabularies.training import (
    TokenizerKind,
    is_our_own,
    parse_vocabulary,
    prepared,
    read_vocabulary,
    train_vocabulary,
)

__all__ = [
    "SpecialTokens", "TextStream", "Tokenizer", "TokenizerKind", "Vocabulary", "is_unicode",
    "read_vocabulary", "train_vocabulary",
]  # fmt: skip

TARGET_FILE = "target_tokenizer.json"


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens with a role, as written; ``others`` holds more of them, such as {"mask_token": "<mask>"}."""

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unk: str | None = None
    others: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, named: Mapping[str, str]) -> SpecialTokens:
        roles = {role: named.get(f"{role}_token") for role in ("bos", "eos", "pad", "unk")}
        return cls(
            **roles, others={key: token for key, token in named.items() if key.removesuffix("_token") not in roles}
        )

    def named(self) -> dict[str, str]:
        """By the names templates know them under, such as {"bos_token": "<s>"}."""
        roles = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": self.pad, "unk_token": self.unk}
        return {**{name: token for name, token in roles.items() if token is not None}, **self.others}


OUR_OWN = SpecialTokens("<bos>", "<eos>", "<pad>", "<unk>")


class Tokenizer:
    """Encodes prompts and sources, encodes and decodes targets; both sides share a vocabulary unless two are given.

    Args:
        source: a ``tokenizers.Tokenizer``, or an object with the same methods. target: the same for the target side.
        special: the special tokens; those of our own vocabularies unless given.
        chat_template: Jinja source, or several by name.
        languages: what ``set_languages`` may choose from, for a translation model of many languages.
        clean_up_spaces: whether decoding removes the space before punctuation.
        files: the files it was read from, which ``save`` writes back.
    """

    def __init__(
        self, source: Vocabulary, target: Vocabulary | None = None, *, special: SpecialTokens = OUR_OWN,
        chat_template: str | dict[str, str] | None = None, languages: Languages | None = None,
        clean_up_spaces: bool = False, files: Mapping[str, bytes] | None = None,
    ) -> None:  # fmt: skip
        self.source = source
        self.target = source if target is None else target
        self.special, self.chat_template, self.languages = special, chat_template, languages
        self.clean_up_spaces, self.files = clean_up_spaces, dict(files or {})
        self._special_ids = _special_ids(self.target)
        if languages is not None:
            languages.frame(self.source)

    @property
    def vocab_size(self) -> int:
        return self.source.get_vocab_size()

    @property
    def target_vocab_size(self) -> int:
        return self.target.get_vocab_size()

    @property
    def bos_id(self) -> int | None:
        return self._id(self.special.bos)

    @property
    def eos_id(self) -> int | None:
        return self._id(self.special.eos)

    @property
    def pad_id(self) -> int | None:
        return self._id(self.special.pad)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.target.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a source or prompt; what the vocabulary lacks becomes its unknown token.

        Included are the special tokens the tokenizer's family puts around a text; our own puts none.
        """
        return self.source.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_target(self, text: str) -> list[int]:
        """The token ids of a target, without special tokens around it."""
        return self.target.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.source.encode_batch(list(texts))]

    def encode_target_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.target.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of target token ids; an id the vocabulary lacks has none."""
        text = self.decode_as_is(token_ids, skip_special_tokens)
        return clean_up(text) if self.clean_up_spaces else text

    def has_text(self, token_id: int, skip_special_tokens: bool = True) -> bool:
        """Whether decoding heeds a token: it leaves out those the vocabulary lacks, and special ones if told to."""
        if self.target.id_to_token(token_id) is None:
            return False
        return not (skip_special_tokens and token_id in self._special_ids)

    def decode_as_is(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """As ``decode``, before any space is cleaned up."""
        return self.target.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_texts(self) -> TokenTexts:
        """The bytes that each target token adds to a text as ``decode_as_is`` gives it, special ones left out."""
        return token_texts(self.target, self._special_ids)

    @property
    def source_language(self) -> str | None:
        return self.languages.source if self.languages else None

    @property
    def target_language(self) -> str | None:
        return self.languages.target if self.languages else None

    def set_languages(self, source: str | None = None, target: str | None = None) -> None:
        """Chooses what ``encode`` adds for the source's language, and the target's, for a model of many languages.

        Raises ConfigError for a language the tokenizer does not know.
        """
        languages = self._languages()
        for code in (source, target):
            if code is not None:
                languages.language_id(code, self.target)
        languages.source, languages.target = source or languages.source, target or languages.target
        languages.frame(self.source)

    def language_id(self, code: str) -> int:
        """The token that starts a target in this language. Raises ConfigError for one the tokenizer does not know."""
        return self._languages().language_id(code, self.target)

    def _languages(self) -> Languages:
        if self.languages is None:
            raise ConfigError("this tokenizer has no languages to choose from")
        return self.languages

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True, **variables: object
    ) -> str:
        """The prompt a chat model expects for these messages, each with a role and a content.

        ``variables`` are the template's own, such as tools; a model with several templates has one for those with
        tools. Raises ConfigError for a template that fails, takes long or writes too much, and for a tokenizer without
        one, ValueError for messages that are none.
        """
        variables = {**self.special.named(), **variables, "add_generation_prompt": add_generation_prompt}
        return render_chat(self.chat_template, messages, variables)

    def save(self, folder: Path) -> None:
        if self.files:
            self._save_files(folder)
            return
        self.source.save(str(folder / VOCABULARY_FILE))
        if self.target is not self.source:
            self.target.save(str(folder / TARGET_FILE))
        if self.special != OUR_OWN:
            (folder / CONFIG_FILE).write_text(json.dumps(self._config(), indent=2) + "\n")

    def _save_files(self, folder: Path) -> None:
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        if self.languages is not None:
            chosen = {"src_lang": self.source_language, "tgt_lang": self.target_language}
            config = read_json_object(folder / CONFIG_FILE) | {key: code for key, code in chosen.items() if code}
            (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = {**self.special.named(), "clean_up_tokenization_spaces": self.clean_up_spaces}
        if self.source.encode_special_tokens:  # which tokenizer.json does not hold
            config["split_special_tokens"] = True
        return config if self.chat_template is None else {**config, "chat_template": self.chat_template}

    @classmethod
    def load(cls, folder: Path) -> Tokenizer | None:
        """The tokenizer of a folder, ours or Hugging Face's; None where it has none. Raises ConfigError if broken."""
        own = not (folder / CONFIG_FILE).exists() and (folder / VOCABULARY_FILE).exists()
        if own and is_our_own(vocabulary := parse_vocabulary(folder / VOCABULARY_FILE)):
            target = folder / TARGET_FILE
            return cls(prepared(vocabulary), read_vocabulary(target) if target.exists() else None)
        return _load_foreign(folder)


def _load_foreign(folder: Path) -> Tokenizer | None:
    config = TokenizerConfig.read(folder)
    vocabularies = read_vocabularies(folder, config)
    if vocabularies is None:
        return None
    source, target = vocabularies
    special = {key: token for key, token in config.named.items() if source.token_to_id(token) is not None}
    return Tokenizer(
        source,
        target,
        special=SpecialTokens.of(special),
        chat_template=read_chat_template(folder, config.values),
        languages=Languages.of(config, source),
        clean_up_spaces=_cleans_up(config, source),
        files=_files(folder, config),
    )


def _files(folder: Path, config: TokenizerConfig) -> dict[str, bytes]:
    """The tokenizer's files by name; they say of themselves what the model's config.json had to tell here."""
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    if unstated := config.unstated():
        values = {**read_json_object(folder / CONFIG_FILE), **unstated}
        files[CONFIG_FILE] = json.dumps(values, indent=2, ensure_ascii=False).encode()
    return files


def _special_ids(vocabulary: Any) -> frozenset[int]:
    """Of the tokens that decoding may leave out."""
    if hasattr(vocabulary, "special_ids"):  # one of ours, written in Python
        return frozenset(vocabulary.special_ids)
    return frozenset(i for i, token in vocabulary.get_added_tokens_decoder().items() if token.special)


def _cleans_up(config: TokenizerConfig, vocabulary: Vocabulary) -> bool:
    # Not for BPE, whose spaces are the text's own, whatever the file says; transformers 5 has it so.
    is_bpe = type(getattr(vocabulary, "model", None)).__name__ == "BPE"
    return bool(config.values.get("clean_up_tokenization_spaces", False)) and not is_bpe


def is_unicode(text: str) -> bool:
    """Whether a string holds characters only, no half of a surrogate pair as broken input leaves behind."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
