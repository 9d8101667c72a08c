"""`load`: from the call that opens a checkpoint folder to its first token, each time in a process of its own."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tools.profile.checkpoints import SHAPES, Shape, make_checkpoint
from tools.profile.machine import Cell
from tools.profile.options import Options
from tools.profile.report import Report
from tools.profile.workers import run_once

WORKER = Path(__file__).with_name("load_worker.py")
PEERS = ("transformers", "ctranslate2")
OPTIONS = ("peer_python", "precision")
ROUNDS = 7


def run(options: Options) -> Report:
    report = Report("load", ("shape", "who"), ("first token s", "low", "high"), path=options.json)
    report.start()
    for name in options.shapes or list(SHAPES):
        with tempfile.TemporaryDirectory() as folder:
            seen = measure(SHAPES[name], Path(folder), options)
        exact = {who: samples for who, samples in seen.items() if not who.startswith("tandem ")}
        firsts = {who: [sample["token"] for sample in samples] for who, samples in exact.items()}
        if len({token for tokens in firsts.values() for token in tokens}) > 1:
            report.failures.append(f"{name}: the first tokens differ: {firsts}")
        for who in seen:
            report.add(row(name, who, seen))
    return report


def measure(shape: Shape, folder: Path, options: Options) -> dict[str, list[dict[str, Any]]]:
    """Each contender's samples, taken in turns after one round to warm the file cache."""
    work = partial(run_once, WORKER, options.peer_python)
    work("tandem")  # a peer's Python that is not one should not wait for a model to be made
    peers = options.against or []
    for peer in peers:
        work(peer)
    make_checkpoint(shape, folder / "model")
    ours = ["tandem", *(f"tandem {precision}" for precision in options.precisions if precision != "fp32")]
    folders = dict.fromkeys([*ours, *peers], folder / "model")
    if "ctranslate2" in folders:
        folders["ctranslate2"] = folder / "converted"
        work("convert", folder / "model", folder / "converted")
    threads = str(torch.get_num_threads())
    seen: dict[str, list[dict[str, Any]]] = {who: [] for who in folders}
    for turn in range(ROUNDS + 1):
        for who, where in folders.items():
            sample = work(who, where, threads, "seq2seq" if shape.seq2seq else "causal")
            if turn:
                seen[who].append(sample)
    return seen


def row(shape: str, who: str, seen: dict[str, list[dict[str, Any]]]) -> dict[str, Cell]:
    ours = median(sample["seconds"] for sample in seen["tandem"])
    seconds = sorted(sample["seconds"] for sample in seen[who])
    weights = seen["tandem"][0]["bytes"]
    return {
        "shape": shape,
        "who": who,
        "first token s": median(seconds),
        "low": seconds[0],
        "high": seconds[-1],
        "over ours": median(seconds) / ours,
        "with imports s": median(sample["seconds"] + sample["imports"] for sample in seen[who]),
        "peak over weights": median(sample["peak"] for sample in seen[who]) / weights,
    }
