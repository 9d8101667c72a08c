"""One process or many: who this one is, and the few collectives the trainer needs."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from models.config import ConfigError


@dataclass(frozen=True)
class Distributed:
    """This process among ``world_size``; ``device`` is its own. A single process needs no process group."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """The sums of each value over all ranks."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def start(device: str) -> Distributed:
    """Joins torchrun's process group (gloo on CPU, nccl for tensors on CUDA); alone, there is none to join."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if use_cuda and not torch.cuda.is_available():
        raise ConfigError("training.device is cuda, but this machine has no CUDA device")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise ConfigError(f"{local_rank + 1} processes were started for {torch.cuda.device_count()} CUDA devices")
    own = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(own)
    if world_size > 1:
        # gloo beside nccl: sums of plain numbers travel between hosts without making one wait for its device.
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo", device_id=own if use_cuda else None)
    return Distributed(rank, world_size, own)


def finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
