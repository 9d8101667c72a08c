"""Streaming detokenisation: token ids in, pieces of text out, never half a character."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.tokenizer import Tokenizer


class TextStream:
    """Turns a growing list of token ids into pieces of text that never end inside a character.

    A byte-level token may hold part of a character, which decodes to U+FFFD: such a tail waits for its rest.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self.tokenizer, self.skip_special_tokens = tokenizer, skip_special_tokens
        self._settled_ids: list[int] = []  # whose text is settled, kept as context for the next decode
        self._pending_ids: list[int] = []

    def push(self, token_ids: Iterable[int], final: bool = False) -> str:
        """The text these ids add; ``final`` also gives out an unfinished tail, as U+FFFD."""
        self._pending_ids.extend(token_ids)
        before = self._decode(self._settled_ids)
        after = self._decode(self._settled_ids + self._pending_ids)
        if after.endswith("\ufffd") and not final:
            return ""
        piece = after[len(before) :]
        # One settled chunk is context enough for tokenizers that treat the first token of a text apart.
        if piece:
            self._settled_ids, self._pending_ids = self._pending_ids, []
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, self.skip_special_tokens) if token_ids else ""
