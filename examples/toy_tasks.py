"""``python -m examples.toy_tasks [reversal] [copy] [addition]``: train the toy tasks' configs.

Prints exact match on unseen examples of the lengths trained on, and, to be honest, on longer ones.
"""

from __future__ import annotations

import random
import sys
import time

from rich.console import Console
from rich.table import Table

from engine import LLM, SamplingParams
from models.config import ConfigError
from train.config import parse
from train.data import tasks
from train.data.corpora import load_pairs
from train.distributed import start
from train.launch import mistakes_in_one_line, run
from train.metrics import exact_match

NUM_LONGER = 1000


def main(names: list[str]) -> None:
    if "--help" in names or "-h" in names:
        print(f"usage: python -m examples.toy_tasks [{'] ['.join(tasks.TASKS)}]\n\n{__doc__}")
        return
    results = Table("task", "epochs", "seconds", "unseen", "longer than trained")
    with mistakes_in_one_line():
        if unknown := [name for name in names if name not in tasks.TASKS]:
            raise ConfigError(f"unknown task {unknown[0]!r}: choose from {', '.join(tasks.TASKS)}")
        for name in names or list(tasks.TASKS):
            results.add_row(*measure(name))
    Console().print(results)


def measure(name: str) -> tuple[str, ...]:
    """Trains ``configs/NAME.yaml`` (or finds it trained) and returns a row of the table."""
    config = parse(["--config", f"configs/{name}.yaml"])
    begun = time.perf_counter()
    run(config, start("auto"))
    seconds = time.perf_counter() - begun
    llm = LLM(config.run_folder / "checkpoints" / "best")
    unseen = [(pair.source, pair.references[0]) for pair in load_pairs(config.data, config.training.seed).validation]
    figures = [f"{accuracy(llm, examples):.1%}" for examples in (unseen, longer(name))]
    return (name, str(config.training.num_epochs), f"{seconds:.0f}", *figures)


def longer(name: str) -> list[tuple[str, str]]:
    """Examples beyond the trained lengths: strings of 13 to 16, sums of four-digit numbers."""
    rng = random.Random(f"longer {name}")
    if name == "addition":
        pairs = [(rng.randint(1000, 9999), rng.randint(1000, 9999)) for _ in range(NUM_LONGER)]
        return [(f"{a}+{b}", str(a + b)) for a, b in pairs]
    sources = ["".join(rng.choices(tasks.LETTERS, k=rng.randint(13, 16))) for _ in range(NUM_LONGER)]
    return [(source, source[::-1] if name == "reversal" else source) for source in sources]


def accuracy(llm: LLM, examples: list[tuple[str, str]]) -> float:
    params = SamplingParams(temperature=0.0, max_tokens=24)
    outputs = llm.generate([source for source, _ in examples], params, use_tqdm=False)
    return exact_match([output.outputs[0].text for output in outputs], [[target] for _, target in examples])


if __name__ == "__main__":
    main(sys.argv[1:])
