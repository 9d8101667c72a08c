"""The Triton kernels, their launchers and their operators. Imported only where Triton runs: see ``kernels.backend``."""

from __future__ import annotations
