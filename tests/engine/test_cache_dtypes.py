"""Caches of other types than the weights', where torch runs the model: int8 with scales, fp8, and floats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engine import LLM, BeamSearchParams, SamplingParams, runners
from engine.kv_cache import Table
from engine.runner import TorchRunner
from engine.tensor_cache import TensorStorage
from kernels.backend import TRITON_DEVICE
from kernels.reference import read_cache
from tests.conftest import tiny_config, tiny_model
from tests.engine.test_triton_decoding import DEVICE, prompts, tokens

TRITON = pytest.param("triton", marks=pytest.mark.skipif(TRITON_DEVICE != DEVICE, reason="Triton does not run here"))
BACKENDS = pytest.mark.parametrize("backend", [TRITON, "torch", "reference"])
KINDS = pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
BYTES = pytest.mark.parametrize("dtype", ["int8", "fp8"])
TOLERANCE = {"int8": 0.05, "fp8": 0.3, "bfloat16": 0.05, "float16": 5e-3}  # of a token's log-probability
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


def engine(kind: str, dtype: str, backend: str = "torch", **changes: Any) -> LLM:
    """A model whose logits lie far apart, so that a cache's rounding decides little."""
    options = {name: changes.pop(name) for name in list(changes) if name in ("enable_prefix_caching",)}
    model = tiny_model(kind, tie_embeddings=False, **changes)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    limits = {"max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 20}
    return LLM.from_model(model.to(DEVICE), None, backend=backend, kv_cache_dtype=dtype, **(limits | options))


def storage_of(llm: LLM) -> TensorStorage:
    runner = llm.engine.runner
    assert isinstance(runner, TorchRunner)
    return runner.storage


def agreement(ours: list[list[list[int]]], exact: list[list[list[int]]]) -> float:
    """The share of tokens that are equal, each behind equal ones: one that differs ends what is compared."""
    equal = total = 0
    for mine, others in zip(ours, exact, strict=True):
        for a, b in zip(mine, others, strict=True):
            differs = [x != y for x, y in zip(a, b, strict=True)]
            equal += differs.index(True) if True in differs else len(a)
            total += len(a)
    return equal / total


@BACKENDS
@KINDS
@BYTES
def test_tokens_are_mostly_those_of_the_exact_cache(kind: str, dtype: str, backend: str) -> None:
    given = prompts(1, 18, 5)
    exact, ours = tokens(engine(kind, "auto"), given, GREEDY), tokens(engine(kind, dtype, backend), given, GREEDY)
    assert agreement(ours, exact) >= {"int8": 0.9, "fp8": 0.7}[dtype]


@BACKENDS
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_scores_are_nearly_those_of_the_exact_cache(dtype: str, backend: str) -> None:
    targets = [[9, 30, 17, 5], [40, 41, 8]]
    exact, ours = (engine("encoder_decoder", of, backend).score(prompts(20, 3), targets) for of in ("float32", dtype))
    for a, b in zip(ours, exact, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=TOLERANCE[dtype])
        assert a.logprobs != b.logprobs  # it was rounded


@pytest.mark.parametrize("cache", ["float32", "bfloat16", "float16", "int8", "fp8"])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16])
@pytest.mark.skipif(TRITON_DEVICE != DEVICE, reason="Triton does not run here")
def test_weights_of_half_precision_beside_any_cache(weights: torch.dtype, cache: str) -> None:
    model = tiny_model("decoder_only").to(DEVICE, weights)
    made = [
        LLM.from_model(model, None, backend=backend, kv_cache_dtype=cache, kv_cache_memory_bytes=1 << 20)
        for backend in ("triton", "torch")
    ]
    scores = [llm.score(prompts(9), [[9, 30, 17]])[0].logprobs for llm in made]
    assert scores[0] == pytest.approx(scores[1], abs=0.1)


def test_a_block_takes_what_is_kept_in_it() -> None:
    config, wide = tiny_config("decoder_only"), tiny_config("decoder_only", dim=256)
    numbers = 2 * 2 * 16 * 2 * 8
    for dtype, expected in ((torch.float32, 4), (torch.bfloat16, 2), (torch.float8_e4m3fn, 1), (torch.int8, 1.5)):
        assert TensorStorage.bytes_per_block(config, 16, dtype) == numbers * expected
        storage = TensorStorage(config, 3, 16, torch.device("cpu"), dtype)
        kept = [x for x in (storage.k, storage.v, storage.k_scale, storage.v_scale) if x is not None]
        assert sum(x.nbytes for x in kept) == 3 * numbers * expected
    of_bytes, of_half = (TensorStorage.bytes_per_block(wide, 16, dtype) for dtype in (torch.int8, torch.bfloat16))
    assert of_half / of_bytes > 1.88  # heads of 64
    blocks = {dtype: engine("decoder_only", dtype).engine.cache.num_blocks for dtype in ("bfloat16", "fp8", "float32")}
    assert blocks["fp8"] == 2 * blocks["bfloat16"] == 4 * blocks["float32"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float16])
def test_blocks_are_copied_and_cleared_whole(dtype: torch.dtype) -> None:
    storage = TensorStorage(tiny_config("decoder_only"), 5, 4, torch.device(DEVICE), dtype)
    torch.manual_seed(0)
    for layer in (0, 1):
        k, v = torch.randn(2, 20, 2, 8, device=DEVICE) * 3
        storage.append(layer, k, v, torch.arange(20, device=DEVICE))
    before = contents(storage)
    table: tuple[Table, ...] = (np.array([0, 1], np.int32), np.array([1, 4], np.int32))
    storage.copy(*table)
    assert torch.equal(contents(storage), before[[0, 0, 2, 3, 1]])
    storage.append(0, k[:1] * torch.nan, v[:1] * torch.nan, torch.tensor([9], device=DEVICE))
    assert contents(storage)[2].isnan().any()
    storage.clear([2, 3])
    assert torch.equal(contents(storage)[[0, 1, 4]], before[[0, 0, 1]])
    assert not contents(storage)[2:4].any()


def contents(storage: TensorStorage) -> torch.Tensor:
    """Keys and values (num_blocks, numbers), as attention reads them."""
    blocks, layers = torch.arange(storage.num_blocks, device=DEVICE), (storage.layer(i) for i in (0, 1))
    parts = [
        read_cache(cache, blocks, scale).float().flatten(1)
        for x in layers
        for cache, scale in ((x.k, x.k_scale), (x.v, x.v_scale))
    ]
    return torch.cat(parts, 1)


@BACKENDS
@KINDS
def test_samples_and_beams_copy_scales_with_their_blocks(
    kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled, found, copied = [], [], 0
    copy = TensorStorage.copy

    def count(storage: TensorStorage, sources: Table, targets: Table) -> None:
        nonlocal copied
        copied += len(sources)
        copy(storage, sources, targets)

    monkeypatch.setattr(TensorStorage, "copy", count)
    params = SamplingParams(n=2, temperature=0.7, seed=7, max_tokens=4, ignore_eos=True)
    search = BeamSearchParams(2, max_tokens=5)
    for llm in (engine(kind, "float32"), engine(kind, "int8", backend)):
        sampled.append(tokens(llm, prompts(3, 9), params))
        found.append([[s.token_ids for s in output.sequences] for output in llm.beam_search(prompts(7), search)])
        assert copied > 0
        copied = 0
    assert agreement(sampled[1], sampled[0]) >= 0.8
    assert [hypotheses[0] for hypotheses in found[1]] == [hypotheses[0] for hypotheses in found[0]]


@BYTES
def test_a_prompt_found_again_gives_the_same_tokens(dtype: str) -> None:
    llm, fresh = engine("decoder_only", dtype), engine("decoder_only", dtype, enable_prefix_caching=False)
    llm.engine.weights_may_change = False
    cold, warm = (tokens(llm, prompts(40), GREEDY) for _ in range(2))
    assert cold == warm == tokens(fresh, prompts(40), GREEDY)
    assert llm.engine.cache.counts.prompt_hits > 0


@BACKENDS
@BYTES
def test_what_is_not_finite_leaves_nothing_behind(dtype: str, backend: str) -> None:
    model = tiny_model("decoder_only", tie_embeddings=False)
    with torch.no_grad():
        model.decoder.embedding.tokens.weight[50] = float("nan")
    llm = LLM.from_model(
        model.to(DEVICE), None, backend=backend, kv_cache_dtype=dtype, max_num_seqs=2, kv_cache_memory_bytes=40_000
    )
    before = tokens(llm, prompts(30), GREEDY)
    broken = llm.generate({"prompt_token_ids": [50] * 20}, GREEDY, use_tqdm=False)[0].outputs[0]
    assert broken.finish_reason == "error" and broken.error
    assert tokens(llm, prompts(30), GREEDY) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "native", "kv_cache_dtype": "fp8"}, "fp8: the native backend takes auto, float32, bfloat16, int8"),
        ({"backend": "native", "kv_cache_dtype": "float16"}, "float16: the native backend takes"),
        ({"kv_cache_dtype": "int4"}, "unknown kv_cache_dtype 'int4': choose one of auto, float32, .*fp8"),
        ({"kv_cache_dtype": torch.int8}, "unknown kv_cache_dtype"),
        ({"kv_cache_dtype": None}, "unknown kv_cache_dtype"),
    ],
)
def test_what_there_is_not_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM.from_model(tiny_model("decoder_only"), None, device="cpu", **options)


@pytest.mark.skipif(TRITON_DEVICE != DEVICE, reason="Triton does not run here")
def test_fp8_is_refused_where_the_kernels_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "serves_float8", lambda: False)
    with pytest.raises(ValueError, match=r"fp8, which needs a GPU of compute capability 8\.9"):
        engine("decoder_only", "fp8", "triton")
    assert tokens(engine("decoder_only", "int8", "triton"), prompts(3), GREEDY)
