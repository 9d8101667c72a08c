"""The calls whose kernels have a budget: each launches on small CPU tensors inside ``budget.compiled``; nothing runs.

A case is a line: its name, "operation/what", and what it calls. Triton specialises on what a launcher passes, so a case
stands for all calls of its dtype, options and divisibility by 16, not for one size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kernels.quantization import QuantizedWeight
from kernels.weight_only_linear import DeviceWeight


@dataclass(frozen=True)
class Attention:
    """One call of attention, forward and backward. Together the cases hold every pair of options' values."""

    head_dim: int
    bits: int = 16
    causal: bool = False
    lengths: str = "whole"  # or "padded", "packed"
    bias: str = "none"  # or "table", "alibi", "dense"
    window: bool = False
    softcap: bool = False
    dropout: bool = False
    grouped: bool = False
    deterministic: bool = False

    def __call__(self) -> None:
        from kernels.gpu import attention as gpu

        dtype = torch.bfloat16 if self.bits == 16 else torch.float32
        q = torch.zeros(1, 256, 4, self.head_dim, dtype=dtype)
        k, v = (torch.zeros(1, 256, 2 if self.grouped else 4, self.head_dim, dtype=dtype) for _ in range(2))
        bounds = torch.tensor([0, 256], dtype=torch.int32) if self.lengths == "packed" else None
        if bounds is not None:
            q, k, v = q[0], k[0], v[0]
        call = gpu.Call(
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
            key_lengths=torch.ones(1, dtype=torch.int32) if self.lengths == "padded" else None,
            slopes=torch.ones(4) if self.bias == "alibi" else None,
            table=torch.zeros(4, 257) if self.bias == "table" else None,
            bias=torch.zeros(1, 4, 256, 256, dtype=dtype) if self.bias == "dense" else None,
            seed=torch.zeros(1, dtype=torch.int64) if self.dropout else None,
            max_seqlen_q=256,
            max_seqlen_k=256,
            causal=self.causal,
            scale=0.125,
            window=64 if self.window else None,
            softcap=30.0 if self.softcap else 0.0,
            dropout_p=0.1 if self.dropout else 0.0,
        )
        out, lse = gpu.forward(q, k, v, *call)
        wants = (self.bias == "table", self.bias == "dense")
        gpu.backward(out, None, q, k, v, out, lse, *call, self.deterministic, *wants)


@dataclass(frozen=True)
class Paged:
    """One call of attention over a paged cache, of which a layer is a view; one query a sequence, or many."""

    head_dim: int
    groups: int = 1
    queries: int = 1
    dtype: torch.dtype = torch.bfloat16
    cache: torch.dtype | None = None  # the queries', unless given
    bias: bool = False
    causal: bool = True
    window: bool = False
    softcap: bool = False
    batch_invariant: bool = False

    def __call__(self) -> None:
        from kernels.gpu import paged_attention as gpu
        from kernels.gpu.target import serves_float8

        cache = self.cache or self.dtype
        if cache == torch.float8_e4m3fn and not serves_float8():
            return
        heads, width = 4 * self.groups, 64
        q = torch.zeros(4 * self.queries, heads, self.head_dim, dtype=self.dtype)
        layer = torch.zeros(4, 2, 16, 4, self.head_dim).to(cache)[:, 1]
        scale = torch.zeros(4, 2, 16, 4)[:, 1] if cache == torch.int8 else None
        table, lengths = torch.zeros(4, width, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
        call = gpu.Call(
            max_seqlen_q=self.queries,
            causal=self.causal,
            scale=0.125,
            window=64 if self.window else None,
            softcap=30.0 if self.softcap else 0.0,
            slopes=None,
            table=torch.zeros(heads, 257) if self.bias else None,
            k_scale=scale,
            v_scale=scale,
            batch_invariant=self.batch_invariant,
        )
        gpu.paged_attention(q, layer, layer, table, lengths, torch.zeros(5, dtype=torch.int32), call)


def cache_append(cache: torch.dtype, rotated: int = 0, interleaved: bool = False) -> None:
    from kernels.gpu.cache_append import append
    from kernels.gpu.target import serves_float8

    if cache == torch.float8_e4m3fn and not serves_float8():
        return
    q, k, v = torch.zeros(16, 8 + 2 + 2, 128, dtype=torch.bfloat16).split((8, 2, 2), dim=1)
    layer = torch.zeros(4, 2, 16, 2, 128).to(cache)[:, 1]
    scale = torch.zeros(4, 2, 16, 2)[:, 1] if cache == torch.int8 else None
    angles = torch.zeros(16, rotated // 2) if rotated else None
    slots = torch.zeros(16, dtype=torch.int64)
    append(k, v, layer, layer, slots, scale, scale, angles, angles, interleaved, q if rotated else None)


def norm(
    width: int, rows: int = 1024, *, center: bool = False, residual: bool = False, other: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:  # fmt: skip
    from kernels.gpu.norm import backward, forward

    x, weight = torch.zeros(rows, width, dtype=dtype), torch.zeros(width, dtype=dtype)
    out, total, statistics = forward(
        x, x if residual else None, weight, weight if center else None, 1e-6, center, x if other else None
    )
    normed, grad_total = (total, out) if residual else (x, None)
    backward(out, grad_total, normed, weight, statistics, center, None)


def rotary(interleaved: bool, rotated: int = 128) -> None:
    from kernels.gpu.rotary import rotate

    x, angles = torch.zeros(1, 16, 2, 128, dtype=torch.bfloat16), torch.zeros(16, 1, rotated // 2)
    for back in (False, True):
        rotate(x, angles, angles, interleaved, back)


def activation(name: str) -> None:
    from kernels.gpu.activation import backward, forward

    x = torch.zeros(2, 8192, dtype=torch.bfloat16)
    backward(forward(x, name), x, name)


def cross_entropy(dtype: torch.dtype, vocab: int, label_smoothing: float = 0.0, z_loss: float = 0.0) -> None:
    from kernels.gpu.cross_entropy import backward, forward

    logits, labels = torch.zeros(2, vocab, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    _, lse = forward(logits, labels, label_smoothing, z_loss, -100)
    backward(torch.ones(()), logits, labels, lse, label_smoothing, z_loss, -100)


def linear_cross_entropy(
    dtype: torch.dtype, label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float = 0.0
) -> None:
    from kernels.chunked_loss import LossOptions
    from kernels.gpu.linear_cross_entropy import loss_of_logits

    logits, labels = torch.zeros(2, 32_000, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    for gradients in (False, True):
        loss_of_logits(logits, labels, LossOptions(label_smoothing, z_loss, softcap, 1.0, -100), gradients)


def sampling(vocab: int = 131_072, dtype: torch.dtype = torch.float32, **params: Any) -> None:
    from kernels.gpu.sampling import launch
    from kernels.gpu.sampling_columns import upload
    from kernels.sampling import SamplingBatch

    logits = torch.zeros(2, vocab, dtype=dtype)
    launch(logits, upload(SamplingBatch.build(2, **params), logits.device))


def edits() -> None:
    from kernels.gpu.logit_edits import edit_logits
    from kernels.sampling import LogitEdits

    edit_logits(
        torch.zeros(2, 131_072),
        LogitEdits.build(
            [0, 1], repetition_penalty=1.5, no_repeat_ngram_size=2, bias=[{1: 2.0}, {}], forced=[3, -1], mask=[-1, 0],
            masks=torch.zeros(1, 4096, dtype=torch.int32), token_ids=[[1, 2], [3]],
        ),
    )  # fmt: skip


def beams() -> None:
    from kernels.gpu.log_softmax import log_softmax_
    from kernels.gpu.top_tokens import top_k

    scores = torch.zeros(2, 131_072)
    log_softmax_(scores)
    top_k(scores, 8)


@dataclass(frozen=True)
class WeightOnly:
    """A linear layer of few rows over a packed weight. kind: int8, int4, int4-minimums, fp8 or float."""

    kind: str
    rows: int
    gated: bool = False
    dtype: torch.dtype = torch.bfloat16

    def __call__(self) -> None:
        from kernels.gpu.target import architecture
        from kernels.gpu.weight_only_linear import dequantize, linear

        if self.kind == "fp8" and architecture() == "sm80":  # which has no such numbers
            return
        weight, x = self.weight(), torch.zeros(self.rows, 4096, dtype=self.dtype)
        linear(x, weight, x[0], "silu" if self.gated else "none", self.gated, None, self.dtype)
        if self.rows == 1 and self.kind != "float":
            dequantize(weight, slice(0, 4096), self.dtype)

    def weight(self) -> DeviceWeight:
        size, scales = (4096, 4096), torch.zeros(4096, 128, dtype=torch.float16)
        stored: QuantizedWeight | torch.Tensor = torch.zeros(size)
        if self.kind == "int8":
            stored = QuantizedWeight(torch.zeros(size, dtype=torch.int8), torch.zeros(4096))
        elif self.kind.startswith("int4"):
            minimums = scales if self.kind.endswith("minimums") else None
            stored = QuantizedWeight(torch.zeros(4096, 2048, dtype=torch.uint8), scales, minimums)
        return DeviceWeight.pack(stored, "cpu", self.dtype, float8=self.kind == "fp8")


CASES: dict[str, Callable[[], None]] = {
    "attention/d64": Attention(64),
    "attention/d64-causal": Attention(64, causal=True),
    "attention/d64-causal-deterministic": Attention(64, causal=True, deterministic=True),
    "attention/d64-packed-window": Attention(64, lengths="packed", window=True, grouped=True, deterministic=True),
    "attention/d64-t5": Attention(64, bias="table"),
    "attention/d64-t5-padded-window-dropout": Attention(64, lengths="padded", bias="table", window=True, dropout=True),
    "attention/d64-t5-causal": Attention(64, causal=True, bias="table", grouped=True),
    "attention/d64-t5-causal-packed-softcap": Attention(
        64, causal=True, lengths="packed", bias="table", softcap=True, deterministic=True
    ),
    "attention/d64-alibi-causal-padded-softcap-window": Attention(
        64, causal=True, lengths="padded", bias="alibi", softcap=True, window=True
    ),
    "attention/d64-dense-padded-grouped": Attention(64, lengths="padded", bias="dense", grouped=True),
    "attention/d64-dropout-causal": Attention(64, causal=True, dropout=True),
    "attention/d40-alibi-packed-dropout": Attention(
        40, lengths="packed", bias="alibi", dropout=True, grouped=True, deterministic=True
    ),
    "attention/d80-causal-packed": Attention(80, causal=True, lengths="packed"),
    "attention/d96-dense-causal-window-dropout": Attention(
        96, causal=True, bias="dense", window=True, softcap=True, dropout=True, deterministic=True
    ),
    "attention/d128": Attention(128),
    "attention/d128-causal-padded": Attention(128, causal=True, lengths="padded", grouped=True, deterministic=True),
    "attention/d128-t5-causal": Attention(128, causal=True, bias="table"),
    "attention/d128-alibi-softcap-dropout": Attention(128, bias="alibi", softcap=True, dropout=True, grouped=True),
    "attention/d256-causal-softcap-window": Attention(256, causal=True, softcap=True, window=True),
    "attention/d256-dropout": Attention(256, dropout=True),
    "attention/d64-fp32-causal": Attention(64, 32, causal=True),
    "attention/d128-fp32-t5": Attention(128, 32, bias="table"),
    "attention/d256-fp32": Attention(256, 32),
    "paged_attention/d64": Paged(64),
    "paged_attention/d64-grouped": Paged(64, 8),
    "paged_attention/d64-t5": Paged(64, bias=True),
    "paged_attention/d64-int8": Paged(64, cache=torch.int8),
    "paged_attention/d64-fp32": Paged(64, dtype=torch.float32),
    "paged_attention/d64-fp32-t5": Paged(64, dtype=torch.float32, bias=True),
    "paged_attention/d80": Paged(80),
    "paged_attention/d128": Paged(128),
    "paged_attention/d128-grouped": Paged(128, 8),
    "paged_attention/d128-grouped-window-softcap": Paged(128, 8, window=True, softcap=True),
    "paged_attention/d128-grouped-few-queries": Paged(128, 4, 5),
    "paged_attention/d128-int8": Paged(128, 4, cache=torch.int8),
    "paged_attention/d128-fp8": Paged(128, 4, cache=torch.float8_e4m3fn),
    "paged_attention/d128-fp32": Paged(128, dtype=torch.float32),
    "paged_attention/d128-invariant": Paged(128, 4, 64, batch_invariant=True),
    "paged_attention/d256-grouped": Paged(256, 8),
    "paged_attention/d64-prompts": Paged(64, queries=256),
    "paged_attention/d64-prompts-t5": Paged(64, queries=256, bias=True),
    "paged_attention/d64-prompts-t5-fp32": Paged(64, queries=256, dtype=torch.float32, bias=True, causal=False),
    "paged_attention/d128-prompts": Paged(128, 4, 256),
    "paged_attention/d128-prompts-int8": Paged(128, 4, 256, cache=torch.int8),
    "paged_attention/d128-prompts-window-softcap": Paged(128, 4, 256, window=True, softcap=True),
    "paged_attention/d128-prompts-fp32": Paged(128, queries=256, dtype=torch.float32),
    "paged_attention/d256-prompts": Paged(256, 8, 256),
    "cache_append/bf16": partial(cache_append, torch.bfloat16),
    "cache_append/bf16-rotated": partial(cache_append, torch.bfloat16, 128),
    "cache_append/bf16-interleaved-partial": partial(cache_append, torch.bfloat16, 64, True),
    "cache_append/int8-rotated": partial(cache_append, torch.int8, 128),
    "cache_append/fp8-rotated": partial(cache_append, torch.float8_e4m3fn, 128),
    "norm/rms-768": partial(norm, 768),
    "norm/rms-4096": partial(norm, 4096),
    "norm/rms-4096-residual": partial(norm, 4096, residual=True),
    "norm/rms-4096-fp32": partial(norm, 4096, dtype=torch.float32),
    "norm/rms-16384": partial(norm, 16384),
    "norm/layer-1024-residual": partial(norm, 1024, center=True, residual=True),
    "norm/layer-8192": partial(norm, 8192, center=True),
    "norm/rms-2048-residual-few": partial(norm, 2048, 32, residual=True),
    "norm/layer-2048-few": partial(norm, 2048, 32, center=True),
    "norm/layer-2048-other": partial(norm, 2048, center=True, residual=True, other=True),
    "norm/layer-2048-other-few": partial(norm, 2048, 1, center=True, residual=True, other=True),
    "rotary/halves": partial(rotary, False),
    "rotary/interleaved": partial(rotary, True),
    "rotary/partial": partial(rotary, False, rotated=32),
    "activation/silu": partial(activation, "silu"),
    "activation/gelu": partial(activation, "gelu"),
    "activation/gelu_new": partial(activation, "gelu_new"),
    "cross_entropy/bf16-32000": partial(cross_entropy, torch.bfloat16, 32_000),
    "cross_entropy/bf16-50257": partial(cross_entropy, torch.bfloat16, 50_257),
    "cross_entropy/fp32-32000": partial(cross_entropy, torch.float32, 32_000),
    "cross_entropy/bf16-32000-smoothed": partial(cross_entropy, torch.bfloat16, 32_000, 0.1, 1e-4),
    "sampling/greedy": partial(sampling, temperature=0.0),
    "sampling/plain": partial(sampling),
    "sampling/plain-50257-bf16": partial(sampling, 50_257, torch.bfloat16),
    "sampling/filters": partial(sampling, temperature=0.8, top_k=50, top_p=0.9, min_p=0.02),
    "sampling/everything": partial(
        sampling, 50_257, top_k=50, typical_p=0.9, presence_penalty=0.5, output_ids=[[1], [2]], num_logprobs=5
    ),
    "sampling/edits": edits,
    "sampling/beams": beams,
    "linear_cross_entropy/bf16": partial(linear_cross_entropy, torch.bfloat16),
    "linear_cross_entropy/bf16-softcap": partial(linear_cross_entropy, torch.bfloat16, 0.1, 1e-4, 30.0),
    "linear/int8-1": WeightOnly("int8", 1),
    "linear/int8-1-gated": WeightOnly("int8", 1, gated=True),
    "linear/int8-16": WeightOnly("int8", 16),
    "linear/int8-64": WeightOnly("int8", 64),
    "linear/int8-64-gated": WeightOnly("int8", 64, gated=True),
    "linear/int8-1-fp16": WeightOnly("int8", 1, dtype=torch.float16),
    "linear/int8-16-fp32": WeightOnly("int8", 16, dtype=torch.float32),
    "linear/int4-1": WeightOnly("int4", 1),
    "linear/int4-1-gated": WeightOnly("int4", 1, gated=True),
    "linear/int4-16": WeightOnly("int4", 16),
    "linear/int4-16-gated": WeightOnly("int4", 16, gated=True),
    "linear/int4-64": WeightOnly("int4", 64),
    "linear/int4-1-fp16": WeightOnly("int4", 1, dtype=torch.float16),
    "linear/int4-16-fp32": WeightOnly("int4", 16, dtype=torch.float32),
    "linear/int4-minimums-1": WeightOnly("int4-minimums", 1),
    "linear/int4-minimums-1-gated": WeightOnly("int4-minimums", 1, gated=True),
    "linear/int4-minimums-64": WeightOnly("int4-minimums", 64),
    "linear/fp8-1": WeightOnly("fp8", 1),
    "linear/fp8-64-gated": WeightOnly("fp8", 64, gated=True),
    "linear/bf16-1": WeightOnly("float", 1),
    "linear/bf16-1-gated": WeightOnly("float", 1, gated=True),
    "linear/bf16-64": WeightOnly("float", 64),
}

# Those that also have to compile for AMD's gfx942; what they take there is not held to anything.
AMD_CASES = (
    "attention/d64-t5-causal", "cache_append/bf16-rotated", "norm/rms-4096-residual",
    "rotary/halves", "activation/silu", "cross_entropy/bf16-32000",
    "linear_cross_entropy/bf16",
)  # fmt: skip
