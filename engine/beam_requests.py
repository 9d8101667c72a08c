"""Beam search in the engine: a request with beams, their step through model and cache, what the caller gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from engine.beam_params import BeamSearchParams
from engine.beam_search import BeamSearch, Hypothesis, NoContinuation
from engine.kv_cache import KVCache
from engine.logits_rules import apply_rules
from engine.prompts import Prompt, PromptReader
from engine.request import BeamSearchOutput, BeamSequence, Request
from engine.sampling import SamplingParams
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


def advance_searches(searches: Mapping[Request, int], logits: Tensor, cache: KVCache) -> None:
    """Takes a step of every search, given logits (rows, vocab) and where those of its live beams begin."""
    for request, start in searches.items():
        log_probs = logits[start : start + len(request.live)].log_softmax(-1)
        _advance(request, log_probs, cache)


def _advance(request: Request, log_probs: Tensor, cache: KVCache) -> None:
    beams = _beams(request)
    cached = beams.token_ids.shape[1]
    apply_rules(log_probs, beams.token_ids, request.rules, beams.num_prompt, beams.max_length)
    if request.rules.renormalize:
        log_probs = log_probs.log_softmax(-1)
    try:
        parents = beams.advance(log_probs)
    except NoContinuation as error:
        for sequence in request.sequences:
            sequence.finish("error", error=str(error))
        return
    if beams.done:
        for sequence in request.sequences:
            sequence.finish("stop")
        return
    rows = [sequence.row for sequence in request.sequences if sequence.row is not None]
    cache.reorder(rows, parents.tolist())
    cache.tokens[[row.index for row in rows], cached] = beams.token_ids[:, -1]
    request.forked = True
    for sequence, token_ids in zip(request.sequences, beams.token_ids.tolist(), strict=True):
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
