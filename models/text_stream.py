"""Streaming detokenisation: token ids in, pieces of text out, never half a character."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what the bytes of half a character decode to
LONGEST_CHARACTER = 4  # bytes in UTF-8, so at most as many tokens
LONGEST_WINDOW = 64  # tokens; only a model that gives no text or no characters for so long reaches it


def clean_up(text: str) -> str:
    """The text without the spaces that splitting into words leaves before punctuation and English contractions."""
    for found in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(found, found.strip())
    return text


class TextStream:
    """Turns a growing list of token ids into pieces of text that never end inside a character.

    The pieces add up to what ``decode`` gives for all ids. Each token is decoded with the few before it alone, so its
    cost does not grow with the text. A byte-level token may hold part of a character, which decodes to U+FFFD: such a
    tail waits for its rest, but no longer than a character has bytes. The bytes of no character come out as U+FFFD;
    where a vocabulary spells whole runs of characters in bytes, the good ones before a bad one keep their text.
    With ``as_is`` no space is cleaned up: the pieces add up to what ``decode_as_is`` gives.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, as_is: bool = False) -> None:
        self.tokenizer, self.skip_special_tokens = tokenizer, skip_special_tokens
        self._window: list[int] = []  # tokens whose text is out, as context for the next, then those still waiting
        self._num_settled = 0  # of the window's tokens
        self._num_given = 0  # of the window's characters
        self._cleaner = _SpaceCleaner() if tokenizer.clean_up_spaces and not as_is else None

    def push(self, token_ids: Iterable[int], final: bool = False) -> str:
        """The text these ids add; ``final`` also gives out an unfinished tail, as U+FFFD."""
        piece = "".join(map(self._add, token_ids))
        if final:
            piece += self._decode()[self._num_given :]
            self._window, self._num_settled, self._num_given = [], 0, 0
        return piece if self._cleaner is None else self._cleaner.push(piece, final)

    def _add(self, token_id: int) -> str:
        if self.tokenizer.has_text(token_id, self.skip_special_tokens):
            self._window.append(token_id)
        text = self._decode()
        piece = text[self._num_given : self._end_of_certain(text)]
        self._num_given += len(piece)
        if piece and self._num_given == len(text):
            # One settled chunk is context enough for tokenizers that treat the first token of a text apart.
            self._shrink(self._num_settled, text)
            self._num_settled = len(self._window)
        elif len(self._window) > LONGEST_WINDOW:
            self._shrink(len(self._window) - LONGEST_WINDOW // 2, text)
        return piece

    def _end_of_certain(self, text: str) -> int:
        """How many characters of the window's text no later token changes."""
        if not text.endswith(UNFINISHED):
            return max(len(text), self._num_given)
        if len(self._window) - self._num_settled < LONGEST_CHARACTER:
            return self._num_given
        unfinished = len(text) - len(text.rstrip(UNFINISHED))
        return max(len(text) - min(unfinished, LONGEST_CHARACTER - 1), self._num_given)

    def _shrink(self, count: int, text: str) -> None:
        """Drops the window's first tokens; as many characters as before are still to be given."""
        waiting = max(0, len(text) - self._num_given)
        self._window = self._window[count:]
        self._num_settled = max(0, self._num_settled - count)
        self._num_given = max(0, len(self._decode()) - waiting)

    def _decode(self) -> str:
        return self.tokenizer.decode_as_is(self._window, self.skip_special_tokens) if self._window else ""


class _SpaceCleaner:
    """Cleans up the spaces of a text that comes in pieces, as ``clean_up`` does those of the whole.

    Every run of characters it replaces starts at a space and has at most four, so a cut no closer behind a space
    divides none; nor does a cut right before a space, but for the one that may follow an apostrophe.
    """

    def __init__(self) -> None:
        self._waiting = ""

    def push(self, piece: str, final: bool) -> str:
        text = self._waiting + piece
        end = len(text) if final else self._cut(text)
        self._waiting = text[end:]
        return clean_up(text[:end])

    @staticmethod
    def _cut(text: str) -> int:
        space = text.rfind(" ")
        if space < 0 or len(text) - space > 3:
            return len(text)
        while space > 0 and text[space - 1] == "'":
            space = text.rfind(" ", 0, space)
        return max(space, 0)
