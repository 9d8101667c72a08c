"""``make demo``: train a transformer to pronounce English from a dictionary, then pronounce unseen words."""

from __future__ import annotations

import json
import sys
import time

from rich.console import Console
from rich.table import Table

from engine import LLM, SamplingParams
from train.config import RunConfig, parse
from train.data.corpora import Pair, load_pairs
from train.distributed import Distributed, start
from train.launch import mistakes_in_one_line, run
from train.metrics import exact_match, token_error_rate

WORDS_SHOWN = 20


def main(arguments: list[str]) -> None:
    with mistakes_in_one_line():
        config = parse(arguments)
        seconds = train(config, start(config.training.device))
        report(config, seconds)


def train(config: RunConfig, own: Distributed) -> float:
    begun = time.perf_counter()
    run(config, own)
    return time.perf_counter() - begun


def report(config: RunConfig, training_seconds: float) -> None:
    """Pronounces the test words with the last checkpoint, and says how well and how fast."""
    console = Console(soft_wrap=True, highlight=False)
    words = load_pairs(config.data, config.training.seed).test
    llm = LLM(config.run_folder / "checkpoints" / "last")
    params = SamplingParams(temperature=0.0, max_tokens=40)
    begun = time.perf_counter()
    outputs = [output.outputs[0] for output in llm.generate([word.source for word in words], params)]
    seconds = time.perf_counter() - begun
    predictions, references = [output.text for output in outputs], [word.references for word in words]
    console.print(table(words, predictions))
    generated = sum(len(output.token_ids) for output in outputs)
    console.print(f"training: {training_speed(config):,.0f} tokens/s, {training_seconds:.0f} s")
    console.print(f"generation: {generated / seconds:,.0f} tokens/s, {len(words):,} unseen words in {seconds:.1f} s")
    console.print(f"words pronounced exactly right: {exact_match(predictions, references):.1%}")
    console.print(f"phone error rate: {token_error_rate(predictions, references):.1%}")


def table(words: list[Pair], predictions: list[str]) -> Table:
    """Every so-many-th unseen word, what the dictionary says, what the model says."""
    shown = Table("word", "reference", "prediction", "")
    step = max(1, len(words) // WORDS_SHOWN)
    for word, prediction in list(zip(words, predictions, strict=True))[::step][:WORDS_SHOWN]:
        right = prediction in word.references
        shown.add_row(word.source, prediction if right else word.references[0], prediction, "✓" if right else "✗")
    return shown


def training_speed(config: RunConfig) -> float:
    """The median tokens a second of the whole run, from its metrics."""
    lines = (config.run_folder / "metrics.jsonl").read_text().splitlines()
    speeds = sorted(entry["tokens_per_second"] for entry in map(json.loads, lines) if "tokens_per_second" in entry)
    return speeds[len(speeds) // 2] if speeds else float("nan")


if __name__ == "__main__":
    main(sys.argv[1:])
