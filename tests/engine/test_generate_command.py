"""``python -m engine.generate`` as a user meets it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from engine.generate import main


def run(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse's own way out
        return int(stop.code or 0)


@pytest.mark.parametrize("flag", ["--prompt", "--source"])
def test_a_prompt_prints_its_text(flag: str, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", model_folder, flag, "abc", "--max-tokens", 5) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_max_length_counts_the_prompt(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", model_folder, "--prompt", "abc", "--max-length", 6, "--logprobs", 0) == 0
    entry = json.loads(capsys.readouterr().out)
    assert len(entry["token_ids"]) <= 6
    assert run("--model", model_folder, "--prompt", "abc", "--max-length", 1) == 2


def test_a_file_of_prompts_becomes_a_file_of_outputs(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "abc"}\n{"source": "세계"}\n')
    (tmp_path / "in.txt").write_text("abc\n\n세계\n")
    for name in ("in.jsonl", "in.txt"):
        out = tmp_path / f"{name}.out.jsonl"
        assert run("--model", model_folder, "--input", tmp_path / name, "--output", out, "--max-tokens", 4) == 0
        entries = [json.loads(line) for line in out.read_text().splitlines()]
        assert [entry["prompt"] for entry in entries] == ["abc", "세계"]
        assert all(entry["outputs"][0]["token_ids"] for entry in entries)


def test_interactive_answers_line_by_line(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\n\nxyz\n"))
    assert run("--model", model_folder, "--interactive", "--max-tokens", 3) == 0
    assert capsys.readouterr().out.count("\n") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere", "--prompt", "a"], "no folder"),
        (["--model", "MODEL", "--prompt", "a", "--temperature", "-1"], "temperature"),
        (["--model", "MODEL", "--input", "missing.txt", "--output", "o.jsonl"], "no input file"),
        (["--model", "MODEL", "--input", "EMPTY", "--output", "o.jsonl"], "is empty"),
        (["--model", "MODEL", "--input", "BROKEN", "--output", "o.jsonl"], "line 1"),
        (["--model", "MODEL", "--input", "EMPTY"], "go together"),
        (["--model", "MODEL", "--prompt", "a", "--device", "tpu"], "unknown device"),
        (["--model", "MODEL", "--prompt", "a", "--dtype", "int3"], "unknown dtype"),
        (["--model", "MODEL", "--prompt", "a", "--tempature", "1"], "unrecognized arguments"),
        (["--model", "MODEL"], "required"),
        (["--model", "MODEL", "--input", "GOOD", "--output", "FOLDER"], "is a folder"),
        (["--model", "MODEL", "--input", "GOOD", "--output", "GOOD"], "same file"),
        (["--model", "MODEL", "--input", "LONG", "--output", "o.jsonl"], "line 3: "),
        (["--model", "MODEL", "--input", "DEEP", "--output", "o.jsonl"], "line 2"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "broken.jsonl").write_text("{\n")
    (tmp_path / "good.txt").write_text("abc\n")
    (tmp_path / "long.txt").write_text("abc\n\n" + "a" * 100 + "\n")
    (tmp_path / "deep.jsonl").write_text("\n" + "[" * 100_000 + "\n")
    monkeypatch.chdir(tmp_path)
    extra = {"GOOD": tmp_path / "good.txt", "FOLDER": tmp_path, "LONG": tmp_path / "long.txt"}
    names = extra | {
        "DEEP": tmp_path / "deep.jsonl",
        "MODEL": model_folder,
        "EMPTY": tmp_path / "empty.txt",
        "BROKEN": tmp_path / "broken.jsonl",
    }
    assert run(*[names.get(argument, argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_beams_print_what_the_search_found(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", model_folder, "--beam-width", 3, "--n", 2, "--max-tokens", 5]
    assert run(*options, "--prompt", "abc") == 0
    assert capsys.readouterr().out.count("\n") == 2
    (tmp_path / "in.txt").write_text("abc\nxyz\n")
    assert run(*options, "--input", tmp_path / "in.txt", "--output", tmp_path / "out.jsonl") == 0
    entries = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [len(entry["outputs"]) for entry in entries] == [2, 2]
    assert entries[0]["outputs"][0]["score"] >= entries[0]["outputs"][1]["score"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beam-width", 0], "beam_width"),
        (["--beam-width", 2, "--n", 3], "num_return_sequences"),
        (["--beam-width", 2, "--temperature", 0.5], "--temperature belongs to sampling"),
        (["--beam-width", 2, "--stop", "a"], "--stop belongs to sampling"),
        (["--target-language", "fra_Latn"], "no languages"),
        (["--task", "summarization"], "task 'summarization'"),
        (["--chat"], "chat template"),
    ],
)
def test_what_the_model_or_the_search_cannot_do_is_one_line(
    arguments: list[object], message: str, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--model", model_folder, "--prompt", "abc", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_search_that_fails_says_so(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    for file in model_folder.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    everything = {"suppress_tokens": list(range(60)), "eos_token_id": 2, "decoder_start_token_id": 1}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(everything))
    options = ["--model", tmp_path / "model", "--beam-width", 2]
    assert run(*options, "--prompt", "a") == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "in.txt").write_text("abc\n")
    assert run(*options, "--input", tmp_path / "in.txt", "--output", tmp_path / "out.jsonl") == 0
    (failed,) = json.loads((tmp_path / "out.jsonl").read_text())["outputs"]
    assert failed["finish_reason"] == "error"
    assert failed["error"]
