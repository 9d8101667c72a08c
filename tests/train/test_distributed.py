"""Ranks and accumulation only split the work: the gradients are those of one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent.parent
SHAPE = ["model.dim=32", "model.depth=2", "model.heads=4", "training.label_smoothing=0.1", "data.num_train_samples=40",
         "data.num_val_samples=10", "data.num_workers=0", "training.batch_size=5"]  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def gradients(folder: Path, world_size: int, accumulation: int) -> Any:
    output, port = folder / f"{world_size}.pt", str(free_port())
    ranks = []
    for rank in range(world_size):
        group = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}  # fmt: skip
        command = [sys.executable, "-m", "tests.train.gradient_worker", str(output), *SHAPE,
                   f"training.accumulation={accumulation}"]  # fmt: skip
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | group, stderr=subprocess.PIPE, text=True))
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return torch.load(output)


def test_two_ranks_with_accumulation_give_the_gradients_of_one_process(tmp_path: Path) -> None:
    alone, together = gradients(tmp_path, 1, 4), gradients(tmp_path, 2, 2)
    assert alone["tokens"] == together["tokens"] > 100
    assert abs(alone["loss"] - together["loss"]) < 1e-3
    assert alone["gradients"].keys() == together["gradients"].keys()
    for name, expected in alone["gradients"].items():
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(together["gradients"][name], expected, atol=1e-6, rtol=0, msg=name)


def test_a_rank_without_work_takes_part_in_silence(tmp_path: Path) -> None:
    # 40 examples in batches of 5 are 8 batches; 2 ranks x 5 passes leave two of the update's ten empty.
    alone, together = gradients(tmp_path, 1, 8), gradients(tmp_path, 2, 5)
    assert alone["tokens"] == together["tokens"]
    for name, expected in alone["gradients"].items():
        torch.testing.assert_close(together["gradients"][name], expected, atol=1e-6, rtol=0, msg=name)
