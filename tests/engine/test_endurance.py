"""A long life: a million tokens leave nothing behind."""

from __future__ import annotations

import gc
import random
from pathlib import Path

import pytest

from engine import LLM, BeamSearchParams, SamplingParams
from tests.conftest import tiny_model


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])
def test_memory_does_not_grow_with_tokens(architecture: str) -> None:
    """Half a million each: prompts never seen before, samples, beams, guesses, aborts, on a pool that is always full.

    The heap settles by a few megabytes; a kilobyte kept of each request would be forty.
    """
    llm = LLM.from_model(
        tiny_model(architecture, depth=1), None, backend="native", max_num_seqs=64, kv_cache_memory_bytes=400_000,
        speculative_config={"method": "ngram"},
    )  # fmt: skip
    rng, number, size = random.Random(0), 0, 0
    while llm.get_metrics().num_tokens < 500_000:
        while llm.engine.scheduler.num_waiting < 40:
            number += 1
            prompt = {"prompt_token_ids": [rng.randrange(4, 60) for _ in range(rng.randrange(1, 30))]}
            params = SamplingParams(
                n=rng.choice([1, 1, 3]), temperature=1.0, max_tokens=30, ignore_eos=rng.random() < 0.8
            )
            search = BeamSearchParams(2, max_tokens=12)
            llm.add_request(str(number), prompt, search if rng.random() < 0.1 else params, rng.choice([0, 1]))
        if rng.random() < 0.05:
            llm.abort(str(rng.randrange(max(1, number - 60), number + 1)))
        llm.step()
        if size == 0 and llm.get_metrics().num_tokens > 100_000:
            gc.collect()
            size = resident_bytes()
    gc.collect()
    assert resident_bytes() - size < 12 << 20
    assert llm.get_metrics().num_preemptions > 50
