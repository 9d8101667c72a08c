"""Which folder a run may write: a new one, or its own; never another's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from models.config import ConfigError
from train.checkpoint import Checkpoints
from train.config import RunConfig, TrainingSection
from train.distributed import Distributed

CONFIG_FILE = "config.yaml"
# What may change between the parts of one run; anything else would make it another run.
FREE_TRAINING_KEYS = {
    "num_epochs", "max_steps", "resume", "device", "eval_interval", "eval_samples", "log_interval", "output_dir",
    "name", "activation_checkpointing", "compile",
}  # fmt: skip
FREE_DATA_KEYS = {"num_workers"}


def claim(config: RunConfig, distributed: Distributed) -> Path | None:
    """Creates the run's folder or finds it its own; returns the checkpoint to start from, or None.

    Raises ConfigError where the folder holds another run, or a run at all under ``resume=never``.
    """
    folder, resume = config.run_folder, config.training.resume
    last = Checkpoints(folder, distributed).last
    if last is not None:  # without a checkpoint there is nothing to lose: a mistake does not use up its name
        if resume == "never":
            raise ConfigError(f"{folder} holds a run already: choose another training.name, or training.resume=auto")
        _refuse_differences(config, folder)
    start = last or _named(resume)
    distributed.barrier()  # every rank has looked before the first one writes
    if distributed.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(config.to_yaml())
    return start


def _named(resume: str) -> Path | None:
    """The checkpoint that ``training.resume`` names, for a run that has none of its own."""
    if resume in ("auto", "never"):
        return None
    path = Path(resume)
    if not (path / "trainer" / "state.json").is_file():
        raise ConfigError(f"training.resume: no checkpoint at {path} (expected auto, never or a checkpoint's path)")
    return path.resolve()


def _refuse_differences(config: RunConfig, folder: Path) -> None:
    try:
        old: Any = yaml.safe_load((folder / CONFIG_FILE).read_text())
        old_values = {section: dict(old[section]) for section in ("model", "training", "data")}
    except (yaml.YAMLError, OSError, KeyError, TypeError, ValueError):
        raise ConfigError(f"{folder / CONFIG_FILE} is not a run's config: choose another training.name") from None
    # A run from before an option existed had its default.
    old_values["training"] = dataclasses.asdict(TrainingSection()) | old_values["training"]
    new_values = dataclasses.asdict(config)
    free = {"training": FREE_TRAINING_KEYS, "data": FREE_DATA_KEYS, "model": set()}
    for section, values in new_values.items():
        for key, value in values.items():
            before = old_values[section].get(key)
            if key not in free[section] and before != value:
                raise ConfigError(
                    f"{folder} holds a run with {section}.{key}={before}, not {value}: choose another training.name"
                )
