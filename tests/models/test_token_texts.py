"""The bytes of tokens add up to what decoding gives, for every kind of tokenizer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Vocabulary

from models.gguf.file import GgufFile
from models.gguf.vocabulary import read_vocabulary
from models.tokenizer import Tokenizer, train_vocabulary
from tests.models.gguf_files import smollm2
from tests.models.tokenizer_folders import FAMILIES, KINDS, LINES, tokenizer_of


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_of(request.param, tmp_path_factory.mktemp(request.param))


def assert_adds_up(tokenizer: Tokenizer, token_ids: list[int]) -> None:
    texts = tokenizer.token_texts()
    spelled = b"".join(texts.inner[i] if n else texts.first[i] for n, i in enumerate(token_ids))
    errors = "ignore" if type(tokenizer.target).__name__ == "ByteVocabulary" else "replace"
    text, decoded = spelled.decode(errors=errors), tokenizer.decode_as_is(token_ids)
    if type(tokenizer.target).__name__ == "SpmVocabulary":
        text = text.strip()
    if "\ufffd" not in decoded:  # how many of them bytes of no character become differs
        assert text == decoded


def test_any_tokens_add_up_to_their_text(tokenizer: Tokenizer) -> None:
    texts = tokenizer.token_texts()
    with_text = [i for i, text in enumerate(texts.inner) if text]
    generator = random.Random(0)
    for _ in range(30):
        assert_adds_up(tokenizer, [generator.choice(with_text) for _ in range(generator.randrange(1, 12))])
    for line in LINES:
        assert_adds_up(tokenizer, tokenizer.encode_target(line))


def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    texts = tokenizer.token_texts()
    assert len(texts.inner) == len(texts.first) >= tokenizer.target_vocab_size
    for token_id in filter(None, (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id)):
        assert texts.inner[token_id] == texts.first[token_id] == b""


def test_half_a_character_keeps_its_bytes(tmp_path: Path) -> None:
    FAMILIES["llama"](tmp_path)
    llama = Tokenizer.load(tmp_path)
    assert llama is not None
    for tokenizer, name in ((llama, "<0xEC>"), (Tokenizer(train_vocabulary("bpe", ["a"], 260)), "ì")):
        token_id = tokenizer.target.token_to_id(name)
        assert tokenizer.token_texts().inner[token_id] == tokenizer.token_texts().first[token_id] == b"\xec"


def test_a_gguf_file_s_tokens_are_bytes() -> None:
    read = read_vocabulary(GgufFile(smollm2()))
    assert read is not None
    tokenizer = Tokenizer(read.vocabulary)
    assert_adds_up(tokenizer, tokenizer.encode_target('{"안녕": "café 😀"}'))


def test_added_tokens_and_other_decoders_are_read() -> None:
    vocabulary = Vocabulary(models.WordLevel({"un": 0, "##do": 1, "it": 2}, unk_token="un"))
    vocabulary.decoder = decoders.WordPiece(cleanup=False)
    texts = Tokenizer(vocabulary).token_texts()
    assert (texts.inner, texts.first) == ([b" un", b"do", b" it"], [b"un", b"##do", b"it"])
    added = train_vocabulary("bpe", ["a"], 260)
    added.add_tokens([AddedToken("<안 b>"), AddedToken("<tool>")])
    texts = Tokenizer(added).token_texts()
    assert texts.inner[-2:] == ["<안 b>".encode(), b"<tool>"]
