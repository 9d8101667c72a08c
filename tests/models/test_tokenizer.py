from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Vocabulary

from models import ConfigError
from models.tokenizer import SpecialTokens, TextStream, Tokenizer, read_vocabulary, train_vocabulary

KOREAN = "안녕하세요, 세계! 😀 café"


def test_special_tokens_have_the_first_ids() -> None:
    for kind in ("char", "word", "bpe"):
        vocabulary = train_vocabulary(kind, [KOREAN], 300)  # type: ignore[arg-type]
        assert [vocabulary.token_to_id(name) for name in ("<pad>", "<bos>", "<eos>", "<unk>")] == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_korean_and_emoji_survive_the_way_there_and_back(kind: str) -> None:
    tokenizer = Tokenizer(train_vocabulary(kind, [KOREAN], 300))  # type: ignore[arg-type]
    assert tokenizer.decode(tokenizer.encode(KOREAN)) == KOREAN


def test_characters_keep_newlines_and_spaces() -> None:
    text = " a\n\n b\t"
    tokenizer = Tokenizer(train_vocabulary("char", [text], 0))
    assert len(tokenizer.encode(text)) == len(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_an_unknown_character_is_unk() -> None:
    assert Tokenizer(train_vocabulary("char", ["ab"], 0)).encode("axb") == [4, 3, 5]


def test_words_come_back_with_single_spaces() -> None:
    tokenizer = Tokenizer(train_vocabulary("word", ["AH B K"], 0))
    assert tokenizer.decode(tokenizer.encode("K  AH B")) == "K AH B"


@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_a_stream_gives_whole_characters_that_add_up(kind: str) -> None:
    tokenizer = Tokenizer(train_vocabulary(kind, ["hello there", KOREAN] if kind != "bpe" else ["hello"], 261))  # type: ignore[arg-type]
    token_ids = tokenizer.encode(KOREAN)
    stream = TextStream(tokenizer)
    pieces = [stream.push([token_id]) for token_id in token_ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.push([], final=True) == tokenizer.decode(token_ids)


def test_an_unfinished_character_comes_out_at_the_end() -> None:
    tokenizer = Tokenizer(train_vocabulary("bpe", ["a"], 260))
    stream = TextStream(tokenizer)
    assert stream.push(tokenizer.encode("안")[:2]) == ""
    assert "\ufffd" in stream.push([], final=True)


def test_source_and_target_vocabularies_are_saved_apart(tmp_path: Path) -> None:
    tokenizer = Tokenizer(train_vocabulary("char", ["word"], 0), train_vocabulary("word", ["W ER D"], 0))
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded is not None
    assert loaded.vocab_size == 8
    assert loaded.target_vocab_size == 7
    assert loaded.decode(loaded.encode_target("ER W")) == "ER W"


def test_a_vocabulary_does_not_depend_on_the_order_of_the_data() -> None:
    first, second = train_vocabulary("char", ["ab", "c"], 0), train_vocabulary("char", ["c", "ba"], 0)
    assert first.get_vocab() == second.get_vocab()


def test_what_cannot_be_a_vocabulary_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose one of char, word, bpe"):
        train_vocabulary("letters", ["a"], 0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least 260"):
        train_vocabulary("bpe", ["a"], 100)
    with pytest.raises(ConfigError, match="cannot read the tokenizer"):
        read_vocabulary(tmp_path / "none.json")


def test_text_that_says_eos_is_only_text() -> None:
    for kind in ("char", "bpe"):
        tokenizer = Tokenizer(train_vocabulary(kind, ["a<eos>b<pad>"], 270))  # type: ignore[arg-type]
        assert not set(tokenizer.encode("a<eos>b<pad>")) & {0, 1, 2, 3}


def test_special_tokens_of_others_stay_text_once_saved(tmp_path: Path) -> None:
    vocabulary = Vocabulary(models.WordLevel({"<s>": 0, "s": 1, "?": 2}, unk_token="?"))
    vocabulary.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    vocabulary.add_special_tokens(["<s>"])
    vocabulary.encode_special_tokens = True
    Tokenizer(vocabulary, special=SpecialTokens(bos="<s>", unk="?")).save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded is not None
    assert loaded.encode("<s>") == [2, 1, 2]


def test_a_tokenizer_with_other_special_tokens_is_refused(tmp_path: Path) -> None:
    Vocabulary(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>")).save(str(tmp_path / "other.json"))
    with pytest.raises(ConfigError, match="<pad> as token 0"):
        read_vocabulary(tmp_path / "other.json")


def test_a_saved_truncation_does_not_cut_what_is_encoded(tmp_path: Path) -> None:
    vocabulary = train_vocabulary("char", ["abcdef"], 0)
    vocabulary.enable_truncation(2)
    vocabulary.save(str(tmp_path / "cut.json"))
    assert len(Tokenizer(read_vocabulary(tmp_path / "cut.json")).encode("abcdef")) == 6
