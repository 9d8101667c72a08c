"""The vocabulary of a GGUF file as the tokenizer.json it was converted from would have given it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Vocabulary

from models.files import CheckpointError
from models.gguf.file import GgufFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # of llama.cpp's token types; the others are UNUSED and BYTE
LONGEST_TOKEN = 1024  # characters: finding the merges of a token takes time with the square of its length

# How text is split before merging, by tokenizer.ggml.pre: one expression after the other. From llama.cpp's
# llama-vocab.cpp, which has them from each model's tokenizer.json.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3, _QWEN2 = _WORDS + r"\p{N}{1,3}" + _REST, _WORDS + r"\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Llama 3's and Tekken's take a word that is a token whole, and begin every text with a token.
WHOLE_WORDS = ["llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "tekken"]
SPLITS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    **dict.fromkeys(["gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4"], (_GPT2,)),
    **dict.fromkeys(
        ["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"], (r"\p{N}", _GPT2)
    ),
    **dict.fromkeys([*WHOLE_WORDS, "dbrx", "smaug-bpe"], (_LLAMA3,)),
    **dict.fromkeys(["qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"], (_QWEN2,)),
    "tekken": (_TEKKEN,),
}


@dataclass(frozen=True)
class GgufVocabulary:
    """A vocabulary that adds no special tokens, and what the file says about adding them."""

    vocabulary: Vocabulary
    bos_id: int | None
    eos_id: int | None
    eot_id: int | None  # of a turn in a chat, where that is another token
    pad_id: int | None
    unk_id: int | None
    add_bos: bool
    add_eos: bool
    chat_template: str | None


@dataclass(frozen=True)
class _Kind:
    """One of llama.cpp's kinds of vocabulary: how it is built, and what holds where a file does not say."""

    build: Callable[[_Metadata], Vocabulary]
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    unk_id: int | None = None
    add_bos: bool = False
    add_eos: bool = False


def read_vocabulary(file: GgufFile) -> GgufVocabulary | None:
    """The file's vocabulary, None if it has none. Raises CheckpointError for one that is broken or unknown to us."""
    name = file.metadata.get("tokenizer.ggml.model", "no_vocab")
    if name == "no_vocab":
        return None
    if not isinstance(name, str) or name not in KINDS:
        raise CheckpointError(f"{file.path} has a {str(name)[:40]!r} vocabulary: expected {', '.join(KINDS)}")
    kind, metadata = KINDS[name], _Metadata(file)
    try:
        vocabulary = kind.build(metadata)
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{file.path} has a broken vocabulary: {' '.join(str(error).split())[:200]}") from None
    return GgufVocabulary(
        vocabulary,
        bos_id=metadata.token_id("bos", kind.bos_id),
        eos_id=metadata.token_id("eos", kind.eos_id),
        eot_id=metadata.token_id("eot", None),
        pad_id=metadata.token_id("padding", kind.pad_id),
        unk_id=metadata.token_id("unknown", kind.unk_id),
        add_bos=metadata.get("ggml.add_bos_token", bool, kind.add_bos or metadata.pre in WHOLE_WORDS),
        add_eos=metadata.get("ggml.add_eos_token", bool, kind.add_eos),
        chat_template=metadata.get("chat_template", str, None),
    )


class _Metadata:
    """A file's values under ``tokenizer.``. Raises CheckpointError for those that are missing or odd."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.tokens = self.array("tokens", str)
        for token in self.tokens:
            if len(token) > LONGEST_TOKEN:
                raise self.error(f"a token of {len(token)} characters, expected at most {LONGEST_TOKEN}")
        if len(set(self.tokens)) != len(self.tokens):
            raise self.error("a token that is listed twice")
        self.types = self.array("token_type", int, len(self.tokens), [NORMAL] * len(self.tokens))

    def get(self, key: str, kind: type, default: Any) -> Any:
        value = self.file.metadata.get(f"tokenizer.{key}", default)
        if value is not default and not isinstance(value, kind):
            raise self.error(f"a {key} that is no {kind.__name__}")
        return value

    def array(self, key: str, kind: type, length: int | None = None, default: list[Any] | None = None) -> list[Any]:
        values = self.file.metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise self.error(f"no list {key} of {kind.__name__}")
        if length is not None and len(values) != length:
            raise self.error(f"{length} tokens, but {len(values)} of {key}")
        return list(values)

    def token_id(self, name: str, default: int | None) -> int | None:
        value = self.get(f"ggml.{name}_token_id", int, default)
        if value is not None and not 0 <= value < len(self.tokens):
            raise self.error(f"no token {value}, its {name} token")
        return value

    @property
    def pre(self) -> str:
        """Which expressions split text, of SPLITS; the files of before this was written down have none."""
        return self.get("ggml.pre", str, "default")

    @property
    def scores(self) -> list[float]:
        scores = self.array("scores", float, len(self.tokens))
        if not all(map(math.isfinite, scores)):
            raise self.error("a score that is no number")
        return scores

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"the vocabulary of {self.file.path} has {message}")


def _byte_level(metadata: _Metadata) -> Vocabulary:
    """GPT-2's kind of BPE: tokens and merges are spelled in its alphabet of bytes."""
    if metadata.pre not in SPLITS:
        raise metadata.error(f"the pre-tokenizer {metadata.pre[:40]!r}: expected one of {', '.join(SPLITS)}")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.array("merges", str)]
    ids = {token: index for index, token in enumerate(metadata.tokens)}
    vocabulary = Vocabulary(models.BPE(ids, merges, ignore_merges=metadata.pre in WHOLE_WORDS))
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS[metadata.pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    vocabulary.decoder = decoders.ByteLevel()
    return _with_added_tokens(vocabulary, metadata)


def _sentencepiece_bpe(metadata: _Metadata) -> Vocabulary:
    """Llama 1's and 2's kind, with a space put before every stretch of text and bytes for unknown characters."""
    ids = {token: index for index, token in enumerate(metadata.tokens)}
    unknown = metadata.tokens[metadata.token_id("unknown", SENTENCEPIECE_UNKNOWN) or 0]
    merges = _merges_of_scores(metadata, ids)
    vocabulary = Vocabulary(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = metadata.get("ggml.add_space_prefix", bool, True)
    vocabulary.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")]
    )
    vocabulary.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         *([decoders.Strip(" ", 1, 0)] if prefix else [])]
    )  # fmt: skip
    return _with_added_tokens(vocabulary, metadata)


def _merges_of_scores(metadata: _Metadata, ids: dict[str, int]) -> list[tuple[str, str]]:
    """The merges that sentencepiece does, best first: any two tokens whose text together is a token, by its score.

    Tokens that are not text, such as <s>, are not built from it. Ties go as in transformers' generate_merges.
    """
    merges = []
    for token, kind, score in zip(metadata.tokens, metadata.types, metadata.scores, strict=True):
        if kind not in (NORMAL, USER_DEFINED):
            continue
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [(left, right) for left, right in pairs if left in ids and right in ids]
        merges += [(score, pair) for pair in sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    merges.sort(key=lambda merge: (merge[0], len(merge[1][0]), len(merge[1][1])), reverse=True)
    return [pair for _, pair in merges]


def _unigram(metadata: _Metadata) -> Vocabulary:
    """T5's kind. The sentinels, which T5's sentencepiece model lacks, are called [PAD...] by the converter."""
    spares = [index for index, token in enumerate(metadata.tokens) if re.fullmatch(r"\[PAD\d+\]", token)]
    for index, spare in enumerate(spares[:SENTINELS]):
        metadata.tokens[spare] = f"<extra_id_{min(SENTINELS, len(spares)) - 1 - index}>"
        metadata.types[spare] = CONTROL
    scored = list(zip(metadata.tokens, metadata.scores, strict=True))
    vocabulary = Vocabulary(models.Unigram(scored, unk_id=metadata.token_id("unknown", T5_UNKNOWN)))
    if charsmap := bytes(value & 255 for value in metadata.array("precompiled_charsmap", int, default=[])):
        vocabulary.normalizer = normalizers.Precompiled(charsmap)
    vocabulary.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", "always")]
    )
    vocabulary.decoder = decoders.Metaspace("▁", "always")
    return _with_added_tokens(vocabulary, metadata)


def _with_added_tokens(vocabulary: Vocabulary, metadata: _Metadata) -> Vocabulary:
    """The same, with the tokens that are found whole in a text: special ones, and those that a user defined."""
    typed = list(zip(metadata.tokens, metadata.types, strict=True))
    special = [AddedToken(token, normalized=False, special=True) for token, kind in typed if kind in (UNKNOWN, CONTROL)]
    vocabulary.add_special_tokens(special)
    vocabulary.add_tokens([AddedToken(token, normalized=False) for token, kind in typed if kind == USER_DEFINED])
    return vocabulary


SENTENCEPIECE_UNKNOWN, T5_UNKNOWN, SENTINELS = 0, 2, 100
KINDS = {
    "gpt2": _Kind(_byte_level),
    "llama": _Kind(_sentencepiece_bpe, bos_id=1, eos_id=2, unk_id=SENTENCEPIECE_UNKNOWN, add_bos=True),
    "t5": _Kind(_unigram, eos_id=1, pad_id=0, unk_id=T5_UNKNOWN, add_eos=True),
}
