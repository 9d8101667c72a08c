"""``python -m train.launch --config FILE section.key=value ...``, alone or under torchrun."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

from kernels.backend import check_process_choice
from models.config import ConfigError
from models.files import CheckpointError
from train import distributed
from train.config import RunConfig, fail, parse
from train.data.dataset import load_data
from train.metrics import Reporter
from train.run_folder import claim
from train.starting_point import starting_point
from train.trainer import DivergenceError, Trainer


def main(arguments: list[str]) -> None:
    with mistakes_in_one_line():
        config = parse(arguments)
        run(config, distributed.start(config.training.device))


@contextlib.contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """Ends the program with one line and exit code 2 for what a user can mend; leaves the process group either way."""
    logging.basicConfig(
        level=logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING, format="%(message)s"
    )
    try:
        check_process_choice()
    except ValueError as error:
        fail(error)
    try:
        yield
    except (ConfigError, CheckpointError, DivergenceError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        distributed.finish()


def run(config: RunConfig, own: distributed.Distributed) -> None:
    """Trains ``config`` to its end, from the run's last checkpoint if there is one."""
    start = claim(config, own)
    model, tokenizer = starting_point(config, start)
    max_seqlen = config.model.max_seqlen if model is None else model.config.max_seqlen
    first_id = None if model is None else model.generation.forced_bos_id
    data = load_data(config.data, config.training.seed, max_seqlen, tokenizer, first_id)
    trainer = Trainer(config, data, own, model)
    if start:
        trainer.resume(start)
    reporter = Reporter(config.run_folder, trainer.state.step, trainer.total_steps, own.is_main)
    reporter.note(describe(trainer, start is not None))
    if data.num_too_long:
        reporter.note(f"{data.num_too_long} examples are longer than model.max_seqlen and left out")
    try:
        trainer.train(reporter)
    finally:
        reporter.close()


def describe(trainer: Trainer, resumed: bool) -> str:
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    start = trainer.config.model.init_from or "scratch"
    at = f"resumed at step {trainer.state.step}" if resumed else f"from {start}"
    return (
        f"{trainer.config.run_folder}: {count / 1e6:.2f}M parameters, {trainer.total_steps} steps, {at}, "
        f"{trainer.distributed.world_size} x {trainer.distributed.device.type}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
