"""What Triton compiles for in this process: a GPU's architecture, or its interpreter."""

from __future__ import annotations

import functools

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)  # read by triton when a kernel is decorated, so fixed from then on


@functools.cache
def architecture() -> str:
    """``sm90`` and the like, AMD's ``gfx942``, or ``interpreter``: the key of a kernel's configurations.

    Taken once: the GPUs of one machine are alike.
    """
    if INTERPRETED:
        return "interpreter"
    arch = triton.runtime.driver.active.get_current_target().arch
    return f"sm{arch}" if isinstance(arch, int) else str(arch)


@functools.cache
def multiprocessors() -> int:
    """How many the GPU has: what a kernel whose programs share out the rows launches a multiple of.

    A constant without a GPU: small where kernels are interpreted, an H100's where they are only compiled.
    """
    if INTERPRETED:
        return 2
    return torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 132


@functools.cache
def is_amd() -> bool:
    return architecture().startswith("gfx")


@functools.cache
def serves_float8() -> bool:
    """Whether e4m3 has instructions here: on NVIDIA's from sm89 on, and in the interpreter."""
    name = architecture()
    return name == "interpreter" or (name.startswith("sm") and int(name[2:]) >= 89)


def has_wgmma() -> bool:
    """Whether products of half precision are Hopper's or a later GPU's, which run beside what follows them."""
    return architecture().startswith(("sm9", "sm10"))
