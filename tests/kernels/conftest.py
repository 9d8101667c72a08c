"""What the tests of several kernels share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RunOnPath = Callable[[str, str], str]
CPU_PATHS = ("generic", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "amx")


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN from here on: what is not written shows."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def run_on_path() -> RunOnPath:
    """Runs a script in a process whose kernels use one CPU path: what it prints. Skips where this CPU lacks it."""

    def run(script: str, path: str) -> str:
        result = subprocess.run(
            [sys.executable, "-c", f"import torch\nimport kernels._C as _C\nassert _C.cpu_path == {path!r}\n{script}"],
            env={**os.environ, "TANDEM_CPU": path},
            capture_output=True,
            text=True,
            check=False,
        )
        if "this CPU does not have it" in result.stderr:
            pytest.skip(f"this CPU has no {path}")
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run
