"""Vocabularies from their parts, as files of several formats hold them: byte-level BPE, sentencepiece BPE, unigram."""

from __future__ import annotations

from typing import Any, Literal

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Vocabulary

from models.config import ConfigError

SPACE = "▁"  # what sentencepiece writes for a space
PrependScheme = Literal["always", "first", "never"]


def byte_level_bpe(
    vocab: dict[str, int], merges: list[tuple[str, str]], add_prefix_space: bool = False
) -> Vocabulary:  # fmt: skip
    """BPE over the bytes of a text, which have no unknown token; GPT-2's and BART's.

    Args:
        vocab: tokens in GPT-2's alphabet of printable characters for bytes.
        add_prefix_space: encode a text as if a space stood before it.
    """
    vocabulary = Vocabulary(models.BPE(vocab=vocab, merges=merges))
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    vocabulary.decoder = decoders.ByteLevel()
    return vocabulary


def sentencepiece_bpe(
    vocab: dict[str, int], unk: str | None = None, byte_fallback: bool = True, prepend: PrependScheme = "first"
) -> Vocabulary:  # fmt: skip
    """Sentencepiece's BPE, as Llama and Mistral have it: spaces are kept, what has no piece becomes bytes.

    Args:
        vocab: the pieces; their order is the rank of merges.
        prepend: whether a text starts with a space: always, only where no special token goes before it, or never.
    """
    model = models.BPE(
        vocab=vocab, merges=ranked_merges(vocab), unk_token=unk, fuse_unk=True, byte_fallback=byte_fallback
    )
    vocabulary = Vocabulary(model)
    vocabulary.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=prepend, split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    vocabulary.decoder = decoders.Sequence(steps if prepend == "never" else [*steps, decoders.Strip(" ", 1, 0)])
    return vocabulary


def sentencepiece_unigram(
    pieces: list[tuple[str, float]], unk_id: int, charsmap: bytes = b"", byte_fallback: bool = False,
    split_at_whitespace: bool = True,
) -> Vocabulary:  # fmt: skip
    """Sentencepiece's unigram model, as T5 and mBART have it: the pieces whose scores add up to most.

    Args:
        pieces: every piece with its score, in the order of ids.
        charsmap: sentencepiece's table that normalises characters.
        split_at_whitespace: drop white space of every kind; otherwise only runs of spaces become one.
    """
    vocabulary = Vocabulary(models.Unigram(pieces, unk_id=unk_id, byte_fallback=byte_fallback))
    frame_words(vocabulary, charsmap, split_at_whitespace)
    if byte_fallback:
        vocabulary.decoder = decoders.Sequence([decoders.ByteFallback(), vocabulary.decoder])
    return vocabulary


def frame_words(vocabulary: Vocabulary, charsmap: bytes, split_at_whitespace: bool) -> None:
    """Makes a vocabulary normalise text and start every word with sentencepiece's space."""
    steps: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    metaspace: Any = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=True)
    if split_at_whitespace:
        metaspace = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    else:
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if steps:
        vocabulary.normalizer = normalizers.Sequence(steps)
    vocabulary.pre_tokenizer = metaspace
    vocabulary.decoder = decoders.Metaspace(SPACE, prepend_scheme="always", split=True)


def ranked_merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges sentencepiece's BPE makes: any two pieces that join into a third, that of the lowest id first."""
    merges = []
    for piece, rank in vocab.items():
        splits = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        merges += [(rank, len(left), left, right) for left, right in splits if left in vocab and right in vocab]
    return [(left, right) for *_, left, right in sorted(merges, key=lambda merge: merge[:2])]


def surround(vocabulary: Any, before: list[str], after: list[str]) -> None:
    """Makes a vocabulary put special tokens before and after what it encodes. Raises ConfigError for one it lacks."""
    for token in before + after:
        if vocabulary.token_to_id(token) is None:
            raise ConfigError(f"the tokenizer's vocabulary lacks {token}, which its family puts around a text")
    if hasattr(vocabulary, "surround"):  # one of ours, written in Python
        vocabulary.surround(before, after)
        return
    ids = [(token, vocabulary.token_to_id(token)) for token in dict.fromkeys(before + after)]
    vocabulary.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=ids)
