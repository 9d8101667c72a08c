"""Scoring: the log-probability of a given target, from one pass over prompt and target."""

from __future__ import annotations

from collections.abc import Sequence

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
    request.scored, request.only_scores = (len(request.prompt_token_ids), sequence.max_length), True
    return request


def _whole_output(generation: GenerationConfig, target_ids: list[int], num_prompt: int) -> list[int]:
    """A target as the model would generate it: behind a first token it forces, before an end token."""
    first = generation.forced_bos_id if num_prompt == 1 else None
    if first is not None and target_ids[:1] != [first]:
        target_ids = [first, *target_ids]
    ends = generation.eos_ids[:1]
    return target_ids if not ends or target_ids[-1:] == [*ends] else [*target_ids, *ends]


def score_output(request: Request) -> ScoreOutput:
    """What the caller gets of a finished request that only scores."""
    (sequence,) = request.sequences
    target = sequence.output_ids
    logprobs = [entry[token_id].logprob for entry, token_id in zip(request.scores, target, strict=True)]
    return ScoreOutput(target, logprobs, sum(logprobs))
