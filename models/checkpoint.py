"""Models on disk: our folders, those of Hugging Face's families, and GGUF files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.assembly import NamedWeights, fill, has_own_head, named_weights
from models.config import MODEL_TYPE, ConfigError, TransformerConfig
from models.families import family_of
from models.families.family import Family
from models.files import CheckpointError, read_json
from models.generation import GenerationConfig, read_generation
from models.gguf.folder import open_gguf
from models.hub import GGUF_SUFFIX, resolve_folder
from models.packed_file import PackedFile
from models.quantized_file import QuantizedFile
from models.sources import BITS, Quantization
from models.tokenizer import Tokenizer
from models.transformer import DecoderOnly, EncoderDecoder, build_model
from models.weights import SAFETENSORS_FILE, Weights, open_weights

CONFIG_FILE, GENERATION_FILE, WEIGHTS_FILE = "config.json", "generation_config.json", SAFETENSORS_FILE
QUANTIZATION_KEY = "quantization"  # in config.json


def save(folder: Path, model: DecoderOnly | EncoderDecoder, tokenizer: Tokenizer | None) -> None:
    """Writes the model into an existing folder; a weight that several names share is stored once."""
    save_file(_unique_tensors(model), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    save_description(folder, model, tokenizer)


def save_description(
    folder: Path, model: DecoderOnly | EncoderDecoder, tokenizer: Tokenizer | None,
    quantization: Quantization | None = None,
) -> None:  # fmt: skip
    """Writes what else than weights is in a folder of ours; ``quantization`` says what they are stored as."""
    if tokenizer is not None:
        tokenizer.save(folder)
    if model.generation != GenerationConfig():
        (folder / GENERATION_FILE).write_text(json.dumps(model.generation.to_dict(), indent=2) + "\n")
    values = model.config.to_dict() | ({} if quantization is None else {QUANTIZATION_KEY: quantization})
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n")


def load(
    model: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    quantization: Quantization | None = None,
) -> tuple[DecoderOnly | EncoderDecoder, Tokenizer | None]:
    """The model, in evaluation mode, and its tokenizer (None where there is none).

    ``model`` is a folder, a GGUF file or the id of a repository on the Hub; ``dtype`` None keeps the file's. The
    weights are floats: with ``quantization`` "int8" or "int4" those that quantised ones stand for, else the file's.
    Raises CheckpointError, in one sentence, for what is missing, broken or not supported.
    """
    device = torch.device(device)
    built, tokenizer, weights = open_model(model, quantization, device=device, dtype=dtype)
    fill(built, weights, device, dtype)
    return built.eval(), tokenizer


def open_model(
    model: str | Path,
    quantization: Quantization | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    keeps_tables: bool = False,
) -> tuple[DecoderOnly | EncoderDecoder, Tokenizer | None, NamedWeights]:
    """The model on the meta device, its tokenizer, and its weights as ``models.assembly.named_weights`` gives them.

    They are read when they are asked for, so that they take the memory of one beside what is made of them. Raises
    CheckpointError as ``load`` does: for shapes and numbers when they are read.
    """
    path = resolve_folder(model)
    try:
        values, weights, tokenizer = open_gguf(path) if path.suffix == GGUF_SUFFIX else _open_folder(path)
        family = OURS if values.get("model_type") == MODEL_TYPE else family_of(values.get("model_type"))
        config = family.config(values, weights.names())
        if config.tie_embeddings and has_own_head(config, weights, family):
            config = dataclasses.replace(config, tie_embeddings=False)
        with torch.device("meta"):  # no memory, no random numbers: every weight comes from the file
            built = build_model(config)
        built.generation = _generation(path, values, config.target_vocab_size or config.vocab_size)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    named = named_weights(
        built, weights, family, where=path, quantization=quantization, device=device, dtype=dtype,
        keeps_tables=keeps_tables,
    )  # fmt: skip
    return built, tokenizer, named


def _open_folder(folder: Path) -> tuple[dict[str, Any], Weights, Tokenizer | None]:
    values, weights = read_json(folder / CONFIG_FILE), open_weights(folder)
    if values.get("model_type") == MODEL_TYPE and (kind := values.pop(QUANTIZATION_KEY, None)) is not None:
        if kind not in list(BITS):
            raise ConfigError(f"{QUANTIZATION_KEY} {kind!r} is not supported: expected {' or '.join(BITS)}")
        weights = QuantizedFile(weights, folder)
    elif (packing := values.get("quantization_config")) is not None:
        weights = PackedFile(weights, packing, folder)
    return values, weights, Tokenizer.load(folder)


OURS = Family(config=lambda values, names: TransformerConfig.from_dict(dict(values)), weights=None)


def _generation(path: Path, values: dict[str, Any], vocab_size: int) -> GenerationConfig:
    own = path / GENERATION_FILE
    stored = read_json(own) if own.is_file() else None
    if values.get("model_type") == MODEL_TYPE:
        return GenerationConfig() if stored is None else read_generation({}, stored, vocab_size)
    theirs = read_generation(values, stored, vocab_size)
    # Sampling is what these files ask for; greedy search is what they mean by silence.
    return dataclasses.replace(theirs, defaults={"do_sample": False, **theirs.defaults})


def load_weights(model: nn.Module, path: Path) -> None:
    """Copies the file's tensors into the model. Raises CheckpointError unless names and shapes match exactly."""
    tensors = read_tensors(path)
    expected = _unique_tensors(model)
    if missing := sorted(set(expected) - set(tensors)):
        raise CheckpointError(f"{path} lacks {len(missing)} weights of the model, the first {missing[0]}")
    if unexpected := sorted(set(tensors) - set(expected)):
        raise CheckpointError(f"{path} has {len(unexpected)} weights the model lacks, the first {unexpected[0]}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.shape != expected[name].shape:
                raise CheckpointError(
                    f"{path}: {name} is {tuple(tensor.shape)}, the model's is {tuple(expected[name].shape)}"
                )
            expected[name].copy_(tensor)


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt: {error}") from None


def _unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and buffers by name, each tensor under the first of its names."""
    by_pointer: dict[int, str] = {}
    state = model.state_dict()
    return {name: t for name, t in state.items() if by_pointer.setdefault(t.data_ptr(), name) == name}
