"""Vocabularies that ``tokenizers`` cannot hold, with the same methods: Marian's, M2M-100's and ByT5's."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from models.config import ConfigError


@dataclass(frozen=True)
class Ids:
    """What encoding gives; of ``tokenizers.Encoding`` the part that is used here."""

    ids: list[int]


class PieceVocabulary(ABC):
    """Encodes what stands between the added tokens of a text piece by piece; offers what ``Tokenizer`` needs.

    Args:
        vocab: the id of every token, those of ``added`` included.
        added: tokens recognised wherever a text has them; the special ones are left out of decoded text.
        before, after: the special tokens around an encoded text.
    """

    def __init__(
        self, vocab: dict[str, int], added: Iterable[AddedToken], before: Sequence[str] = (), after: Sequence[str] = ()
    ) -> None:
        self.vocab, self.tokens = vocab, {token_id: token for token, token_id in vocab.items()}
        self.added: Mapping[str, AddedToken] = {token.content: token for token in added}
        self.special_ids = {vocab[name] for name, token in self.added.items() if token.special}
        names = sorted(filter(None, self.added), key=len, reverse=True)  # the longest token that fits wins
        self._between = re.compile(f"({'|'.join(map(re.escape, names))})" if names else "(?!)()")
        self.surround(before, after)

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """The ids of text without added tokens."""

    @abstractmethod
    def _decode(self, token_ids: list[int]) -> str:
        """The text of ids that are all in the vocabulary."""

    @abstractmethod
    def join(self, tokens: list[str]) -> str:
        """The text of tokens that are not special."""

    def surround(self, before: Sequence[str], after: Sequence[str]) -> None:
        """Puts these special tokens around what is encoded from now on."""
        self._before, self._after = ([self.vocab[token] for token in side] for side in (before, after))

    def encode(self, text: str, add_special_tokens: bool = True) -> Ids:
        parts = self._split(text)
        ids = [i for part in parts for i in ([self.vocab[part]] if part in self.added else self._encode(part))]
        return Ids(self._frame(ids) if add_special_tokens else ids)

    def _frame(self, ids: list[int]) -> list[int]:
        return self._before + ids + self._after

    def _split(self, text: str) -> list[str]:
        parts = self._between.split(text)
        for i, token in enumerate(map(self.added.get, parts)):
            if token is not None and token.rstrip and i + 1 < len(parts):
                parts[i + 1] = parts[i + 1].lstrip()
            if token is not None and token.lstrip and i > 0:
                parts[i - 1] = parts[i - 1].rstrip()
        return [part for part in parts if part]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[Ids]:
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        skipped = self.special_ids if skip_special_tokens else ()
        return self._decode([i for i in token_ids if i in self.tokens and i not in skipped])

    def get_vocab(self) -> dict[str, int]:
        return self.vocab

    def get_vocab_size(self) -> int:
        return max(self.tokens) + 1

    def token_to_id(self, token: str) -> int | None:
        return self.vocab.get(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self.tokens.get(token_id)


class SpmVocabulary(PieceVocabulary):
    """A sentencepiece model that splits, and a vocab.json that numbers the pieces, as Marian and M2M-100 have.

    Args:
        spm: splits text. joins: turns pieces back into text; ``spm`` unless given.
        unk: the token of pieces without a number. gap: what decoding puts after a special token.
        finds_target: whether a text may start with its target language, as in ">>fra<< Hello".
    """

    def __init__(
        self, spm: Any, vocab: dict[str, int], added: Iterable[AddedToken], unk: str, *, before: Sequence[str] = (),
        after: Sequence[str] = (), joins: Any = None, gap: str = "", finds_target: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(vocab, added, before, after)
        self.spm, self.joins, self.unk_id = spm, joins or spm, vocab[unk]
        self.gap, self.finds_target = gap, finds_target

    def _encode(self, text: str) -> list[int]:
        target = re.match(r">>.*?<<", text, re.DOTALL) if self.finds_target else None
        code = [target[0]] if target else []
        pieces = self.spm.encode(text[len(code[0]) :] if code else text, out_type=str)
        return [self.vocab.get(piece, self.unk_id) for piece in code + pieces]

    def _decode(self, token_ids: list[int]) -> str:
        text = ""
        pieces: list[str] = []
        for token_id in token_ids:
            if token_id in self.special_ids:
                text += self.joins.decode_pieces(pieces) + self.tokens[token_id] + self.gap
                pieces = []
            else:
                pieces.append(self.tokens[token_id])
        return (text + self.joins.decode_pieces(pieces)).replace("▁", " ").strip()

    def join(self, tokens: list[str]) -> str:
        return str(self.joins.decode_pieces(tokens)).replace("▁", " ").strip()


class ByteVocabulary(PieceVocabulary):
    """ByT5's: every byte is a token, three special tokens come before them and the sentinels after."""

    def __init__(self, special: Sequence[str], sentinels: Sequence[str], eos: str) -> None:
        first = len(special)
        vocab = {name: index for index, name in enumerate(special)}
        self._bytes = range(first, first + 256)
        vocab |= {f"<0x{byte:02X}>": first + byte for byte in range(256)}
        vocab |= {name: self._bytes.stop + index for index, name in enumerate(sentinels)}
        # Spaces around </s>, <pad> and <unk> go with them; around sentinels they stay.
        added = [AddedToken(name, lstrip=True, rstrip=True, special=True) for name in special]
        super().__init__(vocab, added + [AddedToken(name, special=True) for name in sentinels], after=[eos])

    def _frame(self, ids: list[int]) -> list[int]:
        return ids if ids[-1:] == self._after else ids + self._after

    def _encode(self, text: str) -> list[int]:
        return [byte + self._bytes.start for byte in text.encode()]

    def _decode(self, token_ids: list[int]) -> str:
        start = self._bytes.start
        parts = (bytes([i - start]) if i in self._bytes else self.tokens[i].encode() for i in token_ids)
        return b"".join(parts).decode(errors="ignore")

    def join(self, tokens: list[str]) -> str:
        return self._decode([i for token in tokens for i in self._ids(token)])

    def _ids(self, token: str) -> list[int]:
        return [self.vocab[token]] if token in self.vocab else self._encode(token)


def load_spm(path: Path) -> Any:
    """A sentencepiece processor. Raises ConfigError for a file that is missing or none."""
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{path} is not a sentencepiece model: {error}") from None
