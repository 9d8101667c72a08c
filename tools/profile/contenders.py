"""Who computes the same thing, and how much work that is at least."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from kernels.backend import available
from tools.profile.options import MODES

Outputs = Tensor | tuple[Tensor, ...]
OutputsT = TypeVar("OutputsT", bound=Outputs)
OURS = "tandem"  # ours are called "tandem triton" and the like, after their backends


@dataclass(frozen=True)
class Contender:
    """One implementation. function takes the problem's inputs, or what ``prepare`` makes of them.

    prepare: what a model does once for many calls, and what is therefore not timed. It carries gradients. modes: those
    in which it differs from others.
    """

    function: Callable[..., Outputs]
    prepare: Callable[..., tuple[Any, ...]] = lambda *inputs: inputs
    modes: tuple[str, ...] = MODES


@dataclass(frozen=True)
class Work:
    """The least an operation takes: FLOPs, and bytes to and from memory. reads: hardly any of them are written."""

    flops: float
    bytes: float
    reads: bool = False

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Problem:
    """What a group of rows is about.

    inputs: tensors; those that require a gradient get one. reference: the formula, called on the inputs in a higher
    precision. forward, backward: their work.
    """

    dtype: torch.dtype
    inputs: tuple[Tensor, ...]
    reference: Callable[..., Outputs]
    contenders: dict[str, Contender]
    forward: Work
    backward: Work

    def work(self, mode: str) -> Work:
        return {"forward": self.forward, "backward": self.backward, "both": self.forward + self.backward}[mode]


def our_backends(device: torch.device, dtype: torch.dtype, native: bool = True) -> list[str]:
    """Those worth timing: the kernels, and on a CPU what torch makes of the same call."""
    names = available(device, triton=True, native=native and dtype is torch.float32 and device.type == "cpu")
    if device.type == "cuda":
        return list(names[:1])
    return [name for name in names if name in ("native", "torch")]


def compiled(function: Callable[..., OutputsT]) -> Callable[..., OutputsT]:
    """torch.compile for one shape, at the first call: loading the compiler takes seconds."""

    @functools.cache
    def compile_once() -> Callable[..., OutputsT]:
        import torch._functorch.config

        # A graph whose backward pass runs many times may not give its buffers away.
        torch._functorch.config.donated_buffer = False
        return torch.compile(function, dynamic=False)

    return lambda *args, **kwargs: compile_once()(*args, **kwargs)


def chosen(everyone: dict[str, Contender], against: Sequence[str] | None) -> dict[str, Contender]:
    """Ours and the peers that are named, or all."""
    return {name: c for name, c in everyone.items() if name.startswith(OURS) or against is None or name in against}


def contest(
    function: Callable[..., Outputs],
    formula: Callable[..., Outputs],
    options: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    against: Sequence[str] | None,
    native: bool = True,
) -> dict[str, Contender]:
    """Our function on each of its backends, against a formula of torch's, eager and compiled; all with ``options``."""
    plain = partial(formula, **options)
    everyone = {
        f"{OURS} {name}": Contender(partial(function, **options, backend=name))
        for name in our_backends(device, dtype, native)
    }
    return chosen(everyone | {"eager": Contender(plain), "compile": Contender(compiled(plain))}, against)
