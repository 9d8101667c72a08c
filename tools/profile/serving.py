"""`engine --workload serving`: requests that come faster than they can be served, in batches that change or do not.

Outputs differ in length, so a batch that is run to its end runs ever emptier; continuous batching fills it again. Every
contender serves the same requests, one after another, each in a process of its own that ends with its turn.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from tools.profile.engine import PRECISIONS, check_contenders, check_shapes, folder_of
from tools.profile.engine_field import Contender, Field
from tools.profile.engine_limit import Model
from tools.profile.machine import Cell
from tools.profile.options import Options
from tools.profile.report import Report, Table
from tools.profile.serving_traffic import Requests, Served
from tools.profile.workers import Worker, WorkerError

PEERS = ("transformers", "ctranslate2")
OPTIONS = ("workload", "shape", "batch", "precision", "requests", "rounds", "max_num_seqs", "peer_python")
DEFAULTS = ("gpt2", "t5-small")
BATCHES = [8, 16, 32, 64]  # that the best is chosen of, where batches are static
TRIAL = 128  # requests that it is chosen with
LOAD = 2  # arrivals, over what our engine can serve
AT_ONCE, SATURATED = "at once", f"{LOAD} x saturation"
CHECKED = 8  # requests that are run alone too
WORKER = Path(__file__).with_name("serving_worker.py")
KEYS = ("shape", "precision", "arrivals", "who")
MEASURE = ("tokens/s", "low", "high")
FIGURES = ("x ours", "done/s", "first s", "first 50%", "first 99%", "latency s", "latency 99%", "% others")


@dataclass
class Server:
    """A contender, whose batches are ``static`` or not. batch: how many it runs at once, 0 where that is yet to be
    chosen. runs: what it has done. failed: why it has done no more."""

    contender: Contender
    static: bool = True
    batch: int = 0
    runs: list[Served] = field(default_factory=list)
    failed: str = ""

    @property
    def label(self) -> str:
        return "tandem static" if self.contender.who == "tandem" and self.static else self.contender.who

    @property
    def speed(self) -> float:
        return median(run.speed for run in self.runs)


def run(options: Options) -> Report:
    names = options.shapes or list(DEFAULTS)
    check_shapes(names)
    check_contenders(options)
    expected = {"arrivals": [AT_ONCE, SATURATED], "who": ["tandem static"]}
    report = Report("engine serving", KEYS, MEASURE, path=options.json, table=Table(expected))
    report.start()
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            where = folder_of(name, Path(folder))
            for precision in options.precisions or ["int8"]:
                Serving(Path(name).name, precision, where, Path(folder), options, report).measure()
    return report


class Serving:
    """One shape's, with one precision of weights (transformers' are floats always)."""

    def __init__(
        self, name: str, precision: str, folder: Path, scratch: Path, options: Options, report: Report
    ) -> None:
        model = Model.read(folder)
        self.name, self.precision, self.folder, self.scratch = name, precision, folder, scratch
        self.options, self.report = options, report
        self.batches = options.batches or BATCHES
        self.requests = Requests.draw(options.requests, model.vocab_size)
        sequences = max(self.batches)
        self.static = Field(model.seq2seq, torch.get_num_threads(), 1, sequences, options.peer_python, WORKER)
        self.joining = Field(
            model.seq2seq, torch.get_num_threads(), 1, options.max_num_seqs, options.peer_python, WORKER
        )

    def measure(self) -> None:
        servers = self.servers()
        at_once = self.saturate()
        rate = LOAD * at_once.runs[0].rate
        print(f"{self.name}: our engine serves {rate / LOAD:.3g} requests/s; {rate:.3g} are to arrive", flush=True)
        self.report.add(self.row(at_once, at_once, None))
        rounds = self.options.rounds or 1
        for i in range(rounds):
            for server in servers:
                self.take_turn(server, rate)
                if i == rounds - 1:
                    self.report.add(self.row(server, servers[0], rate))
        self.report.failures += failures(f"{self.name}, {self.precision}", [at_once, *servers])

    def servers(self) -> list[Server]:
        own = Contender("tandem", self.precision)
        found = [Server(own, static=False, batch=self.options.max_num_seqs), Server(own)]
        for who in self.options.against or []:
            precision = "fp32" if who == "transformers" else self.precision
            if precision in PRECISIONS[who]:
                found.append(Server(Contender(who, precision)))
        return found

    def saturate(self) -> Server:
        """How fast ours is when all requests are there from the start. Raises WorkerError."""
        ours = Server(Contender("tandem", self.precision), static=False, batch=self.options.max_num_seqs)
        with self.worker(ours) as worker:
            ours.runs.append(self.served(worker, ours, self.requests, None))
            self.check_alone(worker, ours.runs[0])
        return ours

    @contextmanager
    def worker(self, server: Server) -> Iterator[Worker]:
        """Its process, warmed up."""
        field = self.static if server.static else self.joining
        with closing(field.start(server.contender, self.folder, self.scratch)) as worker:
            self.served(worker, server, self.requests.some(min(self.batches), most_tokens=8), None)
            yield worker

    def served(self, worker: Worker, server: Server, requests: Requests, rate: float | None) -> Served:
        arrivals = requests.arrivals(rate)
        batch = (server.batch or min(self.batches)) if server.static else None
        answer = worker.ask(prompts=requests.prompts, lengths=requests.lengths, arrivals=arrivals, batch=batch)
        return Served.of(arrivals, answer)

    def take_turn(self, server: Server, rate: float) -> None:
        if server.failed:
            return
        try:
            with self.worker(server) as worker:
                server.batch = server.batch or self.best_batch(worker, server)
                server.runs.append(self.served(worker, server, self.requests, rate))
        except WorkerError as error:
            server.failed = str(error)

    def best_batch(self, worker: Worker, server: Server) -> int:
        """Of the sizes there are, the one with which some requests are served soonest when all of them are there."""
        if len(self.batches) == 1:
            return self.batches[0]
        trial, contender = self.requests.some(TRIAL), server.contender
        seconds = {
            size: self.served(worker, Server(contender, batch=size), trial, None).makespan for size in self.batches
        }
        return min(seconds, key=lambda size: seconds[size])

    def check_alone(self, worker: Worker, run: Served) -> None:
        """Whoever is served beside others must get what it gets alone."""
        count = len(self.requests.prompts)
        for i in range(0, count, max(1, count // CHECKED)):
            alone = worker.ask(prompts=[self.requests.prompts[i]], new_tokens=[self.requests.lengths[i]])["tokens"][0]
            if alone != run.tokens[i]:
                self.report.failures.append(f"{self.name}, {self.precision}: request {i} gets other tokens alone")

    def row(self, server: Server, ours: Server, rate: float | None) -> dict[str, Cell]:
        """Medians over the rounds; None where there are none, and the note says why."""
        row: dict[str, Cell] = {"shape": self.name, "precision": server.contender.precision}
        row |= {"arrivals": AT_ONCE if rate is None else SATURATED, "who": server.label}
        row |= {"batch": server.batch or None, "arrivals/s": rate}
        row |= dict.fromkeys((*MEASURE, *FIGURES))
        if server.runs:
            speeds = [run.speed for run in server.runs]
            row |= {"tokens/s": median(speeds), "low": min(speeds), "high": max(speeds)}
            row["x ours"] = median(speeds) / ours.speed if ours.runs else None
            figures = [run.figures() for run in server.runs]
            row |= {name: median(each[name] for each in figures) for name in figures[0]}
        return {**row, "note": server.failed}


def failures(where: str, servers: list[Server]) -> list[str]:
    """Of ours: what could not be run, and tokens that change with the batch."""
    found = []
    ours = [server for server in servers if server.contender.who == "tandem"]
    for server in ours:
        if server.failed:
            found.append(f"{where}: {server.label} could not be measured: {server.failed}")
        if any(run.tokens != ours[0].runs[0].tokens for run in server.runs):
            found.append(f"{where}: {server.label}'s tokens depend on when requests arrive")
    return found
