"""`activation`: gated activations (SwiGLU, GeGLU) against the formula in torch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kernels.activation import NATIVE, TORCH, glu
from tools.profile import rows
from tools.profile.contenders import Problem, Work, contest
from tools.profile.measure import OPTIONS as OPTIONS
from tools.profile.measure import measure
from tools.profile.options import Options
from tools.profile.report import Report
from tools.profile.rows import Rows

KINDS = ("silu", "gelu", "gelu_new")
PEERS = ("eager", "compile")


def run(options: Options) -> Report:
    wanted = rows.shapes(options.shapes, KINDS, "widths")
    return measure("activation", wanted, partial(problem, against=options.against), options, rate="B")


def problem(shape: Rows, device: torch.device, dtype: torch.dtype, against: list[str] | None) -> Problem:
    """The width is the output's; the input holds gate and up side by side, as one product leaves them."""
    x = torch.randn(shape.rows, 2 * shape.width, device=device).to(dtype).requires_grad_()
    return Problem(
        dtype,
        (x,),
        partial(formula, activation=shape.kind),
        contest(glu, formula, {"activation": shape.kind}, device, dtype, against, native=shape.kind in NATIVE),
        forward=Work(0, 1.5 * x.nbytes),
        backward=Work(0, 2.5 * x.nbytes),
    )


def formula(x: Tensor, *, activation: str) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return TORCH[activation](gate) * up
