"""Small models and folders that several tests need."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from models import DecoderOnly, EncoderDecoder, TransformerConfig, build_model
from models.checkpoint import save
from models.tokenizer import Tokenizer, train_vocabulary
from tests import interpreter

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.install()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network for a model
TEXTS = ["abcdefghijklmnopqrstuvwxyz 0123456789+-.", "안녕하세요 세계"]


def tiny_config(architecture: str, **changes: object) -> TransformerConfig:
    values: dict[str, object] = {
        "vocab_size": 60,
        "dim": 32,
        "depth": 2,
        "heads": 4,
        "kv_heads": 2,
        "max_seqlen": 64,
    }
    if architecture == "encoder_decoder":
        values |= {"positions": "sinusoidal", "encoder_depth": 3}
    return TransformerConfig(architecture, **(values | changes))  # type: ignore[arg-type]


def tiny_model(architecture: str, seed: int = 0, **changes: object) -> DecoderOnly | EncoderDecoder:
    torch.manual_seed(seed)
    return build_model(tiny_config(architecture, **changes)).eval()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_vocabulary("char", TEXTS, 0))


@pytest.fixture(scope="session", params=["encoder_decoder", "decoder_only"])
def model_folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer
) -> Path:
    """A checkpoint folder of a random model of either kind."""
    folder = tmp_path_factory.mktemp(request.param)
    save(folder, tiny_model(request.param, vocab_size=tokenizer.vocab_size), tokenizer)
    return folder
