"""Compiled operations, each behind a plain function in its own module; importing the package loads none."""

from __future__ import annotations
