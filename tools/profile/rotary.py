"""`rotary`: rotary positions on a sequence's heads, in both pairings, against the formula."""

from __future__ import annotations

from functools import partial

import torch

from kernels import reference
from kernels.rotary import rotate
from tools.profile import rows
from tools.profile.contenders import Problem, Work, contest
from tools.profile.measure import OPTIONS as OPTIONS
from tools.profile.measure import measure
from tools.profile.options import Options
from tools.profile.report import Report
from tools.profile.rows import Rows

KINDS = ("halves", "interleaved")
PEERS = ("eager", "compile")
HEAD_DIM = 128


def run(options: Options) -> Report:
    wanted = rows.shapes(options.shapes, KINDS, "widths")
    for shape in wanted:
        if shape.width % HEAD_DIM:
            raise ValueError(f"the width of a rotary shape is heads x {HEAD_DIM}, got {shape.width}")
    return measure("rotary", wanted, partial(problem, against=options.against), options, rate="B")


def problem(shape: Rows, device: torch.device, dtype: torch.dtype, against: list[str] | None) -> Problem:
    """One sequence of so many tokens; its angles are float32."""
    heads = shape.width // HEAD_DIM
    x = torch.randn(1, shape.rows, heads, HEAD_DIM, device=device).to(dtype).requires_grad_()
    angles = torch.rand(shape.rows, 1, HEAD_DIM // 2, device=device) * 6.28
    cos, sin = angles.cos(), angles.sin()
    interleaved = shape.kind == "interleaved"
    work = Work(0, 2 * x.nbytes + cos.nbytes + sin.nbytes)
    options = {"interleaved": interleaved}
    return Problem(
        dtype,
        (x, cos, sin),
        partial(reference.rotate, interleaved=interleaved),
        contest(rotate, reference.rotate, options, device, dtype, against, native=not interleaved),
        forward=work,
        backward=work,
    )
