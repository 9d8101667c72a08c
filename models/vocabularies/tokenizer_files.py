"""Which files of a Hugging Face folder hold its vocabulary, and how each family's are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Vocabulary

from models.config import ConfigError
from models.vocabularies import language_codes
from models.vocabularies.bpe_files import bpe_vocabulary, read_vocab
from models.vocabularies.piece_vocabulary import ByteVocabulary, SpmVocabulary, load_spm
from models.vocabularies.sentencepiece_vocabulary import SENTENCEPIECE_FILES, sentencepiece_vocabulary
from models.vocabularies.tokenizer_config import CONFIG_FILE, TokenizerConfig
from models.vocabularies.training import parse_vocabulary

VOCABULARY_FILE = "tokenizer.json"
UNREADABLE = ("vocab.txt", "tiktoken.model", "tekken.json", "vocab.bpe", "bpe.codes")
# Every file that any of the tokenizers read here may need, written back as it was when one is saved.
TOKENIZER_FILES = (
    VOCABULARY_FILE, CONFIG_FILE, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "target_vocab.json", "source.spm", "target.spm", *SENTENCEPIECE_FILES, "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def read_vocabularies(folder: Path, config: TokenizerConfig) -> tuple[Any, Any | None] | None:
    """The vocabulary of sources, and that of targets where it is another; None for a folder without tokenizer files.

    Raises ConfigError, in one sentence, for files that are broken or of a kind that is not supported.
    """
    if (folder / VOCABULARY_FILE).exists():
        return _json_vocabulary(folder / VOCABULARY_FILE, config), None
    if config.kind == "ByT5":
        return _byte_vocabulary(config), None
    if (folder / "source.spm").exists():
        return _marian_vocabularies(folder, config)
    if config.kind == "M2M100" and (folder / "sentencepiece.bpe.model").exists():
        return _m2m_vocabulary(folder, config), None
    return _converted_vocabulary(folder, config)


def _converted_vocabulary(folder: Path, config: TokenizerConfig) -> tuple[Vocabulary, None] | None:
    """Of files that hold all a tokenizer.json would."""
    found = next((folder / name for name in SENTENCEPIECE_FILES if (folder / name).exists()), None)
    if found is not None:
        vocabulary = sentencepiece_vocabulary(found, config)
    elif (folder / "merges.txt").exists():
        vocabulary = bpe_vocabulary(folder, config)
    else:
        _refuse_others(folder)
        return None
    _add_tokens(vocabulary, config)
    return vocabulary, None


def _refuse_others(folder: Path) -> None:
    present = [name for name in (*UNREADABLE, *TOKENIZER_FILES) if (folder / name).exists()]
    if present:
        raise ConfigError(
            f"{folder} has {present[0]} but no vocabulary that can be read here, such as a tokenizer.json"
        )


def _json_vocabulary(path: Path, config: TokenizerConfig) -> Vocabulary:
    vocabulary = parse_vocabulary(path)
    _add_tokens(vocabulary, config)
    vocabulary.encode_special_tokens = bool(config.values.get("split_special_tokens", False))
    return vocabulary


def _add_tokens(vocabulary: Vocabulary, config: TokenizerConfig) -> None:
    """Makes special what the files beside the vocabulary call special, which older ones do not list themselves."""
    present = vocabulary.get_added_tokens_decoder().values()
    same = set(map(repr, present))
    tokens = [token for _, token in sorted(config.added.items()) if repr(token) not in same]
    known = {token.content for token in [*present, *tokens]}
    wanted = [config.named[key] for key in config.stated if key in config.named] + config.extra
    tokens += [config.added_token(content) for content in dict.fromkeys(wanted) if content not in known]
    vocabulary.add_tokens([token for token in tokens if token.content])


def _byte_vocabulary(config: TokenizerConfig) -> ByteVocabulary:
    count = config.count("extra_ids", 125)
    sentinels = config.extra or [f"<extra_id_{index}>" for index in range(count)]
    special = [config.token(role) for role in ("pad_token", "eos_token", "unk_token")]
    return ByteVocabulary(special, sentinels, config.token("eos_token"))


def _marian_vocabularies(folder: Path, config: TokenizerConfig) -> tuple[SpmVocabulary, SpmVocabulary]:
    """A model of sentencepiece for each side, over one vocab.json or one each."""
    source, target = load_spm(folder / "source.spm"), load_spm(folder / "target.spm")
    separate = bool(config.values.get("separate_vocabs", False))
    paths = [folder / "vocab.json", folder / ("target_vocab.json" if separate else "vocab.json")]
    joins = target if separate else source
    unk, after = config.token("unk_token"), [config.token("eos_token")]
    vocabularies = []
    for spm, path in zip((source, target), paths, strict=True):
        vocab, added = _numbered(read_vocab(path), config, path)
        vocabularies.append(SpmVocabulary(spm, vocab, added, unk, after=after, joins=joins, gap=" ", finds_target=True))
    return vocabularies[0], vocabularies[1]


def _m2m_vocabulary(folder: Path, config: TokenizerConfig) -> SpmVocabulary:
    """vocab.json, then the languages, then a few ids for nothing that models have rows for."""
    path = folder / "vocab.json"
    vocab = read_vocab(path)
    codes = language_codes.WMT21 if config.values.get("language_codes") == "wmt21" else language_codes.M2M100
    vocab |= {f"__{code}__": len(vocab) + index for index, code in enumerate(codes)}
    vocab, added = _numbered(vocab, config, path)
    added += [AddedToken(f"__{code}__", special=True) for code in codes]
    return SpmVocabulary(load_spm(folder / "sentencepiece.bpe.model"), vocab, added, config.token("unk_token"))


def _numbered(vocab: dict[str, int], config: TokenizerConfig, path: Path) -> tuple[dict[str, int], list[AddedToken]]:
    """The vocabulary with all added tokens, those it lacks at its end, and the added tokens. Raises ConfigError."""
    for role in ("unk_token", "eos_token"):
        if config.named.get(role) not in vocab:
            raise ConfigError(f"{path} lacks the {role} {config.named.get(role)!r}")
    vocab = vocab | {token.content: token_id for token_id, token in config.added.items()}
    names = dict.fromkeys([*(token.content for token in config.added.values()), *config.named.values(), *config.extra])
    first = max(vocab.values()) + 1
    vocab |= {name: first + index for index, name in enumerate(name for name in names if name not in vocab)}
    return vocab, [config.added_token(name) for name in names if name]
