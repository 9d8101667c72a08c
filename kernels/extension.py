"""The C++ extension, imported in one place: after torch, so that both share one OpenMP and one C++ runtime."""

from __future__ import annotations

import logging

import torch  # noqa: F401

try:
    import kernels._C as _C
except ModuleNotFoundError as error:
    raise ImportError("kernels._C is not built: run `make env` in the repository") from error

__all__ = ["_C"]

# Once, as the module is loaded at its first use.
logging.getLogger(__name__).info("the C++ core uses %s", _C.cpu_path)
