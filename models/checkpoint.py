"""Models on disk: a folder with config.json, model.safetensors and tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.config import ConfigError, TransformerConfig
from models.files import CheckpointError, read_json
from models.tokenizer import Tokenizer
from models.transformer import DecoderOnly, EncoderDecoder, build_model

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


def save(folder: Path, model: DecoderOnly | EncoderDecoder, tokenizer: Tokenizer | None) -> None:
    """Writes the model into an existing folder; a weight that several names share is stored once."""
    (folder / CONFIG_FILE).write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
    save_file(_unique_tensors(model), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save(folder)


def load(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[DecoderOnly | EncoderDecoder, Tokenizer | None]:
    """The model, in evaluation mode, and its tokenizer (None where the folder has none).

    Raises CheckpointError, in one sentence, for a folder or file that is missing, broken or does not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"no model folder at {folder}")
    try:
        config = TransformerConfig.from_dict(read_json(folder / CONFIG_FILE))
        model = build_model(config)
        load_weights(model, folder / WEIGHTS_FILE)
        tokenizer = Tokenizer.load(folder)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return model.to(device=device, dtype=dtype).eval(), tokenizer


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
