"""A model's name is a folder, a GGUF file or a repository of the Hub, here one that a cache holds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from models import hub
from models.files import CheckpointError
from models.hub import resolve_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, which cannot be reached."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_resolves", lambda address: True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def cached(cache: Path, *files: str) -> Path:
    """The snapshot of owner/name with these files."""
    repository, commit = cache / "models--owner--name", "0" * 40
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for file in files:
        (snapshot / file).write_text("{}")
    return snapshot


def test_folders_and_gguf_files_are_themselves(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve_folder("owner/name") == Path("owner/name")
    assert resolve_folder(tmp_path) == tmp_path
    assert resolve_folder("model.gguf") == Path("model.gguf")


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_cached_repository_needs_no_network(weights: str, cache: Path) -> None:
    snapshot = cached(cache, "config.json", weights)
    assert resolve_folder("owner/name") == snapshot.resolve()


@pytest.mark.parametrize("files", [["config.json"], ["model.safetensors"], ["config.json", "tokenizer.json"]])
def test_a_half_cached_repository_is_not_taken_for_whole(files: list[str], cache: Path) -> None:
    cached(cache, *files)
    with pytest.raises(CheckpointError, match="the Hub cannot be reached"):
        resolve_folder("owner/name")


def test_a_cached_repository_without_one_of_its_shards_is_not_whole(cache: Path) -> None:
    snapshot = cached(cache, "config.json")
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one", "b": "two"}}))
    save_file({"a": torch.ones(1)}, snapshot / "one")
    with pytest.raises(CheckpointError, match="the Hub cannot be reached"):
        resolve_folder("owner/name")


@pytest.mark.parametrize(
    ("files", "weights"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["config.json", "model.safetensors.index.json", "pytorch_model.bin"], "model.safetensors"),
        (["config.json", "pytorch_model.bin"], "pytorch_model.bin"),
    ],
)
def test_one_kind_of_weights_is_downloaded(
    files: list[str], weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(repository: str, local_files_only: bool = False, **options: Any) -> str:
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        asked.update(options)
        return str(tmp_path)

    siblings = [SimpleNamespace(rfilename=file) for file in files]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, timeout: SimpleNamespace(siblings=siblings))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_folder("owner/name") == tmp_path
    patterns = asked["allow_patterns"]
    assert {name for name in ("model.safetensors", "pytorch_model.bin") if name in patterns} == {weights}
    assert {"config.json", "tokenizer.json", "generation_config.json"} < set(patterns)


def test_what_the_hub_lacks_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: object, repository: str, timeout: float) -> None:
        raise huggingface_hub.errors.RepositoryNotFoundError.__new__(huggingface_hub.errors.RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", missing)
    with pytest.raises(CheckpointError, match="no folder owner/name, and the Hub has no model of that name"):
        resolve_folder("owner/name")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("owner/name", "no folder owner/name, and the Hub cannot be reached"),
        ("runs/a/checkpoints/best", "no model folder at runs/a/checkpoints/best"),
        ("/nowhere", "no model folder at /nowhere"),
        (Path("owner/name"), "no model folder at owner/name"),
        ("model.gguf", "no model file at model.gguf"),
        ("a..b", "no model folder at a..b"),
    ],
)
def test_what_is_nowhere_is_one_sentence(model: str | Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve_folder(model)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_kind_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(CheckpointError, match=r"neither a checkpoint folder nor a \.gguf file"):
        resolve_folder("model.bin")
