"""Tokenizers of Hugging Face folders against transformers, which reads the same files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer as Vocabulary
from tokenizers import models as token_models

from models import ConfigError
from models.tokenizer import SpecialTokens, Tokenizer
from models.vocabularies.builders import byte_level_bpe, sentencepiece_bpe
from tests.models.tokenizer_folders import FAMILIES, LINES, TEXTS, byte_level, m2m100, marian, mbart, nllb, pegasus, t5

# transformers 5 leaves byte fallback out of T5's vocabulary, which sentencepiece itself does not.
COMPARED = sorted(set(FAMILIES) - {"mt5"})


def load(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    return tokenizer


def peer(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder)


def assert_same(ours: Tokenizer, theirs: Any) -> None:
    for text in [*TEXTS, *LINES]:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids, text
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False).input_ids, text
        assert ours.encode_target(text) == theirs(text_target=text, add_special_tokens=False).input_ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids), text
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)


@pytest.mark.parametrize("family", COMPARED)
def test_text_is_encoded_and_decoded_as_transformers_does(family: str, tmp_path: Path) -> None:
    FAMILIES[family](tmp_path)
    assert_same(load(tmp_path), peer(tmp_path))


@pytest.mark.parametrize("family", ["t5", "mbart", "mbart50", "nllb", "llama", "bart", "gpt2_json", "pegasus"])
def test_what_transformers_writes_is_read(family: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    FAMILIES[family](first)
    peer(first).save_pretrained(second)
    if (first / "config.json").exists():
        (second / "config.json").write_bytes((first / "config.json").read_bytes())
    assert (second / "tokenizer.json").exists()
    assert_same(load(second), peer(second))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_saved_tokenizer_is_the_same(family: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    FAMILIES[family](first)
    tokenizer = load(first)
    tokenizer.save(second)
    again = load(second)
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text) == tokenizer.encode_batch([text])[0]
        assert again.encode_target(text) == tokenizer.encode_target(text) == again.encode_target_batch([text])[0]


def test_what_the_models_config_told_is_saved_too(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    mbart(first)
    (first / "tokenizer_config.json").unlink()
    tokenizer = load(first)
    tokenizer.set_languages(source="ko_KR", target="fr_XX")
    tokenizer.save(second)
    again = load(second)
    assert (again.source_language, again.target_language) == ("ko_KR", "fr_XX")
    assert again.encode("Hello") == tokenizer.encode("Hello")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_ids_beyond_the_vocabulary_have_no_text(family: str, tmp_path: Path) -> None:
    FAMILIES[family](tmp_path)
    tokenizer = load(tmp_path)
    ids = tokenizer.encode_target("Hello")
    assert tokenizer.decode([*ids, tokenizer.target_vocab_size + 7, 10**9]) == tokenizer.decode(ids)


def test_byte_fallback_is_sentencepieces_own(tmp_path: Path) -> None:
    FAMILIES["mt5"](tmp_path)
    tokenizer, spm = load(tmp_path), sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    for text in ["ꙮ", "한글과English섞임", "Hello 漢字", "😀🎉", "１２３ ﬁne"]:
        assert tokenizer.encode_target(text) == spm.encode(text)
        assert tokenizer.decode(spm.encode(text)) == spm.decode(spm.encode(text))


@pytest.mark.parametrize(("family", "file", "offset"), [
    ("t5", "spiece.model", 0), ("nllb", "sentencepiece.bpe.model", 1), ("pegasus", "spiece.model", 103),
])  # fmt: skip
def test_pieces_are_numbered_as_the_family_does(family: str, file: str, offset: int, tmp_path: Path) -> None:
    """Against sentencepiece itself, which normalises and splits; the family moves its ids."""
    FAMILIES[family](tmp_path)
    tokenizer, spm = load(tmp_path), sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / file))
    for text in LINES:
        assert tokenizer.encode_target(text) == [
            i + offset if i != spm.unk_id() or offset != 1 else 3 for i in spm.encode(text)
        ]


def test_mbart_normalises_characters_as_its_sentencepiece_model_says(tmp_path: Path) -> None:
    t5(tmp_path, pad_id=-1, bos_id=1, eos_id=2, unk_id=0)  # a model with a table of characters
    (tmp_path / "spiece.model").rename(tmp_path / "sentencepiece.bpe.model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "MBartTokenizer"}')
    tokenizer = load(tmp_path)
    spm = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sentencepiece.bpe.model"))
    assert tokenizer.encode_target("１２３ ａｂｃ") == [i + 1 for i in spm.encode("１２３ ａｂｃ")]


def test_the_special_tokens_of_pegasus(tmp_path: Path) -> None:
    pegasus(tmp_path)
    tokenizer = load(tmp_path)
    names = ["<pad>", "</s>", "<mask_1>", "<mask_2>", "<unk_2>", "<unk_102>", "<unk>"]
    assert [tokenizer.source.token_to_id(name) for name in names] == [0, 1, 2, 3, 4, 104, 105]


@pytest.mark.parametrize(("write", "source", "expected"), [
    (mbart, "ko_KR", ["</s>", "ko_KR"]), (nllb, "kor_Hang", ["kor_Hang", "</s>"]), (m2m100, "ko", ["__ko__", "</s>"]),
])  # fmt: skip
def test_the_source_language_is_what_encode_adds(write: Any, source: str, expected: list[str], tmp_path: Path) -> None:
    write(tmp_path)
    tokenizer, theirs = load(tmp_path), peer(tmp_path)
    tokenizer.set_languages(source=source, target=source)
    assert (tokenizer.source_language, tokenizer.target_language) == (source, source)
    theirs.src_lang = source
    ids = tokenizer.encode("Hello")
    assert ids == theirs("Hello").input_ids
    assert [tokenizer.source.id_to_token(i) for i in ids if i not in tokenizer.encode_target("Hello")] == expected
    assert tokenizer.language_id(source) == theirs.convert_tokens_to_ids(expected[expected[0] == "</s>"])
    with pytest.raises(ConfigError, match=r"no language 'xx': it knows \d+, such as"):
        tokenizer.set_languages(source="xx")
    with pytest.raises(ConfigError, match="no language 'xx'"):
        tokenizer.language_id("xx")


def test_languages_come_from_the_folder(tmp_path: Path) -> None:
    mbart(tmp_path, "MBart50Tokenizer", src_lang="fr_XX", tgt_lang="ko_KR")
    tokenizer = load(tmp_path)
    assert (tokenizer.source_language, tokenizer.target_language) == ("fr_XX", "ko_KR")
    assert tokenizer.encode("Hello") == peer(tmp_path)("Hello").input_ids
    with pytest.raises(ConfigError, match="no languages to choose"):
        Tokenizer(Vocabulary.from_str(byte_level())).set_languages("en")


def test_marian_has_its_target_language_in_the_text(tmp_path: Path) -> None:
    marian(tmp_path)
    tokenizer = load(tmp_path)
    assert tokenizer.encode(">>fra<< Hello")[0] == tokenizer.source.token_to_id(">>fra<<")
    for text in [">>fra<< Hello", ">>xxx<< Hello", ">>fra<<", "a >>fra<< b", ">>fra", "</s>>>kor<< b"]:
        assert tokenizer.encode(text) == peer(tmp_path)(text).input_ids


def test_special_and_added_tokens_are_recognised_in_text(tmp_path: Path) -> None:
    FAMILIES["gpt2_json"](tmp_path)
    tokenizer = load(tmp_path)
    ids = tokenizer.encode("<|im_start|>user<|endoftext|>")
    assert (ids[0], ids[-1]) == (tokenizer.source.token_to_id("<|im_start|>"), tokenizer.eos_id)
    assert tokenizer.decode(ids) == "user"


@pytest.mark.parametrize("family", ["t5", "gpt2_json", "marian"])
def test_spaces_are_cleaned_up_where_the_file_says(family: str, tmp_path: Path) -> None:
    FAMILIES[family](tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "clean_up_tokenization_spaces": True}))
    assert_same(load(tmp_path), peer(tmp_path))


def test_a_tokenizer_from_parts_is_that_of_the_file(tmp_path: Path) -> None:
    FAMILIES["gpt2"](tmp_path)
    model = json.loads(byte_level())["model"]
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    vocabulary = byte_level_bpe(model["vocab"], merges)  # type: ignore[arg-type]
    vocabulary.add_special_tokens(["<|endoftext|>"])
    special = SpecialTokens(bos="<|endoftext|>", eos="<|endoftext|>", others={"mask_token": "~"})
    tokenizer = Tokenizer(vocabulary, special=special, chat_template="{{ bos_token }}{{ messages[0].content }}")
    assert all(tokenizer.encode(text) == load(tmp_path).encode(text) for text in TEXTS)
    assert tokenizer.eos_id == 0
    saved = tmp_path / "saved"
    saved.mkdir()
    tokenizer.save(saved)
    again = load(saved)
    assert again.special == special.__class__("<|endoftext|>", "<|endoftext|>", others={"mask_token": "~"})
    assert again.apply_chat_template([{"role": "user", "content": "a"}]) == "<|endoftext|>a"
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_merges_follow_the_order_of_the_pieces() -> None:
    from models.vocabularies.builders import ranked_merges

    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4}
    assert ranked_merges(vocab) == [("a", "b"), ("b", "c")]
    assert sentencepiece_bpe(vocab, prepend="never").encode("abc").tokens == ["ab", "c"]
    later = {"a": 0, "b": 1, "c": 2, "bc": 3, "ab": 4}
    assert sentencepiece_bpe(later, prepend="never").encode("abc").tokens == ["a", "bc"]


def test_a_folder_without_tokenizer_files_has_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert Tokenizer.load(tmp_path) is None


def write(name: str, content: str | bytes) -> Any:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


@pytest.mark.parametrize(("family", "damage", "sentence"), [
    ("gpt2_json", write("tokenizer.json", "{"), "cannot read the tokenizer"),
    ("gpt2_json", write("tokenizer_config.json", "{"), "not valid JSON"),
    ("gpt2_json", write("tokenizer_config.json", "[1]"), "JSON object"),
    ("gpt2_json", write("tokenizer_config.json", '{"added_tokens_decoder": 3}'), "describes no tokenizer"),
    ("gpt2_json", write("tokenizer_config.json", '{"chat_template": 3}'), "chat template"),
    ("t5", write("spiece.model", b"\xff" * 40), "not a sentencepiece model"),
    ("t5", write("spiece.model", b""), "not a sentencepiece model"),
    ("t5", write("tokenizer_config.json", '{"tokenizer_class": "XLNetTokenizer"}'), "XLNetTokenizer"),
    ("t5", write("tokenizer_config.json", '{"extra_ids": "many"}'), "extra_ids"),
    ("marian", write("source.spm", b"no model"), "not a sentencepiece model"),
    ("marian", write("vocab.json", "{}"), "does not map tokens"),
    ("marian", write("vocab.json", '{"a": 0}'), "lacks the unk_token"),
    ("gpt2", write("merges.txt", "a b c\n"), "not two tokens"),
    ("gpt2", write("merges.txt", "xx yy\n"), "does not fit"),
    ("gpt2", write("vocab.json", '{"a": "b"}'), "does not map tokens"),
    ("mbart", write("tokenizer_config.json", '{"tokenizer_class": "MBartTokenizer", "src_lang": "xx"}'), "language"),
    ("byt5", write("tokenizer_config.json", '{"tokenizer_class": "BertTokenizer"}'), "no vocabulary that can be read"),
])  # fmt: skip
def test_broken_files_are_one_sentence(family: str, damage: Any, sentence: str, tmp_path: Path) -> None:
    FAMILIES[family](tmp_path)
    damage(tmp_path)
    with pytest.raises(ConfigError, match=sentence) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_broken_table_of_characters_is_one_sentence(tmp_path: Path) -> None:
    t5(tmp_path)
    model = tmp_path / "spiece.model"
    data = model.read_bytes()
    model.write_bytes(data[:-50000] + b"\xff" * 1000 + data[-49000:])
    with pytest.raises(ConfigError, match="is broken"):
        Tokenizer.load(tmp_path)


def test_a_vocabulary_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[UNK]\na\n")
    with pytest.raises(ConfigError, match=r"vocab\.txt but no vocabulary"):
        Tokenizer.load(tmp_path)


def test_a_foreign_vocabulary_of_words(tmp_path: Path) -> None:
    vocabulary = Vocabulary(token_models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    vocabulary.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load(tmp_path)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (None, None, None)
    assert tokenizer.encode("a") == [0]
