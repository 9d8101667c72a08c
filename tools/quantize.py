"""A checkpoint of any kind as a folder of ours with quantised weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from kernels.quantization import QuantizedWeight
from models.assembly import NamedWeights
from models.checkpoint import open_model, save_description
from models.quantized_file import parts_of
from models.sources import Quantization
from models.weights import INDEX_SUFFIX, SAFETENSORS_FILE


def quantize_folder(source: Path, output: Path, quantization: Quantization, shard_bytes: int) -> str:
    """Writes the model into a new folder, or an empty one: linear layers and embeddings as integers, the rest as
    float32. Returns a report. Raises ValueError or OSError for what cannot be read or written.
    """
    model, tokenizer, weights = open_model(source, quantization, dtype=torch.float32)
    output.mkdir(parents=True, exist_ok=True)
    total = write_shards(_tensors(weights), output, shard_bytes)
    # What says that this is a checkpoint comes last, so that what an interruption leaves is not taken for one.
    save_description(output, model, tokenizer, quantization)
    report = f"{output}: {quantization}, {total / 1e6:,.1f} MB"
    if model.generation.unsupported:
        report += f"; without the generation settings {', '.join(model.generation.unsupported)}"
    return report


def _tensors(weights: NamedWeights) -> Iterator[dict[str, Tensor]]:
    for (name, *_), weight in weights:
        parts = parts_of(name, weight) if isinstance(weight, QuantizedWeight) else {name: weight}
        # Mapped files and neighbours in a storage are copied: the format wants each tensor alone.
        yield {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in parts.items()}


def write_shards(groups: Iterable[dict[str, Tensor]], folder: Path, shard_bytes: int) -> int:
    """Writes model.safetensors, or shards of it and their index, holding one shard in memory. Returns the bytes.

    A shard has at most so many bytes, or one group of tensors.
    """
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(shard, folder / _shard_name(len(shards)), metadata={"format": "pt"})
        shards.append(list(shard))

    for group in groups:
        nbytes = sum(tensor.nbytes for tensor in group.values())
        if shard and size + nbytes > shard_bytes:
            flush()
            shard, size = {}, 0
        shard |= group
        size, total = size + nbytes, total + nbytes
    flush()
    _name_shards(shards, folder, total)
    return total


def _name_shards(shards: list[list[str]], folder: Path, total: int) -> None:
    """Renames shards as the Hub does, now that their number is known, and writes their index."""
    if len(shards) == 1:
        (folder / _shard_name(0)).rename(folder / SAFETENSORS_FILE)
        return
    stem, suffix = SAFETENSORS_FILE.split(".")
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"{stem}-{number + 1:05}-of-{len(shards):05}.{suffix}"
        (folder / _shard_name(number)).rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / (SAFETENSORS_FILE + INDEX_SUFFIX)).write_text(json.dumps(index, indent=2) + "\n")


def _shard_name(number: int) -> str:
    return f"shard-{number}.draft"
