"""The toy tasks: reverse a string, copy it, add two numbers."""

from __future__ import annotations

import random
import string
from collections.abc import Callable

LETTERS = string.ascii_lowercase + " "
MAX_LENGTH = 12
MAX_NUMBER = 999

Example = tuple[str, str]


def _letters(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(LETTERS, k=length))


def reversal(rng: random.Random, max_length: int = MAX_LENGTH) -> Example:
    source = _letters(rng, rng.randint(1, max_length))
    return source, source[::-1]


def copy(rng: random.Random, max_length: int = MAX_LENGTH) -> Example:
    source = _letters(rng, rng.randint(1, max_length))
    return source, source


def addition(rng: random.Random, max_number: int = MAX_NUMBER) -> Example:
    left, right = rng.randint(0, max_number), rng.randint(0, max_number)
    return f"{left}+{right}", str(left + right)


TASKS: dict[str, Callable[[random.Random], Example]] = {"reversal": reversal, "copy": copy, "addition": addition}


def generate(task: str, num_train: int, num_validation: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Distinct validation examples, and training examples among which none of them occurs."""
    rng = random.Random(f"{task}-{seed}")
    draw = TASKS[task]
    validation: dict[Example, None] = {}
    while len(validation) < num_validation:
        validation[draw(rng)] = None
    train: list[Example] = []
    while len(train) < num_train:
        if (example := draw(rng)) not in validation:
            train.append(example)
    return train, list(validation)
