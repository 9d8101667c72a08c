"""The shapes that attention is measured on: grids of papers and models, as data."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tools.profile.contenders import Work

TOKENS = 16384  # batch x seqlen of the grids


@dataclass(frozen=True)
class Shape:
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads: int
    head_dim: int
    causal: bool = False
    t5: bool = False  # with T5's relative bias

    @property
    def label(self) -> str:
        lengths = f"{self.seqlen_q}" if self.seqlen_q == self.seqlen_k else f"{self.seqlen_q}:{self.seqlen_k}"
        marks = "-causal" * self.causal + "-t5" * self.t5
        return f"{self.batch}x{lengths}x{self.heads}x{self.head_dim}{marks}"

    @property
    def scores(self) -> int:
        return self.batch * self.heads * self.seqlen_q * self.seqlen_k

    def forward(self, itemsize: int) -> Work:
        """Two matrix products, causal ones counted as half, as is the custom; q, k, v read and the output written."""
        flops = 4 * self.scores * self.head_dim / (2 if self.causal else 1)
        row = self.batch * self.heads * self.head_dim * itemsize
        return Work(flops, row * (2 * self.seqlen_q + 2 * self.seqlen_k))

    def backward(self, itemsize: int) -> Work:
        """Five products; q, k, v, the output and its gradient read, three gradients written."""
        row = self.batch * self.heads * self.head_dim * itemsize
        return Work(2.5 * self.forward(itemsize).flops, row * (4 * self.seqlen_q + 4 * self.seqlen_k))


def _grid(dims: Iterable[tuple[int, int]], lengths: Iterable[int], t5: Iterable[bool] = (False,)) -> list[Shape]:
    """Full and causal self-attention of TOKENS tokens for every (heads, head_dim) and length."""
    return [
        Shape(TOKENS // length, length, length, heads, head_dim, causal, biased)
        for heads, head_dim in dims
        for length in lengths
        for causal in (False, True)
        for biased in t5
    ]


LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)

SHAPES = {
    # FlashAttention-3 (arXiv:2407.08608): heads x head_dim = 2048
    "fa3": _grid([(32, 64), (16, 128), (8, 256)], LENGTHS),
    # T5's encoder and decoder, base and large widths of 12 and 32 heads, beside the same without the bias
    "t5": _grid([(12, 64), (32, 64)], LENGTHS[:-1], t5=(True, False)),
    # the decoder's queries on the encoder's keys: T5 and BART
    "cross": [
        Shape(32, seqlen_q, seqlen_k, heads, 64)
        for heads in (12, 16)
        for seqlen_q, seqlen_k in ((64, 512), (128, 512), (128, 1024), (512, 4096))
    ],
    # for a CPU
    "small": [
        Shape(4, length, length, 8, 64, causal, t5)
        for length in (128, 512)
        for causal, t5 in ((False, False), (True, False), (False, True))
    ],
}


def shapes(names: list[str], on_gpu: bool) -> list[Shape]:
    """The shapes of presets, and others by their own labels. Raises ValueError for what is neither."""
    found: list[Shape] = []
    for name in names or (["fa3", "t5"] if on_gpu else ["small"]):
        found += SHAPES[name] if name in SHAPES else [_parsed(name)]
    return found


def _parsed(text: str) -> Shape:
    found = re.fullmatch(r"(\d+)x(\d+)(?::(\d+))?x(\d+)x(\d+)(-causal)?(-t5)?", text)
    numbers = [int(number) for number in found.groups(default="-1")[:5] if number != "-1"] if found else [0]
    if found is None or 0 in numbers:
        raise ValueError(
            f"unknown shape {text!r}: choose from {', '.join(SHAPES)}, or give batch x seqlen x heads x head_dim "
            "such as 4x4096x16x128, 4x128:512x16x64 (queries and keys) or 4x512x12x64-causal-t5"
        )
    batch, seqlen_q, *seqlen_k, heads, head_dim = numbers
    causal, t5 = (mark is not None for mark in found.groups()[5:])
    return Shape(batch, seqlen_q, seqlen_k[0] if seqlen_k else seqlen_q, heads, head_dim, causal, t5)
