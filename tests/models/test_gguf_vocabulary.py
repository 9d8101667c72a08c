"""The vocabulary of a GGUF file encodes as the tokenizer it was made from."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from models.files import CheckpointError
from models.gguf.file import GgufFile
from models.gguf.vocabulary import GgufVocabulary, read_vocabulary
from tests.models.gguf_files import smollm2, write

TEXTS = [
    "", " ", "a", "Hello world", "Hello, world! How are you?", " leading", "trailing ", "two  spaces", "   three",
    "tab\tand\nnewline\r\n", "\n\n\n", "\n \n  x", "it's we'll I'LL they've", "don’t", "123", "2024-12-31", "3.14159",
    "x1y2z3", "1,000,000", "def f(x):\n    return x ** 2  # squared\n", "if (a != b) { c += d[0]; }",
    "https://example.com/a?b=c&d=%20", "안녕하세요 세계", "한국어와 English를 섞은 문장 42개",
    "日本語テキスト", "Café déjà vu", "she said: \"no\"",
    "😀👍🏽🇰🇷 emoji", "\u00a0nbsp\u3000wide\u200b", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><|im_start|>", "<|im_start", "camelCaseWORDS_and_snake",
]  # fmt: skip


def test_the_real_file_encodes_as_transformers_does() -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(smollm2().parent, gguf_file=smollm2().name)
    ours = read_vocabulary(GgufFile(smollm2()))
    assert ours is not None
    assert [ours.vocabulary.encode(text).ids for text in TEXTS] == [theirs(text)["input_ids"] for text in TEXTS]
    for text in TEXTS:
        assert ours.vocabulary.decode(ours.vocabulary.encode(text).ids, skip_special_tokens=False) == text
    assert ours.vocabulary.decode([1, 19556, 2], skip_special_tokens=True) == "Hello"
    assert ours.vocabulary.get_vocab_size() == len(theirs)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id) == (1, 2, 2, 0)
    assert (ours.add_bos, ours.add_eos) == (False, False)
    assert ours.chat_template == theirs.chat_template


def test_digits_part_from_spaces_before_them() -> None:
    """As in the original tokenizer.json and in llama.cpp, whose ids these are; transformers leaves the Digits out."""
    ours = read_vocabulary(GgufFile(smollm2()))
    assert ours is not None
    assert ours.vocabulary.encode("a  12 34").ids == [81, 256, 33, 34, 216, 35, 36]
    assert ours.vocabulary.encode("½ ² ١٢").ids == [16738, 216, 19133, 216, 164, 111, 164, 112]


CORPUS = [
    "the quick brown fox jumps over the lazy dog", "she sells sea shells", "pack my box with five dozen jugs",
    "안녕하세요 세계", "안녕 세계", "how now brown cow", "for x in range(10): print(x)", "1 2 3 4 5 6 7 8 9 0",
] * 4  # fmt: skip
SENTENCES = [
    "the quick brown fox", "  two  spaces", "trailing  ", "안녕하세요 세계", "안녕 world", "print(3): x", "she's", "",
    "the lazy dogs sell shells",
]  # fmt: skip


def sentencepiece_file(path: Path, kind: str, **options: Any) -> tuple[GgufVocabulary, Any]:
    """The vocabulary of a file written from a sentencepiece model that was trained here, and that model."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, hard_vocab_limit=False, minloglevel=2,
        **options,
    )  # fmt: skip
    peer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = range(peer.get_piece_size())
    types = [2 if peer.is_unknown(i) else 3 if peer.is_control(i) else 6 if peer.is_byte(i) else 1 for i in pieces]
    metadata = {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": [peer.id_to_piece(i) for i in pieces],
        "tokenizer.ggml.scores": [peer.get_score(i) for i in pieces],
        "tokenizer.ggml.token_type": types,
    }
    if kind == "t5":
        from sentencepiece import sentencepiece_model_pb2

        charsmap = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue()).normalizer_spec.precompiled_charsmap
        metadata["tokenizer.ggml.precompiled_charsmap"] = charsmap
        metadata["tokenizer.ggml.tokens"] += [f"[PAD{len(pieces) + i}]" for i in range(128)]
        metadata["tokenizer.ggml.scores"] += [-1000.0] * 128
        metadata["tokenizer.ggml.token_type"] += [5] * 128
    vocabulary = read_vocabulary(GgufFile(write(path, "llama", metadata, {})))
    assert vocabulary is not None
    return vocabulary, peer


def test_a_llama_vocabulary_encodes_as_sentencepiece_does(tmp_path: Path) -> None:
    ours, peer = sentencepiece_file(
        tmp_path / "v.gguf", "llama", model_type="bpe", vocab_size=400, byte_fallback=True,
        remove_extra_whitespaces=False, normalization_rule_name="identity",
    )  # fmt: skip
    for text in [*SENTENCES, "😀 unknown ½", "tab\tnew\nline"]:
        ids = ours.vocabulary.encode(text).ids
        assert ids == peer.encode(text), text
        assert ours.vocabulary.decode(ids) == peer.decode(ids) == text
    assert ours.vocabulary.encode("<s>").ids == [1]
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id) == (1, 2, None, 0)
    assert (ours.add_bos, ours.add_eos, ours.chat_template) == (True, False, None)


def test_a_t5_vocabulary_encodes_as_sentencepiece_does(tmp_path: Path) -> None:
    ours, peer = sentencepiece_file(
        tmp_path / "v.gguf", "t5", model_type="unigram", vocab_size=120, pad_id=0, eos_id=1, unk_id=2, bos_id=-1
    )
    for text in [*SENTENCES, "tab\tand space", "ｔｈｅ ﬁve", "<s> ½"]:
        ids = ours.vocabulary.encode(text).ids
        assert ids == peer.encode(text), text
        assert 2 in ids or ours.vocabulary.decode(ids) == peer.decode(ids)  # which shows what is unknown
    first = peer.get_piece_size()
    assert ours.vocabulary.encode("<extra_id_99><extra_id_0>").ids == [first, first + 99]
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id) == (None, 1, 0, 2)
    assert (ours.add_bos, ours.add_eos) == (False, True)


BYTES = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": ["a", "b", "ab", "<x>"],
    "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.token_type": [1, 1, 1, 3],
}  # fmt: skip


def byte_level(path: Path, **changes: Any) -> GgufVocabulary | None:
    metadata = BYTES | {f"tokenizer.{key.replace('__', '.')}": value for key, value in changes.items()}
    return read_vocabulary(GgufFile(write(path / "v.gguf", "llama", metadata, {})))


def test_what_a_file_says_of_special_tokens_is_kept(tmp_path: Path) -> None:
    ours = byte_level(
        tmp_path, ggml__bos_token_id=3, ggml__add_bos_token=True, chat_template="{{ x }}", ggml__eos_token_id=2
    )
    assert ours is not None
    assert ours.vocabulary.encode("ab<x>ab").ids == [2, 3, 2]
    assert (ours.bos_id, ours.eos_id, ours.add_bos, ours.add_eos) == (3, 2, True, False)
    assert ours.chat_template == "{{ x }}"


def test_llama_3_begins_every_text_with_a_token(tmp_path: Path) -> None:
    ours = byte_level(tmp_path, ggml__pre="llama-bpe")
    assert ours is not None
    assert ours.add_bos


def test_a_file_may_have_no_vocabulary(tmp_path: Path) -> None:
    assert byte_level(tmp_path, ggml__model="no_vocab") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ggml__model": "rwkv"}, "'rwkv' vocabulary: expected gpt2, llama, t5"),
        ({"ggml__model": [1]}, r"'\[1\]' vocabulary"),
        ({"ggml__pre": "viking"}, "pre-tokenizer 'viking': expected one of default, gpt-2, .*smollm"),
        ({"ggml__tokens": ["a", "a", "ab", "<x>"]}, "a token that is listed twice"),
        ({"ggml__tokens": ["a", "b", "ab", "x" * 2000]}, "a token of 2000 characters"),
        ({"ggml__tokens": 3}, "no list tokens"),
        ({"ggml__token_type": [1, 1]}, "4 tokens, but 2 of token_type"),
        ({"ggml__merges": ["a c"]}, "broken vocabulary: .*out of vocabulary"),
        ({"ggml__merges": ["ab"]}, "broken vocabulary"),
        ({"ggml__eos_token_id": 4}, "no token 4, its eos token"),
        ({"ggml__add_bos_token": "yes"}, "add_bos_token that is no bool"),
        ({"chat_template": 3}, "chat_template that is no str"),
        ({"ggml__model": "llama"}, "no list scores"),
        ({"ggml__model": "llama", "ggml__scores": [1.0, float("nan"), 0.5, 0.5]}, "a score that is no number"),
        ({"ggml__model": "t5", "ggml__scores": [1.0] * 4, "ggml__precompiled_charsmap": [1, 2]}, "charsmap"),
    ],
)
def test_a_broken_vocabulary_is_one_sentence(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        byte_level(tmp_path, **changes)
    assert "v.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)
