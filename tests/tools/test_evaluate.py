"""``python -m tools.evaluate``: its figures are those of the model, counted another way."""

from __future__ import annotations

import json
import math
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from engine import LLM, SamplingParams
from models.checkpoint import save
from models.tokenizer import Tokenizer
from tests.conftest import tiny_model
from tools.evaluate import main
from tools.quality import windows

TEXT = "a string of letters and 42, " * 5
PAIRS = [("abc", "cba"), ("hello world", "dlrow olleh"), ("0123", "3210"), ("abc", "cab")]


def figures(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    assert main([str(argument) for argument in arguments]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    results = json.loads(last)["results"]
    for result in results:
        assert any(result["quantization"] in line for line in shown)
    return results


@pytest.fixture
def folders(tmp_path: Path, tokenizer: Tokenizer) -> dict[str, Path]:
    for name in ("decoder_only", "encoder_decoder"):
        (tmp_path / name).mkdir()
        save(tmp_path / name, tiny_model(name, vocab_size=tokenizer.vocab_size, tie_embeddings=False), tokenizer)
    return {name: tmp_path / name for name in ("decoder_only", "encoder_decoder")}


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 12, 13, 50])
@pytest.mark.parametrize("context", [2, 3, 8])
def test_windows_predict_every_token_once(length: int, context: int) -> None:
    ids = list(range(length))
    found = list(windows(ids, context))
    assert list(chain.from_iterable(target for _, target in found)) == ids[1:]
    for prompt, target in found:
        assert prompt + target == ids[prompt[0] : prompt[0] + len(prompt) + len(target)]
        assert target and len(prompt + target) <= context
    assert all(len(prompt) == context // 2 for prompt, _ in found[1:])


def nats(model: Any, prompt: list[int], target: list[int]) -> float:
    """The negative log-probability of a target, from the whole model's logits."""
    with torch.inference_mode():
        logprobs = model(torch.tensor([prompt + target])).log_softmax(-1)[0, len(prompt) - 1 :]
    return -sum(float(logprobs[i, token]) for i, token in enumerate(target))


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_the_perplexity_of_a_text(
    quantization: Any, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    model, tokenizer = models.load(folders["decoder_only"], quantization=quantization)
    assert tokenizer is not None
    parts = list(windows(tokenizer.encode(TEXT)[:101], 20))
    expected = math.exp(sum(nats(model, *part) for part in parts) / 100)
    (result,) = figures(
        capsys, "--model", folders["decoder_only"], "--data", tmp_path / "text.txt", "--context", 20, "--limit", 101,
        "--backend", "torch", "--quantization", quantization or "none",
    )  # fmt: skip
    assert result["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_documents_are_measured_apart(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["one document", "and another one"]
    (tmp_path / "texts.jsonl").write_text("\n\n".join(json.dumps({"text": text}) for text in texts))
    model, tokenizer = models.load(folders["decoder_only"])
    assert tokenizer is not None
    ids = [tokenizer.encode(text) for text in texts]
    expected = sum(nats(model, each[:1], each[1:]) for each in ids) / sum(len(each) - 1 for each in ids)
    (result,) = figures(capsys, "--model", folders["decoder_only"], "--data", tmp_path / "texts.jsonl")
    assert result["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


@pytest.mark.parametrize("kind", ["tsv", "jsonl"])
@pytest.mark.parametrize("architecture", ["decoder_only", "encoder_decoder"])
def test_the_perplexity_of_pairs(
    architecture: str, kind: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(tmp_path / f"pairs.{kind}", PAIRS)
    scored = LLM(folders[architecture]).score([s for s, _ in PAIRS], [t for _, t in PAIRS])
    expected = math.exp(-sum(each.total for each in scored) / sum(len(each.token_ids) for each in scored))
    (result,) = figures(capsys, "--model", folders[architecture], "--data", tmp_path / f"pairs.{kind}")
    assert result["perplexity"] == pytest.approx(expected, rel=1e-5)


def write_pairs(path: Path, pairs: list[tuple[str, str]]) -> None:
    if path.suffix == ".tsv":
        path.write_text("".join(f"{source}\t{target}\n" for source, target in pairs))
    else:
        path.write_text("".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in pairs))


@pytest.mark.parametrize("architecture", ["decoder_only", "encoder_decoder"])
def test_outputs_are_compared_with_references(
    architecture: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = ["abc", "hello world", "0123", "zyx"]
    params = SamplingParams(temperature=0.0, max_tokens=12)
    outputs = [each.outputs[0].text.strip() for each in LLM(folders[architecture]).generate(sources, params)]
    assert all(outputs)
    # One is right, one by its second reference, one has a token more than its reference, one less.
    pairs = [*zip(sources, [outputs[0], "x", f"{outputs[2]} y", outputs[3]], strict=True), (sources[1], outputs[1])]
    words = [len(text.split()) for text in outputs]
    write_pairs(tmp_path / "pairs.tsv", pairs)
    results = figures(
        capsys, "--model", folders[architecture], "--data", tmp_path / "pairs.tsv", "--metrics", "wer,exact_match",
        "--max-tokens", 12, "--quantization", "none,int8",
    )  # fmt: skip
    assert [result["quantization"] for result in results] == ["none", "int8"]
    assert list(results[0]) == ["quantization", "wer", "exact_match"]
    assert results[0]["exact_match"] == 0.75
    assert results[0]["wer"] == pytest.approx(1 / (sum(words) + 1))
    assert 0 <= results[1]["exact_match"] <= 1


def test_differences_are_shown_beside_the_figures(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ["--model", str(folders["decoder_only"]), "--data", str(tmp_path / "text.txt")]
    assert main([*arguments, "--quantization", "none,int4"]) == 0
    out = capsys.readouterr().out
    plain, quantised = (result["perplexity"] for result in json.loads(out.splitlines()[-1])["results"])
    assert f"{quantised:#.4g} ({quantised / plain - 1:+.1%})" in out
    assert plain != quantised


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--model": "nowhere"}, "no model folder"),
        ({"--data": "missing.txt"}, "no data file at"),
        ({"--data": "bytes.txt"}, "as UTF-8 text"),
        ({"--data": "empty.txt"}, "holds no text of two tokens or more"),
        ({"--data": "empty.tsv"}, "holds no pairs"),
        ({"--data": "broken.tsv"}, "expected source and target with one tab between"),
        ({"--data": "broken.jsonl"}, "line 2: expected a JSON object whose text is a string"),
        ({"--metrics": "bleu"}, "'bleu' is not one of perplexity, exact_match, wer"),
        ({"--metrics": "exact_match"}, "exact_match is measured on pairs"),
        ({"--quantization": "none,int3"}, "'int3' is not one of none, auto, int8, int4"),
        ({"--limit": "0"}, "'0' is no positive number"),
        ({"--context": "1"}, "--context 1 leaves no token to predict"),
        ({"--model": "encoder_decoder"}, "an encoder-decoder model is measured on pairs"),
    ],
)
def test_mistakes_are_one_line(
    changes: dict[str, str], message: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "empty.txt").write_text("a")
    (tmp_path / "empty.tsv").write_text("\n")
    (tmp_path / "broken.tsv").write_text("no tab\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    options = {"--model": "decoder_only", "--data": "text.txt"} | changes
    options |= {name: str(tmp_path / options[name]) for name in ("--model", "--data")}
    try:
        status = main([word for pair in options.items() for word in pair])
    except SystemExit as stop:  # argparse's own way out
        status = int(stop.code or 0)
    assert status == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_model_without_a_tokenizer_cannot_be_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, tiny_model("decoder_only"), None)
    (tmp_path / "text.txt").write_text(TEXT)
    assert main(["--model", str(tmp_path), "--data", str(tmp_path / "text.txt")]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
