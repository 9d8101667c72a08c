"""Beam search in the engine: a request with beams, their step through model and cache, what the caller gets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from engine.beam_params import BeamSearchParams
from engine.beam_search import BeamSearch, Hypothesis
from engine.beam_step import Indices, Logprobs, NoContinuation, advance_together
from engine.constrained_beams import ConstrainedBeamSearch
from engine.diverse_beams import DiverseBeamSearch
from engine.kv_cache import KVCache
from engine.prompts import Prompt, PromptReader
from engine.request import BeamSearchOutput, BeamSequence, Request, Sequence
from engine.sampling import SamplingParams
from kernels.sampling import LogitEdits, edit_logits, log_softmax_, top_k
from models.tokenizer import Tokenizer

AnySearch = BeamSearch | DiverseBeamSearch
Move = list[int] | NoContinuation  # the beam that each beam continues; or why none can


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
    searches = [_beams(request) for request in requests]
    starts = np.cumsum([0, *(len(search.token_ids) for search in searches)])
    scores = log_softmax_(logits, num_threads=num_threads)
    if edits is not None:
        edit_logits(scores, edits, num_threads=num_threads)
    if any(request.rules.renormalize for request in requests):
        again = np.repeat([request.rules.renormalize for request in requests], np.diff(starts)).nonzero()[0].tolist()
        scores[again] = log_softmax_(scores[again], num_threads=num_threads)
    wanted = min(max(search.num_candidates for search in searches), scores.shape[1])
    logprobs, tokens = (best.cpu().numpy() for best in top_k(scores, wanted, num_threads=num_threads))
    moves = _advance(searches, starts, logprobs, tokens, scores)
    _follow([*zip(requests, searches, moves, strict=True)], cache)


def _advance(
    searches: list[AnySearch], starts: Indices, logprobs: Logprobs, tokens: Indices, scores: Tensor
) -> list[Move]:  # fmt: skip
    """Takes a step of every search, whose rows begin at its start; plain ones that are alike take it together."""
    moves: dict[int, Move] = {}
    alike: dict[tuple[object, ...], list[int]] = {}
    everything: Logprobs | None = None
    for i, search in enumerate(searches):
        if type(search) is BeamSearch:
            alike.setdefault(search.likeness, []).append(i)
            continue
        own, count = slice(starts[i], starts[i + 1]), search.num_candidates
        if everything is None and isinstance(search, ConstrainedBeamSearch):
            everything = scores.cpu().numpy()
        try:
            table = None if everything is None else everything[own]
            moves[i] = search.advance(logprobs[own, :count], tokens[own, :count], table)
        except NoContinuation as error:
            moves[i] = error
    for members in alike.values():
        group = [search for i in members if isinstance(search := searches[i], BeamSearch)]
        rows, count = starts[members, None] + np.arange(len(group[0].token_ids)), group[0].num_candidates
        moves |= zip(members, advance_together(group, logprobs[rows, :count], tokens[rows, :count]), strict=True)
    return [moves[i] for i in range(len(searches))]


def _follow(moved: list[tuple[Request, AnySearch, Move]], cache: KVCache) -> None:
    """Takes requests and the cache where the searches went."""
    sequences: list[Sequence] = []
    parents: list[int] = []
    for request, search, move in moved:
        if isinstance(move, NoContinuation):
            for sequence in request.sequences:
                sequence.finish("error", error=str(move))
                sequence.broken = move.not_finite
            continue
        request.forked = True
        if search.done:
            for sequence in request.sequences:
                sequence.finish("stop")
            continue
        first, cached = len(sequences), search.length - 1
        parents += [first + parent for parent in move]
        sequences += request.sequences
        for sequence, token_ids in zip(request.sequences, search.token_ids, strict=True):
            sequence.token_ids, sequence.num_cached = token_ids, cached
    rows = [sequence.row for sequence in sequences if sequence.row is not None]
    cache.reorder(rows, parents)
    places = [row.index for row in rows], [sequence.num_cached for sequence in sequences]
    cache.tokens[places] = [sequence.token_ids[-1] for sequence in sequences]


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


def _beams(request: Request) -> AnySearch:
    assert request.beams is not None
    return request.beams
