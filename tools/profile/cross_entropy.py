"""`cross_entropy`: the loss of logits, plain and with label smoothing and z-loss, against torch's."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import cross_entropy as ours
from tools.profile import rows
from tools.profile.contenders import Problem, Work, contest
from tools.profile.measure import OPTIONS as OPTIONS
from tools.profile.measure import measure
from tools.profile.options import Options
from tools.profile.report import Report
from tools.profile.rows import Rows

VOCABULARIES = (32_000, 50_257, 128_256, 256_000)
GPU_ROWS = 4096
KINDS: dict[str, dict[str, Any]] = {"plain": {}, "smoothed": {"label_smoothing": 0.1, "z_loss": 1e-4}}
PEERS = ("eager", "compile")


def run(options: Options) -> Report:
    tokens = GPU_ROWS if torch.cuda.is_available() else None
    wanted = rows.shapes(options.shapes, list(KINDS), "vocabularies", VOCABULARIES, tokens)
    return measure("cross_entropy", wanted, partial(problem, against=options.against), options, rate="B")


def problem(shape: Rows, device: torch.device, dtype: torch.dtype, against: list[str] | None) -> Problem:
    logits = (2 * torch.randn(shape.rows, shape.width, device=device)).to(dtype).requires_grad_()
    labels = torch.randint(shape.width, (shape.rows,), device=device)
    size = logits.nbytes
    return Problem(
        dtype,
        (logits, labels),
        partial(formula, **KINDS[shape.kind]),
        contest(ours.cross_entropy, formula, KINDS[shape.kind], device, dtype, against, native=False),
        forward=Work(0, size),
        backward=Work(0, 2 * size),
    )


def formula(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """In float32, as models compute it."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
    return loss + z_loss * logits.logsumexp(-1).square().sum() if z_loss else loss
