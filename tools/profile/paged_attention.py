"""`paged_attention`: decoding over cached keys and values, in pages of floats or of our own layout, against SDPA.

This is a CPU's; a GPU's is paged_attention_gpu.py.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engine.native_runner import NativeStorage
from kernels.cached_attention import CacheFormat, append, attend
from kernels.paged_attention import paged_attention
from tools.profile import paged_attention_gpu
from tools.profile.contenders import OURS, Contender, Problem, Work, chosen
from tools.profile.machine import default_device
from tools.profile.measure import measure
from tools.profile.options import Options
from tools.profile.paged_attention_shapes import BLOCK, CACHES, CPU_CACHES, Shape, shapes
from tools.profile.report import Report

OPTIONS = ("shape", "plot")
PEERS = ("eager", "sdpa")
MODES = ("forward",)


def run(options: Options) -> Report:
    if default_device().type == "cuda":
        return paged_attention_gpu.run(options)
    wanted = shapes(options.shapes)
    for shape in wanted:
        if shape.cache not in CPU_CACHES or shape.bias:
            raise ValueError(f"{shape.label} is measured on a GPU alone")
    return measure("paged_attention", wanted, partial(problem, against=options.against), options, rate="B", modes=MODES)


def problem(shape: Shape, device: torch.device, _: torch.dtype, against: list[str] | None) -> Problem:
    """q (sequences, queries, heads, head_dim), k and v (sequences, keys, kv_heads, head_dim), which the caches hold."""
    q = torch.randn(shape.sequences, shape.queries, shape.heads, shape.head_dim, device=device)
    k, v = (torch.randn(shape.sequences, shape.keys, shape.kv_heads, shape.head_dim, device=device) for _ in range(2))
    everyone = {f"{OURS} pages": pages(shape)} if device.type == "cpu" else {}
    if shape.cache == "fp32":
        everyone |= {f"{OURS} {name}": paged(shape, name) for name in ("native", "torch")[device.type != "cpu" :]}
    # Theirs are of floats, and lie side by side.
    everyone |= {"eager": Contender(partial(formula, shape)), "sdpa": Contender(partial(sdpa, shape), heads_first)}
    contenders, formula_of = chosen(everyone, against), partial(formula, shape)
    return Problem(CACHES[shape.cache], (q, k, v), formula_of, contenders, shape.work(), Work(0, 0))


def paged(shape: Shape, backend: str) -> Contender:
    """The contract's: blocks of floats. Filling the cache is not timed."""
    blocks = -(-shape.keys // BLOCK)

    def prepare(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        room = torch.zeros(shape.sequences, blocks * BLOCK - shape.keys, *k.shape[2:], dtype=k.dtype, device=k.device)
        caches = (torch.cat((x, room), dim=1).view(-1, BLOCK, *x.shape[2:]) for x in (k, v))
        return q.flatten(0, 1), *caches, *lengths(shape, blocks, q.device)

    def function(q: Tensor, k: Tensor, v: Tensor, table: Tensor, keys: Tensor, offsets: Tensor) -> Tensor:
        out = paged_attention(q, k, v, table, keys, offsets, max_seqlen_q=shape.queries, backend=backend)
        return out.view(shape.sequences, shape.queries, *q.shape[1:])

    return Contender(function, prepare)


def pages(shape: Shape) -> Contender:
    """The native engine's own cache, of any type."""
    blocks = -(-shape.keys // BLOCK)
    layout = CacheFormat(str(CACHES[shape.cache]).removeprefix("torch."), shape.kv_heads, shape.head_dim, BLOCK)

    def prepare(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        cache = torch.from_numpy(NativeStorage(1, layout, shape.sequences * blocks).blocks)
        slots = torch.arange(shape.sequences)[:, None] * blocks * BLOCK + torch.arange(shape.keys)
        append(k.flatten(0, 1), v.flatten(0, 1), cache, layout, slots.flatten())
        return q.flatten(0, 1), cache, *lengths(shape, blocks, q.device)

    def function(q: Tensor, cache: Tensor, table: Tensor, keys: Tensor, offsets: Tensor) -> Tensor:
        return attend(q, cache, layout, table, keys, offsets).view(shape.sequences, shape.queries, *q.shape[1:])

    return Contender(function, prepare)


def lengths(shape: Shape, blocks: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The block table, keys of each sequence, and where its queries begin."""
    table = torch.arange(shape.sequences * blocks, dtype=torch.int32, device=device).view(shape.sequences, blocks)
    keys = torch.full((shape.sequences,), shape.keys, dtype=torch.int32, device=device)
    offsets = torch.arange(shape.sequences + 1, dtype=torch.int32, device=device) * shape.queries
    return table, keys, offsets


def heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """As SDPA likes a cache best: one run of memory a sequence and head."""
    return q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()


def sdpa(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of one query, which sees all keys, or of as many as keys."""
    if shape.queries not in (1, shape.keys):
        raise ValueError("left out: its causal mask is aligned top-left")
    grouped = shape.heads != shape.kv_heads
    out = scaled_dot_product_attention(q, k, v, is_causal=shape.queries > 1, enable_gqa=grouped)
    return out.transpose(1, 2)


def formula(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(shape.heads // shape.kv_heads, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / shape.head_dim**0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(shape.keys - shape.queries + 1)
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
