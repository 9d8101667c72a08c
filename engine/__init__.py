"""Policy on top of models: requests, scheduling, the cache, decoding; ``LLM`` is the door."""

from __future__ import annotations

from engine.async_llm import AsyncLLM, EngineDeadError
from engine.beam_params import BeamSearchParams
from engine.llm import LLM
from engine.metrics import EngineMetrics
from engine.request import (
    BeamSearchOutput,
    BeamSequence,
    CompletionOutput,
    Delta,
    EncoderOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    ScoreOutput,
)
from engine.sampling import SamplingParams
from engine.structured_outputs import StructuredOutputsParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSequence",
    "CompletionOutput",
    "Delta",
    "EncoderOutput",
    "EngineDeadError",
    "EngineMetrics",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "ScoreOutput",
    "StructuredOutputsParams",
]
