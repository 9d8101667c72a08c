"""``python -m examples.annalog_family FOLDER SMILES...``: a model of somebody else's, loaded as a family of ours.

ANNalog (MIT; ``pip install --no-deps annalog==1.0.6``) writes molecules like a given one: an
encoder-decoder of 4 million parameters over SMILES. Importing this module makes ``models.load`` know its family;
``convert`` writes the package's files as a folder to load. docs/families.md goes through it.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, decoders, pre_tokenizers, processors
from tokenizers import Tokenizer as Vocabulary
from tokenizers import models as kinds

from engine import LLM, BeamSearchParams
from models import TransformerConfig
from models.families import FAMILIES
from models.families.family import Entry, Family, Values, need
from models.tokenizer import SpecialTokens, Tokenizer

# What its code hands to its modules; the package has no config.json.
CONFIG = {
    "model_type": "annalog", "hid_dim": 256, "n_layers": 3, "n_heads": 8, "pf_dim": 512, "max_length": 102,
    "dropout": 0.1, "pad_token_id": 1, "decoder_start_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
SPECIAL = SpecialTokens(bos="<sos>", eos="<eos>", pad="<pad>", unk="<unk>")


def config(values: Values, names: Collection[str]) -> TransformerConfig:
    return TransformerConfig(
        "encoder_decoder",
        vocab_size=need(values, "vocab_size", int),
        dim=need(values, "hid_dim", int),
        depth=need(values, "n_layers", int),
        heads=need(values, "n_heads", int),
        ffn_dim=need(values, "pf_dim", int),
        max_seqlen=need(values, "max_length", int),
        dropout=need(values, "dropout", float),
        activation="relu",
        norm_place="post",
        positions="learned",
        scale_embedding=True,
        share_embeddings=False,
        tie_embeddings=False,
        head_bias=True,
    )


def stack(side: str) -> dict[str, Entry]:
    """The weights that the encoder and the decoder have in common."""
    ours, theirs = f"{side}.blocks.{{i}}", f"{side}.layers.{{i}}"
    return {
        f"{side}.embedding.tokens": f"{side}.tok_embedding",
        f"{side}.embedding.positions": f"{side}.pos_embedding",
        f"{ours}.attention.qkv": tuple(f"{theirs}.self_attention.fc_{part}" for part in "qkv"),
        f"{ours}.attention.out": f"{theirs}.self_attention.fc_o",
        f"{ours}.attention_norm": f"{theirs}.self_attn_layer_norm",
        f"{ours}.ffn.up": f"{theirs}.positionwise_feedforward.fc_1",
        f"{ours}.ffn.down": f"{theirs}.positionwise_feedforward.fc_2",
        f"{ours}.ffn_norm": f"{theirs}.ff_layer_norm",
    }


CROSS = "decoder.layers.{i}.encoder_attention"
WEIGHTS: dict[str, Entry] = {
    **stack("encoder"),
    **stack("decoder"),
    "decoder.blocks.{i}.cross_attention.q": f"{CROSS}.fc_q",
    "decoder.blocks.{i}.cross_attention.kv": (f"{CROSS}.fc_k", f"{CROSS}.fc_v"),
    "decoder.blocks.{i}.cross_attention.out": f"{CROSS}.fc_o",
    "decoder.blocks.{i}.cross_attention_norm": "decoder.layers.{i}.enc_attn_layer_norm",
    "lm_head": "decoder.fc_out",
}


def weights(config: TransformerConfig) -> Mapping[str, Entry]:
    return WEIGHTS


FAMILIES["annalog"] = Family(config, weights)


def convert(folder: Path) -> None:
    """Writes the installed package's weights and vocabulary as a folder that ``models.load`` reads."""
    spec = find_spec("annalog")  # which does not import it: its other needs, rdkit among them, stay uninstalled
    if spec is None or not spec.submodule_search_locations:
        sys.exit("error: annalog is missing: pip install --no-deps annalog==1.0.6")
    files = Path(spec.submodule_search_locations[0]) / "ckpt_and_vocab"
    tokens = read_tokens(files / "stereo_experiment_vocab_ttf.pkl")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": len(tokens)}, indent=2) + "\n")
    state = torch.load(files / "Lev_extended.pt", map_location="cpu", weights_only=True)
    save_file(state, folder / "model.safetensors")
    tokenizer(tokens).save(folder)


class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings and numbers. What can run code in a pickle is a name it looks up: it has none."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is more than plain data")


def read_tokens(path: Path) -> list[str]:
    """The vocabulary, in the order of ids."""
    with path.open("rb") as file:
        return list(PlainUnpickler(file).load()["itos"])


def tokenizer(tokens: list[str]) -> Tokenizer:
    """Atoms in brackets, two-digit ring numbers, Br and Cl are a token each, as is any other character."""
    vocabulary = Vocabulary(kinds.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Split(Regex(r"\[[^\]]*\]|%\d{2}|Br|Cl|[\s\S]"), "isolated")
    vocabulary.decoder = decoders.Fuse()
    vocabulary.add_special_tokens(list(SPECIAL.named().values()))
    vocabulary.encode_special_tokens = True  # a source that says <eos> does not end there
    around = [(token, tokens.index(token)) for token in ("<sos>", "<eos>")]
    vocabulary.post_processor = processors.TemplateProcessing("<sos> $A <eos>", special_tokens=around)
    return Tokenizer(vocabulary, special=SPECIAL)


def main(folder: str, *molecules: str) -> None:
    convert(Path(folder))
    for found in LLM(folder).beam_search(list(molecules), BeamSearchParams(4, max_tokens=None)):
        print(found.encoder_prompt, "->", *(sequence.text for sequence in found.sequences))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python -m examples.annalog_family FOLDER SMILES...")
    main(*sys.argv[1:])
