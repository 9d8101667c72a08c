"""`engine`: tokens a second of decoding, beside CTranslate2, OpenVINO and transformers, each in a process of its own.

Every contender generates one token and then ``NEW_TOKENS`` from the same prompts, in turns, round after round: the
difference is decoding alone, the first token the prompt's or source's share. Nobody may choose the end token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from tools.profile.checkpoints import SHAPES, make_checkpoint
from tools.profile.engine_field import Case, Contender, Field, Rows
from tools.profile.engine_limit import Limit, Model, Rates
from tools.profile.engine_rows import KEYS, MEASURE, rows_of
from tools.profile.engine_tokens import failures_of
from tools.profile.options import Options
from tools.profile.prompts import random_prompts
from tools.profile.report import Report
from tools.profile.workers import run_once

PRECISIONS = {
    "tandem": ("fp32", "int8", "int4"),
    "transformers": ("fp32",),
    "ctranslate2": ("fp32", "int8"),
    "openvino": ("fp32", "int8", "int4"),
}
PEERS = tuple(PRECISIONS)[1:]
OPTIONS = ("workload", "shape", "batch", "precision", "prompt", "beams", "plot", "peer_python")
# Each an operation too, with options of its own; the first is this one.
WORKLOADS = {"decode": __name__} | {name: f"tools.profile.{name}" for name in ("serving", "beams", "copying", "gpu")}
BATCHES = [1, 8, 32]
NEW_TOKENS, ROUNDS = 64, 5


def run(options: Options) -> Report:
    names = options.shapes or list(SHAPES)
    check_shapes(names)
    check_contenders(options)
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


def check_contenders(options: Options) -> None:
    """One that is not there should not wait for a model to be made."""
    for who in ("tandem", *(options.against or [])):
        run_once(Field.WORKER, options.peer_python, who)


def folder_of(name: str, scratch: Path) -> Path:
    """Where the checkpoint is that a shape's name, or a path, stands for: made first, if it is a shape."""
    if name not in SHAPES:
        return Path(name).absolute()
    make_checkpoint(SHAPES[name], folder := scratch / "model")
    return folder


def measure_shape(name: str, scratch: Path, rates: Rates, options: Options, report: Report) -> None:
    folder = folder_of(name, scratch)
    model = Model.read(folder)
    limit = Limit.measure(model, rates, {contender.precision for contender in contenders(options)})
    batches, beams = options.batches or BATCHES, options.beams or 1
    field = Field(model.seq2seq, torch.get_num_threads(), beams, max(batches), options.peer_python)
    try:
        for contender in contenders(options):
            field.enter(contender, folder, scratch)
        for batch in batches:
            case = Case(Path(name).name, options.prompt, beams, batch, NEW_TOKENS)
            samples = field.measure(make_prompts(case, model.vocab_size), NEW_TOKENS, ROUNDS)
            for row in rows_of(case, field, samples, limit):
                report.add(row)
            report.failures += failures_of(case, field, samples)
    finally:
        field.close()


def contenders(options: Options, default: Sequence[str] = ("fp32", "int8")) -> list[Contender]:
    """By precision; OpenVINO's compressed weights meet activations of both precisions that it has for them."""
    found = []
    for precision in options.precisions or default:
        for who in ("tandem", *(options.against or [])):
            if precision in PRECISIONS[who]:
                found.append(Contender(who, precision))
                if who == "openvino" and precision != "fp32":
                    found.append(Contender(who, precision, "bf16"))
    return found


def make_prompts(case: Case, vocab_size: int) -> Rows:
    return random_prompts([case.prompt] * case.batch, vocab_size)
