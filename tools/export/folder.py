"""A checkpoint folder for transformers: config, weights, generation settings and tokenizer, whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from models.checkpoint import CONFIG_FILE, GENERATION_FILE, WEIGHTS_FILE, load
from models.config import MODEL_TYPE
from models.families import FAMILIES
from models.files import CheckpointError, read_json
from models.generation import GenerationConfig
from models.tokenizer import TARGET_FILE, Tokenizer
from models.transformer import DecoderOnly, EncoderDecoder
from models.vocabularies.tokenizer_config import CONFIG_FILE as TOKENIZER_CONFIG_FILE
from tools.export.choice import choose
from tools.export.targets import Target
from tools.export.weights import bart_extras, to_family


def export(folder: Path, output: Path) -> str:
    """Writes the checkpoint of ours in ``folder`` into ``output``, a new folder or an empty one; returns a report.

    Raises ValueError (ConfigError, CheckpointError) or OSError, and leaves nothing behind.
    """
    check(folder, output)
    model, tokenizer = load(folder, dtype=None)
    target, values = choose(model.config)
    output = output.absolute()
    draft = output.with_name(f".{output.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        write_model(draft, model, target, values)
        notes = [] if tokenizer is None else write_tokenizer(draft, tokenizer, model.config.max_seqlen)
        draft.rename(output)  # over an empty folder, too
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return "; ".join([f"{output}: {target.architecture}", *notes])


def check(folder: Path, output: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no checkpoint folder")
    kind = read_json(folder / CONFIG_FILE).get("model_type")
    if kind in FAMILIES:
        raise CheckpointError(f"{folder} is a Hugging Face checkpoint already: its model_type is {kind}")
    if kind != MODEL_TYPE:
        raise CheckpointError(f"{folder} holds model_type {kind!r}: only what was trained here can be converted")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} exists and is not an empty folder")


def write_model(
    folder: Path, model: DecoderOnly | EncoderDecoder, target: Target, values: dict[str, Any]
) -> None:  # fmt: skip
    """Writes the files of the model into an existing folder."""
    tensors = bart_extras(model) if target.is_bart else {}
    tensors |= to_family(model, FAMILIES[target.model_type])
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    tokens = special_tokens(model)
    # What forces a last token is for generation_config.json to say; Marian's config has a default of its own for it.
    write_json(folder / CONFIG_FILE, {**values, **tokens, "forced_eos_token_id": None, "dtype": dtype})
    write_json(folder / GENERATION_FILE, {**model.generation.to_dict(), **tokens})
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def special_tokens(model: DecoderOnly | EncoderDecoder) -> dict[str, Any]:
    """The ids that config.json and generation_config.json both hold."""
    generation: GenerationConfig = model.generation
    ends = list(generation.eos_ids)
    ids = {
        "bos_token_id": generation.bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": generation.pad_id,
    }
    return ids | ({"decoder_start_token_id": generation.start_id} if model.config.is_encoder_decoder else {})


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_seqlen: int) -> list[str]:
    """Writes the tokenizer as AutoTokenizer reads it; returns what is to say about it."""
    tokenizer.save(folder)
    if not tokenizer.files:  # one of our own: a foreign one keeps the files it came with
        path = folder / TOKENIZER_CONFIG_FILE
        known = read_json(path) if path.exists() else {}
        write_json(path, {**tokenizer_config(tokenizer, max_seqlen), **known})
    if (folder / TARGET_FILE).exists():
        return [f"transformers' AutoTokenizer reads the source's vocabulary only, the target's is in {TARGET_FILE}"]
    return []


def tokenizer_config(tokenizer: Tokenizer, max_seqlen: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokenizer.special.named(),
        "clean_up_tokenization_spaces": tokenizer.clean_up_spaces,
        "split_special_tokens": bool(tokenizer.source.encode_special_tokens),  # text that says "<eos>" is text
        "model_max_length": max_seqlen,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
