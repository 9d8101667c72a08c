"""Vocabularies of folders that hold vocab.json and merges.txt and no tokenizer.json: GPT-2, BART."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as Vocabulary

from models.config import ConfigError
from models.vocabularies.builders import byte_level_bpe, surround
from models.vocabularies.tokenizer_config import TokenizerConfig, read_json_object


def bpe_vocabulary(folder: Path, config: TokenizerConfig) -> Vocabulary:
    """The byte-level BPE of a folder's vocab.json and merges.txt. Raises ConfigError for a broken file."""
    add_prefix_space = bool(config.values.get("add_prefix_space", False))
    try:
        vocab, merges = read_vocab(folder / "vocab.json"), _read_merges(folder / "merges.txt")
        vocabulary = byte_level_bpe(vocab, merges, add_prefix_space=add_prefix_space)
    except ConfigError:
        raise
    except Exception as error:  # tokenizers raises bare Exception, for a merge of tokens the vocabulary lacks
        raise ConfigError(f"{folder / 'merges.txt'} does not fit vocab.json: {error}") from None
    named = [token for key, token in config.named.items() if token in vocab or key in config.stated]
    vocabulary.add_special_tokens([AddedToken(token, special=True) for token in named])
    _frame(vocabulary, config)
    return vocabulary


def _frame(vocabulary: Vocabulary, config: TokenizerConfig) -> None:
    if config.kind == "Bart":
        before, after = (config.token(role) for role in ("cls_token", "sep_token"))
        if None not in (vocabulary.token_to_id(before), vocabulary.token_to_id(after)):
            surround(vocabulary, [before], [after])
    elif config.values.get("add_bos_token"):
        surround(vocabulary, [config.token("bos_token")], [])


def read_vocab(path: Path) -> dict[str, int]:
    """A vocab.json: tokens and their ids. Raises ConfigError for anything else."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing")
    vocab = read_json_object(path)
    if not vocab or not all(type(token_id) is int and token_id >= 0 for token_id in vocab.values()):
        raise ConfigError(f"{path} does not map tokens to ids")
    return vocab


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    pairs = [tuple(line.split(" ")) for line in lines if line.strip() and not line.startswith("#version")]
    if any(len(pair) != 2 for pair in pairs):
        raise ConfigError(f"{path} has a line that is not two tokens with a space between")
    return pairs  # type: ignore[return-value]
