"""The weights of attention, on demand: they add up to one, and are those that the formula gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import LLM, SamplingParams
from tests.conftest import tiny_model
from tests.engine.llms import llm_of, within


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_weights_add_up_and_see_nothing_ahead(architecture: str, backend: str) -> None:
    model = tiny_model(architecture)
    llm = llm_of(model, backend=backend)
    prompt = {"prompt_token_ids": [5, 6, 7, 8, 9, 5, 30, 31, 32, 33, 34]}
    output = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=9, ignore_eos=True), use_tqdm=False)[0]
    found = llm.attention_weights(prompt, output.outputs[0].token_ids)
    length = len(output.prompt_token_ids) + 9
    assert found.token_ids == output.prompt_token_ids + output.outputs[0].token_ids
    assert found.decoder.shape == (2, 4, length, length)
    torch.testing.assert_close(found.decoder.sum(-1), torch.ones(2, 4, length))
    assert not found.decoder.triu(1).any()
    if architecture == "encoder_decoder":
        assert found.cross is not None and found.encoder_token_ids == prompt["prompt_token_ids"]
        assert found.cross.shape == (2, 4, length, 11)
        torch.testing.assert_close(found.cross.sum(-1), torch.ones(2, 4, length))
        assert found.cross.std() > 0
    else:
        assert found.cross is None and found.encoder_token_ids is None


def test_the_weights_are_those_of_the_formula() -> None:
    """Of the first layer, whose queries and keys are easily had."""
    model = tiny_model("decoder_only", positions="learned")
    ids = torch.tensor([5, 9, 30, 31, 7, 7, 12])
    found = llm_of(model).attention_weights({"prompt_token_ids": ids[:3].tolist()}, ids[3:].tolist())
    with torch.no_grad():
        block = model.decoder.blocks[0]
        x = block.attention_norm(model.decoder.embedding(ids, torch.arange(7), None))
        q, k, _ = block.attention.qkv(x).split([32, 16, 16], dim=-1)
        q, k = q.view(7, 4, 8), k.view(7, 2, 8).repeat_interleave(2, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / 8**0.5
        expected = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(found.decoder[0], expected, atol=within(1e-5), rtol=within(1e-5))


def test_a_folder_that_the_core_runs_is_read_again(model_folder: Path) -> None:
    found = LLM(model_folder, device="cpu", quantization="int8").attention_weights("abc", "12")
    assert found.decoder.sum(-1).allclose(torch.ones(1))


def test_an_output_that_does_not_fit_is_refused() -> None:
    llm = llm_of(tiny_model("decoder_only"))
    with pytest.raises(ValueError, match="max_model_len"):
        llm.attention_weights({"prompt_token_ids": [5] * 40}, [5] * 40)
