"""Callables of a request that change its logits, and what happens when one of them fails."""

from __future__ import annotations

import inspect

from torch import Tensor

from engine.request import Sequence
from engine.sampling import LogitsProcessor


def process_logits(sequences: list[Sequence], logits: Tensor) -> None:
    """Lets each sequence's ``logits_processors`` change its row of logits; one that raises ends its own sequence."""
    for sequence, row in zip(sequences, logits, strict=True):
        for process in sequence.request.params.logits_processors or ():
            try:
                row.copy_(_processed(process, sequence, row))
            except Exception as error:
                what = getattr(process, "__name__", type(process).__name__)
                sequence.finish("error", error=f"the logits processor {what} raised {type(error).__name__}: {error}")
                break


def _processed(process: LogitsProcessor, sequence: Sequence, row: Tensor) -> Tensor:
    given = [sequence.output_ids, row]
    if len(inspect.signature(process).parameters) == 3:
        given.insert(0, list(sequence.request.prompt_token_ids))
    result = process(*given)
    if not isinstance(result, Tensor) or result.shape != row.shape:
        raise TypeError(f"it must return a tensor of shape {tuple(row.shape)}")
    return result
