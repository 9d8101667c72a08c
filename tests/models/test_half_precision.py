"""T5 keeps its head in float16: activations far beyond float16's range neither overflow nor lose the answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import models
from engine import LLM, SamplingParams
from models.transformer import EncoderDecoder

# The widths of T5-large and Flan-T5-large; all their layers where time allows.
SHAPES = {
    "t5-large": {"d_ff": 4096, "feed_forward_proj": "relu"},
    "flan-t5-large": {"d_ff": 2816, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}


def save_t5(folder: Path, shape: str, layers: int) -> Path:
    """A random model whose feed-forwards put out more than float16 holds, as trained T5s do."""
    config = transformers.T5Config(
        vocab_size=500,
        d_model=1024,
        d_kv=64,
        num_heads=16,
        num_layers=layers,
        decoder_start_token_id=0,
        **SHAPES[shape],
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "DenseReluDense" in name:
                parameter.normal_(std=parameter.shape[1] ** -0.5 * (3e5 if name.endswith("wo.weight") else 2))
    model.save_pretrained(folder)
    return folder


@torch.inference_mode()
def logits(folder: Path, dtype: torch.dtype, *, plain: bool = False) -> torch.Tensor:
    model, _ = models.load(folder, dtype=dtype)
    if plain:  # as a model is that says nothing of its range
        model.to(dtype)
        for stack in model.stacks:
            stack.embedding.widen = False
    assert isinstance(model, EncoderDecoder)
    torch.manual_seed(1)
    source, target = torch.randint(3, 500, (2, 12)), torch.randint(3, 500, (2, 5))
    return model(source, target, source_lengths=torch.tensor([12, 7])).float()


def check(folder: Path) -> None:
    exact = logits(folder, torch.float32)
    assert not logits(folder, torch.float16, plain=True).isfinite().all(), "nothing overflows: this test proves nothing"
    for dtype, tolerance in ((torch.float16, 0.02), (torch.bfloat16, 0.1)):
        error = (logits(folder, dtype) - exact).std() / exact.std()
        assert error < tolerance, f"{dtype}: {error}"  # NaN is not less either


@pytest.mark.parametrize("shape", SHAPES)
def test_what_overflows_a_plain_float16_t5_does_not_overflow_ours(shape: str, tmp_path: Path) -> None:
    check(save_t5(tmp_path, shape, layers=2))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_engine_generates_with_it(shape: str, dtype: str, tmp_path: Path) -> None:
    llm = LLM(save_t5(tmp_path, shape, layers=1), dtype=dtype, max_num_seqs=2, max_model_len=32)
    prompts = [{"prompt_token_ids": list(range(3, 15))}, {"prompt_token_ids": [7]}]
    for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), use_tqdm=False):
        (completion,) = output.outputs
        assert completion.error is None
        assert len(completion.token_ids) == 6
    assert all(score.total < 0 for score in llm.score(prompts, [[5, 6], [8]]))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_nor_does_it_with_all_layers(shape: str, tmp_path: Path) -> None:
    check(save_t5(tmp_path, shape, layers=24))


def test_the_wide_layers_alone_stay_float32(tmp_path: Path) -> None:
    model, _ = models.load(save_t5(tmp_path, "t5-large", layers=1), dtype=torch.float16)
    wide = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert wide == {"encoder.blocks.0.ffn.down.weight", "decoder.blocks.0.ffn.down.weight"}
