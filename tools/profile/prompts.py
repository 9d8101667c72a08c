"""Prompts of random tokens, the same in every run."""

from __future__ import annotations

import random
from collections.abc import Iterable

SHORTEST, LONGEST = 20, 100  # of prompts whose lengths differ


def random_lengths(count: int, shortest: int = SHORTEST, longest: int = LONGEST) -> list[int]:
    """Evenly spread; over what a sentence or a short paragraph has, unless given."""
    draw = random.Random(1)
    return [draw.randint(shortest, longest) for _ in range(count)]


def random_prompts(lengths: Iterable[int], vocab_size: int) -> list[list[int]]:
    """Tokens from the middle of the vocabulary, whose ends are for special ones."""
    draw, third = random.Random(0), vocab_size // 3
    return [[draw.randrange(third, 2 * third) for _ in range(length)] for length in lengths]
