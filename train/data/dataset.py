"""A run's data, ready to batch: tokenizer, training examples, validation examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from models.config import ConfigError
from models.tokenizer import Tokenizer, TokenizerKind, Vocabulary, read_vocabulary, train_vocabulary
from train.data.batching import Example, Plan, lengths_of, plan_epoch
from train.data.corpora import (
    DEFAULT_TOKENIZER,
    DEFAULT_VOCABULARY,
    DataSection,
    Pair,
    load_pairs,
    load_text,
    texts,
)


@dataclass
class PairData:
    """Pairs as token ids. ``validation_pairs`` keep the text, for decoding and comparing."""

    tokenizer: Tokenizer
    train: list[Example]
    validation: list[Example]
    validation_pairs: list[Pair]
    num_too_long: int = 0  # pairs left out because a side is longer than the model takes
    lengths: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = lengths_of(self.train)

    def epoch(self, seed: int, epoch: int, batch_size: int, max_tokens: int | None) -> tuple[Sequence[Example], Plan]:
        """The examples of an epoch and its plan of batches."""
        return self.train, plan_epoch(self.lengths, seed, epoch, batch_size, max_tokens)


@dataclass
class TextData:
    """A text as one long row of token ids, cut anew each epoch into windows from a random offset."""

    tokenizer: Tokenizer
    train_ids: NDArray[np.int64]
    context: int
    validation: list[Example]
    validation_pairs: list[Pair] = field(default_factory=list)
    num_too_long: int = 0

    def epoch(self, seed: int, epoch: int, batch_size: int, max_tokens: int | None) -> tuple[Sequence[Example], Plan]:
        offset = int(np.random.default_rng([seed, epoch]).integers(self.context))
        if offset + self.context >= len(self.train_ids):
            offset = 0
        examples = windows(self.train_ids[offset:], self.context)
        return examples, plan_epoch(lengths_of(examples), seed, epoch, batch_size, max_tokens)


def load_data(
    data: DataSection, seed: int, max_seqlen: int, tokenizer: Tokenizer | None = None, first_id: int | None = None
) -> PairData | TextData:
    """Reads the data and learns, or takes, its vocabulary; a target's first token is ``first_id`` where there is one.

    Raises ConfigError for data that cannot be used.
    """
    if data.task == "text":
        if data.context > max_seqlen:
            raise ConfigError(f"data.context {data.context} is longer than model.max_seqlen {max_seqlen}")
        return _load_text(data, tokenizer)
    corpus = load_pairs(data, seed)
    tokenizer = tokenizer or _tokenizer(data, *texts(corpus.train))
    train_pairs, train = _encode(tokenizer, corpus.train, max_seqlen, first_id)
    validation_pairs, validation = _encode(tokenizer, corpus.validation, max_seqlen, first_id)
    if not train or not validation:
        raise ConfigError("the data set is empty once examples beyond model.max_seqlen are left out")
    num_too_long = len(corpus.train) + len(corpus.validation) - len(train_pairs) - len(validation_pairs)
    return PairData(tokenizer, train, validation, validation_pairs, num_too_long)


def windows(token_ids: NDArray[np.int64], context: int) -> list[Example]:
    """Consecutive windows of ``context`` tokens and the one that follows."""
    starts = range(0, len(token_ids) - context, context)
    return [Example(None, token_ids[start : start + context + 1]) for start in starts]


def _load_text(data: DataSection, tokenizer: Tokenizer | None) -> TextData:
    train, validation = load_text(data)
    # A character that only the validation text has must not be unknown; what bpe merges is for training to say.
    seen = [train, validation] if (data.tokenizer or DEFAULT_TOKENIZER) == "char" else [train]
    tokenizer = tokenizer or Tokenizer(_vocabulary(data.tokenizer, seen, data.vocab_size))
    train_ids, validation_ids = (np.array(tokenizer.encode(text), dtype=np.int64) for text in (train, validation))
    if len(train_ids) <= data.context or len(validation_ids) <= data.context:
        raise ConfigError(f"{data.file} is too short for windows of data.context {data.context} tokens")
    return TextData(tokenizer, train_ids, data.context, windows(validation_ids, data.context))


def _tokenizer(data: DataSection, sources: list[str], targets: list[str]) -> Tokenizer:
    if data.target_tokenizer is None:
        return Tokenizer(_vocabulary(data.tokenizer, [*sources, *targets], data.vocab_size))
    return Tokenizer(
        _vocabulary(data.tokenizer, sources, data.vocab_size),
        _vocabulary(data.target_tokenizer, targets, data.vocab_size),
    )


def _vocabulary(kind: str | None, texts: list[str], vocab_size: int | None) -> Vocabulary:
    kind = kind or DEFAULT_TOKENIZER
    if kind in get_args(TokenizerKind):
        return train_vocabulary(kind, texts, vocab_size or DEFAULT_VOCABULARY)  # type: ignore[arg-type]
    if not Path(kind).is_file():
        raise ConfigError(f"no tokenizer {kind!r}: expected {', '.join(get_args(TokenizerKind))} or a tokenizer.json")
    return read_vocabulary(Path(kind))


def _encode(
    tokenizer: Tokenizer, pairs: list[Pair], max_seqlen: int, first_id: int | None
) -> tuple[list[Pair], list[Example]]:
    """The pairs no side of which is longer than the model takes, the end token counted, and their examples."""
    sources, targets = texts(pairs)
    first = [] if first_id is None else [first_id]
    target_ids = [first + ids for ids in tokenizer.encode_target_batch(targets)]
    encoded = list(map(Example, tokenizer.encode_batch(sources), target_ids))
    kept: list[Pair] = []
    examples: list[Example] = []
    start = 0
    for pair in pairs:
        own = encoded[start : start + len(pair.references)]
        start += len(own)
        if all(len(e.source or ()) <= max_seqlen and len(e.target) < max_seqlen for e in own):
            kept.append(pair)
            examples += own
    return kept, examples
