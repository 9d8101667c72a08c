"""The models of ``engine --workload gpu``: published architectures with random weights, made where they run.

No folder is written and nothing is downloaded: a config.json's values say what a model is, its family reads them, and
the weights are drawn on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from models import DecoderOnly, EncoderDecoder, TransformerConfig, build_model
from models.families import family_of
from models.layers import Attention, FeedForward
from models.positions import RelativePositions

SENTENCE, ARTICLE = (32, 32), (260, 440)  # tokens of a prompt or source: the least and the most
Published = Mapping[int, Mapping[int, int | None]]


@dataclass(frozen=True)
class GpuShape:
    """A model, and what it is asked for.

    Attributes:
        model_type, values: those of its config.json. stored: names of its file's tensors that decide over the config.
        lengths: of prompts and sources, the least and the most tokens.
        new_tokens: of a greedy output; of a beam search ``beam_tokens``.
        published: the batches to run by number of beams, with others' tokens a second where there are any.
    """

    model_type: str
    values: dict[str, Any]
    published: Published
    lengths: tuple[int, int] = SENTENCE
    new_tokens: int = 128
    beam_tokens: int = 64
    stored: frozenset[str] = field(default_factory=frozenset)

    @property
    def config(self) -> TransformerConfig:
        return family_of(self.model_type).config(self.values, self.stored)

    def tokens(self, beams: int) -> int:
        return self.new_tokens if beams == 1 else self.beam_tokens


SHAPES = {
    # TensorRT-LLM on one H100 in bf16: at most 128 tokens, inputs of 260 to 440.
    "flan-t5-xl": GpuShape(
        "t5",
        {
            "vocab_size": 32128, "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32,
            "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
        },
        published={1: {32: 3312, 64: 4184, 128: 4768}}, lengths=ARTICLE, stored=frozenset({"lm_head.weight"}),
    ),
    "bart-large-cnn": GpuShape(
        "bart",
        {
            "vocab_size": 50264, "d_model": 1024, "encoder_layers": 12, "decoder_layers": 12,
            "encoder_attention_heads": 16, "decoder_attention_heads": 16, "encoder_ffn_dim": 4096,
            "decoder_ffn_dim": 4096, "max_position_embeddings": 1024,
        },
        published={1: {32: 12611, 64: 22007, 128: 31544}}, lengths=ARTICLE, stored=frozenset({"final_logits_bias"}),
    ),
    # FasterTransformer on an A100-40GB in fp16, with four beams.
    "t5-base": GpuShape(
        "t5",
        {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
        published={1: {1: None, 32: None}, 4: {1: 671, 32: 7102, 128: 11312}},
    ),
    "phi-1.5": GpuShape(
        "phi",
        {
            "vocab_size": 51200, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
            "num_attention_heads": 32, "max_position_embeddings": 2048, "partial_rotary_factor": 0.5,
        },
        published={1: {1: None}},
    ),
    "gpt2": GpuShape(
        "gpt2",
        {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024},
        published={1: {1: None, 32: None}},
    ),
}  # fmt: skip


def make_model(shape: GpuShape, device: torch.device, dtype: torch.dtype) -> DecoderOnly | EncoderDecoder:
    """The model, drawn on the device; the same weights every time."""
    torch.manual_seed(0)
    with torch.device(device):
        model = build_model(shape.config)
    _enliven(model)
    return model.to(device, dtype).eval()


@torch.no_grad()
def _enliven(model: DecoderOnly | EncoderDecoder) -> None:
    """Greedy search on a fresh model repeats one token: what all tokens have in common adds up from block to block.

    So attention looks at few tokens, feed-forwards are large, and rid of what their activations' mean gives; all that
    a fresh model has as zero is drawn.
    """
    post = model.config.norm_place == "post"
    for module in model.modules():
        if isinstance(module, RelativePositions):
            nn.init.normal_(module.table)
        elif isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, Attention):
            queries = module.q if module.cross else module.qkv
            unscaled = model.config.softmax_scale == 1
            queries.weight[: module.heads * module.head_dim] *= 2 * (module.head_dim**-0.5 if unscaled else 1)
            module.out.weight *= 0.3 if post else 1
        elif isinstance(module, FeedForward):
            module.up.weight *= 1 if post else 2
            module.down.weight *= 2 if post else 4
            module.down.weight -= module.down.weight.mean(1, keepdim=True)
