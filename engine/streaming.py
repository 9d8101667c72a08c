"""What is new in a request's outputs since one last looked: pieces of text and tokens that nothing takes back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from engine.beam_requests import search_output
from engine.detokenize import released_text
from engine.request import Delta, Request, Sequence
from models.tokenizer import TextStream, Tokenizer


class Follower(Protocol):
    """Follows one output of a request."""

    done: bool

    def look(self) -> Delta | None:
        """What is new; None: nothing."""
        ...


class SampleFollower:
    """Follows a sample, whose text may lag behind its tokens by a character or what may become a stop string."""

    def __init__(self, request_index: int, sequence: Sequence) -> None:
        self.request_index, self.sequence, self.done = request_index, sequence, False
        self._characters = self._tokens = 0

    def look(self) -> Delta | None:
        sequence = self.sequence
        reason = sequence.finish_reason
        text = released_text(sequence)
        new_text, new_ids = text[self._characters :], sequence.token_ids[sequence.num_prompt + self._tokens :]
        self._characters, self.done = len(text), reason is not None
        self._tokens += len(new_ids)
        if not new_ids and reason is None:
            return None
        return Delta(self.request_index, sequence.index, new_text, new_ids, reason)


class SearchFollower:
    """Follows the best hypothesis of a beam search: the tokens that are sure to begin it."""

    def __init__(self, request_index: int, request: Request, tokenizer: Tokenizer | None) -> None:
        self.request_index, self.request, self.tokenizer, self.done = request_index, request, tokenizer, False
        self._stream = TextStream(tokenizer) if tokenizer is not None else None
        self._tokens = 0

    def look(self) -> Delta | None:
        request = self.request
        assert request.beams is not None
        reason = request.sequences[0].finish_reason
        token_ids = request.beams.settled() if request.sequences[0].error is None else []
        new_ids = token_ids[self._tokens :]
        self._tokens, self.done = len(token_ids), reason is not None
        if reason == "stop":
            best = search_output(request, self.tokenizer).sequences
            reason = best[0].finish_reason if best else reason
        if not new_ids and not self.done:
            return None
        text = self._stream.push(new_ids, final=self.done) if self._stream is not None else ""
        return Delta(self.request_index, 0, text, new_ids, reason)


def followers_of(requests: list[Request], tokenizer: Tokenizer | None) -> Iterator[Follower]:
    for i, request in enumerate(requests):
        if request.beams is not None:
            yield SearchFollower(i, request, tokenizer)
        else:
            yield from (SampleFollower(i, sequence) for sequence in request.sequences)
