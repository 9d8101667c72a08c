"""The one place that picks which implementation of an operation runs.

Every compiled operation names the backends it has, best first; ``choose`` returns the one to use. An argument wins over
the environment variable ``TANDEM_BACKEND``, which wins over the default. What is asked for and missing is an error.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence

BACKENDS = ("triton", "native", "torch", "reference")
ENVIRONMENT_VARIABLE = "TANDEM_BACKEND"

logger = logging.getLogger(__name__)


def choose(operation: str, available: Sequence[str], requested: str | None = None) -> str:
    """Returns the backend of ``operation``: ``requested``, else the environment's, else ``available[0]``.

    Raises ValueError for a name that is no backend, or that this operation does not have.
    """
    name = requested or os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    return _resolve(operation, tuple(available), name)


@functools.cache
def _resolve(operation: str, available: tuple[str, ...], name: str) -> str:
    if name == "auto":
        name = available[0]
    elif name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)} or auto")
    elif name not in available:
        raise ValueError(f"{operation} has no {name} backend here: choose one of {', '.join(available)} or auto")
    logger.info("%s runs on the %s backend", operation, name)
    return name
