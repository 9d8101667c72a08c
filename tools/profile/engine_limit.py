"""How fast decoding could be at most: a step reads every weight of the decoder once, and multiplies each row by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from models import DecoderOnly, EncoderDecoder, checkpoint
from tools.profile import ceilings
from tools.profile.machine import Cell

BYTES = {
    "fp32": 4.0,
    "bf16": 2.0,
    "int8": 1.0,
    "int4": 0.5625,
}  # a weight; in int4 a 16-bit scale for 32 of them is part of it

TRIES = 5


@dataclass(frozen=True)
class Rates:
    """Operations a second of this machine with torch's threads, in a product of matrices."""

    fp32: float
    int8: float

    @classmethod
    def measure(cls) -> Rates:
        cpu, side = torch.device("cpu"), ceilings.CPU_PRODUCT
        return cls(
            fp32=best(lambda: ceilings.product(cpu, torch.float32, side)),
            int8=best(lambda: ceilings.int8_product(side)),
        )

    def cells(self) -> dict[str, Cell]:
        rates = {"fp32 product GFLOP/s": self.fp32, "int8 product GOP/s": self.int8}
        return {name: float(f"{rate / 1e9:.3g}") for name, rate in rates.items()}


def best(measure: Callable[[], float]) -> float:
    """Of a few tries: what other processes take of the machine is no limit of its own."""
    return max(measure() for _ in range(TRIES))


@dataclass(frozen=True)
class Model:
    """weights: those a step of decoding multiplies by, the head's included."""

    seq2seq: bool
    vocab_size: int
    weights: int

    @classmethod
    def read(cls, path: Path) -> Model:
        """Of a checkpoint's folder or GGUF file. Raises CheckpointError for what our engine cannot open."""
        return cls.of(checkpoint.load(path)[0])

    @classmethod
    def of(cls, model: DecoderOnly | EncoderDecoder) -> Model:
        weights = model.lm_head.weight.numel()
        for name, module in model.decoder.named_modules():
            # Keys and values of the source are made once, before the first step.
            if isinstance(module, nn.Linear) and not name.endswith("cross_attention.kv"):
                weights += module.weight.numel()
        return cls(model.config.is_encoder_decoder, model.config.vocab_size, weights)


@dataclass(frozen=True)
class Limit:
    """Of a model's decoding. reads: bytes a second by precision, of as many bytes as its weights have there, over and
    over: caches may hold a part of them."""

    model: Model
    rates: Rates
    reads: dict[str, float]

    @classmethod
    def measure(cls, model: Model, rates: Rates, precisions: Iterable[str]) -> Limit:
        sizes = {precision: int(model.weights * BYTES[precision]) for precision in precisions}
        return cls(model, rates, {name: best(partial(ceilings.read, size)) for name, size in sizes.items()})

    def least_seconds(self, precision: str, sequences: int) -> tuple[float, str]:
        """Of a step of so many sequences, and what says so: the weights' reading, or their product."""
        product = self.rates.fp32 if precision == "fp32" else self.rates.int8
        read = self.reads[precision]
        reading = (self.model.weights * BYTES[precision] / read, f"read, {read / 1e9:.3g} GB/s")
        return max(reading, (2 * self.model.weights * sequences / product, "product"))
