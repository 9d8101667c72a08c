"""Run by ``tools.profile engine --workload copying`` in a process of its own: answers texts, with guesses or without.

As ``engine_worker``, but opened by {"folder": ..., "precision": ..., "threads": ..., "sequences": ..., "lookup": true},
and a line is {"texts": [...], "batch": 8, "new_tokens": 128}: each text is the one message of a chat. It is answered by
the seconds it took, the mean seconds to a first token, the tokens, and how many were guessed and how many were right.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from engine import LLM, RequestOutput, SamplingParams


def opened(folder: str, precision: str, threads: int, sequences: int, lookup: bool) -> LLM:
    quantized: dict[str, Any] = {} if precision == "fp32" else {"quantization": precision}
    return LLM(
        folder, num_threads=threads, max_num_seqs=sequences, speculative_config={"method": "ngram"} if lookup else None,
        enable_prefix_caching=False, **quantized,
    )  # fmt: skip


def answer(llm: LLM, texts: list[str], batch: int, new_tokens: int) -> dict[str, Any]:
    """So many texts at a time, as far as the model goes on by itself: what it says after its end nobody reads."""
    prompts = [llm.chat_prompt([{"role": "user", "content": text}]) for text in texts]
    params = SamplingParams(temperature=0, max_tokens=new_tokens)
    before, start, outputs = counts(llm), time.perf_counter(), []
    for i in range(0, len(prompts), batch):
        outputs += llm.generate(prompts[i : i + batch], params, use_tqdm=False)
    seconds = time.perf_counter() - start
    guessed, right = (after - count for after, count in zip(counts(llm), before, strict=True))
    return {
        "seconds": seconds, "first": sum(map(first, outputs)) / len(outputs), "guessed": guessed, "right": right,
        "tokens": [output.outputs[0].token_ids for output in outputs],
    }  # fmt: skip


def first(output: RequestOutput) -> float:
    """Seconds to a request's first token."""
    metrics = output.metrics
    assert metrics is not None and metrics.first_token_time is not None
    return metrics.first_token_time - metrics.arrival_time


def counts(llm: LLM) -> tuple[int, int]:
    """Tokens that have been guessed, and those that were right."""
    speculation = llm.engine.speculation
    return (0, 0) if speculation is None else (speculation.num_guessed, speculation.num_right)


def main(who: str, settings: str) -> None:
    # Libraries print as they like; what we say goes where they cannot write.
    say = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    llm = opened(**json.loads(settings))
    print(json.dumps({}), file=say)
    for line in sys.stdin:
        print(json.dumps(answer(llm, **json.loads(line))), file=say)


if __name__ == "__main__":
    main(*sys.argv[1:])
