"""`paged_attention` on a GPU: our kernels over a paged cache of any type, against SDPA over contiguous bf16 or fp32.

Calls run in CUDA graphs, in turns, each on a cache of its own: together they are larger than the L2 cache.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels import reference
from kernels.attention_options import RelativeBias, score_options
from kernels.paged_attention import append_to_cache, paged_attention
from tools.profile import ceilings, launches
from tools.profile.contenders import OURS, Work
from tools.profile.machine import Cell, default_device
from tools.profile.options import Options
from tools.profile.paged_attention_shapes import BLOCK, CACHES, GPU_SHAPES, Shape, shapes
from tools.profile.report import Report, Table
from tools.profile.timing import FLUSH_BYTES, in_graphs

PEERS = ("sdpa",)
CALLS = 8  # in a graph, at least
MOST_CALLS = 64
CHECKED = 2  # sequences that are held against the reference
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "int8": 4e-2, "fp8": 1.2e-1}  # of the output's scale
SECONDS = 0.3  # a contender, unless asked for less


class Sequences(NamedTuple):
    """A batch in a paged cache, and the floats that the cache was filled with: (sequences, tokens, heads, head_dim)."""

    q: Tensor
    k: Tensor
    v: Tensor
    caches: tuple[Tensor, Tensor]
    scales: tuple[Tensor | None, Tensor | None]
    table: Tensor
    lengths: Tensor
    offsets: Tensor


def run(options: Options) -> Report:
    """A row a shape and contender; what computes something else is a failure."""
    device, wanted = default_device(), shapes(options.shapes, GPU_SHAPES)
    limits = ceilings.measure(device, [torch.bfloat16])
    table = Table({"shape": [shape.label for shape in wanted], "who": [f"{OURS} triton"]})
    report = Report(
        "paged_attention", ("shape", "who"), ("us", "20%", "80%"), hidden=("flops", "bytes"), path=options.json,
        ceilings=limits.cells(), table=table,
    )  # fmt: skip
    report.start()
    for shape in wanted:
        torch.manual_seed(0)
        for row in rows(shape, device, limits.copy, options):
            report.add(row)
            if row["note"] and str(row["who"]).startswith(OURS):
                report.failures.append(f"{row['shape']}, {row['who']}: {row['note']}")
    return report


def rows(shape: Shape, device: torch.device, copy: float, options: Options) -> list[dict[str, Cell]]:
    """What ours and the peers take; copy is bytes a second."""
    done = work(shape)
    count = min(MOST_CALLS, max(1, -(-FLUSH_BYTES // int(done.bytes)))) if device.type == "cuda" else 1
    with torch.inference_mode():
        batches = [filled(shape, device) for _ in range(count)]
        calls: dict[str, list[Callable[[], Tensor]]] = {}
        calls[f"{OURS} triton"] = [partial(ours, shape, bias(shape, device), batch) for batch in batches]
        if options.against is None or "sdpa" in options.against:
            calls["sdpa"] = [sdpa(shape, batch, bias(shape, device)) for batch in batches]
        found = {name: _row(shape, name, done) for name in calls}
        for name, theirs in calls.items():
            with launches.described(found[name]) if name != "sdpa" else contextlib.nullcontext():
                found[name] |= checked(shape, theirs[0](), batches[0])
        repeated = {name: (theirs * -(-CALLS // count))[: max(CALLS, count)] for name, theirs in calls.items()}
        timings = in_graphs(repeated, min(options.seconds, SECONDS), device)
    ours_first = timings[f"{OURS} triton"].median
    for name, timing in timings.items():
        row = found[name]
        row["us"], row["20%"], row["80%"] = (1e6 * t for t in (timing.median, timing.low, timing.high))
        row["TB/s"], row["TFLOP/s"] = done.bytes / timing.median / 1e12, done.flops / timing.median / 1e12
        row["% of copy"] = 100 * done.bytes / timing.median / copy
        row["x ours"] = timing.median / ours_first
    return list(found.values())


def work(shape: Shape) -> Work:
    """The cache's bytes, with its scales, are read once; queries too, and as much is written."""
    width = 4 if shape.cache == "fp32" else 2
    head = CACHES[shape.cache].itemsize * shape.head_dim + (4 if shape.cache == "int8" else 0)
    moved = 2 * shape.keys * shape.kv_heads * head + 2 * shape.queries * shape.heads * shape.head_dim * width
    return Work(shape.work().flops, shape.sequences * moved, reads=True)


def filled(shape: Shape, device: torch.device) -> Sequences:
    """Normal numbers, appended to a cache whose blocks lie in any order."""
    dtype = torch.float32 if shape.cache == "fp32" else torch.bfloat16
    tokens = (shape.sequences, shape.keys, shape.kv_heads, shape.head_dim)
    q = torch.randn(shape.sequences * shape.queries, shape.heads, shape.head_dim, device=device, dtype=dtype)
    k, v = (torch.randn(tokens, device=device, dtype=dtype) for _ in range(2))
    blocks = -(-shape.keys // BLOCK)
    table = torch.randperm(shape.sequences * blocks, device=device).view(shape.sequences, blocks)
    cache = (table.numel(), BLOCK, shape.kv_heads, shape.head_dim)
    k_cache, v_cache = (torch.zeros(cache, device=device).to(CACHES[shape.cache]) for _ in range(2))
    k_scale, v_scale = (torch.zeros(cache[:3], device=device) if shape.cache == "int8" else None for _ in range(2))
    place = torch.arange(shape.keys, device=device)
    slots = table[:, place // BLOCK] * BLOCK + place % BLOCK
    append_to_cache(
        k.flatten(0, 1), v.flatten(0, 1), k_cache, v_cache, slots.flatten(),
        k_scale=k_scale, v_scale=v_scale, backend="triton",
    )  # fmt: skip
    lengths = torch.full((shape.sequences,), shape.keys, dtype=torch.int32, device=device)
    offsets = torch.arange(shape.sequences + 1, dtype=torch.int32, device=device) * shape.queries
    return Sequences(q, k, v, (k_cache, v_cache), (k_scale, v_scale), table.int(), lengths, offsets)


def ours(shape: Shape, relative_bias: RelativeBias | None, batch: Sequences) -> Tensor:
    out = paged_attention(
        batch.q, *batch.caches, batch.table, batch.lengths, batch.offsets, max_seqlen_q=shape.queries,
        relative_bias=relative_bias, k_scale=batch.scales[0], v_scale=batch.scales[1], backend="triton",
    )  # fmt: skip
    return out.view(shape.sequences, shape.queries, *out.shape[1:])


def sdpa(shape: Shape, batch: Sequences, relative_bias: RelativeBias | None) -> Callable[[], Tensor]:
    """Over one run of memory a sequence and head; masks and T5's bias are made beforehand."""
    q = batch.q.view(shape.sequences, shape.queries, *batch.q.shape[1:]).transpose(1, 2).contiguous()
    k, v = (x.transpose(1, 2).contiguous() for x in (batch.k, batch.v))
    mask = None
    distance = torch.arange(shape.keys, device=q.device) - torch.arange(shape.queries, device=q.device)[:, None]
    distance -= shape.keys - shape.queries
    if relative_bias is not None:
        places = distance.clamp(-relative_bias.max_distance, relative_bias.max_distance) + relative_bias.max_distance
        mask = relative_bias.distance_bias[None, :, places].to(q.dtype).masked_fill(distance > 0, -torch.inf)
    elif 1 < shape.queries < shape.keys:
        mask = distance <= 0
    causal, grouped = mask is None and shape.queries > 1, shape.heads != shape.kv_heads
    attend = partial(scaled_dot_product_attention, q, k, v, mask, is_causal=causal, enable_gqa=grouped)
    return lambda: attend().transpose(1, 2)


@functools.cache
def bias(shape: Shape, device: torch.device) -> RelativeBias | None:
    table = torch.randn(32, shape.heads, generator=torch.Generator().manual_seed(0)) if shape.bias else None
    return None if table is None else RelativeBias(table.to(device), 128, bidirectional=False)


def checked(shape: Shape, out: Tensor, batch: Sequences) -> dict[str, Cell]:
    """The error of the first sequences against the reference on the numbers as they were; a note where it is wrong."""
    options = score_options(shape.heads, None, 0.0, None, bias(shape, out.device))
    q = batch.q[: CHECKED * shape.queries].unflatten(0, (-1, shape.queries)).float()
    k, v = (x[:CHECKED].float() for x in (batch.k, batch.v))
    expected, _ = reference.attention(q, k, v, causal=True, options=options)
    error = float((out[:CHECKED].float() - expected).abs().max() / expected.abs().max())
    return {"error": error, "note": "" if error <= TOLERANCE[shape.cache] else "wrong"}


def _row(shape: Shape, name: str, done: Work) -> dict[str, Cell]:
    columns = ("us", "20%", "80%", "TB/s", "% of copy", "TFLOP/s", "x ours", "error", *launches.COLUMNS)
    given = {"shape": shape.label, "who": name, **dict.fromkeys(columns), "note": ""}
    return given | {"flops": done.flops, "bytes": done.bytes}
