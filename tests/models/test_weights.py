"""Weights are read from every layout of files there is, or a sentence says what is wrong with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.files import CheckpointError
from models.weights import Weights, open_weights

TENSORS = {
    "embed.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "norm.weight": torch.ones(4, dtype=torch.bfloat16),
    "scale": torch.tensor(2.0, dtype=torch.float16),
}


def write_safetensors(folder: Path) -> None:
    save_file(TENSORS, folder / "model.safetensors")


def write_torch(folder: Path) -> None:
    torch.save(TENSORS, folder / "pytorch_model.bin")


def write_legacy_torch(folder: Path) -> None:
    torch.save(TENSORS, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def write_shards(folder: Path, stem: str, suffix: str, write: Callable[[dict[str, Tensor], Path], object]) -> None:
    weight_map = {}
    for number, name in enumerate(TENSORS, 1):
        weight_map[name] = f"{stem}-{number:05}-of-00003.{suffix}"
        write({name: TENSORS[name]}, folder / weight_map[name])
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_safetensors_shards(folder: Path) -> None:
    write_shards(folder, "model", "safetensors", save_file)


def write_torch_shards(folder: Path) -> None:
    write_shards(folder, "pytorch_model", "bin", torch.save)


def check(weights: Weights) -> None:
    assert sorted(weights.names()) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        read = weights.read(name)
        assert weights.shape(name) == tuple(tensor.shape)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


@pytest.mark.parametrize("write", [write_safetensors, write_safetensors_shards])
def test_safetensors_are_read(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path)
    weights = open_weights(tmp_path)
    check(weights)
    with pytest.raises(KeyError):
        weights.read("nothing")


@pytest.mark.parametrize("write", [write_torch, write_legacy_torch, write_torch_shards])
def test_pickles_are_read_with_one_warning(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.warns(UserWarning, match=r"pytorch_model.bin.* is a pickle.*--to safetensors") as caught:
        weights = open_weights(tmp_path)
    assert len(caught) == 1
    check(weights)


def test_safetensors_come_before_pickles(tmp_path: Path) -> None:
    write_safetensors_shards(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    check(open_weights(tmp_path))


def test_links_to_files_elsewhere_are_followed(tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir(), folder.mkdir()
    write_safetensors_shards(blobs)
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(file)
    check(open_weights(folder))


PEAK = """
import sys, torch
from pathlib import Path
from models.weights import open_weights

def resident(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

weights = open_weights(Path(sys.argv[1]))
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = resident("VmRSS")
total = 0
model = {}
for name in weights.names():
    model[name] = torch.empty(weights.shape(name))
    model[name].copy_(weights.read(name))
    total += model[name].nbytes
print((resident("VmHWM") - before) / total)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads its memory from Linux's /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path: Path) -> None:
    save_file({str(i): torch.ones(1 << 20) for i in range(32)}, tmp_path / "model.safetensors")
    command = [sys.executable, "-W", "error", "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.15


def edit_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        write_safetensors_shards(folder)
        values = json.loads((folder / "model.safetensors.index.json").read_text())
        change(values)
        (folder / "model.safetensors.index.json").write_text(json.dumps(values))

    return edit


def truncated(write: Callable[[Path], None], name: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        write(folder)
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return cut


def store(content: object) -> Callable[[Path], None]:
    return lambda folder: torch.save(content, folder / "pytorch_model.bin")


def drop_shard(folder: Path) -> None:
    write_safetensors_shards(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


class Code:
    """What a pickle would have run, if it were read as pickles usually are."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, ("exit 1",)


SHARD = "model-00001-of-00003.safetensors"
BREAKAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: None, "no weights: looked for model.safetensors, .*index.json, pytorch_model.bin, "),
    (truncated(write_safetensors, "model.safetensors"), "model.safetensors is truncated or corrupt"),
    (truncated(write_safetensors_shards, SHARD), f"{SHARD} is truncated or corrupt"),
    (truncated(write_safetensors_shards, "model.safetensors.index.json"), "index.json is not valid JSON"),
    (edit_index(lambda index: index.pop("weight_map")), "index.json has no weight_map"),
    (edit_index(lambda index: index.update(weight_map=["a"])), "index.json has no weight_map"),
    (edit_index(lambda index: index["weight_map"].update(scale=3)), "index.json has no weight_map"),
    (edit_index(lambda index: index["weight_map"].update(more=SHARD)), f"{SHARD} lacks more"),
    (edit_index(lambda index: index["weight_map"].update(scale="../x")), "'../x', which is outside"),
    (edit_index(lambda index: index["weight_map"].update(scale="/etc/passwd")), "outside its folder"),
    (edit_index(lambda index: index["weight_map"].update(scale="a\\..\\..\\x")), "outside its folder"),
    (edit_index(lambda index: index["weight_map"].update(scale="")), "which is missing"),
    (edit_index(lambda index: index["weight_map"].update(scale="\0")), "which is missing"),
    (drop_shard, "model-00002-of-00003.safetensors', which is missing"),
    (truncated(write_torch, "pytorch_model.bin"), "pytorch_model.bin is truncated or corrupt"),
    (truncated(write_legacy_torch, "pytorch_model.bin"), "pytorch_model.bin is truncated or corrupt"),
    (lambda folder: (folder / "pytorch_model.bin").write_bytes(b""), "pytorch_model.bin is truncated or corrupt"),
    (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"nothing"), "pytorch_model.bin is truncated or corru"),
    (store([torch.ones(1)]), "pytorch_model.bin does not hold a dict of named tensors"),
    (store({"epoch": 3}), "pytorch_model.bin does not hold a dict of named tensors"),
    (store({"tensor": torch.ones(1), "path": Path("x")}), "pytorch_model.bin holds Python objects"),
    (store({"tensor": torch.ones(1), "code": Code()}), "pytorch_model.bin holds Python objects"),
]


@pytest.mark.filterwarnings("ignore:.*is a pickle:UserWarning")
@pytest.mark.parametrize(("write", "message"), BREAKAGES)
def test_broken_weights_are_one_sentence(write: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_weights(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_breaks_once_open_is_one_sentence(tmp_path: Path) -> None:
    write_safetensors(tmp_path)
    weights = open_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        weights.read("scale")
