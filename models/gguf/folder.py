"""GGUF files, llama.cpp's format, read as if they were the Hugging Face folder they were converted from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.quantization import QuantizedWeight
from models.files import CheckpointError
from models.gguf.blocks import check_types, read_floats, read_quantized
from models.gguf.config import ROPE_FACTORS, read_config
from models.gguf.file import GgufFile
from models.gguf.vocabulary import GgufVocabulary, read_vocabulary
from models.tokenizer import SpecialTokens, Tokenizer
from models.vocabularies.builders import surround
from models.weights import Weights

LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.#.attn_norm": "model.layers.#.input_layernorm",
    "blk.#.attn_q": "model.layers.#.self_attn.q_proj",
    "blk.#.attn_k": "model.layers.#.self_attn.k_proj",
    "blk.#.attn_v": "model.layers.#.self_attn.v_proj",
    "blk.#.attn_output": "model.layers.#.self_attn.o_proj",
    "blk.#.ffn_norm": "model.layers.#.post_attention_layernorm",
    "blk.#.ffn_gate": "model.layers.#.mlp.gate_proj",
    "blk.#.ffn_up": "model.layers.#.mlp.up_proj",
    "blk.#.ffn_down": "model.layers.#.mlp.down_proj",
}


def open_gguf(path: Path) -> tuple[dict[str, Any], Weights, Tokenizer | None]:
    """What config.json would hold, the weights under their Hugging Face names, and the tokenizer if the file has one.

    Raises CheckpointError for a file that is broken, or of a model, a tensor type or a vocabulary unknown to us.
    """
    file = GgufFile(path)
    config, vocabulary = read_config(file), read_vocabulary(file)
    if vocabulary is not None:
        ends = [end for end in (vocabulary.eos_id, vocabulary.eot_id) if end is not None]
        eos: int | list[int] | None = ends if len(set(ends)) > 1 else vocabulary.eos_id
        config |= {"bos_token_id": vocabulary.bos_id, "eos_token_id": eos, "pad_token_id": vocabulary.pad_id}
    return config, GgufWeights(file, config), None if vocabulary is None else _tokenizer(vocabulary)


def _tokenizer(given: GgufVocabulary) -> Tokenizer:
    def token(token_id: int | None) -> str | None:
        return None if token_id is None else given.vocabulary.id_to_token(token_id)

    special = SpecialTokens(token(given.bos_id), token(given.eos_id), token(given.pad_id), token(given.unk_id))
    before, after = [special.bos] if given.add_bos else [], [special.eos] if given.add_eos else []
    if given.add_bos or given.add_eos:
        surround(given.vocabulary, [token for token in before if token], [token for token in after if token])
    return Tokenizer(given.vocabulary, special=special, chat_template=given.chat_template)


class GgufWeights(Weights):
    """A GGUF file's tensors under their Hugging Face names."""

    def __init__(self, file: GgufFile, config: dict[str, Any]) -> None:
        check_types(file)
        self._file = file
        self._sources = _source_names(file, _t5_names(config) if config["model_type"] == "t5" else LLAMA_NAMES)
        # llama.cpp turns neighbours, Hugging Face the halves of a head: converting reorders the rows that are turned.
        turned = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        self._turned_heads = {name: config[key] for name, key in turned.items() if key in config}

    def names(self) -> list[str]:
        return list(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[self._sources[name]].shape

    def read(self, name: str) -> Tensor:
        values, order = read_floats(self._file, self._sources[name]), self._order(name)
        return values if order is None else values[order]

    def quantized(self, name: str) -> QuantizedWeight | None:
        weight, order = read_quantized(self._file, self._sources[name]), self._order(name)
        return weight if weight is None or order is None else weight.rows(order)

    def _order(self, name: str) -> Tensor | None:
        """Of the rows of turned heads, which are interleaved pairs: a first half and a second."""
        heads, shape = self._turned_heads.get(name.split(".")[-2]), self.shape(name)
        if heads is None:
            return None
        if shape[0] % (2 * heads):
            raise CheckpointError(f"{self._file.path}: {name} is {shape}, not pairs of rows a head")
        return torch.arange(shape[0]).view(heads, -1, 2).transpose(1, 2).flatten()


def _source_names(file: GgufFile, names: dict[str, str]) -> dict[str, str]:
    """The file's names by the Hugging Face names they stand for."""
    sources = {}
    for source in file.tensors:
        stem, _, suffix = source.rpartition(".")
        number = re.search(r"(?<=blk\.)\d+(?=\.)", stem)
        target = names.get(stem.replace(f"blk.{number[0]}.", "blk.#.", 1) if number else stem)
        if target is not None and suffix in ("weight", "bias"):
            sources[f"{target.replace('#', number[0]) if number else target}.{suffix}"] = source
        elif source != ROPE_FACTORS:  # which config.json says in other words
            raise CheckpointError(f"{file.path} holds {source[:80]!r}, which no model that we know has")
    return sources


def _t5_names(config: dict[str, Any]) -> dict[str, str]:
    names = {"token_embd": "shared", "output": "lm_head"}
    for short, stack in (("enc", "encoder"), ("dec", "decoder")):
        branches = [("attn", "SelfAttention"), ("cross_attn", "EncDecAttention")][: 1 if short == "enc" else 2]
        for layer, (branch, module) in enumerate(branches):
            source, target = f"{short}.blk.#.{branch}", f"{stack}.block.#.layer.{layer}"
            names[f"{source}_norm"] = f"{target}.layer_norm"
            names[f"{source}_rel_b"] = f"{target}.{module}.relative_attention_bias"
            names |= {f"{source}_{part}": f"{target}.{module}.{part}" for part in "qkvo"}
        source, target = f"{short}.blk.#.ffn", f"{stack}.block.#.layer.{len(branches)}"
        names[f"{source}_norm"] = f"{target}.layer_norm"
        names[f"{source}_gate"] = f"{target}.DenseReluDense.wi_0"
        names[f"{source}_up"] = f"{target}.DenseReluDense.{'wi' if config['feed_forward_proj'] == 'relu' else 'wi_1'}"
        names[f"{source}_down"] = f"{target}.DenseReluDense.wo"
        names[f"{short}.output_norm"] = f"{stack}.final_layer_norm"
    return names
