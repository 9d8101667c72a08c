"""The C++ extension, imported in one place: after torch, so that both share one OpenMP and one C++ runtime."""

from __future__ import annotations

import torch  # noqa: F401

try:
    import kernels._C as _C
except ModuleNotFoundError as error:
    raise ImportError("kernels._C is not built: run `make env` in the repository") from error

__all__ = ["_C"]
