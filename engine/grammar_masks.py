"""Grammars of a step's sequences: which tokens they allow next, and where they stand after what came."""

from __future__ import annotations

import numpy as np

from engine.grammar_state import GrammarError
from engine.logits_rules import Mask
from engine.request import Sequence


def masks_of(sequences: list[Sequence], vocab_size: int) -> dict[int, Mask]:
    """By row, for those that have a grammar; one whose grammar leaves nothing ends with an error.

    A token that the model's makers force is none of the grammar's business.
    """
    masks = {}
    for i, sequence in enumerate(sequences):
        if sequence.grammar is None or sequence.finish_reason is not None or _is_forced(sequence):
            continue
        masks[i] = np.empty(-(-vocab_size // 32), dtype=np.int32)
        try:
            sequence.grammar.fill_mask(masks[i])
        except GrammarError as error:
            del masks[i]
            sequence.finish("error", error=str(error))
    return masks


def accept_token(sequence: Sequence, token_id: int) -> bool:
    """Takes a sequence's next token, which is not yet among its own.

    Returns whether its text is complete, where no end token will say so.
    """
    grammar, rules = sequence.grammar, sequence.request.rules
    if grammar is None or _is_forced(sequence):
        return False
    grammar.accept(token_id)
    may_end = bool(rules.eos_ids) and not sequence.request.params.ignore_eos
    return not may_end and grammar.finished


def _is_forced(sequence: Sequence) -> bool:
    return sequence.request.rules.forced(len(sequence.token_ids), sequence.max_length) is not None
