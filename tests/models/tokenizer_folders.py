"""Small tokenizers in the file layouts of each family, trained on a few lines: what tests load and compare."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer as Vocabulary
from tokenizers import decoders, models, pre_tokenizers, trainers

from models.tokenizer import Tokenizer, train_vocabulary
from models.vocabularies.language_codes import M2M100, NLLB

LINES = [
    "The quick brown fox jumps over the lazy dog.", "It didn't matter, he said; we're here, aren't we?",
    "Hello world! How are you today? I'm fine.", "Le cœur déçu mais l'âme plutôt naïve, café crème.",
    "안녕하세요, 세계! 오늘 날씨가 좋네요.", "나는 학교에 갑니다. 그는 집에 있습니다.",
    "Zwölf Boxkämpfer jagen Viktor quer über",
    "den großen Sylter Deich 1234567890", "Translate English to French: the house is wonderful.", "a b c d e f g h",
    "😀 smile 🎉 party 👍🏽 ok", "One two three four five six seven eight nine ten", "2024-01-31 12:59 (3.14%) [x] {y}",
]  # fmt: skip
# Texts that tokenizers disagree about: spaces, newlines, characters beyond the vocabulary, special tokens.
TEXTS = [
    "", " ", "   ", "Hello world!", " Hello", "Hello ", "  two  spaces  ", "line one\nline two\n\n", "\ttab",
    "안녕하세요 세계", "😀🎉 emoji 👩‍👩‍👧", "한글과English섞임", "漢字 और हिन्दी ꙮ", "café naïve cœur",
    "don't we're 's . , !",
    "a</s>b", "x </s> y", "<pad> <unk>", "<s>start", "a <mask> b", "<mask_1>c <extra_id_0> d",
    "▁ ▁x", "１２３ ﬁne", "\u00a0nbsp\u2003em", "Hello world! " * 160,
]  # fmt: skip


@functools.cache
def spm_bytes(model_type: str = "unigram", size: int = 220, **options: Any) -> bytes:
    """A sentencepiece model of a family's making: ``options`` are the trainer's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 4), model_writer=model, model_type=model_type, vocab_size=size,
        hard_vocab_limit=False, character_coverage=0.99, minloglevel=9, num_threads=1, **options,
    )  # fmt: skip
    return model.getvalue()


def write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def t5(folder: Path, **options: Any) -> None:
    options = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, **options}
    (folder / "spiece.model").write_bytes(spm_bytes(**options))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "extra_ids": 100})
    write_json(folder / "config.json", {"model_type": "t5"})


def mbart(folder: Path, name: str = "MBartTokenizer", **values: Any) -> None:
    (folder / "sentencepiece.bpe.model").write_bytes(spm_bytes(normalization_rule_name="identity"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": name, **values})
    write_json(folder / "config.json", {"model_type": "mbart"})


def nllb(folder: Path, **values: Any) -> None:
    (folder / "sentencepiece.bpe.model").write_bytes(spm_bytes("bpe", 300))
    # Files in circulation state the ids; without them transformers 5 numbers <mask> before the languages, not after.
    first = len(spm_pieces(spm_bytes("bpe", 300))) + 1
    added = {first + index: _added(name) for index, name in enumerate([*NLLB, "<mask>"])}
    added |= {index: _added(name) for index, name in enumerate(["<s>", "<pad>", "</s>", "<unk>"])}
    config = {"tokenizer_class": "NllbTokenizer", "additional_special_tokens": NLLB, "mask_token": "<mask>",
              "added_tokens_decoder": added, **values}  # fmt: skip
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "config.json", {"model_type": "m2m_100"})


def llama(folder: Path, **values: Any) -> None:
    options = {"byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": True,
               "remove_extra_whitespaces": False, "split_digits": True}  # fmt: skip
    (folder / "tokenizer.model").write_bytes(spm_bytes("bpe", 500, **options))
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, **values}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "config.json", {"model_type": "llama"})


def pegasus(folder: Path) -> None:
    options = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    (folder / "spiece.model").write_bytes(spm_bytes(**options))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PegasusTokenizer"})


def _added(name: str) -> dict[str, Any]:
    flags = {"lstrip": name == "<mask>", "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {"content": name, **flags}


def spm_pieces(model: bytes) -> list[str]:
    spm = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [spm.id_to_piece(index) for index in range(spm.get_piece_size())]


def spm_vocab(model: bytes, first: list[str], last: list[str] | None = None) -> dict[str, int]:
    """A vocab.json of another order than the model's, as Marian and M2M-100 have."""
    pieces = spm_pieces(model)[::-1]
    names = first + [piece for piece in pieces if piece not in (*first, *(last or []))] + (last or [])
    return {name: index for index, name in enumerate(dict.fromkeys(names))}


def marian(folder: Path, separate: bool = False) -> None:
    source, target = spm_bytes(), spm_bytes("unigram", 180)
    (folder / "source.spm").write_bytes(source)
    (folder / "target.spm").write_bytes(target)
    first = ["</s>", "<unk>", ">>fra<<", ">>kor<<"]
    vocab = spm_vocab(source, first, ["<pad>"])
    if separate:
        vocab = spm_vocab(source, ["</s>", "<unk>", "<pad>"])
        write_json(folder / "target_vocab.json", spm_vocab(target, ["</s>", "<unk>", "<pad>"]))
    else:
        others = [piece for piece in spm_vocab(target, first) if piece not in vocab]
        vocab = {name: index for index, name in enumerate([*list(vocab)[:-1], *others, "<pad>"])}
    write_json(folder / "vocab.json", vocab)
    config = {"tokenizer_class": "MarianTokenizer", "source_lang": "en", "target_lang": "fr"}
    write_json(folder / "tokenizer_config.json", {**config, "separate_vocabs": separate})
    write_json(folder / "config.json", {"model_type": "marian"})


def m2m100(folder: Path) -> None:
    model = spm_bytes("bpe", 300)
    (folder / "sentencepiece.bpe.model").write_bytes(model)
    write_json(folder / "vocab.json", spm_vocab(model, ["<s>", "<pad>", "</s>", "<unk>"]))
    write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "M2M100Tokenizer", "src_lang": "fr", "tgt_lang": "ko"}
    )
    write_json(folder / "special_tokens_map.json", {"additional_special_tokens": [f"__{code}__" for code in M2M100]})
    write_json(folder / "config.json", {"model_type": "m2m_100"})


@functools.cache
def byte_level(special: tuple[str, ...] = ("<|endoftext|>",)) -> str:
    """A byte-level BPE tokenizer.json."""
    vocabulary = Vocabulary(models.BPE())
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    vocabulary.train_from_iterator(LINES * 4, trainer)
    return str(vocabulary.to_str())


def bpe_files(folder: Path, special: tuple[str, ...]) -> None:
    model = json.loads(byte_level(special))["model"]
    write_json(folder / "vocab.json", model["vocab"])
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def gpt2(folder: Path) -> None:
    bpe_files(folder, ("<|endoftext|>",))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    write_json(folder / "config.json", {"model_type": "gpt2"})


def bart(folder: Path) -> None:
    bpe_files(folder, ("<s>", "<pad>", "</s>", "<unk>", "<mask>"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BartTokenizer"})
    write_json(folder / "config.json", {"model_type": "bart"})


def gpt2_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(byte_level(), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    write_json(folder / "tokenizer_config.json", {**config, "additional_special_tokens": ["<|im_start|>"]})


def byt5(folder: Path) -> None:
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer"})
    write_json(folder / "config.json", {"model_type": "t5"})


FAMILIES = {
    "t5": t5, "mbart": mbart, "nllb": nllb, "llama": llama, "marian": marian, "m2m100": m2m100, "gpt2": gpt2,
    "bart": bart, "gpt2_json": gpt2_json, "byt5": byt5, "pegasus": pegasus,
    "mbart50": functools.partial(mbart, name="MBart50Tokenizer"),
    "nllb_legacy": functools.partial(nllb, legacy_behaviour=True),
    "llama_legacy": functools.partial(llama, legacy=True, add_eos_token=True, add_bos_token=False),
    "marian_separate": functools.partial(marian, separate=True),
    "mt5": functools.partial(t5, byte_fallback=True, size=500),
}  # fmt: skip


OUR_OWN = ("char", "word", "bpe")
KINDS = (*OUR_OWN, *FAMILIES)


def tokenizer_of(kind: str, folder: Path) -> Tokenizer:
    """One of our own vocabularies, or a family's, whose files are written into the folder."""
    if kind in OUR_OWN:
        return Tokenizer(train_vocabulary(kind, LINES, 400))  # type: ignore[arg-type]
    FAMILIES[kind](folder)
    loaded = Tokenizer.load(folder)
    assert loaded is not None
    return loaded
