"""A machine of known ceilings, models and options that take no time, for tests of the profiling command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from tools.profile.ceilings import Ceilings
from tools.profile.checkpoints import Shape
from tools.profile.options import Options

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
GPT2 = Shape(
    "gpt2", {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 300, "n_positions": 512, "initializer_range": 0.5}
)
T5 = Shape(
    "t5", {"num_layers": 1, "d_model": 32, "d_ff": 64, "num_heads": 2, "d_kv": 16, "vocab_size": 300}, seq2seq=True
)
LIMITS = Ceilings(CPU, {torch.float32: 1e11}, 1e10, 2e10)


def options(**changes: object) -> Options:
    return Options(**({"against": ["eager"], "seconds": 0.001} | changes))  # type: ignore[arg-type]


def profile(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.profile", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
