"""What each token adds to a decoded text, in bytes: grammars that constrain a text are matched against these."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

ANCHOR = "a"  # a token that every decoder writes as it is
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

Join = Callable[[list[str]], str]


@dataclass(frozen=True)
class TokenTexts:
    """The bytes of every token of a vocabulary, by id; b"" for ids without a token and for special tokens.

    ``inner`` is what a token adds to a text that has begun, ``first`` what it adds where it is the first: there many
    vocabularies leave out a space. Decoding joins ``first`` of the first token and ``inner`` of the others; only
    SpmVocabulary also drops the white space around the whole.
    """

    inner: list[bytes]
    first: list[bytes]


def token_texts(vocabulary: Any, special_ids: Collection[int]) -> TokenTexts:
    """The texts of a ``tokenizers.Tokenizer``'s tokens, or those of one of our own vocabularies with its methods."""
    names = vocabulary.get_vocab()
    size = max(names.values(), default=-1) + 1
    spell = _speller(vocabulary)
    inner, first = [b""] * size, [b""] * size
    for name, token_id in names.items():
        if token_id not in special_ids:
            inner[token_id], first[token_id] = spell(name)
    return TokenTexts(inner, first)


def _speller(vocabulary: Any) -> Callable[[str], tuple[bytes, bytes]]:
    """What a token's name spells inside a text and as its first token, learned from what decoding makes of it."""
    join = _joiner(vocabulary)
    if join([ANCHOR, "Ġ", ANCHOR]) == f"{ANCHOR} {ANCHOR}":
        return _byte_level
    has_byte_tokens = join([ANCHOR, "<0x41>", ANCHOR]) == f"{ANCHOR}A{ANCHOR}"
    tail = join([ANCHOR, ANCHOR])[len(ANCHOR) :]  # with a space before it where decoding puts one between tokens

    def spell(name: str) -> tuple[bytes, bytes]:
        byte = BYTE_TOKEN.fullmatch(name) if has_byte_tokens else None
        if byte and int(byte[1], 16) >= 0x80:  # part of a character, which alone decodes to U+FFFD
            return bytes.fromhex(byte[1]), bytes.fromhex(byte[1])
        inner, first = join([ANCHOR, name, ANCHOR]), join([name, ANCHOR])
        return inner[len(ANCHOR) :].removesuffix(tail).encode(), first.removesuffix(tail).encode()

    return spell


def _joiner(vocabulary: Any) -> Join:
    """How decoding makes a text of tokens."""
    if hasattr(vocabulary, "join"):  # one of ours, written in Python
        join: Join = vocabulary.join
        return join
    decoder = vocabulary.decoder
    return " ".join if decoder is None else decoder.decode


def _alphabet() -> dict[str, int]:
    """GPT-2's printable characters for bytes: those that print stand for themselves, the rest follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_OF = _alphabet()


def _byte_level(name: str) -> tuple[bytes, bytes]:
    # An added token may have other characters, and is then text.
    spelled = bytes(map(BYTE_OF.__getitem__, name)) if all(map(BYTE_OF.__contains__, name)) else name.encode()
    return spelled, spelled
