"""Compiled operations, each behind a plain function in a module of its own; importing this package loads none of them."""

from __future__ import annotations
