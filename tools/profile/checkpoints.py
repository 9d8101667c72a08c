"""Random models of the shapes people use, saved as Hugging Face folders: what ``load`` and ``engine`` open."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

TOKENS, BLOCKS = 1 / 16, 1.5  # times what weights are initialised with


@dataclass(frozen=True)
class Shape:
    """A model of transformers: its model_type, what its config differs in, and its special tokens."""

    model_type: str
    config: dict[str, Any]
    seq2seq: bool = False
    special: dict[str, int] = field(default_factory=lambda: {"<pad>": 0, "</s>": 1, "<unk>": 2})


SHAPES = {
    "gpt2": Shape("gpt2", {}),
    "t5-base": Shape(
        "t5", {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}, seq2seq=True
    ),
    "t5-small": Shape("t5", {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8}, seq2seq=True),
    "marian": Shape(  # of OPUS-MT, whose last token is the padding that a target starts with
        "marian",
        {
            "vocab_size": 58101, "d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 2048,
            "decoder_ffn_dim": 2048, "encoder_attention_heads": 8, "decoder_attention_heads": 8,
            "activation_function": "swish", "scale_embedding": True, "static_position_embeddings": True,
            "max_position_embeddings": 512, "forced_eos_token_id": None,
        },
        seq2seq=True,
        special={"<pad>": 58100, "</s>": 0, "<unk>": 1},
    ),
}  # fmt: skip


def make_checkpoint(shape: Shape, folder: Path) -> None:
    """A random model with a vocabulary of words (w7 is token 7), as transformers saves both."""
    import transformers

    pad, end = shape.special["<pad>"], shape.special["</s>"]
    tokens = {"pad_token_id": pad, "eos_token_id": end, "bos_token_id": end}
    if shape.seq2seq:
        tokens["decoder_start_token_id"] = pad
    config = transformers.AutoConfig.for_model(shape.model_type, **{**tokens, **shape.config})
    auto = transformers.AutoModelForSeq2SeqLM if shape.seq2seq else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config)
    _raise_blocks(model)
    model.save_pretrained(folder)
    _save_vocabulary(shape, config.vocab_size, folder)


def _raise_blocks(model: Any) -> None:
    """Greedy search on a model as it is initialised repeats one token, whatever its blocks compute.

    Much more than this, and attention is so sharp that float32's rounding decides over the tokens.
    """
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(TOKENS)
        for weight in model.parameters():
            if weight.ndim == 2 and not any(weight is table for table in tables):
                weight.mul_(BLOCKS)


def _save_vocabulary(shape: Shape, size: int, folder: Path) -> None:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = {number: word for word, number in shape.special.items()}
    words = {special.get(i, f"w{i}"): i for i in range(size)}
    vocabulary = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", eos_token="</s>", bos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    written = json.loads(path.read_text())
    # transformers 5 writes a name that 4, which some peers still need, does not know; both know this one.
    path.write_text(json.dumps({**written, "tokenizer_class": "PreTrainedTokenizerFast"}))
