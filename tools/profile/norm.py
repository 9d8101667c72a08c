"""`norm`: RMSNorm and LayerNorm, alone and after a residual addition, against torch's."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.norm import layer_norm, rms_norm
from tools.profile import rows
from tools.profile.contenders import Outputs, Problem, Work, contest
from tools.profile.measure import OPTIONS as OPTIONS
from tools.profile.measure import measure
from tools.profile.options import Options
from tools.profile.report import Report
from tools.profile.rows import Rows

KINDS = ("rms_norm", "rms_norm_add", "layer_norm", "layer_norm_add")
PEERS = ("eager", "compile")
EPS = 1e-6


def run(options: Options) -> Report:
    wanted = rows.shapes(options.shapes, KINDS, "widths")
    return measure("norm", wanted, partial(problem, against=options.against), options, rate="B")


def problem(shape: Rows, device: torch.device, dtype: torch.dtype, against: list[str] | None) -> Problem:
    """x, weight, then the bias of a LayerNorm, then the residual; all with gradients."""
    centered, added = shape.kind.startswith("layer_norm"), shape.kind.endswith("_add")
    sizes = [(shape.rows, shape.width), (shape.width,)]
    sizes += [(shape.width,)] * centered + [(shape.rows, shape.width)] * added
    inputs = tuple(torch.randn(size, device=device).to(dtype).requires_grad_() for size in sizes)
    # With a residual, it is read and the sum written; back, the sum's gradient is read, and both terms share theirs.
    forward, backward = 2 + 2 * added, 3 + added
    return Problem(
        dtype,
        inputs,
        partial(formula, kind=shape.kind),
        contest(ours, formula, {"kind": shape.kind}, device, dtype, against, native=False),
        forward=Work(0, forward * inputs[0].nbytes),
        backward=Work(0, backward * inputs[0].nbytes),
    )


def ours(x: Tensor, weight: Tensor, *others: Tensor, kind: str, backend: str) -> Outputs:
    bias, residual = named(others, kind)
    if kind.startswith("rms_norm"):
        return rms_norm(x, weight, EPS, residual=residual, backend=backend)
    return layer_norm(x, weight, bias, EPS, residual=residual, backend=backend)


def formula(x: Tensor, weight: Tensor, *others: Tensor, kind: str) -> Outputs:
    bias, residual = named(others, kind)
    total = x if residual is None else x + residual
    if kind.startswith("rms_norm"):
        out = F.rms_norm(total, weight.shape, weight, EPS)
    else:
        out = F.layer_norm(total, weight.shape, weight, bias, EPS)
    return out if residual is None else (out, total)


def named(others: tuple[Tensor, ...], kind: str) -> tuple[Tensor | None, Tensor | None]:
    """The bias and the residual."""
    return others[0] if kind.startswith("layer_norm") else None, others[-1] if kind.endswith("_add") else None
