"""Tasks and corpora, and the sentences for data that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from models import ConfigError
from train.data.corpora import DataSection, load_pairs
from train.data.dataset import PairData, TextData, load_data

KOREAN = [("안녕", "녕안"), ("세계", "계세"), ("하나", "나하"), ("둘", "둘")]


@pytest.mark.parametrize("task", ["reversal", "copy", "addition"])
def test_no_validation_example_occurs_in_training(task: str) -> None:
    data = DataSection(task=task, num_train_samples=2000, num_val_samples=200)  # type: ignore[arg-type]
    corpus = load_pairs(data, seed=0)
    assert (len(corpus.train), len(corpus.validation)) == (2000, 200)
    assert not {p.source for p in corpus.train} & {p.source for p in corpus.validation}


def test_the_toy_tasks_are_what_they_say() -> None:
    for task, rule in {
        "reversal": lambda s: s[::-1],
        "copy": lambda s: s,
        "addition": lambda s: str(sum(map(int, s.split("+")))),
    }.items():
        data = DataSection(task=task, num_train_samples=200, num_val_samples=20)  # type: ignore[arg-type]
        for source, (target,) in load_pairs(data, seed=1).train:
            assert rule(source) == target
            assert 1 <= len(source) <= 12


def test_the_dictionary_is_split_by_word() -> None:
    corpus = load_pairs(DataSection(task="g2p", num_val_samples=100), seed=0)
    assert len(corpus.train) + len(corpus.test) > 119_000
    assert len(corpus.test) == 12_604
    sides = [{pair.source for pair in part} for part in (corpus.train, corpus.validation, corpus.test)]
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    phones = {phone for pair in corpus.test for reference in pair.references for phone in reference.split()}
    assert len(phones) == 39


def test_a_byte_order_mark_is_no_character(tmp_path: Path) -> None:
    (tmp_path / "bom.tsv").write_bytes(b"\xef\xbb\xbfa\tb\nc\td\n")
    corpus = load_pairs(DataSection(task="pairs", file=str(tmp_path / "bom.tsv")), seed=0)
    assert {p.source for p in corpus.train + corpus.validation} == {"a", "c"}


def write_pairs(folder: Path, kind: str, pairs: list[tuple[str, str]]) -> DataSection:
    if kind == "files":
        (folder / "a").write_text("".join(f"{s}\n" for s, _ in pairs))
        (folder / "b").write_text("".join(f"{t}\n" for _, t in pairs))
        return DataSection(task="pairs", source_file=str(folder / "a"), target_file=str(folder / "b"))
    lines = {"tsv": "{}\t{}\n", "jsonl": '{{"source": "{}", "target": "{}"}}\n'}[kind]
    (folder / f"pairs.{kind}").write_text("".join(lines.format(*pair) for pair in pairs))
    return DataSection(task="pairs", file=str(folder / f"pairs.{kind}"))


@pytest.mark.parametrize("kind", ["files", "tsv", "jsonl"])
def test_pairs_are_read_from_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    corpus = load_pairs(write_pairs(tmp_path, kind, KOREAN), seed=0)
    everything = {(p.source, *p.references) for p in corpus.train + corpus.validation}
    assert everything == set(KOREAN)
    assert len(corpus.validation) == 1


def test_a_source_with_two_targets_falls_on_one_side(tmp_path: Path) -> None:
    pairs = [(f"s{i}", t) for i in range(30) for t in ("x", "y")]
    corpus = load_pairs(write_pairs(tmp_path, "tsv", pairs), seed=0)
    assert not {p.source for p in corpus.train} & {p.source for p in corpus.validation}
    assert all(p.references == ("x", "y") for p in corpus.train)


def test_korean_pairs_become_token_ids_and_back(tmp_path: Path) -> None:
    data = load_data(write_pairs(tmp_path, "tsv", KOREAN), seed=0, max_seqlen=16)
    assert isinstance(data, PairData)
    assert {data.tokenizer.decode(example.target) for example in data.train} <= {t for _, t in KOREAN}


def test_text_is_cut_into_windows_from_an_offset_of_the_epochs_own(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("abcdefghij" * 50)
    data = load_data(DataSection(task="text", file=str(tmp_path / "t.txt"), context=16), seed=0, max_seqlen=64)
    assert isinstance(data, TextData)
    firsts = set()
    for epoch in range(8):
        windows, plan = data.epoch(0, epoch, 4, None)
        assert sum(len(batch) for batch in plan) == len(windows)
        assert all(len(window.target) == 17 for window in windows)
        firsts.add(int(windows[0].target[0]))
    assert len(firsts) > 1


BAD_DATA: list[tuple[dict[str, object], str]] = [
    ({"task": "pairs"}, "needs data.file"),
    ({"task": "text"}, "needs data.file"),
    ({"task": "pairs", "file": "none.tsv"}, "no data file"),
    ({"task": "pairs", "file": "empty.tsv"}, "at least 2"),
    ({"task": "pairs", "file": "columns.tsv"}, "line 2.*found 3 columns"),
    ({"task": "pairs", "file": "broken.jsonl"}, "line 1.*source and target"),
    ({"task": "pairs", "file": "numbers.jsonl"}, "must be strings"),
    ({"task": "pairs", "source_file": "columns.tsv", "target_file": "empty.tsv"}, "lines"),
    ({"task": "text", "file": "empty.tsv"}, "too short"),
    ({"task": "text", "file": "short.txt"}, "too short"),
    ({"task": "text", "file": "latin.txt"}, "UTF-8"),
    ({"task": "pairs", "file": "good.tsv", "tokenizer": "nothing.json"}, "no tokenizer"),
    ({"task": "pairs", "file": "long.tsv"}, "data set is empty"),
]


@pytest.mark.parametrize(("section", "message"), BAD_DATA)
def test_bad_data_is_one_sentence(section: dict[str, object], message: str, tmp_path: Path) -> None:
    for name, content in {
        "empty.tsv": b"", "columns.tsv": b"a\tb\na\tb\tc\n", "broken.jsonl": b"{\n", "numbers.jsonl":
        b'{"source": 1, "target": 2}\n', "short.txt": b"abc", "latin.txt": b"caf\xe9" * 100,
        "good.tsv": b"a\tb\nc\td\n",
        "long.tsv": b"a" * 99 + b"\tb\n" + b"c" * 99 + b"\td\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    files = {k: str(tmp_path / str(v)) if k.endswith("file") else v for k, v in section.items()}
    with pytest.raises(ConfigError, match=message) as caught:
        load_data(DataSection(**files), seed=0, max_seqlen=64)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
