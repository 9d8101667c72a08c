"""The toy tasks: reverse a string, copy it, add two numbers."""

from __future__ import annotations

import random
import string
from collections.abc import Callable

from models.config import ConfigError

LETTERS = string.ascii_lowercase + " "
MAX_LENGTH = 12
MAX_NUMBER = 999
MAX_DRAWS = 100  # for each validation example, before the task counts as used up

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


TASKS: dict[str, Callable[[random.Random], Example]] = {
    "reversal": reversal,
    "copy": copy,
    "addition": addition,
}


def generate(task: str, num_train: int, num_validation: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Training examples, and distinct validation examples none of which occurs among them.

    Training is drawn first. The other way round would hold out nearly all of the 27 strings of one letter, and leave
    training without an example of that length.
    """
    rng = random.Random(f"{task}-{seed}")
    draw = TASKS[task]
    train = [draw(rng) for _ in range(num_train)]
    seen = set(train)
    validation: dict[Example, None] = {}
    for _ in range(MAX_DRAWS * num_validation):
        if len(validation) == num_validation:
            return train, list(validation)
        if (example := draw(rng)) not in seen:
            validation[example] = None
    raise ConfigError(
        f"{num_train} training examples of {task} leave too few unseen ones for data.num_val_samples={num_validation}"
    )
