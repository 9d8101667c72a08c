"""A checkpoint with pickled weights becomes one with safetensors that says the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.weights import open_weights
from tools.convert import convert, main

SHARED = torch.arange(12.0).view(3, 4)
TENSORS = {
    "shared.weight": SHARED,
    "block.weight": torch.ones(4, 4, dtype=torch.bfloat16),
    "block.transposed": torch.arange(6.0).view(2, 3).T,
    "block.row": SHARED[1],
    "lm_head.weight": SHARED,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "extra").mkdir(parents=True)
    torch.save(TENSORS, folder / "pytorch_model.bin")
    (folder / "config.json").write_text("{}")
    (folder / "extra" / "notes.txt").write_text("as it was")
    return folder


def check(output: Path) -> None:
    weights = open_weights(output)
    assert sorted(weights.names()) == sorted(set(TENSORS) - {"lm_head.weight"})
    for name in weights.names():
        assert weights.read(name).dtype == TENSORS[name].dtype
        assert torch.equal(weights.read(name), TENSORS[name]), name
    assert (output / "config.json").read_text() == "{}"
    assert (output / "extra" / "notes.txt").read_text() == "as it was"
    assert not list(output.glob("pytorch_model*"))


def test_a_pickle_becomes_safetensors(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "output"
    assert main(["--model", str(folder), "--to", "safetensors", "--output", str(output)]) == 0
    check(output)
    with safe_open(output / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "lm_head.weight": "shared.weight"}
    assert capsys.readouterr().err == ""


def test_large_weights_are_written_in_shards(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "output", shard_bytes=90)
    check(tmp_path / "output")
    index = json.loads((tmp_path / "output" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 48 + 32 + 24 + 16
    assert sorted(set(index["weight_map"].values())) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_pickled_shards_are_converted(folder: Path, tmp_path: Path) -> None:
    (folder / "pytorch_model.bin").unlink()
    weight_map: dict[str, str] = {}
    parts: list[dict[str, Tensor]] = [dict(list(TENSORS.items())[:2]), dict(list(TENSORS.items())[2:4])]
    for number, part in enumerate(parts, 1):
        torch.save(part, folder / f"pytorch_model-{number}.bin")
        weight_map |= dict.fromkeys(part, f"pytorch_model-{number}.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(folder, tmp_path / "output")
    check(tmp_path / "output")


@pytest.mark.parametrize(
    ("model", "output", "message"),
    [
        ("model", "taken", "taken exists and is not an empty folder"),
        ("model", "model/inside", "is inside the folder to convert"),
        ("model", "file", "file exists and is not an empty folder"),
        ("ready", "output", "model.safetensors is in the safetensors format already"),
        ("taken", "output", "has no weights"),
        ("broken", "output", "pytorch_model.bin is truncated or corrupt"),
        ("no/such/folder", "output", "no model folder"),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    model: str, output: str, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("taken", "ready", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "taken" / "notes.txt").touch()
    (tmp_path / "file").touch()
    save_file({"a": torch.ones(1)}, tmp_path / "ready" / "model.safetensors")
    (tmp_path / "broken" / "pytorch_model.bin").write_bytes(b"nothing")
    arguments = ["--model", str(tmp_path / model), "--to", "safetensors", "--output", str(tmp_path / output)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "output").exists()
