"""Decoding through the paged cache gives what a full forward pass gives."""

from __future__ import annotations

import pytest
import torch

from engine import SamplingParams
from models import EncoderDecoder
from tests.conftest import tiny_model
from tests.engine.llms import llm_of, within

LENGTHS = [1, 17, 5, 33, 16]  # around block_size, ragged
SHAPES: list[dict[str, object]] = [
    {},
    {"norm": "rmsnorm", "norm_place": "post", "activation": "swiglu"},
    {"positions": "learned", "kv_heads": 4},
    {"positions": "rotary", "bias": False, "tie_embeddings": False},
]


def prompts(seed: int = 1) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"prompt_token_ids": torch.randint(4, 60, (n,), generator=generator).tolist()} for n in LENGTHS]


def full_logits(model: torch.nn.Module, prompt: list[int], output: list[int]) -> torch.Tensor:
    """Logits of each output token, (len(output), vocab), from one uncached pass."""
    if isinstance(model, EncoderDecoder):
        return model(torch.tensor([prompt]), torch.tensor([[1, *output[:-1]]]))[0]
    return model(torch.tensor([prompt + output[:-1]]))[0, len(prompt) - 1 :]


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_cached_decoding_of_a_ragged_batch_equals_a_full_forward_pass(
    architecture: str, shape: dict[str, object]
) -> None:
    model = tiny_model(architecture, **shape)
    llm = llm_of(model)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=0)
    for prompt, result in zip(prompts(), llm.generate(prompts(), params, use_tqdm=False), strict=True):
        completion = result.outputs[0]
        logits = full_logits(model, prompt["prompt_token_ids"], completion.token_ids)
        assert completion.token_ids == logits.argmax(-1).tolist()
        assert completion.logprobs is not None
        cached = [entry[token].logprob for entry, token in zip(completion.logprobs, completion.token_ids, strict=True)]
        torch.testing.assert_close(
            torch.tensor(cached), logits.log_softmax(-1).amax(-1), atol=within(2e-5), rtol=within(2e-5)
        )


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])
def test_every_backend_decodes_the_same_even_when_requests_join_late(architecture: str) -> None:
    model = tiny_model(architecture)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    outputs = [
        llm_of(model, backend=backend, max_num_seqs=2).generate(prompts(), params, use_tqdm=False)
        for backend in ("native", "torch", "reference")
    ]
    tokens = [[o.outputs[0].token_ids for o in each] for each in outputs]
    assert tokens[0] == tokens[1] == tokens[2]


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])
def test_a_request_gives_the_same_tokens_alone_and_among_others(architecture: str) -> None:
    model = tiny_model(architecture)
    params = SamplingParams(temperature=1.0, top_k=20, max_tokens=12, seed=7, ignore_eos=True)
    together = llm_of(model).generate(prompts(), params, use_tqdm=False)
    queued = llm_of(model, max_num_seqs=2).generate(prompts(), params, use_tqdm=False)
    alone = [llm_of(model).generate(p, params, use_tqdm=False)[0] for p in prompts()]
    tokens = [[output.outputs[0].token_ids for output in outputs] for outputs in (together, queued, alone)]
    assert tokens[0] == tokens[1] == tokens[2]


def test_every_block_and_row_is_free_again_when_all_is_done() -> None:
    llm = llm_of(tiny_model("encoder_decoder"))
    cache = llm.engine.cache
    before = cache.pool.num_available, cache.num_free_rows
    llm.generate(prompts(), SamplingParams(max_tokens=5, n=3), use_tqdm=False)
    next(stream := llm.stream(prompts(), SamplingParams(max_tokens=50)))
    stream.close()
    assert (cache.pool.num_available, cache.num_free_rows) == before
    assert not any(cache.pool.holders)
    assert not llm.engine.has_unfinished_requests()


def test_a_small_cache_serves_requests_in_turn() -> None:
    model = tiny_model("decoder_only")
    block = 2 * 2 * 16 * 2 * 8 * 4  # k and v, layers, tokens, kv heads, head_dim, bytes
    small = llm_of(model, kv_cache_memory_bytes=4 * block)
    assert small.engine.cache.num_blocks == 4
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    queued = small.generate(prompts(), params, use_tqdm=False)
    roomy = llm_of(model).generate(prompts(), params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in queued] == [o.outputs[0].token_ids for o in roomy]
    with pytest.raises(ValueError, match="cache blocks"):
        small.generate(prompts(), SamplingParams(max_tokens=None, n=2), use_tqdm=False)
