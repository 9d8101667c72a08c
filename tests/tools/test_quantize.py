"""``python -m tools.convert --quantize``: a folder of ours in eight or four bits that says what the model said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from engine import LLM, SamplingParams
from kernels.quantization import QuantizedWeight
from models.checkpoint import open_model
from models.sources import Quantization
from tests.models.gguf_files import smollm2
from tests.models.made_folders import llama_config, llama_shapes, t5_config, t5_shapes, write
from tools.convert import main
from tools.quantize import quantize_folder


def convert(source: Path, output: Path, quantization: str) -> int:
    arguments = ["--model", str(source), "--to", "safetensors", "--quantize", quantization, "--output", str(output)]
    return main(arguments)


@pytest.fixture(params=["llama", "t5"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config, shapes = (llama_config(), llama_shapes) if request.param == "llama" else (t5_config(), t5_shapes)
    (tmp_path / "model").mkdir()
    return write(tmp_path / "model", config, shapes(config))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_folder_holds_the_model_quantised(
    quantization: Quantization, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "output"
    assert convert(folder, output, quantization) == 0
    assert capsys.readouterr().out.startswith(f"{output}: {quantization}, 0.")
    config = json.loads((output / "config.json").read_text())
    assert (config["model_type"], config["quantization"]) == ("tandem", quantization)
    wanted, _ = models.load(folder, quantization=quantization)
    for asked in (None, "auto", quantization):
        model, _ = models.load(output, quantization=asked)  # type: ignore[arg-type]
        assert (model.config, model.generation) == (wanted.config, wanted.generation)
        for (name, ours), theirs in zip(model.named_parameters(), wanted.parameters(), strict=True):
            assert torch.equal(ours, theirs), name


def test_what_is_stored(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "output", "int4")
    tensors = load_file(tmp_path / "output" / "model.safetensors")
    up, scales = (tensors[f"decoder.blocks.0.ffn.up.weight{suffix}"] for suffix in ("", ".scales"))
    assert (up.dtype, up.shape[1], scales.dtype, scales.shape[1]) == (torch.uint8, 16, torch.float16, 1)
    down, scales = (tensors[f"decoder.blocks.0.ffn.down.weight{suffix}"] for suffix in ("", ".scales"))
    assert (down.dtype, down.shape[1], scales.dtype) == (torch.int8, 48, torch.float32)
    assert tensors["decoder.norm.weight"].dtype == torch.float32
    stored = {name for names, weight in open_model(tmp_path / "output", "auto")[2]
              for name in names if isinstance(weight, QuantizedWeight)}  # fmt: skip
    assert len([name for name in stored if "relative" in name or "norm" in name]) == 0
    assert {"lm_head.weight", "decoder.embedding.tokens.weight", "decoder.blocks.1.attention.qkv.weight"} <= stored


def test_large_models_are_written_in_shards(folder: Path, tmp_path: Path) -> None:
    report = quantize_folder(folder, tmp_path / "output", "int8", shard_bytes=9000)
    index = json.loads((tmp_path / "output" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert sorted(path.name for path in (tmp_path / "output").glob("*.safetensors")) == shards
    assert f"{index['metadata']['total_size'] / 1e6:,.1f} MB" in report
    wanted, _ = models.load(folder, quantization="int8")
    model, _ = models.load(tmp_path / "output")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), wanted.parameters(), strict=True))


def test_a_model_with_a_tokenizer_speaks_as_before(tmp_path: Path) -> None:
    assert convert(smollm2(), tmp_path / "output", "int8") == 0
    params = SamplingParams(temperature=0.0, max_tokens=8)
    theirs, ours = (LLM(path, max_model_len=64) for path in (smollm2(), tmp_path / "output"))
    prompt = theirs.chat_prompt([{"role": "user", "content": "What is the capital of France?"}])
    assert ours.chat_prompt([{"role": "user", "content": "What is the capital of France?"}]) == prompt
    answers = [llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].text for llm in (ours, theirs)]
    assert answers[0] == answers[1]
    assert "Paris" in answers[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--output": "model/inside"}, "is inside the folder to convert"),
        ({"--output": "taken"}, "taken exists and is not an empty folder"),
        ({"--model": "nowhere"}, "no model folder"),
        ({"--to": "huggingface"}, "--quantize writes a folder of ours: use it with --to safetensors"),
    ],
)
def test_what_cannot_be_written_is_one_line(
    changes: dict[str, Any], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").touch()
    options = {"--model": "model", "--output": "output"} | changes
    options |= {name: str(tmp_path / options[name]) for name in ("--model", "--output")}
    options = {"--to": "safetensors", "--quantize": "int8"} | options
    assert main([word for pair in options.items() for word in pair]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "output").exists()


def changed(name: str, change: Any) -> Any:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name])
        save_file(tensors, folder / "model.safetensors")

    return damage


def configured(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


DOWN, UP = "decoder.blocks.0.ffn.down.weight", "decoder.blocks.0.ffn.up.weight"
DAMAGES = [
    (changed(f"{UP}.scales", None), f"{UP} holds torch.uint8, expected floating-point"),
    (changed(UP, None), r"weights of the model, the first .*up.weight"),
    (changed(f"{UP}.scales", lambda x: x[:-1]), f"{UP} is broken: values uint8"),
    (changed(f"{UP}.scales", lambda x: x.float()), f"{UP} is broken: values uint8"),
    (changed(f"{DOWN}.scales", lambda x: x[:-1].clone()), f"{DOWN} is broken: values int8"),
    (changed(UP, lambda x: torch.cat((x, x))), f"{UP} is broken"),
    (changed(DOWN, lambda x: x[:, :-1].clone()), f"{DOWN} is .*, the config asks for"),
    (cut, "truncated or corrupt"),
    (lambda folder: configured(folder, quantization=None), r"has \d+ weights the model lacks"),
    (lambda folder: configured(folder, quantization="int2"), "quantization 'int2' is not supported: expected int8 or"),
    (lambda folder: configured(folder, quantization=["int4"]), "is not supported: expected int8 or int4"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
@pytest.mark.parametrize("quantization", [None, "auto"])
def test_a_broken_folder_is_one_sentence(
    damage: Any, message: str, quantization: Quantization | None, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    convert(folder, output, "int4")
    models.load(output, quantization=quantization)
    damage(output)
    with pytest.raises(models.CheckpointError, match=message):
        models.load(output, quantization=quantization)
