from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

max_head_dim: int  # of attention
cache_page: int  # tokens
cpu_path: str  # of csrc/cpu_features.h, as TANDEM_CPU names it

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
def top_k(scores: NDArray[np.float32], k: int, num_threads: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]: ...

class LogitEdits:
    def __init__(self, fields: dict[str, NDArray[np.generic]]) -> None: ...

def edit_logits(scores: NDArray[np.float32], edits: LogitEdits, num_threads: int) -> None: ...  # in place
def log_softmax(scores: NDArray[np.float32], num_threads: int) -> None: ...  # in place
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

class PackedWeight:
    storage: str  # "float32", "bfloat16", "float16", "int8" or "int4"
    outputs: int
    inputs: int
    nbytes: int
    takes_bytes: bool  # whether its layer takes rows rounded to eight bits
    byte_layout: tuple[int, int]  # of those rows: their width, and how many sums a row has
    @staticmethod
    def from_floats(
        values: NDArray[np.generic], bfloat16: bool, order: NDArray[np.int64] | None, num_threads: int, /
    ) -> PackedWeight: ...
    @staticmethod
    def from_int8(
        values: NDArray[np.int8], scales: Floats, order: NDArray[np.int64] | None, num_threads: int, /
    ) -> PackedWeight: ...
    @staticmethod
    def from_int4(
        values: NDArray[np.uint8],
        scales: NDArray[np.uint16],
        minimums: NDArray[np.uint16] | None,
        order: NDArray[np.int64] | None,
        num_threads: int,
        /,
    ) -> PackedWeight: ...
    def rows(self, ids: NDArray[np.int64], /) -> Floats: ...

def linear(
    x: Floats,
    weight: PackedWeight,
    bias: Floats | None,
    activation: str,
    gated: bool,
    residual: Floats | None,
    widen: bool,
    out: Floats,
    num_threads: int,
    /,
) -> None: ...

# Rows are named by the numbers that `floats` and `bytes` give them; -1 is none.
class Program:
    nbytes: int  # of its rows
    def __init__(self) -> None: ...
    def floats(self, width: int, /) -> int: ...
    def bytes(self, weight: PackedWeight, /) -> int: ...
    def embed(self, tokens: PackedWeight, scale: float, positions: Floats | None, offset: int, out: int, /) -> None: ...
    def rotary(self, frequencies: Floats, factor: float, /) -> None: ...
    def norm(
        self,
        x: int,
        weight: Floats,
        bias: Floats | None,
        eps: float,
        subtract_mean: bool,
        out: int,
        column: int,
        heads: int,
        added: int,
        bytes: int,
        selected: bool,
        /,
    ) -> None: ...
    def select(self, x: int, out: int, scale: float, /) -> None: ...
    def quantize(self, x: int, bytes: int, selected: bool, /) -> None: ...
    def linear(
        self,
        weight: PackedWeight,
        bias: Floats | None,
        activation: str,
        gated: bool,
        x: int,
        bytes: int,
        residual: int,
        out: int,
        /,
    ) -> None: ...
    def head(self, weight: PackedWeight, bias: Floats | None, x: int, bytes: int, softcap: float, /) -> None: ...
    def deliver(self, x: int, /) -> None: ...
    def cache(self, format: tuple[str, int, int, int], layers: int, /) -> None: ...
    def append(self, layer: int, heads: int, x: int, key_column: int, rotated: int, /) -> None: ...
    def attend(
        self, layer: int, heads: int, scores: Scores, softmax_scale: float, x: int, out: int, source: bool, /
    ) -> None: ...
    def attend_within(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scores: Scores,
        softmax_scale: float,
        x: int,
        out: int,
        causal: bool,
        rotated: int,
        /,
    ) -> None: ...
    def run(
        self,
        token_ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        cu_seqlens: Integers,
        slots: NDArray[np.int64] | None,
        lengths: Integers | None,
        blocks: Integers | None,
        source_lengths: Integers | None,
        source_blocks: Integers | None,
        cache: NDArray[np.uint8] | None,
        selected: NDArray[np.int64],
        out: Floats,
        num_threads: int,
        /,
    ) -> None: ...
    def take_seconds(self) -> tuple[float, float, float]: ...  # in linear layers, attention, and everything else
