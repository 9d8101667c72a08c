"""`engine --workload beams`: beam search over sources of different lengths, and what it holds of the cache.

All beams of a search read the same keys and values of its source, which are in the cache once: as many blocks of it at
any width.
"""

from __future__ import annotations

import tempfile
from contextlib import closing
from pathlib import Path
from statistics import median

import torch

from tools.profile.engine import check_contenders, check_shapes, contenders, folder_of
from tools.profile.engine_field import Case, Contender, Field, Rows, Samples
from tools.profile.engine_limit import Model
from tools.profile.engine_tokens import TRUSTED, Seen, failures_of
from tools.profile.machine import Cell
from tools.profile.options import Options
from tools.profile.prompts import LONGEST, random_lengths, random_prompts
from tools.profile.report import Report, Table

PEERS = ("transformers", "ctranslate2")
OPTIONS = ("workload", "shape", "batch", "precision", "beams", "rounds", "peer_python")
BEAMS, SOURCES, NEW_TOKENS, ROUNDS = 4, 32, 64, 3
WIDTHS = (1, 4, 8)  # whose use of the cache is compared
WORKER = Path(__file__).with_name("beams_worker.py")
KEYS = ("shape", "precision", "beams", "batch", "who")
MEASURE = ("tokens/s", "low", "high")
HELD = ("source blocks", "source MiB", "other blocks")
FIGURES = (*MEASURE, "x ours", "% equal", "% others", *HELD)


def run(options: Options) -> Report:
    names = options.shapes or ["t5-base"]
    check_shapes(names)
    check_contenders(options)
    table = Table({"who": ["tandem's cache", "transformers"]})
    report = Report("engine beams", KEYS, MEASURE, path=options.json, table=table)
    report.start()
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            measure_shape(name, Path(scratch), options, report)
    return report


def measure_shape(name: str, scratch: Path, options: Options, report: Report) -> None:
    folder = folder_of(name, scratch)
    model = Model.read(folder)
    for batch in options.batches or [SOURCES]:
        case = Case(Path(name).name, LONGEST, options.beams or BEAMS, batch, NEW_TOKENS)
        prompts = random_prompts(random_lengths(batch), model.vocab_size)
        measure_search(case, prompts, model, folder, scratch, options, report)
        if model.seq2seq:
            for precision in options.precisions or ("fp32",):
                measure_cache(case, precision, prompts, folder, options, report)


def measure_search(
    case: Case, prompts: Rows, model: Model, folder: Path, scratch: Path, options: Options, report: Report
) -> None:
    field = Field(model.seq2seq, torch.get_num_threads(), case.beams, case.batch, options.peer_python)
    chosen = contenders(options, default=("fp32",))
    with closing(field):
        for contender in chosen:
            field.enter(contender, folder, scratch)
        seen = field.measure(prompts, NEW_TOKENS, options.rounds or ROUNDS)
        for contender in field.contenders:
            report.add(row(case, contender, field, seen))
        report.failures += failures_of(case, field, seen)


def row(case: Case, contender: Contender, field: Field, seen: Seen) -> dict[str, Cell]:
    """Figures are None where the contender has none; the note then says why."""
    cells = named(case, contender.precision, case.beams, contender.label)
    if contender in seen:
        cells |= figures(case, seen[contender])
        ours = seen.get(Contender("tandem", contender.precision))
        if ours is not None:
            cells["x ours"] = median(speeds_of(case, seen[contender])) / median(speeds_of(case, ours))
        if TRUSTED in seen:
            cells["% equal"] = 100 * equal_share(seen[contender], seen[TRUSTED])
    return {**cells, "note": field.failed.get(contender, "")}


def named(case: Case, precision: str, beams: int, who: str) -> dict[str, Cell]:
    """A row without its figures."""
    cells: dict[str, Cell] = {"shape": case.shape, "precision": precision, "beams": beams, "batch": case.batch}
    return {**cells, "who": who, **dict.fromkeys(FIGURES), "note": ""}


def figures(case: Case, samples: Samples) -> dict[str, Cell]:
    """Of whole searches, the reading of their sources included."""
    speeds = speeds_of(case, samples)
    return {"tokens/s": median(speeds), "low": min(speeds), "high": max(speeds), "% others": 100 * samples.others}


def speeds_of(case: Case, samples: Samples) -> list[float]:
    """Tokens a second of the best hypotheses."""
    return [case.batch * case.new_tokens / (sample.prefill + sample.decode) for sample in samples.taken]


def equal_share(samples: Samples, reference: Samples) -> float:
    """Of the hypotheses, those that are the same token by token."""
    pairs = list(zip(samples.tokens, reference.tokens, strict=True))
    return sum(ours == theirs for ours, theirs in pairs) / len(pairs)


def measure_cache(case: Case, precision: str, prompts: Rows, folder: Path, options: Options, report: Report) -> None:
    """A row for each of the widths; that their sources take different room is a failure."""
    sequences = max(WIDTHS) * case.batch
    field = Field(True, torch.get_num_threads(), 1, sequences, options.peer_python, WORKER)
    found = []
    with closing(field.start(Contender("tandem", precision), folder, folder)) as worker:
        for beams in WIDTHS:
            held = worker.ask(prompts=prompts, new_tokens=NEW_TOKENS, beams=beams)
            found.append(held["sources"])
            cells = named(case, precision, beams, "tandem's cache")
            cells |= {"source blocks": held["sources"], "source MiB": held["sources"] * held["bytes"] / 2**20}
            report.add({**cells, "other blocks": held["all"] - held["sources"], "% others": 100 * held["others"]})
    report.failures += uneven(f"{case.shape}, {precision}", found)


def uneven(where: str, blocks: list[int]) -> list[str]:
    """What is wrong where searches of different widths hold different numbers of blocks for the same sources."""
    if len(set(blocks)) == 1:
        return []
    return [f"{where}: wider searches hold more of their sources: {', '.join(map(str, blocks))} blocks"]
