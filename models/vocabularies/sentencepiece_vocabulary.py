"""Vocabularies of folders that hold a sentencepiece model and no tokenizer.json: T5, mBART, NLLB, Pegasus, Llama."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as Vocabulary

from models.config import ConfigError
from models.vocabularies import language_codes
from models.vocabularies.builders import frame_words, sentencepiece_bpe, sentencepiece_unigram, surround
from models.vocabularies.sentencepiece_file import CONTROL, UNKNOWN, USER_DEFINED, SentencePieceFile
from models.vocabularies.tokenizer_config import TokenizerConfig

SENTENCEPIECE_FILES = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
# Fairseq has its own ids for these four; a sentencepiece model's first three pieces are <unk>, <s> and </s>.
FAIRSEQ_FIRST = ["<s>", "<pad>", "</s>", "<unk>"]
PEGASUS_OFFSET = 103


def sentencepiece_vocabulary(path: Path, config: TokenizerConfig) -> Vocabulary:
    """The vocabulary of a sentencepiece model as its family numbers and frames it. Raises ConfigError."""
    file = SentencePieceFile.read(path)
    builders = {"T5": _t5, "MBart": _mbart, "MBart50": _mbart50, "Nllb": _nllb, "Pegasus": _pegasus, "Llama": _llama}
    if config.kind not in builders:
        what = f"class {config.kind}Tokenizer" if config.kind else "no tokenizer_class"
        raise ConfigError(f"{path} has {what} beside it: expected one of {', '.join(builders)}, or a tokenizer.json")
    try:
        return builders[config.kind](file, config)
    except ConfigError:
        raise
    except Exception as error:  # tokenizers raises bare Exception, for a broken table of characters
        raise ConfigError(f"{path} is broken: {error}") from None


def _t5(file: SentencePieceFile, config: TokenizerConfig) -> Vocabulary:
    """The pieces as they are, then <extra_id_99> down to <extra_id_0>; a text ends in </s>."""
    count = config.count("extra_ids", 100)
    sentinels = [f"<extra_id_{index}>" for index in reversed(range(count))]
    pieces = file.pieces + [(name, 0.0) for name in sentinels]
    vocabulary = sentencepiece_unigram(pieces, file.types.index(UNKNOWN), file.charsmap, file.byte_fallback)
    _add_special(vocabulary, [*config.named.values(), *sentinels])
    surround(vocabulary, [], ["</s>"])
    return vocabulary


def _mbart(file: SentencePieceFile, config: TokenizerConfig) -> Vocabulary:
    names = [*language_codes.MBART, "<mask>"]
    vocabulary = sentencepiece_unigram(_fairseq_pieces(file, names), 3, file.charsmap)
    return _fairseq(vocabulary, names, config)


def _mbart50(file: SentencePieceFile, config: TokenizerConfig) -> Vocabulary:
    names = [*language_codes.MBART50, "<mask>"]
    pieces = _fairseq_pieces(file, names)
    return _fairseq(sentencepiece_unigram(pieces, 3, file.charsmap, split_at_whitespace=False), names, config)


def _nllb(file: SentencePieceFile, config: TokenizerConfig) -> Vocabulary:
    names = [*language_codes.NLLB, "<mask>"]
    pieces = _fairseq_pieces(file, [])
    vocab = {piece: index for index, (piece, _) in enumerate(pieces)}
    vocabulary = sentencepiece_bpe(vocab, unk="<unk>", byte_fallback=False)
    frame_words(vocabulary, file.charsmap, split_at_whitespace=False)
    return _fairseq(vocabulary, names, config)


def _pegasus(file: SentencePieceFile, config: TokenizerConfig) -> Vocabulary:
    """<pad>, </s>, two masks and 101 placeholders before the pieces, which lose their own <pad> and </s>."""
    special = [config.token("pad_token"), config.token("eos_token")]
    special += [str(config.values.get("mask_token_sent", "<mask_1>")), config.token("mask_token")]
    special += [f"<unk_{index}>" for index in range(2, PEGASUS_OFFSET)]
    pieces = [(name, 0.0) for name in special] + file.pieces[2:]
    unk_id = file.types.index(UNKNOWN) + PEGASUS_OFFSET
    vocabulary = sentencepiece_unigram(pieces, unk_id, file.charsmap, split_at_whitespace=False)
    _add_special(vocabulary, [*special, *config.named.values()])
    surround(vocabulary, [], [config.token("eos_token")])
    return vocabulary


def _llama(file: SentencePieceFile, config: TokenizerConfig) -> Vocabulary:
    """The pieces as they are; a text starts with <s> and does not end in </s> unless tokenizer_config.json says so."""
    values, vocab = config.values, {piece: index for index, (piece, _) in enumerate(file.pieces)}
    prepend = "always" if values.get("legacy") else "first"
    if values.get("add_prefix_space") is False:
        prepend = "never"
    vocabulary = sentencepiece_bpe(vocab, byte_fallback=True, prepend=prepend)  # type: ignore[arg-type]
    _add_special(vocabulary, [*file.names(CONTROL), *config.named.values()])
    vocabulary.add_tokens([AddedToken(name, normalized=False) for name in file.names(USER_DEFINED)])
    before = [config.token("bos_token")] if values.get("add_bos_token", True) else []
    surround(vocabulary, before, [config.token("eos_token")] if values.get("add_eos_token") else [])
    return vocabulary


def _fairseq_pieces(file: SentencePieceFile, names: list[str]) -> list[tuple[str, float]]:
    return [(name, 0.0) for name in FAIRSEQ_FIRST] + file.pieces[3:] + [(name, 0.0) for name in names]


def _fairseq(vocabulary: Vocabulary, names: list[str], config: TokenizerConfig) -> Vocabulary:
    """``names`` are the languages and <mask>, whose ids follow the pieces'; the mask takes the space before it."""
    _add_special(vocabulary, FAIRSEQ_FIRST + names[:-1])
    stated = {token.content: token for token in config.added.values()}
    vocabulary.add_tokens([stated.get("<mask>") or AddedToken("<mask>", lstrip=True, special=True)])
    return vocabulary


def _add_special(vocabulary: Vocabulary, names: list[str]) -> None:
    vocabulary.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in dict.fromkeys(names)])
