"""Scoring: the log-probability of a given target, from one pass over prompt and target."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from engine.engine import Engine
from engine.prompts import Prompt, PromptReader
from engine.request import Request, ScoreOutput
from engine.sampling import SamplingParams
from models.generation import GenerationConfig


def score_request(reader: PromptReader, request_id: str, prompt: Prompt, target: str | Sequence[int]) -> Request:
    """A request whose one sequence holds the target already. Raises ValueError for what cannot be scored."""
    request = reader.request(request_id, prompt, SamplingParams(max_tokens=None), seed=0)
    target_ids = reader.target_ids(target)
    if reader.config.is_encoder_decoder:
        target_ids = _whole_output(reader.generation, target_ids, len(request.prompt_token_ids))
    if not target_ids:
        raise ValueError("a target to score is empty")
    (sequence,) = request.sequences
    sequence.token_ids += target_ids
    sequence.max_length = len(sequence.token_ids)
    if sequence.max_length > reader.max_model_len:
        raise ValueError(
            f"prompt and target are {sequence.max_length} tokens, beyond max_model_len {reader.max_model_len}"
        )
    return request


def _whole_output(generation: GenerationConfig, target_ids: list[int], num_prompt: int) -> list[int]:
    """A target as the model would generate it: behind a first token it forces, before an end token."""
    first = generation.forced_bos_id if num_prompt == 1 else None
    if first is not None and target_ids[:1] != [first]:
        target_ids = [first, *target_ids]
    ends = generation.eos_ids[:1]
    return target_ids if not ends or target_ids[-1:] == [*ends] else [*target_ids, *ends]


@torch.inference_mode()
def score_step(engine: Engine) -> dict[str, ScoreOutput]:
    """Scores the next queued requests that fit, by request id."""
    schedule = engine.scheduler.schedule()
    encoded = [request for request in schedule.requests if request.encoder_prompt_token_ids is not None]
    if encoded:
        engine.runner.encode(encoded)
    logprobs = engine.runner.target_logprobs(schedule.sequences)
    results, start = {}, 0
    for sequence in schedule.sequences:
        end = start + len(sequence.token_ids)
        target = sequence.output_ids
        rows = logprobs[start + sequence.num_prompt - 1 : end - 1]
        chosen = rows.gather(1, torch.tensor(target)[:, None])[:, 0].tolist()
        results[sequence.request.request_id] = ScoreOutput(target, chosen, sum(chosen))
        # What is not finite must not stay behind in the cache: see KVCache.release.
        finite = all(map(math.isfinite, chosen))
        sequence.finish("stop" if finite else "error", error=None if finite else "the model gave no finite logits")
        start = end
    engine.scheduler.retire()
    return results
