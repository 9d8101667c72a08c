"""The weight files of a checkpoint folder as one lazy mapping from name to tensor, read without copying the file."""

from __future__ import annotations

import json
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernels.quantization import QuantizedWeight
from models.files import CheckpointError, read_json

SAFETENSORS_FILE, TORCH_FILE = "model.safetensors", "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"
WEIGHT_FILES = tuple(name + suffix for name in (SAFETENSORS_FILE, TORCH_FILE) for suffix in ("", INDEX_SUFFIX))
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
LFS_POINTER = b"version https://git-lfs"
ZIP_MAGIC = b"PK\x03\x04"
REFUSALS = ("GLOBAL", "allowlisted", "unrecognized function")  # what PyTorch says of a pickle that wants to run code


class Weights(Protocol):
    """The tensors of a checkpoint by the names its files give them. Reading an unknown name is a KeyError.

    A quantised matrix is one of them, under the name it would have as floats.
    """

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU, in the dtype it is stored in (float32 if it is quantised); a view of the file where
        it can be, not to be written.

        Raises CheckpointError for a file that broke since it was opened.
        """
        ...

    def quantized(self, name: str) -> QuantizedWeight | None:
        """The tensor as the integers it is stored as, or the nearest to them that we have; None if it is floats."""
        return None


def open_weights(folder: Path) -> Weights:
    """The weights of a folder: ``model.safetensors`` or ``pytorch_model.bin``, whole or in shards with an index.

    Where both kinds are there, safetensors is read. Raises CheckpointError for files that are missing or broken.
    """
    path = find_weights(folder)
    if path.name.startswith(TORCH_FILE):
        warnings.warn(
            f"{path} is a pickle, which loads slower than safetensors: `python -m tools.convert --to safetensors` "
            "makes this warning go away",
            stacklevel=2,
        )
    return open_file(path)


def open_file(path: Path) -> Weights:
    """The weights of one file, or of the shards that an index names."""
    kind = TorchFile if path.name.startswith(TORCH_FILE) else SafetensorsFile
    return ShardedWeights(path, kind) if path.name.endswith(INDEX_SUFFIX) else kind(path)


def find_weights(folder: Path) -> Path:
    """The weight file, or index of shards, that a folder is read from."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} has no weights: looked for {', '.join(WEIGHT_FILES)}")


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a folder, all of which are there."""
    path = find_weights(folder)
    return [folder / shard for shard in _listed_shards(path)] if path.name.endswith(INDEX_SUFFIX) else [path]


class SafetensorsFile(Weights):
    """A file of the safetensors format.

    Every read maps the file anew: a mapping lasts as long as its tensors, so pages that were copied from are let go
    before the next tensor comes, and loading a model takes no more memory than the model and a tensor. The library
    checks the file once; reading its header again for every tensor would take longer than loading the tensors.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with _safetensors_errors(path), safe_open(path, framework="pt"):
            self._size = path.stat().st_size
            self._start, self._entries = _read_header(path)

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def read(self, name: str) -> Tensor:
        entry = self._entries[name]
        dtype, offset = SAFETENSORS_DTYPES.get(entry["dtype"]), self._start + entry["data_offsets"][0]
        with _safetensors_errors(self._path):
            if dtype is None or offset % dtype.itemsize:
                with safe_open(self._path, framework="pt") as file:
                    return file.get_tensor(name)
            if self._path.stat().st_size != self._size:
                raise OSError("its size has changed since it was opened")
            file_bytes: Any = torch.UntypedStorage.from_file(str(self._path), False, self._size)
            count = math.prod(entry["shape"])
            flat = torch.empty(0, dtype=dtype).set_(file_bytes, offset // dtype.itemsize, (count,), (1,))
            return flat.view(entry["shape"])


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors' bytes begin, and each tensor's entry: dtype, shape and data_offsets."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return 8 + length, {name: entry for name, entry in header.items() if name != "__metadata__"}


@contextmanager
def _safetensors_errors(path: Path) -> Iterator[None]:
    try:
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise CheckpointError(f"{path} is a git-lfs pointer to the weights: fetch them with `git lfs pull`")
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt: {error}") from None


class TorchFile(Weights):
    """A file that torch.save wrote: tensors in a pickle, of which nothing but tensors is unpickled.

    The file is mapped, whole and until the last tensor goes; only the format of before PyTorch 1.6 is read into memory.
    """

    def __init__(self, path: Path) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in _unpickle(path).items()}

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def _unpickle(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            mappable = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # a broken pickle raises anything, from struct.error to AttributeError
        if isinstance(error, UnpicklingError) and any(sign in str(error) for sign in REFUSALS):
            raise CheckpointError(f"{path} holds Python objects other than tensors, which are not unpickled") from None
        raise CheckpointError(f"{path} is truncated or corrupt: {_first_line(error)}") from None
    if not _is_state(content):
        raise CheckpointError(f"{path} does not hold a dict of named tensors")
    return content


def _is_state(content: Any) -> bool:
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class ShardedWeights(Weights):
    """The files that an index spreads a model's tensors over, each tensor read from the one it is listed under."""

    def __init__(self, index: Path, open_file: Callable[[Path], Weights]) -> None:
        self._shards: dict[str, Weights] = {}
        for shard, names in _listed_shards(index).items():
            weights = open_file(index.parent / shard)
            if missing := sorted(set(names) - set(weights.names())):
                raise CheckpointError(f"{index.parent / shard} lacks {missing[0]}, which {index.name} says it holds")
            self._shards |= dict.fromkeys(names, weights)

    def names(self) -> list[str]:
        return list(self._shards)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shards[name].shape(name)

    def read(self, name: str) -> Tensor:
        return self._shards[name].read(name)


def _listed_shards(index: Path) -> dict[str, list[str]]:
    """The names of tensors by shard, whose files are there and lie inside the index's folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names")
    shards = defaultdict(list)
    for name, shard in weight_map.items():
        shards[shard].append(name)
    for shard in shards:
        # The name is what counts: the files of a Hub cache are links to blobs elsewhere.
        if _leaves_folder(shard):
            raise CheckpointError(f"{index} names the shard {shard!r}, which is outside its folder")
        if not (index.parent / shard).is_file():
            raise CheckpointError(f"{index} names the shard {shard!r}, which is missing")
    return dict(shards)


def _leaves_folder(name: str) -> bool:
    return any(kind(name).anchor or ".." in kind(name).parts for kind in (PurePosixPath, PureWindowsPath))
