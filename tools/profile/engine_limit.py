"""How fast decoding could be at most: a step reads every weight of the decoder once, and multiplies each row by it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from models import checkpoint
from tools.profile import ceilings
from tools.profile.machine import Cell

BYTES = {"fp32": 4.0, "int8": 1.0, "int4": 0.5625}  # a weight; in int4 a 16-bit scale for 32 of them is part of it
READ = 256 << 20  # bytes, as much as GPT-2's weights

TRIES = 5


@dataclass(frozen=True)
class Rates:
    """What this machine does a second with torch's threads: bytes read, operations in a product of matrices."""

    read: float
    fp32: float
    int8: float

    @classmethod
    def measure(cls) -> Rates:
        """The best of a few tries: what other processes take of the machine is no limit of its own."""
        cpu, side = torch.device("cpu"), ceilings.CPU_PRODUCT
        rates = [
            (ceilings.read(READ), ceilings.product(cpu, torch.float32, side), ceilings.int8_product(side))
            for _ in range(TRIES)
        ]
        return cls(*map(max, zip(*rates, strict=True)))

    def cells(self) -> dict[str, Cell]:
        rates = {"read GB/s": self.read, "fp32 product GFLOP/s": self.fp32, "int8 product GOP/s": self.int8}
        return {name: float(f"{rate / 1e9:.3g}") for name, rate in rates.items()}

    def least_seconds(self, weights: int, precision: str, sequences: int) -> tuple[float, str]:
        """Of a step of so many sequences, and what says so: the weights' reading, or their product."""
        product = self.fp32 if precision == "fp32" else self.int8
        reading = weights * BYTES[precision] / self.read
        return max((reading, "read"), (2 * weights * sequences / product, "product"))


@dataclass(frozen=True)
class Model:
    """weights: those a step of decoding multiplies by, the head's included."""

    seq2seq: bool
    vocab_size: int
    weights: int

    @classmethod
    def read(cls, path: Path) -> Model:
        """Of a checkpoint's folder or GGUF file. Raises CheckpointError for what our engine cannot open."""
        model, _ = checkpoint.load(path)
        weights = model.lm_head.weight.numel()
        for name, module in model.decoder.named_modules():
            # Keys and values of the source are made once, before the first step.
            if isinstance(module, nn.Linear) and not name.endswith("cross_attention.kv"):
                weights += module.weight.numel()
        return cls(model.config.is_encoder_decoder, model.config.vocab_size, weights)
