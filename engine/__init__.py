"""Policy on top of models: requests, scheduling, the cache, decoding; ``LLM`` is the door."""

from __future__ import annotations

from engine.beam_params import BeamSearchParams
from engine.llm import LLM
from engine.request import BeamSearchOutput, BeamSequence, CompletionOutput, Delta, Logprob, RequestOutput, ScoreOutput
from engine.sampling import SamplingParams

__all__ = [
    "LLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSequence",
    "CompletionOutput",
    "Delta",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "ScoreOutput",
]
