"""The one place that picks which implementation of an operation runs.

Every compiled operation names the backends that serve a call, best first; ``choose`` returns the one to
use. An argument wins over the environment variable ``TANDEM_BACKEND``, which is read once and wins over the
default. What is asked for and missing is an error; but the variable speaks to a whole process, so it passes over an
operation that never has its backend, such as the norms, which have no C++.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor

BACKENDS = ("triton", "native", "torch", "reference")
ENVIRONMENT_VARIABLE = "TANDEM_BACKEND"

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CUDA_CAPABILITY = (8, 0)  # what the Triton kernels are written and compiled for

logger = logging.getLogger(__name__)


def _triton_device() -> str | None:
    """The type of device that Triton kernels run on in this process, if any."""
    if importlib.util.find_spec("triton") is None:
        return None
    if torch.cuda.is_available():
        return "cuda" if torch.cuda.get_device_capability() >= MIN_CUDA_CAPABILITY else None
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else None


TRITON_DEVICE = _triton_device()  # "cpu": interpreted, for tests
PROCESS_CHOICE = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"


def available(device: torch.device, *, triton: bool = False, native: bool = False) -> tuple[str, ...]:
    """The backends that serve a call on ``device``, best first, given which kernels of our own take its tensors."""
    names = ("native", "torch", "reference") if native else ("torch", "reference")
    if not triton or device.type != TRITON_DEVICE:
        return names
    return (*names, "triton") if device.type == "cpu" else ("triton", *names)


def triton_serves(*tensors: Tensor | None) -> bool:
    """Whether Triton kernels, which compute in float32, take all of these tensors in this process."""
    if TRITON_DEVICE is None:
        return False
    return all(x is None or (x.device.type == TRITON_DEVICE and x.dtype in TRITON_DTYPES) for x in tensors)


def choose(
    operation: str, available: Sequence[str], requested: str | None = None, *, has: Sequence[str] = BACKENDS
) -> str:
    """Returns the backend of ``operation``: ``requested``, else the environment's, else ``available[0]``.

    ``available`` are the backends that serve this call, ``has`` those that serve any call of the operation: the
    environment's choice of another does not concern it.
    Raises ValueError for a name that is no backend, or that is asked for and not available.
    """
    name = requested or (PROCESS_CHOICE if PROCESS_CHOICE in has or PROCESS_CHOICE not in BACKENDS else "auto")
    # A traced graph has no room for a cache or a log line, and is traced once anyway.
    pick = _pick if torch.compiler.is_compiling() else _pick_once
    return pick(operation, tuple(available), name)


def _pick(operation: str, available: tuple[str, ...], name: str) -> str:
    if name == "auto":
        return available[0]
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)} or auto")
    if name not in available:
        allowed = ", ".join(available)
        raise ValueError(f"{operation} has no {name} backend here: choose one of {allowed} or auto")
    return name


def check_process_choice() -> None:
    """Raises ValueError where TANDEM_BACKEND names no backend, or one that no tensor of this process could have."""
    if PROCESS_CHOICE != "auto" and PROCESS_CHOICE not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} is {PROCESS_CHOICE!r}: choose one of {', '.join(BACKENDS)} or auto")
    if PROCESS_CHOICE == "triton" and TRITON_DEVICE is None:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} is triton, which needs a GPU of compute capability 8.0 and triton")


def check_devices(operation: str, first: Tensor, *others: Tensor | None) -> None:
    """Raises ValueError where the tensors of a call are not on one device."""
    for x in others:
        if x is not None and x.device != first.device:
            raise ValueError(f"{operation} needs its tensors on one device, got {first.device} and {x.device}")


@functools.cache
def _pick_once(operation: str, available: tuple[str, ...], name: str) -> str:
    picked = _pick(operation, available, name)
    logger.info("%s runs on the %s backend", operation, picked)
    return picked


def in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast wants a product's operands, where it is on; an operator of our own would not be asked."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)
