"""What a caller gets of a request: its samples so far, or the hypotheses of its search in their place.

Of a search that is not finished it is what is settled of its best hypothesis.
"""

from __future__ import annotations

from dataclasses import replace

from engine.beam_requests import search_output
from engine.request import BeamSequence, CompletionOutput, Logprob, Request, RequestOutput, Sequence
from models.tokenizer import Tokenizer


def output_of(request: Request, tokenizer: Tokenizer | None) -> RequestOutput:
    return RequestOutput(
        request.request_id, request.prompt, request.prompt_token_ids, _completions(request, tokenizer),
        request.finished, request.encoder_prompt, request.encoder_prompt_token_ids, _prompt_logprobs(request),
        replace(request.metrics),
    )  # fmt: skip


def _prompt_logprobs(request: Request) -> list[dict[int, Logprob] | None] | None:
    """One entry a token of the prompt; the first has none before it to be judged by."""
    return None if request.params.prompt_logprobs is None else [None, *request.scores]


def _completions(request: Request, tokenizer: Tokenizer | None) -> list[CompletionOutput]:
    if request.beams is None:
        return [_sample(sequence) for sequence in request.sequences]
    reason = request.sequences[0].finish_reason
    if reason in (None, "abort"):
        settled = request.beams.settled()
        text = tokenizer.decode(settled) if tokenizer is not None else ""
        return [CompletionOutput(0, text, settled, finish_reason=reason)]
    found = search_output(request, tokenizer)
    if found.error is not None:
        return [CompletionOutput(0, "", [], finish_reason="error", error=found.error)]
    return [_hypothesis(index, each) for index, each in enumerate(found.sequences)]


def _sample(sequence: Sequence) -> CompletionOutput:
    wanted = sequence.request.params.logprobs is not None
    return CompletionOutput(
        sequence.index, sequence.text, sequence.output_ids, sequence.cumulative_logprob if wanted else None,
        list(sequence.logprobs) if wanted else None, sequence.finish_reason, sequence.stop_reason, sequence.error,
    )  # fmt: skip


def _hypothesis(index: int, found: BeamSequence) -> CompletionOutput:
    return CompletionOutput(
        index, found.text, found.token_ids, found.cum_logprob, finish_reason=found.finish_reason
    )  # fmt: skip
