"""A machine of known ceilings, and options that take no time, for tests of the profiling command."""

from __future__ import annotations

import torch

from tools.profile.ceilings import Ceilings
from tools.profile.options import Options

CPU = torch.device("cpu")
LIMITS = Ceilings(CPU, {torch.float32: 1e11}, 1e10, 2e10)


def options(**changes: object) -> Options:
    return Options(**({"against": ["eager"], "seconds": 0.001} | changes))  # type: ignore[arg-type]
