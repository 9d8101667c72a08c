"""`linear_cross_entropy`: the loss of a language model's head from its hidden states, forward and the whole step.

Its gradients come in the forward pass where they are wanted, so a backward pass alone would say nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.linear_cross_entropy import linear_cross_entropy
from tools.profile.contenders import Problem, Work, contest
from tools.profile.measure import OPTIONS as OPTIONS
from tools.profile.measure import measure
from tools.profile.options import Options
from tools.profile.report import Report


@dataclass(frozen=True)
class Shape:
    rows: int
    dim: int
    vocab: int

    @property
    def label(self) -> str:
        return f"{self.rows}x{self.dim}x{self.vocab}"


SHAPES = {
    "heads": [Shape(8192, dim, vocab) for dim, vocab in ((768, 32_128), (2048, 128_256), (4096, 128_256))],
    "small": [Shape(512, 256, 32_000)],  # for a CPU
}
PEERS = ("eager", "compile")
MODES = ("forward", "both")


def run(options: Options) -> Report:
    wanted = shapes(options.shapes, torch.cuda.is_available())
    against = partial(problem, against=options.against)
    return measure("linear_cross_entropy", wanted, against, options, rate="FLOP", modes=MODES)


def shapes(names: list[str], on_gpu: bool) -> list[Shape]:
    found: list[Shape] = []
    for name in names or ["heads" if on_gpu else "small"]:
        sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", name)
        if name not in SHAPES and not sizes:
            raise ValueError(
                f"unknown shape {name!r}: choose from {', '.join(SHAPES)}, or give rows x dim x vocabulary such as "
                "8192x1024x32128"
            )
        found += [Shape(*map(int, sizes.groups()))] if sizes else SHAPES[name]
    return found


def problem(shape: Shape, device: torch.device, dtype: torch.dtype, against: list[str] | None) -> Problem:
    hidden = torch.randn(shape.rows, shape.dim, device=device).to(dtype).requires_grad_()
    weight = (2 * torch.randn(shape.vocab, shape.dim, device=device) / shape.dim**0.5).to(dtype).requires_grad_()
    labels = torch.randint(shape.vocab, (shape.rows,), device=device)
    flops, size = 2 * shape.rows * shape.dim * shape.vocab, hidden.nbytes + weight.nbytes
    return Problem(
        dtype,
        (hidden, weight, labels),
        formula,
        contest(linear_cross_entropy, formula, {}, device, dtype, against, native=False),
        forward=Work(flops, size),
        backward=Work(2 * flops, 2 * size),
    )


def formula(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")
