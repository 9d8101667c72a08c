"""Beam search in the engine: a request with beams, their step through model and cache, what the caller gets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.beam_params import BeamSearchParams
from engine.beam_search import BeamSearch, Hypothesis, Logprobs, NoContinuation
from engine.constrained_beams import ConstrainedBeamSearch
from engine.diverse_beams import DiverseBeamSearch
from engine.kv_cache import KVCache
from engine.prompts import Prompt, PromptReader
from engine.request import BeamSearchOutput, BeamSequence, Request
from engine.sampling import SamplingParams
from kernels.sampling import LogitEdits, edit_logits, log_softmax_, top_k
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
    max_length, eos_ids = request.sequences[0].max_length, reader.generation.eos_ids
    if params.force_words:
        words = _forced(reader, params, max_length - request.num_prompt)
        request.beams = ConstrainedBeamSearch(params, request.prompt_token_ids, max_length, eos_ids, words)
    else:
        kind = BeamSearch if params.num_beam_groups == 1 else DiverseBeamSearch
        request.beams = kind(params, request.prompt_token_ids, max_length, eos_ids)
    return request


def _forced(reader: PromptReader, params: BeamSearchParams, room: int) -> tuple[tuple[int, ...], ...]:
    """The token ids of the words that must come. Raises ValueError for those that cannot."""
    words = tuple(tuple(reader.target_ids(word)) for word in params.force_words or ())
    if not all(words):
        raise ValueError("force_words holds a text without tokens")
    if not params.ignore_eos and any(token in reader.generation.eos_ids for word in words for token in word):
        raise ValueError("force_words holds an end token, after which no other word could come")
    if (needed := sum(map(len, words))) > room:
        raise ValueError(f"force_words are {needed} tokens, more than the {room} that may be generated")
    return words


def advance_searches(
    requests: list[Request], logits: Tensor, edits: LogitEdits | None, cache: KVCache, num_threads: int | None
) -> None:
    """Takes a step of every search, given the logits (rows, vocab) of their live beams, packed; they are changed.

    ``edits`` are what the beams' rules ask of their log-probabilities.
    """
    beams = [sequence for request in requests for sequence in request.live]
    scores = log_softmax_(logits, num_threads=num_threads)
    if edits is not None:
        edit_logits(scores, edits, num_threads=num_threads)
    again = [i for i, sequence in enumerate(beams) if sequence.request.rules.renormalize]
    if again:
        scores[again] = log_softmax_(scores[again], num_threads=num_threads)
    wanted = min(max(_beams(request).num_candidates for request in requests), scores.shape[1])
    logprobs, tokens = (best.cpu().numpy() for best in top_k(scores, wanted, num_threads=num_threads))
    everything = any(isinstance(_beams(request), ConstrainedBeamSearch) for request in requests)
    start, table = 0, scores.cpu().numpy() if everything else None
    for request in requests:
        end, count = start + len(request.live), _beams(request).num_candidates
        own = None if table is None else table[start:end]
        _advance(request, logprobs[start:end, :count], tokens[start:end, :count], own, cache)
        start = end


def _advance(
    request: Request, logprobs: Logprobs, tokens: NDArray[np.int64], scores: Logprobs | None, cache: KVCache
) -> None:  # fmt: skip
    beams = _beams(request)
    cached = beams.length
    try:
        parents = beams.advance(logprobs, tokens, scores)
    except NoContinuation as error:
        for sequence in request.sequences:
            sequence.finish("error", error=str(error))
            sequence.broken = error.not_finite
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


def _beams(request: Request) -> BeamSearch | DiverseBeamSearch:
    assert request.beams is not None
    return request.beams
