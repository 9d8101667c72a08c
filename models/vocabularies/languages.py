"""Translation models of many languages: the special tokens that tell the source's language, and the target's."""

from __future__ import annotations

import re
from typing import Any

from models.config import ConfigError
from models.vocabularies.builders import surround
from models.vocabularies.tokenizer_config import TokenizerConfig

# What stands around a source text, by tokenizer class: {} is the language's token.
FRAMES = {
    "MBart": ([], ["</s>", "{}"]),
    "MBart50": (["{}"], ["</s>"]),
    "Nllb": (["{}"], ["</s>"]),
    "M2M100": (["{}"], ["</s>"]),
}
LEGACY_NLLB_FRAME: tuple[list[str], list[str]] = ([], ["</s>", "{}"])
DEFAULT_LANGUAGE = {"MBart": "en_XX", "MBart50": "en_XX", "Nllb": "eng_Latn", "M2M100": "en"}
LANGUAGE_TOKEN = re.compile(r"[a-z]{2}_[A-Z]{2}|[a-z]{3}_[A-Z][a-z]{3}|__[a-z]{2,3}__")


class Languages:
    """The languages a tokenizer knows, and the two chosen.

    Args:
        tokens: the special token of every language, by its code.
        before, after: the special tokens around a source text, "{}" for its language's.

    Attributes:
        source, target: the codes chosen.
    """

    def __init__(self, tokens: dict[str, str], before: list[str], after: list[str]) -> None:
        self.tokens, self.before, self.after = tokens, before, after
        self.source: str | None = None
        self.target: str | None = None

    @classmethod
    def of(cls, config: TokenizerConfig, vocabulary: Any) -> Languages | None:
        """None for a tokenizer whose class knows no languages. Raises ConfigError where the files choose an unknown."""
        if config.kind not in FRAMES:
            return None
        before, after = FRAMES[config.kind]
        if config.kind == "Nllb" and config.values.get("legacy_behaviour"):
            before, after = LEGACY_NLLB_FRAME
        names = sorted(filter(LANGUAGE_TOKEN.fullmatch, vocabulary.get_vocab()))
        languages = cls({name.strip("_"): name for name in names}, before, after)
        for side, code in (("source", config.values.get("src_lang")), ("target", config.values.get("tgt_lang"))):
            if code is not None:
                languages.language_id(code, vocabulary)
                setattr(languages, side, code)
        if languages.source is None and DEFAULT_LANGUAGE[config.kind] in languages.tokens:
            languages.source = DEFAULT_LANGUAGE[config.kind]
        return languages

    def language_id(self, code: str, vocabulary: Any) -> int:
        """The id of a language's token. Raises ConfigError for a code that is none."""
        known = isinstance(code, str) and code in self.tokens  # a file may hold anything
        token_id = vocabulary.token_to_id(self.tokens[code]) if known else None
        if token_id is None:
            some = ", ".join(list(self.tokens)[:8])
            raise ConfigError(f"the tokenizer has no language {code!r}: it knows {len(self.tokens)}, such as {some}")
        return int(token_id)

    def frame(self, vocabulary: Any) -> None:
        """Makes the vocabulary put the source language's special tokens around what it encodes."""
        if self.source is None:
            return
        before, after = ([part.format(self.tokens[self.source]) for part in side] for side in (self.before, self.after))
        surround(vocabulary, before, after)
