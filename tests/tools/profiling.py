"""A machine of known ceilings, and options that take no time, for tests of the profiling command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from tools.profile.ceilings import Ceilings
from tools.profile.options import Options

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
LIMITS = Ceilings(CPU, {torch.float32: 1e11}, 1e10, 2e10)


def options(**changes: object) -> Options:
    return Options(**({"against": ["eager"], "seconds": 0.001} | changes))  # type: ignore[arg-type]


def profile(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.profile", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
