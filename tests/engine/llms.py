"""Engines on the device that the tests are run for: ``TANDEM_TEST_DEVICE``, the CPU unless it is set.

All are float32, as tokens are compared with those of other devices and other engines. Tests of the C++ core, which is
for the CPU, make theirs with ``LLM`` itself.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from engine import LLM
from engine.options import resolve_device
from models import DecoderOnly, EncoderDecoder
from models.tokenizer import Tokenizer

ROOM = 256 << 20  # bytes of a GPU's memory, which many processes share; all that tests need
DEVICE = resolve_device(os.environ.get("TANDEM_TEST_DEVICE", "cpu")).type


def llm_of(model: DecoderOnly | EncoderDecoder, tokenizer: Tokenizer | None = None, **options: Any) -> LLM:
    """An engine around the model, or around a copy where the model is on another device, so that both can be asked."""
    device = "cpu" if options.get("backend") == "native" else DEVICE
    if next(model.parameters()).device.type != device:
        model = copy.deepcopy(model).to(device)
    return LLM.from_model(model, tokenizer, device=device, **(_room(device) | options))


def llm_from(folder: Path, **options: Any) -> LLM:
    return LLM(folder, device=DEVICE, dtype="float32", **(_room(DEVICE) | options))


def _room(device: str) -> dict[str, Any]:
    return {} if device == "cpu" else {"kv_cache_memory_bytes": ROOM}


def within(tolerance: float) -> float:
    """What two ways to compute one number on the CPU may differ by, as it is where one of them is another device's."""
    return tolerance if DEVICE == "cpu" else 10 * tolerance
