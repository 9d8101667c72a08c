"""Vocabularies of our own: characters, words or byte-level BPE, learned from text or read from a file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Vocabulary

from models.config import BOS_ID, EOS_ID, PAD_ID, UNK_ID, ConfigError

TokenizerKind = Literal["char", "word", "bpe"]
SPECIAL_TOKENS = {"<pad>": PAD_ID, "<bos>": BOS_ID, "<eos>": EOS_ID, "<unk>": UNK_ID}


def parse_vocabulary(path: Path) -> Vocabulary:
    """Any tokenizer.json; it neither cuts nor pads what it encodes. Raises ConfigError for a file that is none."""
    try:
        vocabulary = Vocabulary.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception, for a missing file as for a broken one
        raise ConfigError(f"cannot read the tokenizer {path}: {error}") from None
    vocabulary.no_truncation()
    vocabulary.no_padding()
    return vocabulary


def read_vocabulary(path: Path) -> Vocabulary:
    """A tokenizer.json with our special tokens. Raises ConfigError for a file that is none, or has others."""
    vocabulary = parse_vocabulary(path)
    for name, token_id in SPECIAL_TOKENS.items():
        if vocabulary.token_to_id(name) != token_id:
            raise ConfigError(f"the tokenizer {path} does not have {name} as token {token_id}, as models here need")
    return prepared(vocabulary)


def is_our_own(vocabulary: Vocabulary) -> bool:
    return all(vocabulary.token_to_id(name) == token_id for name, token_id in SPECIAL_TOKENS.items())


def prepared(vocabulary: Vocabulary) -> Vocabulary:
    # Text that happens to say "<eos>" must not end a sequence.
    vocabulary.encode_special_tokens = True
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
    return prepared(vocabulary)


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
    return prepared(vocabulary)
