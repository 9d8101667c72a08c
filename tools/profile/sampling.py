"""Sampling: temperature 0.8, top_k 50, top_p 0.9 against a peer's processors; and pure greedy.

Where there is a GPU, it is the GPU's that is measured (sampling_gpu.py). On a CPU, what limits it is reading the logits
once: 4 bytes a token of the vocabulary. A batch sampled over and over comes from cache; greedy rows rotate over more
memory than caches hold and are set against the memory's speed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from kernels import reference
from kernels.sampling import SamplingBatch, sample
from tools.profile import sampling_gpu
from tools.profile.machine import Cell
from tools.profile.options import Options
from tools.profile.report import Report
from tools.profile.timing import READ_BYTES, ReadBandwidth, Timing, interleaved

SHAPES = {"32k": 32_000, "50k": 50_257, "128k": 128_256}
BATCHES = [1, 32]
OPTIONS = ("batch",)
TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.9

Warper = Callable[[Tensor], Tensor]  # logits (rows, vocab) to probabilities


def transformers_warper() -> Warper:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = [TemperatureLogitsWarper(TEMPERATURE), TopKLogitsWarper(TOP_K), TopPLogitsWarper(TOP_P)]

    def probabilities(logits: Tensor) -> Tensor:
        for warper in warpers:
            logits = warper(None, logits)
        return logits.softmax(-1)

    return probabilities


PEERS: dict[str, Callable[[], Warper]] = {"transformers": transformers_warper}


def run(options: Options) -> Report:
    """Measure every shape at every batch size; a failed check is among the report's failures."""
    if torch.cuda.is_available():
        report = Report("sampling", ("what", "vocab", "batch"), path=options.json)
        report.start()
        sampling_gpu.run(options.shapes, options.seconds, report)
        return report
    peers = {name: PEERS[name]() for name in options.against or ()}
    report = Report("sampling", ("what", "vocab", "batch"), ("us/row", "20%", "80%"), path=options.json)
    report.start()
    for shape in options.shapes or SHAPES:
        for batch in options.batches or BATCHES:
            report.add(measure_filters(SHAPES[shape], batch, peers, options.seconds, report.failures))
    for shape in options.shapes or SHAPES:
        report.add(measure_greedy(SHAPES[shape], max(options.batches or BATCHES), options.seconds, report))
    return report


def measure_filters(
    vocab: int, rows: int, peers: dict[str, Warper], seconds: float, failures: list[str]
) -> dict[str, Cell]:
    """Ours and the peers' time a row on the same logits, after both were held against the reference."""
    logits = make_logits(rows, vocab)
    batch = SamplingBatch.build(rows, temperature=TEMPERATURE, top_k=TOP_K, top_p=TOP_P, seed=range(rows))
    failures += check(logits, batch, peers)
    functions: dict[str, Callable[[], object]] = {"ours": lambda: sample(logits, batch)}
    for name, warper in peers.items():
        functions[name] = partial(draw, warper, logits)
    timings = interleaved(functions, seconds)
    row = describe("top_k, top_p", vocab, rows, timings["ours"])
    for name in peers:
        row[f"{name} us/row"] = timings[name].median / rows * 1e6
        row[f"x {name}"] = timings[name].median / timings["ours"].median
    return row


def measure_greedy(vocab: int, rows: int, seconds: float, report: Report) -> dict[str, Cell]:
    """Greedy sampling from memory, interleaved with plain reading of the same memory."""
    memory = make_logits(rows * (1 + READ_BYTES // (4 * rows * vocab)), vocab)
    buffers = memory.split(rows)
    batch = SamplingBatch.build(rows, temperature=0.0)
    if not torch.equal(sample(buffers[0], batch).token_ids, buffers[0].argmax(-1)):
        report.failures.append(f"greedy at vocabulary {vocab} is not the argmax")
    rotation = cycle(buffers)
    read = ReadBandwidth(memory)
    timings = interleaved({"ours": lambda: sample(next(rotation), batch), "read": read}, seconds)
    ceiling = read.bytes_per_second(timings["read"])
    row = describe("greedy", vocab, rows, timings["ours"])
    row["% of read bandwidth"] = 100 * 4 * vocab * rows / timings["ours"].median / ceiling
    report.ceilings["read GB/s"] = round(ceiling / 1e9, 1)
    return row


def draw(warper: Warper, logits: Tensor) -> Tensor:
    return torch.multinomial(warper(logits), 1)


def describe(what: str, vocab: int, rows: int, timing: Timing) -> dict[str, Cell]:
    microseconds = [t / rows * 1e6 for t in (timing.median, timing.low, timing.high)]
    return {
        "what": what,
        "vocab": vocab,
        "batch": rows,
        "us/row": microseconds[0],
        "20%": microseconds[1],
        "80%": microseconds[2],
        "GB/s": 4 * vocab / microseconds[0] / 1e3,
    }


def check(logits: Tensor, batch: SamplingBatch, peers: dict[str, Warper]) -> list[str]:
    """Our tokens must be the reference's, and a peer must leave the same tokens to choose from."""
    where = f"at vocabulary {logits.shape[1]}, batch {logits.shape[0]}"
    failures = []
    if not torch.equal(sample(logits, batch).token_ids, reference.sample(logits, batch)):
        failures.append(f"our tokens are not the reference's {where}")
    support = reference.sampling_probabilities(logits, batch) > 0
    failures += [
        f"{name} and the reference leave different tokens {where}"
        for name, warper in peers.items()
        if not torch.equal(warper(logits) > 0, support)
    ]
    return failures


def make_logits(rows: int, vocab: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
