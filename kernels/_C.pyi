from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

max_head_dim: int  # of attention
cache_page: int  # tokens
cpu_path: str  # "generic", "avx2" or "avx512"

class SamplingBatch:
    def __init__(self, fields: dict[str, NDArray[np.generic]]) -> None: ...

def sample(
    logits: NDArray[np.float32], batch: SamplingBatch, num_threads: int
) -> tuple[
    NDArray[np.int64],
    NDArray[np.float32],
    NDArray[np.int32],
    NDArray[np.float32],
    NDArray[np.int64],
    list[str | None],
]: ...
def uniform(seed: int, position: int) -> float: ...

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]
Scores = tuple[int, float, Floats | None, Floats | None]  # window (0: none), softcap, alibi_slopes, distance_bias

def attention_forward(
    q: Floats,
    k: Floats,
    v: Floats,
    cu_seqlens_q: Integers | None,
    cu_seqlens_k: Integers | None,
    key_lengths: Integers | None,
    causal: bool,
    softmax_scale: float,
    scores: Scores,
    out: Floats,
    lse: Floats | None,
    num_threads: int,
    /,
) -> None: ...
def attention_backward(
    q: Floats,
    k: Floats,
    v: Floats,
    cu_seqlens_q: Integers | None,
    cu_seqlens_k: Integers | None,
    key_lengths: Integers | None,
    causal: bool,
    softmax_scale: float,
    scores: Scores,
    out: Floats,
    lse: Floats,
    grad_out: Floats,
    grad_lse: Floats | None,
    grad_q: Floats,
    grad_k: Floats,
    grad_v: Floats,
    grad_distance_bias: Floats | None,
    num_threads: int,
    /,
) -> None: ...
def paged_attention(
    q: Floats,
    k_cache: Floats,
    v_cache: Floats,
    block_table: Integers,
    cache_seqlens: Integers,
    cu_seqlens_q: Integers,
    causal: bool,
    softmax_scale: float,
    scores: Scores,
    out: Floats,
    num_threads: int,
    /,
) -> None: ...
def gelu(x: Floats, tanh: bool, out: Floats, num_threads: int, /) -> None: ...
def gelu_backward(x: Floats, grad_out: Floats, tanh: bool, grad_x: Floats, num_threads: int, /) -> None: ...
def rotate(x: Floats, cos: Floats, sin: Floats, back: bool, out: Floats, num_threads: int, /) -> None: ...
def transpose(x: Floats, out: Floats, sums: Floats | None, num_threads: int, /) -> None: ...

Format = tuple[str, int, int, int]  # dtype, kv_heads, head_dim, block_size

def cache_page_bytes(dtype: str, kv_heads: int, head_dim: int, /) -> int: ...
def cache_append(
    cache: NDArray[np.uint8],
    format: Format,
    k: Floats,
    v: Floats,
    slots: NDArray[np.int64],
    cos: Floats | None,
    sin: Floats | None,
    interleaved: bool,
    q: Floats | None,
    num_threads: int,
    /,
) -> None: ...
def cached_attention(
    q: Floats,
    cache: NDArray[np.uint8],
    format: Format,
    block_table: Integers,
    cache_seqlens: Integers,
    cu_seqlens_q: Integers,
    causal: bool,
    softmax_scale: float,
    scores: Scores,
    out: Floats,
    num_threads: int,
    /,
) -> None: ...
