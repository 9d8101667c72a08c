"""A model on disk comes back as it was, or as one sentence about what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import CheckpointError, load
from models.checkpoint import save
from tests.conftest import tiny_model


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])
def test_a_model_comes_back_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    save(tmp_path, model, None)
    restored, tokenizer = load(tmp_path)
    assert tokenizer is None
    assert restored.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, restored.state_dict()[name]), name


def test_a_shared_weight_is_stored_once(tmp_path: Path) -> None:
    save(tmp_path, tiny_model("encoder_decoder"), None)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def drop_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("decoder.norm.weight")
    save_file(tensors, folder / "model.safetensors")


def add_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "stray": torch.zeros(1)}, folder / "model.safetensors")


def reshape_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["decoder.norm.weight"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "heads": 3}))


BREAKAGES: list[tuple[Callable[[Path], object], str]] = [
    (truncate, "truncated or corrupt"),
    (drop_a_weight, "lacks 1 weights"),
    (add_a_weight, "stray"),
    (reshape_a_weight, r"decoder.norm.weight is \(3,\)"),
    (change_config, "not a multiple of heads|does not divide"),
    (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
    (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    (lambda folder: (folder / "config.json").write_text("[]"), "JSON object"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot read the tokenizer"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b""), "truncated or corrupt"),
]


@pytest.mark.parametrize(("damage", "message"), BREAKAGES)
def test_a_broken_checkpoint_is_one_sentence(
    damage: Callable[[Path], object], message: str, model_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "copy"))
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model folder"):
        load(tmp_path / "nowhere")
