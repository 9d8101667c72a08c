"""Launchers as operators of torch: torch.compile and torch.export see a name and shapes, never a kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.backend import TRITON_DEVICE

LIBRARY = torch.library.Library("tandem", "FRAGMENT")


def operator(schema: str, launch: Callable[..., Any], shapes: Callable[..., Any]) -> Any:
    """Defines ``tandem::<schema>`` and returns it, to be called without gradients.

    ``launch`` computes it and returns tensors of its own; its first argument is a tensor. ``shapes`` returns empty
    tensors of the same shapes, dtypes and contiguous strides, for tracing.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, _on_its_device(launch), "CUDA")
    if TRITON_DEVICE == "cpu":
        LIBRARY.impl(name, launch, "CPU")
    torch.library.register_fake(f"tandem::{name}", shapes, lib=LIBRARY)
    return getattr(torch.ops.tandem, name).default


def first_derivative_only(operation: str) -> None:
    """For the start of a backward pass: raises RuntimeError where its own gradient is asked for, as it has none.

    torch's ``once_differentiable`` would not say so where nothing above needs a gradient.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{operation} has no second derivative on triton: use backend='torch' for create_graph")


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be the tensors'."""

    @functools.wraps(launch)
    def run(first: Tensor, *rest: Any) -> Any:
        with torch.cuda.device(first.device):
            return launch(first, *rest)

    return run
