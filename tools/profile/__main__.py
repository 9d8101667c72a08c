"""`python -m tools.profile OP [options]` measures; `compare A.json B.json` and `plot A.json FILE.png` show results."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch

from kernels.backend import check_process_choice
from tools.profile import budget_check, compare, plot, tune
from tools.profile.ceilings import DTYPES
from tools.profile.options import MODES, PRECISIONS, Options, known, listed, number, numbers

# An operation is a module with PEERS and SHAPES, each named by its keys, and run(options) -> Report, which prints its
# rows as they are measured. OPTIONS are those of SOME that it takes, and "shape" where run() reads the shapes' names
# itself, and has others than SHAPES; MODES and WEIGHTS (of --precision), if there, are others than all; SECONDS, if
# there, is what --seconds is by default; WORKLOADS, if there, are more operations, of which --workload chooses one.
NAMES = (
    "attention", "paged_attention", "linear", "norm", "rotary", "activation", "cross_entropy", "linear_cross_entropy",
    "sampling", "load", "train", "engine",
)  # fmt: skip
OPERATIONS = {name: f"tools.profile.{name}" for name in NAMES}
SOME = (
    "batch",
    "mode",
    "dtype",
    "precision",
    "prompt",
    "beams",
    "workload",
    "requests",
    "rounds",
    "max_num_seqs",
    "plot",
    "peer_python",
)  # options that not every operation takes
SHOWS = {"compare": compare.main, "plot": plot.main}


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] in SHOWS:
        return SHOWS[arguments[0]](arguments[1:])
    parsed = parse(arguments)
    if parsed.budget or parsed.update:
        return budget(parsed)
    if parsed.tune:
        return tuning(parsed)
    if parsed.operation is None:
        raise ValueError(f"say what to measure: one of {', '.join(OPERATIONS)}")
    operation = load(parsed.operation, parsed.workload)
    options = read(parsed, operation)
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    report = operation.run(options)
    report.finish()
    if parsed.plot:
        plot.draw(report.operation, report.rows, report.ceilings, parsed.plot)
    return 1 if report.failures else 0


def budget(parsed: argparse.Namespace) -> int:
    if not parsed.budget:
        raise ValueError("--update belongs to --budget")
    given = [name for name in (*SOME, "against", "shape", "threads") if getattr(parsed, name)]
    if parsed.tune:
        raise ValueError("--tune and --budget are for one each")
    if given:
        raise ValueError(f"--budget takes no --{given[0].replace('_', '-')}")
    writable("--json", parsed.json)
    report = budget_check.run(parsed.operation, parsed.update, parsed.json)
    report.finish()
    return 1 if report.failures else 0


def tuning(parsed: argparse.Namespace) -> int:
    if parsed.operation != "attention":
        raise ValueError("--tune is for attention, whose kernels choose from a table")
    given = [name for name in (*SOME, "against", "threads") if getattr(parsed, name)]
    if given:
        raise ValueError(f"--tune takes no --{given[0].replace('_', '-')}")
    writable("--json", parsed.json)
    report = tune.run(listed(parsed.shape), seconds(parsed), parsed.json)
    report.finish()
    return 1 if report.failures else 0


def load(name: str, workload: str) -> ModuleType:
    known("operation", [name], OPERATIONS)
    operation = import_module(OPERATIONS[name])
    if workload and (workloads := getattr(operation, "WORKLOADS", {})):
        known("workload", [workload], workloads)
        return import_module(workloads[workload])
    return operation


def read(parsed: argparse.Namespace, operation: ModuleType) -> Options:
    """The options, checked before anything is measured."""
    if not 0 <= parsed.threads <= 1024:
        raise ValueError(f"--threads must be from 0 (torch's own) to 1024, got {parsed.threads}")
    given_seconds = seconds(parsed, getattr(operation, "SECONDS", Options.seconds))
    for option in SOME:
        if getattr(parsed, option) and option not in operation.OPTIONS:
            workload = f"'s {parsed.workload or 'decode'}" if "workload" in operation.OPTIONS else ""
            raise ValueError(f"{parsed.operation}{workload} takes no --{option.replace('_', '-')}")
    writable("--json", parsed.json)
    writable("--plot", parsed.plot)
    if parsed.plot:
        if parsed.plot.suffix != ".png":
            raise ValueError(f"plots are PNG: call the file {parsed.plot.stem or 'plot'}.png")
        plot.library()  # that it is missing should not come out after the figures
    shapes = listed(parsed.shape)
    return Options(
        against=None if parsed.against is None else peers(parsed.against, operation),
        shapes=shapes if "shape" in operation.OPTIONS else known("shape", shapes, operation.SHAPES),
        batches=numbers("--batch", parsed.batch),
        modes=known("mode", listed(parsed.mode), getattr(operation, "MODES", MODES)),
        dtypes=[DTYPES[name] for name in known("dtype", listed(parsed.dtype), DTYPES)],
        precisions=known("precision", listed(parsed.precision), getattr(operation, "WEIGHTS", PRECISIONS)),
        prompt=number("--prompt", parsed.prompt) or Options.prompt,
        beams=number("--beams", parsed.beams),
        requests=number("--requests", parsed.requests) or Options.requests,
        rounds=number("--rounds", parsed.rounds),
        max_num_seqs=number("--max-num-seqs", parsed.max_num_seqs) or Options.max_num_seqs,
        seconds=given_seconds,
        json=parsed.json,
        peer_python=parsed.peer_python or sys.executable,
    )


def seconds(parsed: argparse.Namespace, default: float = Options.seconds) -> float:
    given = default if parsed.seconds is None else parsed.seconds
    if not 0 < given < 1e6:
        raise ValueError(f"--seconds must be a positive number, got {given}")
    return given


def peers(text: str, operation: ModuleType) -> list[str]:
    names = known("peer", listed(text), [*operation.PEERS, "none"])
    if "none" in names and len(names) > 1:
        raise ValueError(f"--against none is for none alone, got {text!r}")
    return [name for name in names if name != "none"]


def writable(option: str, path: Path | None) -> None:
    """A folder that is not there should not wait for the figures."""
    if path is not None and not path.absolute().parent.is_dir():
        raise ValueError(f"{option} {path}: there is no such folder")
    if path is not None and path.exists() and not path.is_file():
        raise ValueError(f"{option} {path} is not a file")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m tools.profile", description=__doc__)
    parser.add_argument("operation", metavar="OP", nargs="?", help="one of " + ", ".join(OPERATIONS))
    parser.add_argument("--against", metavar="PEER,PEER", help="what to compare with; none for nothing")
    parser.add_argument("--shape", default="", metavar="NAME,NAME", help="shapes by name, or of your own")
    parser.add_argument("--batch", default="", metavar="N,N", help="batch sizes (sampling, train, engine)")
    parser.add_argument("--mode", default="", metavar="MODE,MODE", help="of " + ", ".join(MODES))
    parser.add_argument("--dtype", default="", metavar="DTYPE,DTYPE", help="of " + ", ".join(DTYPES))
    parser.add_argument(
        "--precision",
        default="",
        metavar="NAME,NAME",
        help="of weights (engine, linear, load): " + ", ".join(PRECISIONS),
    )
    parser.add_argument("--prompt", default="", metavar="N", help="tokens of a prompt or source (engine)")
    parser.add_argument("--beams", default="", metavar="N", help="width of a beam search (engine); greedy by default")
    parser.add_argument(
        "--workload", default="", metavar="NAME", help="of engine: decode (the default), serving, beams, copying or gpu"
    )
    parser.add_argument("--requests", default="", metavar="N", help="how many come (serving); 256 by default")
    parser.add_argument("--rounds", default="", metavar="N", help="to take medians of (serving, beams, copying, gpu)")
    parser.add_argument("--max-num-seqs", default="", metavar="N", help="of ours (serving); 64 by default")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; torch's by default")
    parser.add_argument("--seconds", type=float, help="time for each measurement; of engine's gpu, each shape")
    parser.add_argument("--peer-python", metavar="PATH", help="Python of peers (load, engine)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the JSON line to a file, row by row")
    parser.add_argument("--budget", action="store_true", help="what kernels take of a GPU, against budgets.json")
    parser.add_argument("--update", action="store_true", help="with --budget: write what was found there instead")
    parser.add_argument("--tune", action="store_true", help="attention: find better tiles on this GPU for the table")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the rows")
    return parser.parse_args(arguments)


def command(arguments: list[str]) -> int:
    """``main``, with what a user can set right as one sentence and exit code 2."""
    try:
        check_process_choice()
        return main(arguments)
    except KeyboardInterrupt:
        return 130
    except (ValueError, ImportError, OSError) as error:
        print(f"tools.profile: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
