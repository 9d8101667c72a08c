"""The tokens of a model as grammars see them: the bytes of each, and where each may stand whatever the grammar."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from models.tokenizer import Tokenizer

Mask = npt.NDArray[np.int32]

# What the library takes for a character and decoding does not: halves of surrogate pairs, and what UTF-8 has shorter.
NO_CHARACTER = re.compile(rb"\xed[\xa0-\xbf]|\xe0[\x80-\x9f]|\xf0[\x80-\x8f]")
# The bytes that may follow such a first byte, which may be the last of a token.
SECOND_BYTES = {0xED: range(0x80, 0xA0), 0xE0: range(0xA0, 0xC0), 0xF0: range(0x90, 0xC0)}


@dataclass(frozen=True, eq=False)
class GrammarVocabulary:
    """Every mask is int32 (ceil(size / 32),), with bit i % 32 of word i // 32 for token i.

    Attributes:
        texts: the bytes of each id, b"" for the end tokens and for those that no grammar allows, such as special ones.
        eos_ids: the end tokens.
        drops_space: whether decoding leaves out the space that a text's first token starts with. Grammars then begin
            with one (``engine.grammar_build``).
        anywhere, first, after: the tokens that may stand in general, at the start, and behind half a character that
            ends with one of SECOND_BYTES. ends: the end tokens.
        key: of no other vocabulary.
    """

    texts: list[bytes]
    eos_ids: tuple[int, ...]
    drops_space: bool
    anywhere: Mask
    first: Mask
    after: dict[int, Mask]
    ends: Mask
    key: str = field(default_factory=lambda: uuid4().hex)

    @property
    def size(self) -> int:
        """How many logits the model gives."""
        return len(self.texts)

    @classmethod
    def of(cls, tokenizer: Tokenizer, size: int, eos_ids: Iterable[int]) -> GrammarVocabulary:
        """``eos_ids`` that are none of the ``size`` ids are left out."""
        given, ends = tokenizer.token_texts(), tuple(sorted({i for i in eos_ids if 0 <= i < size}))
        inner, first = ((texts + [b""] * (size - len(texts)))[:size] for texts in (given.inner, given.first))
        texts = [b"" if i in ends or NO_CHARACTER.search(text) else text for i, text in enumerate(inner)]
        drops_space = given.inner != given.first
        spelled = [i for i, text in enumerate(texts) if text]
        # A grammar knows of one space that is left out: tokens that lose more at the start may not stand there.
        starts = [i for i in spelled if first[i] == (texts[i].removeprefix(b" ") if drops_space else texts[i])]
        after = {
            byte: _mask(size, [i for i in spelled if texts[i][0] in allowed]) for byte, allowed in SECOND_BYTES.items()
        }
        return cls(
            texts,
            ends,
            drops_space,
            anywhere=_mask(size, [*spelled, *ends]),
            first=_mask(size, [*starts, *ends]),
            after=after,
            ends=_mask(size, ends),
        )

    def place(self, token_ids: Sequence[int]) -> Mask:
        """Which tokens may follow these."""
        if not token_ids:
            return self.first
        before = self.texts[token_ids[-1]]
        return self.after.get(before[-1], self.anywhere) if before else self.ends

    def info(self) -> Any:
        """``xgrammar.TokenizerInfo`` of these tokens."""
        import xgrammar

        return xgrammar.TokenizerInfo(self.texts, vocab_size=self.size, stop_token_ids=list(self.eos_ids))


def _mask(size: int, ids: Sequence[int]) -> Mask:
    bits = np.zeros(-(-size // 32) * 32, dtype=bool)
    bits[list(ids)] = True
    return np.packbits(bits, bitorder="little").view(np.int32)
