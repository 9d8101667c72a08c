"""A run's checkpoints: written whole or not at all, and enough to continue bit for bit.

``checkpoints/step-N`` is a checkpoint folder as ``models.load`` reads it plus ``trainer/``; ``last`` and ``best`` link
to such folders. A folder is written under another name, synced and renamed, and only then linked.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from models import checkpoint
from models.checkpoint import read_tensors
from models.files import CheckpointError, read_json
from models.tokenizer import Tokenizer
from models.transformer import DecoderOnly, EncoderDecoder
from train.distributed import Distributed


@dataclass
class TrainState:
    """Where a run stands. ``update`` counts within the epoch, ``step`` over the whole run."""

    step: int = 0
    epoch: int = 0
    update: int = 0
    best: float | None = None


class Checkpoints:
    """The ``checkpoints`` folder of one run."""

    def __init__(self, run_folder: Path, distributed: Distributed) -> None:
        self.folder = run_folder / "checkpoints"
        self.distributed = distributed

    @property
    def last(self) -> Path | None:
        """The newest complete checkpoint, if there is one; the links may have been lost in copying."""
        link = self.folder / "last"
        if link.exists():
            return link.resolve()
        complete = [path.parent.parent for path in self.folder.glob("step-*/trainer/state.json")]
        return max(complete, key=lambda folder: int(folder.name.removeprefix("step-")), default=None)

    def save(
        self, model: DecoderOnly | EncoderDecoder, tokenizer: Tokenizer, optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler, state: TrainState, is_best: bool,
    ) -> None:  # fmt: skip
        """Writes ``step-N`` and moves ``last`` (and ``best``) to it; every rank adds its random state."""
        target, draft = self.folder / f"step-{state.step}", self.folder / f".step-{state.step}"
        if self.distributed.is_main:
            shutil.rmtree(draft, ignore_errors=True)
            (draft / "trainer").mkdir(parents=True)
        self.distributed.barrier()
        save_file(
            _random_state(self.distributed.device),
            draft / "trainer" / f"rank-{self.distributed.rank}.safetensors",
        )
        if self.distributed.is_main:
            checkpoint.save(draft, model, tokenizer)
            save_file(_optimizer_tensors(optimizer), draft / "trainer" / "optimizer.safetensors")
            world_size = self.distributed.world_size
            progress = {"state": asdict(state), "scaler": scaler.state_dict(), "world_size": world_size}
            (draft / "trainer" / "state.json").write_text(json.dumps(progress, indent=2) + "\n")
        self.distributed.barrier()
        if self.distributed.is_main:
            _sync(draft)
            shutil.rmtree(target, ignore_errors=True)
            draft.rename(target)
            for name in ["last", "best"] if is_best else ["last"]:
                _point(self.folder / name, target.name)
            self._remove_unlinked()
        self.distributed.barrier()

    def restore(
        self, folder: Path, model: DecoderOnly | EncoderDecoder, optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> TrainState:  # fmt: skip
        """Loads everything ``save`` wrote. Raises CheckpointError for a folder that lacks or breaks a part of it."""
        checkpoint.load_weights(model, folder / checkpoint.WEIGHTS_FILE)
        progress = read_json(folder / "trainer" / "state.json")
        if (world_size := progress.get("world_size")) not in (None, self.distributed.world_size):
            raise CheckpointError(
                f"{folder} was saved by {world_size} processes, and its place in the data means nothing to "
                f"{self.distributed.world_size}: start as many"
            )
        _restore_optimizer(optimizer, read_tensors(folder / "trainer" / "optimizer.safetensors"))
        _restore_random_state(read_tensors(folder / "trainer" / f"rank-{self.distributed.rank}.safetensors"))
        try:
            scaler.load_state_dict(progress["scaler"])
            state = TrainState(**progress["state"])
        except (KeyError, TypeError, RuntimeError):
            raise CheckpointError(f"{folder / 'trainer' / 'state.json'} does not describe a training state") from None
        if folder.parent != self.folder.resolve():
            state.best = None  # another run's best, perhaps by another metric, is not this one's to beat
        return state

    def _remove_unlinked(self) -> None:
        kept = {os.readlink(self.folder / name) for name in ("last", "best") if (self.folder / name).is_symlink()}
        for folder in self.folder.glob("*step-*"):
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": tensor for index, values in state.items() for name, tensor in values.items()}


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if set(state) != set(range(count)):
        raise CheckpointError(f"the optimizer state is of {len(state)} parameters, the model has {count}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _restore_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _point(link: Path, target: str) -> None:
    draft = link.with_name(f".{link.name}")
    draft.unlink(missing_ok=True)
    draft.symlink_to(target)
    draft.rename(link)
