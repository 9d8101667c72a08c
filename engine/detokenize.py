"""What a new token does to its sequence: the text grows, and the sequence may end."""

from __future__ import annotations

from engine.request import Sequence


def deliver(sequence: Sequence, token_id: int, is_complete: bool = False) -> None:
    """Takes note of a token just appended: an end or stop token, a stop string, a complete text, the length limit."""
    params = sequence.request.params
    if token_id in sequence.request.rules.eos_ids and not params.ignore_eos:
        sequence.finish("stop")
    elif token_id in sequence.request.rules.stops:
        sequence.finish("stop", stop_reason=token_id)
    _extend_text(sequence, token_id)
    if sequence.finish_reason is None and (is_complete or len(sequence.token_ids) >= sequence.max_length):
        sequence.finish("stop" if is_complete else "length")
        _flush(sequence)


def _extend_text(sequence: Sequence, token_id: int) -> None:
    if sequence.stream is None:
        return
    ended = sequence.finish_reason is not None
    # The token that ends a text is no part of it unless asked for, as in vLLM.
    shown = [] if ended and not sequence.request.params.include_stop_str_in_output else [token_id]
    before = len(sequence.text)
    sequence.text += sequence.stream.push(shown, final=ended)
    _cut_at_stop_string(sequence, before)


def _flush(sequence: Sequence) -> None:
    if sequence.stream is not None:
        before = len(sequence.text)
        sequence.text += sequence.stream.push([], final=True)
        _cut_at_stop_string(sequence, before)


def _cut_at_stop_string(sequence: Sequence, before: int) -> None:
    """Ends the sequence at the first stop string in its text, however many tokens it came in; ``before`` characters
    have been searched already."""
    params = sequence.request.params
    if len(sequence.token_ids) - sequence.num_prompt <= params.min_tokens:
        return
    # What was there before has been looked at, or came before min_tokens; its end may be the beginning of one.
    found = [(sequence.text.find(stop, max(0, before - len(stop) + 1)), stop) for stop in params.stop_strings]
    if not (hits := [(at, stop) for at, stop in found if at >= 0]):
        return
    at, stop = min(hits)
    sequence.text = sequence.text[: at + (len(stop) if params.include_stop_str_in_output else 0)]
    sequence.finish("stop", stop_reason=stop)


def released_text(sequence: Sequence) -> str:
    """The text that no coming stop string can take back: all of it, less a tail that may begin one."""
    if sequence.finish_reason is not None:
        return sequence.text
    text = sequence.text
    longest = max((len(stop) for stop in sequence.request.params.stop_strings), default=0)
    for size in range(min(longest - 1, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in sequence.request.params.stop_strings):
            return text[:-size]
    return text
