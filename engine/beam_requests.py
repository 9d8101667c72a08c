"""Beam search in the engine: a request with beams, their step through model and cache, what the caller gets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.beam_params import BeamSearchParams
from engine.beam_search import BeamSearch, Hypothesis, NoContinuation
from engine.kv_cache import KVCache
from engine.logits_rules import edits_of
from engine.prompts import Prompt, PromptReader
from engine.request import BeamSearchOutput, BeamSequence, Request
from engine.sampling import SamplingParams
from kernels.sampling import edit_logits, log_softmax_, top_k
from models.tokenizer import Tokenizer


def search_request(reader: PromptReader, request_id: str, prompt: Prompt, params: BeamSearchParams) -> Request:
    """A request whose sequences are beams. Raises ValueError for what cannot run."""
    if not isinstance(params, BeamSearchParams):
        raise ValueError(f"params must be BeamSearchParams, got {type(params).__name__}")
    as_samples = SamplingParams(
        n=params.beam_width,
        max_tokens=params.max_tokens,
        no_repeat_ngram_size=params.no_repeat_ngram_size,
        min_tokens=params.min_tokens,
        task=params.task,
    )
    request = reader.request(request_id, prompt, as_samples, seed=0)
    request.rules = replace(
        request.rules, repetition_penalty=params.repetition_penalty, renormalize=reader.generation.renormalize
    )
    eos_ids = reader.generation.eos_ids
    request.beams = BeamSearch(params, request.prompt_token_ids, request.sequences[0].max_length, eos_ids)
    return request


def advance_searches(requests: list[Request], logits: Tensor, cache: KVCache, num_threads: int | None) -> None:
    """Takes a step of every search, given the logits (rows, vocab) of their live beams, packed; they are changed."""
    beams = [sequence for request in requests for sequence in request.live]
    scores = log_softmax_(logits, num_threads=num_threads)
    edits = edits_of(beams, [len(sequence.token_ids) for sequence in beams], cache.tokens, logits.shape[1])
    if edits is not None:
        edit_logits(scores, edits, num_threads=num_threads)
    again = [i for i, sequence in enumerate(beams) if sequence.request.rules.renormalize]
    if again:
        scores[again] = log_softmax_(scores[again], num_threads=num_threads)
    wanted = min(max(_beams(request).num_candidates for request in requests), scores.shape[1])
    logprobs, tokens = (best.numpy() for best in top_k(scores, wanted, num_threads=num_threads))
    start = 0
    for request in requests:
        end, count = start + len(request.live), _beams(request).num_candidates
        _advance(request, logprobs[start:end, :count], tokens[start:end, :count], cache)
        start = end


def _advance(
    request: Request, logprobs: NDArray[np.float32], tokens: NDArray[np.int64], cache: KVCache
) -> None:  # fmt: skip
    beams = _beams(request)
    cached = beams.length
    try:
        parents = beams.advance(logprobs, tokens)
    except NoContinuation as error:
        for sequence in request.sequences:
            sequence.finish("error", error=str(error))
        return
    request.forked = True
    if beams.done:
        for sequence in request.sequences:
            sequence.finish("stop")
        return
    rows = [sequence.row for sequence in request.sequences if sequence.row is not None]
    cache.reorder(rows, parents)
    cache.tokens[[row.index for row in rows], cached] = [token_ids[-1] for token_ids in beams.token_ids]
    for sequence, token_ids in zip(request.sequences, beams.token_ids, strict=True):
        sequence.token_ids, sequence.num_cached = token_ids, cached


def search_output(request: Request, tokenizer: Tokenizer | None) -> BeamSearchOutput:
    """What the caller gets of a finished search."""
    error = request.sequences[0].error
    found = [] if error else _beams(request).hypotheses()
    return BeamSearchOutput(
        request.request_id, request.prompt, request.prompt_token_ids, request.encoder_prompt,
        request.encoder_prompt_token_ids, [_sequence(request, each, tokenizer) for each in found], error,
    )  # fmt: skip


def _sequence(request: Request, found: Hypothesis, tokenizer: Tokenizer | None) -> BeamSequence:
    shown = found.token_ids[:-1] if found.ended else found.token_ids
    return BeamSequence(
        token_ids=found.token_ids,
        tokens=[*request.prompt_token_ids, *found.token_ids],
        text=tokenizer.decode(shown) if tokenizer else "",
        cum_logprob=found.cum_logprob,
        score=found.score,
        finish_reason="stop" if found.ended else "length",
    )


def _beams(request: Request) -> BeamSearch:
    assert request.beams is not None
    return request.beams
