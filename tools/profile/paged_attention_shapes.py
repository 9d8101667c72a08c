"""What shapes the paged attention is measured in, on a CPU and on a GPU."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tools.profile.contenders import Work

BLOCK = 16  # tokens
CACHES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
CPU_CACHES = ("fp32", "bf16", "int8")


@dataclass(frozen=True)
class Shape:
    """Sequences that attend with ``queries`` tokens each, their last ones, over ``keys`` keys."""

    sequences: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    cache: str = "fp32"
    bias: bool = False  # T5's

    @property
    def label(self) -> str:
        tokens, heads = f"{self.sequences}x{self.queries}:{self.keys}", f"{self.heads}:{self.kv_heads}"
        return f"{tokens}x{heads}x{self.head_dim}-{self.cache}" + "-t5" * self.bias

    def work(self) -> Work:
        """Two products a query and key; the cache is read, queries too, and as much is written."""
        pairs = self.queries * self.keys - self.queries * (self.queries - 1) // 2
        cached = 2 * self.keys * self.kv_heads * CACHES[self.cache].itemsize
        moved = self.sequences * self.head_dim * (cached + 2 * self.queries * self.heads * 4)
        return Work(4 * self.sequences * pairs * self.heads * self.head_dim, moved, reads=True)


# Of GPT-2's heads, and of a grouped model's.
DECODING = (
    (1, 2048, 12, 12, 64),
    (8, 512, 12, 12, 64),
    (32, 128, 12, 12, 64),
    (32, 1024, 12, 12, 64),
    (8, 1024, 32, 8, 128),
)
SHAPES = {
    "decode": [
        Shape(sequences, 1, keys, heads, kv_heads, head_dim, cache)
        for sequences, keys, heads, kv_heads, head_dim in DECODING
        for cache in CPU_CACHES
    ],
    "prefill": [Shape(batch, keys, keys, 12, 12, 64) for batch, keys in ((1, 512), (8, 128))],
}
GPU_SHAPES = {
    "decode": [
        Shape(64, 1, 2048, 32, 8, 128, "bf16"),
        Shape(32, 1, 4096, 16, 16, 64, "bf16"),
        Shape(1, 1, 2048, 32, 32, 128, "bf16"),
        Shape(1, 1, 2048, 32, 8, 128, "bf16"),
        Shape(32, 1, 2048, 32, 4, 64, "bf16"),
    ],
    "t5": [Shape(64, 1, 1024, 12, 12, 64, "bf16", bias=True), Shape(64, 1, 1024, 12, 12, 64, "fp32", bias=True)],
    "bytes": [Shape(64, 1, 2048, 32, 8, 128, cache) for cache in ("int8", "fp8")],
    "few": [Shape(16, 5, 2048, 32, 8, 128, "bf16")],
    "prefill": [Shape(4, 2048, 2048, 32, 8, 128, "bf16"), Shape(4, 512, 4096, 16, 16, 64, "bf16")],
}


def shapes(names: list[str], presets: Mapping[str, list[Shape]] = SHAPES) -> list[Shape]:
    """The shapes of presets, and others by their own labels. Raises ValueError for what is neither."""
    found: list[Shape] = []
    for name in names or list(presets):
        found += presets[name] if name in presets else [_parsed(name, presets)]
    return found


def _parsed(text: str, presets: Mapping[str, list[Shape]]) -> Shape:
    found = re.fullmatch(rf"(\d+)x(\d+):(\d+)x(\d+):(\d+)x(\d+)(?:-({'|'.join(CACHES)}))?(-t5)?", text)
    numbers = map(int, found.groups()[:6]) if found else [0] * 6
    sequences, queries, keys, heads, kv_heads, head_dim = numbers
    if found is None or not sequences * queries * heads * kv_heads * head_dim or queries > keys or heads % kv_heads:
        raise ValueError(
            f"unknown shape {text!r}: choose from {', '.join(presets)}, or give sequences x queries:keys x "
            "heads:kv_heads x head_dim - cache [-t5] such as 8x1:512x32:8x128-int8, with no more queries than keys"
        )
    return Shape(sequences, queries, keys, heads, kv_heads, head_dim, found[7] or "fp32", found[8] is not None)
