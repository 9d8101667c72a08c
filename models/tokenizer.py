"""Text to token ids and back: character, word and byte-level BPE vocabularies, trained or read from a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, get_args

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Vocabulary

from models.config import BOS_ID, EOS_ID, PAD_ID, UNK_ID, ConfigError

TokenizerKind = Literal["char", "word", "bpe"]
SPECIAL_TOKENS = {"<pad>": PAD_ID, "<bos>": BOS_ID, "<eos>": EOS_ID, "<unk>": UNK_ID}
SOURCE_FILE, TARGET_FILE = "tokenizer.json", "target_tokenizer.json"


class Tokenizer:
    """Encodes prompts and sources, encodes and decodes targets; both sides share a vocabulary unless two are given."""

    def __init__(self, source: Vocabulary, target: Vocabulary | None = None) -> None:
        self.source = source
        self.target = source if target is None else target

    @property
    def vocab_size(self) -> int:
        return self.source.get_vocab_size()

    @property
    def target_vocab_size(self) -> int:
        return self.target.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The token ids of a source or prompt, without special tokens; what the vocabulary lacks becomes ``<unk>``."""
        return self.source.encode(text, add_special_tokens=False).ids

    def encode_target(self, text: str) -> list[int]:
        return self.target.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.source.encode_batch(list(texts), add_special_tokens=False)]

    def encode_target_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.target.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of target token ids."""
        return self.target.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def save(self, folder: Path) -> None:
        self.source.save(str(folder / SOURCE_FILE))
        if self.target is not self.source:
            self.target.save(str(folder / TARGET_FILE))

    @classmethod
    def load(cls, folder: Path) -> Tokenizer | None:
        """The tokenizer of a checkpoint folder; None where it has no tokenizer.json. Raises ConfigError if broken."""
        if not (folder / SOURCE_FILE).exists():
            return None
        target = folder / TARGET_FILE
        return cls(read_vocabulary(folder / SOURCE_FILE), read_vocabulary(target) if target.exists() else None)


def is_unicode(text: str) -> bool:
    """Whether a string holds characters only, no half of a surrogate pair as broken input leaves behind."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


class TextStream:
    """Turns a growing list of token ids into pieces of text that never end inside a character.

    A byte-level token may hold part of a character, which decodes to U+FFFD: such a tail waits for its rest.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self.tokenizer, self.skip_special_tokens = tokenizer, skip_special_tokens
        self._settled_ids: list[int] = []  # whose text is settled, kept as context for the next decode
        self._pending_ids: list[int] = []

    def push(self, token_ids: Iterable[int], final: bool = False) -> str:
        """The text these ids add; ``final`` also gives out an unfinished tail, as U+FFFD."""
        self._pending_ids.extend(token_ids)
        before = self._decode(self._settled_ids)
        after = self._decode(self._settled_ids + self._pending_ids)
        if after.endswith("\ufffd") and not final:
            return ""
        piece = after[len(before) :]
        # One settled chunk is context enough for tokenizers that treat the first token of a text apart.
        if piece:
            self._settled_ids, self._pending_ids = self._pending_ids, []
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, self.skip_special_tokens) if token_ids else ""


def read_vocabulary(path: Path) -> Vocabulary:
    """A tokenizer.json with our special tokens. Raises ConfigError for a file that is none, or has others."""
    try:
        vocabulary = Vocabulary.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception, for a missing file as for a broken one
        raise ConfigError(f"cannot read the tokenizer {path}: {error}") from None
    for name, token_id in SPECIAL_TOKENS.items():
        if vocabulary.token_to_id(name) != token_id:
            raise ConfigError(f"the tokenizer {path} does not have {name} as token {token_id}, as models here need")
    return _prepared(vocabulary)


def _prepared(vocabulary: Vocabulary) -> Vocabulary:
    # Text that happens to say "<eos>" must not end a sequence, and no file may cut or pad what it encodes.
    vocabulary.encode_special_tokens = True
    vocabulary.no_truncation()
    vocabulary.no_padding()
    return vocabulary


def train_vocabulary(kind: TokenizerKind, texts: Iterable[str], vocab_size: int) -> Vocabulary:
    """Learns a vocabulary whose first ids are the special tokens.

    ``char`` makes every character a token, ``word`` everything between spaces, ``bpe`` at most ``vocab_size``
    byte-level merges (no text is unknown to it).
    """
    if kind not in get_args(TokenizerKind):
        raise ConfigError(f"unknown tokenizer {kind!r}: choose one of {', '.join(get_args(TokenizerKind))}")
    special = list(SPECIAL_TOKENS)
    if kind == "bpe":
        return _train_bpe(texts, vocab_size, special)
    vocabulary = Vocabulary(models.WordLevel(unk_token="<unk>"))
    if kind == "char":
        vocabulary.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        vocabulary.decoder = decoders.Fuse()
        units = sorted({character for text in texts for character in text})
    else:
        vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        units = sorted({word for text in texts for word in text.split()})
    # Sorted rather than counted: the ids depend on the set of units alone, not on the order of the data.
    entries = {unit: index for index, unit in enumerate([*special, *units])}
    vocabulary.model = models.WordLevel(entries, unk_token="<unk>")
    vocabulary.add_special_tokens(special)
    return _prepared(vocabulary)


def _train_bpe(texts: Iterable[str], vocab_size: int, special: list[str]) -> Vocabulary:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(special) + len(alphabet):
        raise ConfigError(f"a bpe vocabulary needs at least {len(special) + len(alphabet)} tokens, got {vocab_size}")
    vocabulary = Vocabulary(models.BPE())
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    vocabulary.train_from_iterator(texts, trainer)
    return _prepared(vocabulary)
