"""A sentencepiece model file: its pieces and how it splits text, read from the protocol buffer it is."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from models.config import ConfigError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # types of piece; the others are unused
BPE = 2  # of the model types; 1, the default, is unigram

Field = tuple[int, "int | bytes"]


@dataclass(frozen=True)
class SentencePieceFile:
    """What a sentencepiece model says.

    Attributes:
        pieces: every piece and its score. types: the type of each.
        is_bpe: whether pieces merge by rank, rather than compete by score (unigram).
        byte_fallback: whether a character without a piece becomes its bytes' pieces.
        charsmap: the table that normalises characters; empty where none are.
        path: the file, for messages.
    """

    pieces: list[tuple[str, float]]
    types: list[int]
    is_bpe: bool
    byte_fallback: bool
    charsmap: bytes
    path: Path

    @classmethod
    def read(cls, path: Path) -> SentencePieceFile:
        """Raises ConfigError for a file that is no sentencepiece model."""
        try:
            fields = list(_fields(path.read_bytes()))
            parts = [_piece(value) for number, value in fields if number == 1 and isinstance(value, bytes)]
            trainer, normalizer = (dict(_fields(_last(fields, number))) for number in (2, 3))
        except (OSError, ValueError, IndexError, TypeError, struct.error) as error:
            raise ConfigError(f"{path} is not a sentencepiece model: {error}") from None
        charsmap = normalizer.get(2, b"")
        if len(parts) < 3 or not isinstance(charsmap, bytes) or UNKNOWN not in (type_ for _, _, type_ in parts):
            raise ConfigError(f"{path} is not a sentencepiece model: it has no vocabulary")
        pieces, types = [(piece, score) for piece, score, _ in parts], [type_ for _, _, type_ in parts]
        return cls(pieces, types, trainer.get(3, 1) == BPE, bool(trainer.get(35, 0)), charsmap, path)

    def names(self, *types: int) -> list[str]:
        """The pieces of these types."""
        return [name for (name, _), type_ in zip(self.pieces, self.types, strict=True) if type_ in types]


def _piece(message: bytes) -> tuple[str, float, int]:
    fields = dict(_fields(message))
    text, score, type_ = fields.get(1, b""), fields.get(2, b"\0" * 4), fields.get(3, NORMAL)
    if not (isinstance(text, bytes) and isinstance(score, bytes) and isinstance(type_, int)):
        raise ValueError("a piece has fields of the wrong kind")
    return text.decode(), struct.unpack("<f", score)[0], type_


def _last(fields: list[Field], number: int) -> bytes:
    values = [value for found, value in fields if found == number and isinstance(value, bytes)]
    return values[-1] if values else b""


def _fields(message: bytes) -> Iterator[Field]:
    """Number and value of each field of a message: a number for a varint, the bytes of any other."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, position = _varint(message, position)
            yield number, value
            continue
        if kind == 2:
            size, position = _varint(message, position)
        else:
            size = {1: 8, 5: 4}.get(kind, len(message) + 1)
        if position + size > len(message):
            raise ValueError("it ends early or holds something else")
        yield number, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value, shift, position = value | (byte & 127) << shift, shift + 7, position + 1
        if byte < 128:
            return value, position
        if shift > 63:
            raise ValueError("a number in it is too long")
