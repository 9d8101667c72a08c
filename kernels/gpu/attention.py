"""Attention's launches, its two operators, and the gradient between them: see ``kernels.attention.attention``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.gpu import attention_configs
from kernels.gpu.attention_backward import (
    attention_backward_keys_kernel,
    attention_backward_queries_kernel,
    attention_delta_kernel,
)
from kernels.gpu.attention_bias_gradient import attention_bias_gradient_kernel
from kernels.gpu.attention_configs import Config
from kernels.gpu.attention_forward import attention_forward_kernel
from kernels.gpu.attention_scores import DenseBias, Dropout, Lengths, Rows, Scores
from kernels.gpu.library import first_derivative_only, operator
from kernels.gpu.target import architecture, has_wgmma

MAX_HEAD_DIM = 256
DELTA_BLOCK = 64


class Call(NamedTuple):
    """What both operators take beside q, k and v, in the order of their schema."""

    cu_seqlens_q: Tensor | None  # int32 (batch + 1,)
    cu_seqlens_k: Tensor | None
    key_lengths: Tensor | None  # int32 (batch,)
    slopes: Tensor | None  # float32 (heads,)
    table: Tensor | None  # float32 (heads, 2 * reach + 1)
    bias: Tensor | None  # (batch or 1, heads or 1, seqlen_q or 1, seqlen_k or 1)
    seed: Tensor | None  # int64 (1,)
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool
    scale: float
    window: int | None
    softcap: float
    dropout_p: float


SCHEMA = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? key_lengths, Tensor? slopes, Tensor? table, Tensor? bias, "
    "Tensor? seed, SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, float scale, SymInt? window, float softcap, "
    "float dropout_p"
)


def attention(q: Tensor, k: Tensor, v: Tensor, call: Call, deterministic: bool) -> tuple[Tensor, Tensor]:
    """The output, in q's dtype, and the log-sum-exp, float32 (batch, heads, seqlen_q) or (heads, tokens_q)."""
    tensors = (q, k, v, call.table, call.bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _Attention.apply(q, k, v, *call, deterministic)
    return attention_forward(q, k, v, *call)


class _Attention(torch.autograd.Function):
    """Keeps the output and the log-sum-exp; the backward pass computes the probabilities again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        *given, deterministic = options
        call = Call(*given)
        out, lse = attention_forward(q, k, v, *call)
        ctx.save_for_backward(q, k, v, out, lse, *call[:7])
        ctx.numbers, ctx.deterministic = tuple(call[7:]), deterministic
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        first_derivative_only("attention")
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        call = Call(*tensors, *ctx.numbers)
        wants_table, wants_bias = ctx.needs_input_grad[7], ctx.needs_input_grad[8]
        dq, dk, dv, dtable, dbias = attention_backward(
            grad_out, grad_lse, q, k, v, out, lse, *call, ctx.deterministic, wants_table, wants_bias
        )
        none = (None,) * (len(Call._fields) + 1)
        grads = (*none[:4], dtable if wants_table else None, dbias if wants_bias else None, *none[6:])
        return dq, dk, dv, *grads


def forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Launches the forward kernel: see ``attention``."""
    call = Call(*options)
    out, lse = _outputs(q, call)
    if q.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    config = _config("forward", q, call)
    q, k, v = (_readable(x, config) for x in (q, k, v))
    programs, blocks = _grid(q, call, call.max_seqlen_q, config.block_m)
    attention_forward_kernel[(programs,)](
        _rows(q), _rows(k), _rows(v), _rows(out), lse, *_descriptors(k, v, config.block_n, config, call),
        *_lengths(lse, call), _scores(call), _dense(call.bias, q, call), _dropout(call), *_heads(q, k), blocks,
        *_dims(q, call), *_loop(q, call, config), num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the table and the dense bias; what is not wanted is an empty tensor."""
    *given, deterministic, wants_table, wants_bias = options
    call = Call(*given)
    if q.numel() == 0 or k.numel() == 0:
        return _nothing_to_do(q, k, v, call, wants_table, wants_bias)
    keys, queries = _config("keys", q, call), _config("queries", q, call)
    q, grad_out = (_readable(x, keys) for x in (q, grad_out))
    k, v = (_readable(x, queries) for x in (k, v))
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    gradient = Gradient(grad_out, lse, _delta(grad_out, grad_lse, out, lse, call))
    one_pass = keys.one_pass and not (deterministic or wants_table or wants_bias)
    if one_pass:
        dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        dk, dv = _key_gradients(q, k, v, gradient, call, keys, dq)
        return dq.to(q.dtype), dk, dv, q.new_empty(0), q.new_empty(0)
    dk, dv = _key_gradients(q, k, v, gradient, call, keys, None)
    dbias = torch.zeros(*q.shape[:1], q.shape[2], q.shape[1], k.shape[1], device=q.device) if wants_bias else None
    blocks = _grid(q, call, call.max_seqlen_q, queries.block_m)[1]
    far_sums = torch.zeros(_batch(q, call), blocks, q.shape[-2], 2, device=q.device) if wants_table else None
    dq = _query_gradient(q, k, v, gradient, call, queries, far_sums, dbias)
    dtable = q.new_empty(0)
    if far_sums is not None:
        dtable = _table_gradient(q, k, v, gradient, call, queries)
        dtable[:, :: dtable.shape[1] - 1] += far_sums.sum((0, 1))  # its first and last column
    if dbias is None or call.bias is None:
        return dq, dk, dv, dtable, q.new_empty(0)
    return dq, dk, dv, dtable, dbias.sum_to_size(call.bias.shape).to(call.bias.dtype)


class Gradient(NamedTuple):
    """What comes from above, and what it is held against."""

    out: Tensor
    saved_lse: Tensor
    delta: Tensor

    def pointers(self) -> tuple[Rows, Tensor, Tensor]:
        return _rows(self.out), self.saved_lse, self.delta


def _nothing_to_do(
    q: Tensor, k: Tensor, v: Tensor, call: Call, wants_table: bool, wants_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def zeros(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else torch.zeros(x.shape, dtype=x.dtype, device=x.device)

    return (
        zeros(q),
        zeros(k),
        zeros(v),
        zeros(call.table if wants_table else None),
        zeros(call.bias if wants_bias else None),
    )


def _delta(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, call: Call) -> Tensor:
    delta = torch.empty_like(lse)
    programs, blocks = _grid(out, call, call.max_seqlen_q, DELTA_BLOCK)
    attention_delta_kernel[(programs,)](
        _rows(out), _rows(grad_out), lse, grad_lse, delta, *_lengths(lse, call),
        out.shape[-2], blocks, *_dims(out, call), DELTA_BLOCK,
    )  # fmt: skip
    return delta


def _key_gradients(
    q: Tensor, k: Tensor, v: Tensor, gradient: Gradient, call: Call, config: Config, dq: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dk and dv; and dq, added to float32 zeros, where it is given."""
    # A key head's gradient is the sum of those that its query heads give.
    shape = (*k.shape[:-2], q.shape[-2], k.shape[-1])
    dk, dv = (torch.empty(shape, dtype=k.dtype, device=k.device) for _ in "kv")
    heads, groups = _heads(q, k)
    programs, blocks = _grid(q, call, call.max_seqlen_k, config.block_n)
    attention_backward_keys_kernel[(programs,)](
        _rows(q), _rows(k), _rows(v), *gradient.pointers(), _rows(dq), _rows(dk), _rows(dv),
        *_descriptors(q, gradient.out, config.block_m, config, call), *_lengths(gradient.delta, call), _scores(call),
        _dense(call.bias, q, call), _dropout(call), heads, groups, blocks, *_dims(q, call), *_loop(q, call, config),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if groups == 1:
        return dk, dv
    return dk.unflatten(-2, (-1, groups)).sum(-2), dv.unflatten(-2, (-1, groups)).sum(-2)


def _query_gradient(
    q: Tensor, k: Tensor, v: Tensor, gradient: Gradient, call: Call, config: Config, far_sums: Tensor | None,
    dbias: Tensor | None,
) -> Tensor:  # fmt: skip
    """dq; and the far sums and the dense bias's gradient into what is given for them."""
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    programs, blocks = _grid(q, call, call.max_seqlen_q, config.block_m)
    attention_backward_queries_kernel[(programs,)](
        _rows(q), _rows(k), _rows(v), *gradient.pointers(), _rows(dq), far_sums,
        *_descriptors(k, v, config.block_n, config, call), *_lengths(gradient.delta, call), _scores(call),
        _dense(call.bias, q, call), _dense(dbias, q, call), _dropout(call), *_heads(q, k), blocks, *_dims(q, call),
        *_loop(q, call, config), num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return dq


def _table_gradient(q: Tensor, k: Tensor, v: Tensor, gradient: Gradient, call: Call, counted: Config) -> Tensor:
    """What tiles that ``_query_gradient`` did not count give the bias's row, float32 (heads, 2 * reach + 1)."""
    assert call.table is not None
    config = _config("bias_gradient", q, call)
    assert counted.block_m % config.block_m == counted.block_n % config.block_m == 0
    programs, blocks = _grid(q, call, call.max_seqlen_q, config.block_m)
    partials = torch.zeros(_batch(q, call), blocks, *call.table.shape, device=q.device)
    attention_bias_gradient_kernel[(programs,)](
        _rows(q), _rows(k), _rows(v), *gradient.pointers(), partials, *_lengths(gradient.delta, call), _scores(call),
        _dense(call.bias, q, call), _dropout(call), *_heads(q, k), blocks, *_dims(q, call),
        config.block_m, counted.block_m, counted.block_n, call.causal, _precision(q), config.stages,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return partials.sum((0, 1))


def _outputs(q: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Memory for the output and the log-sum-exp."""
    shape = (q.shape[1], q.shape[0]) if call.cu_seqlens_q is not None else (q.shape[0], q.shape[2], q.shape[1])
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(shape, dtype=torch.float32, device=q.device)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _outputs(q, Call(*options))


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    *given, _, wants_table, wants_bias = options
    call = Call(*given)
    return (
        *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)),
        torch.empty_like(call.table) if wants_table and call.table is not None else q.new_empty(0),
        call.bias.new_empty(call.bias.shape) if wants_bias and call.bias is not None else q.new_empty(0),
    )


def _batch(q: Tensor, call: Call) -> int:
    return q.shape[0] if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1


def _grid(q: Tensor, call: Call, longest: int, block: int) -> tuple[int, int]:
    """Programs in all, one a block of every head, and blocks a sequence."""
    blocks = triton.cdiv(longest, block)
    return blocks * _batch(q, call) * q.shape[-2], blocks


def _heads(q: Tensor, k: Tensor) -> tuple[int, int]:
    """Query heads, and how many of them share a key head."""
    return q.shape[-2], q.shape[-2] // k.shape[-2]


def _loop(q: Tensor, call: Call, config: Config) -> tuple[Any, ...]:
    return config.block_m, config.block_n, call.causal, _precision(q), config.stages, config.near_stages


def _rows(x: Tensor | None) -> Rows:
    if x is None:
        return Rows(None, 0, 0, 0)
    batch = 0 if x.dim() == 3 else x.stride(0)
    return Rows(x, batch, x.stride(-3), x.stride(-2))


def _lengths(per_query: Tensor, call: Call) -> tuple[Lengths, int, int, int]:
    """The lengths, the longest of either, and the stride between heads of a float32 number a query."""
    lengths = Lengths(call.cu_seqlens_q, call.cu_seqlens_k, call.key_lengths)
    return lengths, call.max_seqlen_q, call.max_seqlen_k, per_query.shape[-1]


def _scores(call: Call) -> Scores:
    reach = None if call.table is None else call.table.shape[1] // 2
    return Scores(call.scale, call.softcap or None, call.window, call.slopes, call.table, reach)


def _descriptors(x: Tensor, y: Tensor, block: int, config: Config, call: Call) -> tuple[TensorDescriptor | None, ...]:
    """What the copy engine needs to fetch tiles of x and y in the pieces of ``_dims``."""
    if not config.descriptors:
        return None, None, None, None
    d0, d1, _ = _dims(x, call)

    def describe(z: Tensor, width: int) -> TensorDescriptor | None:
        z = z if z.dim() == 4 else z.unsqueeze(0)
        return TensorDescriptor(z, z.shape, z.stride(), [1, block, 1, width]) if width else None

    return describe(x, d0), describe(x, d1), describe(y, d0), describe(y, d1)


def _readable(x: Tensor, config: Config) -> Tensor:
    """x itself, or a copy where the kernel could not read it: rows are contiguous, and 16-byte for the copy engine."""
    size = x.element_size()
    readable = x.stride(-1) == 1
    if config.descriptors:
        readable &= x.data_ptr() % 16 == 0 and all(n * size % 16 == 0 and n > 0 for n in x.stride()[:-1])
    # contiguous() would leave what is contiguous at an odd address, or has an odd stride in a dimension of one.
    return x if readable else x.clone(memory_format=torch.contiguous_format)


def _dense(bias: Tensor | None, q: Tensor, call: Call) -> DenseBias:
    if bias is None:
        return DenseBias(None, None, None, None, None)
    shape = (q.shape[0], q.shape[2], call.max_seqlen_q, call.max_seqlen_k)
    return DenseBias(bias, *bias.expand(shape).stride())


def _dropout(call: Call) -> Dropout:
    if call.seed is None:
        return Dropout(None, None, None)
    return Dropout(call.seed, round(call.dropout_p * (1 << 24)), 1 / (1 - call.dropout_p))


def _dims(q: Tensor, call: Call) -> tuple[int, int, int]:
    """head_dim in the pieces of a call: see ``dims``."""
    return dims(q, masked=call.cu_seqlens_q is not None or call.key_lengths is not None)


def dims(q: Tensor, masked: bool) -> tuple[int, int, int]:
    """head_dim as one power of two, or as two whose sum is nearer to it: 80 is 64 + 16. Wide float32 is always cut.

    masked: rows of values are cleared between their load and their product. Seen on an H200 with Triton 3.6: for
    wgmma's asynchronous products in half precision, the second piece's then lies where others still read or write.
    """
    head_dim = q.shape[-1]
    whole = max(16, triton.next_power_of_2(head_dim))
    if head_dim > 128 and q.dtype == torch.float32:
        return 128, max(16, triton.next_power_of_2(head_dim - 128)), head_dim
    if whole == head_dim or whole <= 16 or (masked and q.dtype != torch.float32 and has_wgmma()):
        return whole, 0, head_dim
    first = whole // 2
    rest = max(16, triton.next_power_of_2(head_dim - first))
    return (first, rest, head_dim) if first >= 16 and rest < first else (whole, 0, head_dim)


def _precision(q: Tensor) -> str:
    if q.dtype != torch.float32:
        return "tf32"  # which says nothing about half precision
    return "ieee" if architecture().startswith("gfx") else "tf32x3"


def _config(kernel: str, q: Tensor, call: Call) -> Config:
    used = {
        "bias": call.table is not None or call.slopes is not None or call.bias is not None,
        "softcap": call.softcap > 0,
        "dropout": call.seed is not None,
    }
    features = tuple(name for name, is_used in used.items() if is_used)
    return attention_configs.choose(kernel, 8 * q.element_size(), q.shape[-1], features)


attention_forward = operator(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {SCHEMA}) -> (Tensor, Tensor)", forward, _fake_forward
)
attention_backward = operator(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{SCHEMA}, bool deterministic, bool wants_table, bool wants_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward,
    _fake_backward,
)
