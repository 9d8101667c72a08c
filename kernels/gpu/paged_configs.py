"""How the attention over a paged cache is cut for a GPU: tiles by architecture, and splits of the keys by shape.

Decoding waits for memory, so what counts is how many bytes are on their way: a multiprocessor of an H100 needs some
40 KB. A tile of keys is 16 KB or so, of values as much, one or two of each are under way while another is computed, and
``resident`` programs share a multiprocessor. The tensor cores' smallest tile has 16 rows; that one query fills one of
them costs nothing that memory would not hide: products and exponents take a tenth of what the cores can do.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton

from kernels.gpu.target import architecture, multiprocessors

SPLIT_KEYS = 512  # of a batch-invariant call, whose splits are the same for every sequence
INVARIANT_ROWS = 32
MOST_SPLITS = 128
FEWEST_KEYS = 128  # worth a split
FULL_WAVES = 0.85  # how full the waves of programs should be before more splits are tried


class Config(NamedTuple):
    """Rows (queries x heads that share a kv head) and keys a tile; stages of loads; programs a multiprocessor holds."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    near_stages: int  # of the loop that masks and looks biases up
    resident: int


# Keys are (architecture, rows, units of 128 bytes of a cached head, rounded up to a power of two). 16 and 32 rows
# decode; 128 are of prompts, 64 of prompts in float32. An architecture takes from sm80 what it has no entry for.
TABLE: dict[tuple[str, int, int], Config] = {
    ("sm80", 16, 1): Config(16, 64, 4, 4, 4, 4),
    ("sm80", 16, 2): Config(16, 64, 4, 3, 3, 3),
    ("sm80", 16, 4): Config(16, 32, 4, 3, 3, 3),
    ("sm80", 16, 8): Config(16, 16, 4, 3, 3, 2),
    ("sm80", 32, 1): Config(32, 64, 4, 3, 3, 3),
    ("sm80", 32, 2): Config(32, 64, 4, 3, 3, 2),
    ("sm80", 32, 4): Config(32, 32, 4, 3, 3, 2),
    ("sm80", 32, 8): Config(32, 16, 4, 3, 3, 2),
    ("sm80", 64, 2): Config(32, 32, 4, 2, 2, 2),
    ("sm80", 64, 4): Config(16, 32, 4, 2, 2, 2),
    ("sm80", 64, 8): Config(16, 16, 8, 2, 2, 1),
    ("sm80", 128, 1): Config(128, 32, 8, 3, 2, 1),
    ("sm80", 128, 2): Config(128, 32, 8, 3, 2, 1),
    ("sm80", 128, 4): Config(64, 32, 8, 2, 1, 1),
    ("sm90", 16, 1): Config(16, 32, 2, 4, 4, 8),
    ("sm90", 64, 2): Config(64, 32, 4, 2, 1, 2),
    ("sm90", 128, 1): Config(128, 64, 8, 3, 2, 1),
    ("sm90", 128, 2): Config(128, 64, 8, 3, 2, 1),
    ("sm90", 128, 4): Config(64, 32, 8, 2, 1, 1),
}
# Of caches in eight bits, whose tiles are half as many bytes and more arithmetic; without an entry, as above.
BYTES: dict[tuple[str, int, int], Config] = {("sm90", 16, 1): Config(16, 64, 2, 3, 3, 4)}


def choose(rows: int, cached: torch.dtype, queries: torch.dtype, head_dim: int, invariant: bool) -> Config:
    """rows: the most of a sequence, queries times heads that share a kv head. Then the dtypes of cache and queries."""
    wide = queries == torch.float32
    size = INVARIANT_ROWS if invariant or 16 < rows <= 32 else 16 if rows <= 16 else 64 if wide else 128
    arch = architecture()
    if arch == "interpreter":
        return Config(min(size, 64), 32, 4, 1, 1, 1)
    # A product of float32 takes registers as if its operands were stored as that.
    units = math.ceil(head_dim * (4 if wide else cached.itemsize) / 128)
    width = min(8, max(2 if size == 64 else 1, triton.next_power_of_2(units)))
    if cached.itemsize == 1 and (arch, size, width) in BYTES:
        return BYTES[arch, size, width]
    if (arch, size, width) not in TABLE:
        arch = "sm80"
    # Prompts of heads too wide for a row of their own take the widest that has one.
    return TABLE[arch, size, min(width, max(w for a, s, w in TABLE if (a, s) == (arch, size)))]


def splits(programs: int, most_keys: int, config: Config, invariant: bool) -> int:
    """How many programs share the keys of a block of rows, known without the lengths.

    The fewest whose waves of programs are nearly full, since the last wave of a launch leaves the rest of the GPU idle;
    or, if none is, those that waste least.
    """
    if invariant:
        return max(1, math.ceil(most_keys / SPLIT_KEYS))
    slots = multiprocessors() * config.resident
    most = min(MOST_SPLITS, max(1, most_keys // max(FEWEST_KEYS, config.block_n)))
    best, fullest = 1, 0.0
    for count in range(1, most + 1):
        waves = programs * count / slots
        full = waves / math.ceil(waves)
        if full > fullest:
            best, fullest = count, full
        if full >= FULL_WAVES:
            break
    return best
