"""``python -m tools.convert``: a checkpoint again, in safetensors, quantised, or as transformers has it."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from models.files import CheckpointError
from models.hub import resolve_folder
from models.sources import BITS
from models.weights import INDEX_SUFFIX, SAFETENSORS_FILE, TORCH_FILE, Weights, find_weights, open_file, weight_files
from tools.export import export
from tools.quantize import quantize_folder

SHARD_BYTES = 5_000_000_000


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    try:
        folder, output = resolve_folder(options.model), Path(options.output)
        if options.quantize and options.to == "huggingface":
            raise ValueError("--quantize writes a folder of ours: use it with --to safetensors")
        if options.quantize:
            check_output(folder, output)
            print(quantize_folder(folder, output, options.quantize, SHARD_BYTES))
        elif options.to == "huggingface":
            print(export(folder, output))
        else:
            convert(folder, output)
    except (ValueError, OSError, SafetensorError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.convert", description="Rewrites a checkpoint.")
    parser.add_argument("--model", required=True, metavar="DIR", help="a checkpoint folder, or a name on the Hub")
    parser.add_argument(
        "--to", required=True, choices=["safetensors", "huggingface"],
        help="safetensors: pickled weights in that format; huggingface: a model trained here as transformers loads it",
    )  # fmt: skip
    parser.add_argument(
        "--quantize", choices=list(BITS),
        help="with --to safetensors, of any model: a folder of ours, its linear layers and embeddings in so many bits",
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder, or an empty one")
    return parser


def convert(folder: Path, output: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the folder's weights as safetensors, in shards of at most so many bytes, and copies its other files.

    Raises ValueError or OSError for a folder that cannot be read or written.
    """
    source = check(folder, output)
    weights = open_file(source)
    output.mkdir(parents=True, exist_ok=True)
    write_weights(weights, output, shard_bytes)
    # config.json comes last, so that what an interruption leaves is not taken for a checkpoint.
    replaced = {source, *weight_files(folder)}
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
        if path.is_dir():
            shutil.copytree(path, output / path.name)
        elif path not in replaced:
            shutil.copyfile(path, output / path.name)


def check(folder: Path, output: Path) -> Path:
    """The file, or index, of the weights to convert. Raises ValueError for what cannot be converted, or not there."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no checkpoint folder")
    source = find_weights(folder)
    if not source.name.startswith(TORCH_FILE):
        raise CheckpointError(f"{source} is in the safetensors format already")
    check_output(folder, output)
    return source


def check_output(folder: Path, output: Path) -> None:
    """Raises ValueError for a place that the conversion of ``folder`` may not be written to."""
    if output.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--output {output} is inside the folder to convert")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} exists and is not an empty folder")


def write_weights(weights: Weights, folder: Path, shard_bytes: int) -> None:
    """Writes model.safetensors, or shards of it and their index, in the layout of the Hugging Face Hub."""
    aliases = shared_names(weights)
    shards = list(split([name for name in weights.names() if name not in aliases], weights, shard_bytes))
    stem, suffix = SAFETENSORS_FILE.split(".")
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        file = SAFETENSORS_FILE if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.{suffix}"
        tensors = {name: own_storage(weights.read(name)) for name in names}
        # Which names a tensor also had is noted as safetensors.torch.save_model notes it.
        noted = {alias: name for alias, name in aliases.items() if name in tensors}
        save_file(tensors, folder / file, metadata={"format": "pt", **noted})
        weight_map |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / (SAFETENSORS_FILE + INDEX_SUFFIX)).write_text(json.dumps(index, indent=2) + "\n")


def shared_names(weights: Weights) -> dict[str, str]:
    """The names of tensors that were there before under another name, which is their value."""
    first: dict[object, str] = {}
    aliases = {}
    for name in weights.names():
        tensor = weights.read(name)
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and first.setdefault(place, name) != name:
            aliases[name] = first[place]
    return aliases


def split(names: list[str], weights: Weights, shard_bytes: int) -> Iterator[list[str]]:
    """The names in runs whose tensors have at most so many bytes together; a bigger tensor is a run of its own."""
    run: list[str] = []
    size = 0
    for name in names:
        nbytes = weights.read(name).nbytes
        if run and size + nbytes > shard_bytes:
            yield run
            run, size = [], 0
        run.append(name)
        size += nbytes
    yield run


def own_storage(tensor: Tensor) -> Tensor:
    """The same values, contiguous and alone in their storage, as the format wants them."""
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
