"""Writes models trained here as folders that transformers loads."""

from __future__ import annotations

from tools.export.folder import export

__all__ = ["export"]
