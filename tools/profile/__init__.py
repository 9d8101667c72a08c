"""Measures operations against their peers and the machine's limits: `python -m tools.profile OP`."""

from __future__ import annotations
