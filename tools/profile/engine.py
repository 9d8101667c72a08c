"""`engine`: tokens a second of decoding, beside CTranslate2, OpenVINO and transformers, each in a process of its own.

Every contender generates one token and then ``NEW_TOKENS`` from the same prompts, in turns, round after round: the
difference is decoding alone, the first token the prompt's or source's share. Nobody may choose the end token.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from tools.profile.checkpoints import SHAPES, make_checkpoint
from tools.profile.engine_field import Case, Contender, Field, Rows
from tools.profile.engine_limit import Limit, Model, Rates
from tools.profile.engine_rows import KEYS, MEASURE, rows_of
from tools.profile.engine_tokens import failures_of
from tools.profile.options import Options
from tools.profile.report import Report
from tools.profile.workers import run_once

PRECISIONS = {
    "tandem": ("fp32", "int8", "int4"),
    "transformers": ("fp32",),
    "ctranslate2": ("fp32", "int8"),
    "openvino": ("fp32", "int8", "int4"),
}
PEERS = tuple(PRECISIONS)[1:]
OPTIONS = ("shape", "batch", "precision", "prompt", "beams", "plot", "peer_python")
BATCHES = [1, 8, 32]
NEW_TOKENS, ROUNDS = 64, 5


def run(options: Options) -> Report:
    names, peers = options.shapes or list(SHAPES), options.against or []
    check_shapes(names)
    for who in ("tandem", *peers):  # one that is not there should not wait for a model to be made
        run_once(Field.WORKER, options.peer_python, who)
    rates = Rates.measure()
    report = Report("engine", KEYS, MEASURE, ceilings=rates.cells(), path=options.json)
    report.start()
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            measure_shape(name, Path(folder), rates, options, report)
    return report


def check_shapes(names: Iterable[str]) -> None:
    for name in names:
        if name not in SHAPES and not Path(name).exists():
            raise ValueError(f"unknown shape {name!r}: choose from {', '.join(SHAPES)}, or give a checkpoint's path")


def measure_shape(name: str, scratch: Path, rates: Rates, options: Options, report: Report) -> None:
    folder = Path(name).absolute()
    if name in SHAPES:
        make_checkpoint(SHAPES[name], folder := scratch / "model")
    model = Model.read(folder)
    limit = Limit.measure(model, rates, {contender.precision for contender in contenders(options)})
    batches = options.batches or BATCHES
    field = Field(model.seq2seq, torch.get_num_threads(), options.beams, max(batches), options.peer_python)
    try:
        for contender in contenders(options):
            field.enter(contender, folder, scratch)
        for batch in batches:
            case = Case(Path(name).name, options.prompt, options.beams, batch, NEW_TOKENS)
            samples = field.measure(make_prompts(case, model.vocab_size), NEW_TOKENS, ROUNDS)
            for row in rows_of(case, field, samples, limit):
                report.add(row)
            report.failures += failures_of(case, field, samples)
    finally:
        field.close()


def contenders(options: Options) -> list[Contender]:
    """By precision; OpenVINO's compressed weights meet activations of both precisions that it has for them."""
    found = []
    for precision in options.precisions or ("fp32", "int8"):
        for who in ("tandem", *(options.against or [])):
            if precision in PRECISIONS[who]:
                found.append(Contender(who, precision))
                if who == "openvino" and precision != "fp32":
                    found.append(Contender(who, precision, "bf16"))
    return found


def make_prompts(case: Case, vocab_size: int) -> Rows:
    """Random tokens from the middle of the vocabulary, whose ends are for special ones."""
    draw, third = random.Random(0), vocab_size // 3
    return [[draw.randrange(third, 2 * third) for _ in range(case.prompt)] for _ in range(case.batch)]
