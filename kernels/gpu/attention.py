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
from kernels.gpu.attention_scores import DenseBias, Dropout, Lengths, PerQuery, Rows, Scores

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256


class Call(NamedTuple):
    """What both operators take beside q, k and v, in the order of their schema."""

    cu_seqlens_q: Tensor | None  # int32 (batch + 1,)
    cu_seqlens_k: Tensor | None
    key_lengths: Tensor | None  # int (batch,)
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


def serves(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None) -> bool:
    """Whether the kernels take these tensors."""
    return (
        q.dtype == k.dtype == v.dtype
        and q.dtype in DTYPES
        and 0 < q.shape[-1] <= MAX_HEAD_DIM
        and (softmax_scale is None or softmax_scale > 0)
    )


def attention(q: Tensor, k: Tensor, v: Tensor, call: Call, deterministic: bool) -> tuple[Tensor, Tensor]:
    """The output, in q's dtype, and the log-sum-exp, float32 (batch, heads, seqlen_q) or (heads, tokens_q)."""
    tensors = (q, k, v, call.table, call.bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _Attention.apply(q, k, v, *call, deterministic)
    return torch.ops.tandem.attention_forward(q, k, v, *call)


class _Attention(torch.autograd.Function):
    """Keeps the output and the log-sum-exp; the backward pass computes the probabilities again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        *given, deterministic = options
        call = Call(*given)
        out, lse = torch.ops.tandem.attention_forward(q, k, v, *call)
        ctx.save_for_backward(q, k, v, out, lse, *call[:7])
        ctx.numbers, ctx.deterministic = tuple(call[7:]), deterministic
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("attention has no second derivative on triton: use backend='torch' for create_graph")
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        call = Call(*tensors, *ctx.numbers)
        wants_table, wants_bias = ctx.needs_input_grad[7], ctx.needs_input_grad[8]
        dq, dk, dv, dtable, dbias = torch.ops.tandem.attention_backward(
            grad_out, grad_lse, q, k, v, out, lse, *call, ctx.deterministic, wants_table, wants_bias
        )
        none = (None,) * (len(Call._fields) + 1)
        grads = (*none[:4], dtable if wants_table else None, dbias if wants_bias else None, *none[6:])
        return dq, dk, dv, *grads


def forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    call = Call(*options)
    out, lse = _outputs(q, call)
    if out.numel() == 0:
        return out, lse
    q, k, v = map(_rows_contiguous, (q, k, v))
    config = _config("forward", q, call)
    heads, groups = q.shape[-2], q.shape[-2] // k.shape[-2]
    blocks = triton.cdiv(call.max_seqlen_q, config.block_m)
    attention_forward_kernel[(blocks * _batch(q, call) * heads,)](
        _rows(q), _rows(k), _rows(v), _rows(out), _per_query(lse), *_descriptors(k, v, config.block_n, config),
        _lengths(call), _scores(call),
        _dense(call.bias, q, call), _dropout(call), heads, groups, blocks, *_dims(q), config.block_m, config.block_n,
        call.causal, _precision(q), config.stages, config.near_stages,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *given, deterministic, wants_table, wants_bias = options
    call = Call(*given)
    grad_out, q, k, v = map(_rows_contiguous, (grad_out, q, k, v))
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    nothing = q.new_empty(0)
    # A key head's gradient is the sum of those that its query heads give.
    per_head = (*k.shape[:-2], q.shape[-2], k.shape[-1])
    dk, dv = (torch.empty(per_head, dtype=k.dtype, device=k.device) for _ in "kv")
    if q.numel() == 0 or k.numel() == 0:
        dtable = torch.zeros_like(call.table) if wants_table and call.table is not None else nothing
        dbias = torch.zeros_like(call.bias) if wants_bias and call.bias is not None else nothing
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), dtable, dbias
    delta = torch.empty_like(lse)
    heads, groups, batch = q.shape[-2], q.shape[-2] // k.shape[-2], _batch(q, call)
    keys, queries = _config("keys", q, call), _config("queries", q, call)
    one_pass = keys.one_pass and not (deterministic or wants_table or wants_bias)
    common = (_lengths(call), _scores(call), _dense(call.bias, q, call))
    blocks = triton.cdiv(call.max_seqlen_q, 64)
    attention_delta_kernel[(blocks * batch * heads,)](
        _rows(out), _rows(grad_out), _per_query(lse), None if grad_lse is None else _per_query(grad_lse),
        _per_query(delta), _lengths(call), heads, blocks, *_dims(q), 64,
    )  # fmt: skip
    sum_dtype = torch.float32 if one_pass else q.dtype
    dq = (torch.zeros if one_pass else torch.empty)(q.shape, dtype=sum_dtype, device=q.device)
    blocks = triton.cdiv(call.max_seqlen_k, keys.block_n)
    attention_backward_keys_kernel[(blocks * batch * heads,)](
        _rows(q), _rows(k), _rows(v), _rows(grad_out), _per_query(lse), _per_query(delta),
        _rows(dq) if one_pass else Rows(None, 0, 0, 0), _rows(dk), _rows(dv),
        *_descriptors(q, grad_out, keys.block_m, keys), *common, _dropout(call), heads, groups,
        blocks, *_dims(q), keys.block_m, keys.block_n, call.causal, _precision(q), keys.stages, keys.near_stages,
        num_warps=keys.warps, num_stages=keys.stages,
    )  # fmt: skip
    if groups > 1:
        dk, dv = (x.unflatten(-2, (-1, groups)).sum(-2) for x in (dk, dv))
    if one_pass:
        return dq.to(q.dtype), dk, dv, nothing, nothing
    counts = wants_table and call.window is None and not call.causal
    far_sums = torch.empty_like(lse) if counts else None
    full = torch.zeros(batch, heads, q.shape[1], k.shape[1], device=q.device) if wants_bias else None
    blocks = triton.cdiv(call.max_seqlen_q, queries.block_m)
    attention_backward_queries_kernel[(blocks * batch * heads,)](
        _rows(q), _rows(k), _rows(v), _rows(grad_out), _per_query(lse), _per_query(delta), _rows(dq),
        _per_query(far_sums), *_descriptors(k, v, queries.block_n, queries), *common, _dense(full, q, call), _dropout(call), heads, groups, blocks, *_dims(q),
        queries.block_m, queries.block_n, call.causal, _precision(q), queries.stages, queries.near_stages,
        num_warps=queries.warps, num_stages=queries.stages,
    )  # fmt: skip
    dtable = nothing
    if wants_table:
        dtable = _table_gradient(q, k, v, grad_out, grad_lse, lse, delta, far_sums, call, queries)
    dbias = nothing
    if full is not None and call.bias is not None:
        dbias = full.sum_to_size(call.bias.shape).to(call.bias.dtype)
    return dq, dk, dv, dtable, dbias


def _table_gradient(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, grad_lse: Tensor | None, lse: Tensor, delta: Tensor,
    far_sums: Tensor | None, call: Call, queries: Config,
) -> Tensor:  # fmt: skip
    assert call.table is not None
    config = _config("bias_gradient", q, call)
    assert queries.block_m % config.block_m == 0
    heads, batch = q.shape[-2], _batch(q, call)
    blocks = triton.cdiv(call.max_seqlen_q, config.block_m)
    partials = torch.zeros(batch, blocks, *call.table.shape, device=q.device)
    attention_bias_gradient_kernel[(blocks * batch * heads,)](
        _rows(q), _rows(k), _rows(v), _rows(grad_out), _per_query(lse), _per_query(delta),
        None if grad_lse is None else _per_query(grad_lse), _per_query(far_sums), partials, _lengths(call),
        _scores(call), _dense(call.bias, q, call), _dropout(call), heads, heads // k.shape[-2], blocks, *_dims(q),
        config.block_m, queries.block_m, queries.block_n, call.causal, _precision(q), config.stages,
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
        torch.empty_like(call.bias) if wants_bias and call.bias is not None else q.new_empty(0),
    )


def _batch(q: Tensor, call: Call) -> int:
    return q.shape[0] if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor) -> Rows:
    batch = 0 if x.dim() == 3 else x.stride(0)
    return Rows(x, batch, x.stride(-3), x.stride(-2))


def _per_query(x: Tensor | None) -> PerQuery:
    if x is None:
        return PerQuery(None, 0, 0)
    return PerQuery(x, 0 if x.dim() == 2 else x.stride(0), x.stride(-2))


def _lengths(call: Call) -> Lengths:
    return Lengths(call.cu_seqlens_q, call.cu_seqlens_k, call.key_lengths, call.max_seqlen_q, call.max_seqlen_k)


def _scores(call: Call) -> Scores:
    reach = None if call.table is None else call.table.shape[1] // 2
    return Scores(call.scale, call.softcap or None, call.window, call.slopes, call.table, reach)


def _descriptors(x: Tensor, y: Tensor, block: int, config: Config) -> tuple[TensorDescriptor | None, ...]:
    """What the copy engine needs to fetch tiles of x and y in the pieces of ``_dims``; it wants 16-byte strides."""
    d0, d1, _ = _dims(x)
    if not 0 < config.descriptors <= x.shape[-3] or not (_is_aligned(x) and _is_aligned(y)):
        return None, None, None, None

    def describe(z: Tensor, width: int) -> TensorDescriptor | None:
        z = z if z.dim() == 4 else z.unsqueeze(0)
        return TensorDescriptor(z, z.shape, z.stride(), [1, block, 1, width]) if width else None

    return describe(x, d0), describe(x, d1), describe(y, d0), describe(y, d1)


def _is_aligned(x: Tensor) -> bool:
    size = x.element_size()
    return x.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 and stride > 0 for stride in x.stride()[:-1])


def _dense(bias: Tensor | None, q: Tensor, call: Call) -> DenseBias:
    if bias is None:
        return DenseBias(None, None, None, None, None)
    shape = (q.shape[0], q.shape[2], call.max_seqlen_q, call.max_seqlen_k)
    return DenseBias(bias, *bias.expand(shape).stride())


def _dropout(call: Call) -> Dropout:
    if call.seed is None:
        return Dropout(None, None, None)
    return Dropout(call.seed, round(call.dropout_p * (1 << 24)), 1 / (1 - call.dropout_p))


def _dims(q: Tensor) -> tuple[int, int, int]:
    """head_dim as one power of two, or as two whose sum is nearer to it: 80 is 64 + 16."""
    head_dim = q.shape[-1]
    whole = max(16, triton.next_power_of_2(head_dim))
    if whole == head_dim or whole <= 16:
        return whole, 0, head_dim
    first = whole // 2
    rest = max(16, triton.next_power_of_2(head_dim - first))
    return (first, rest, head_dim) if first >= 16 and rest < first else (whole, 0, head_dim)


def _precision(q: Tensor) -> str:
    return "tf32x3" if q.dtype == torch.float32 else "tf32"  # the latter says nothing about half precision


def _config(kernel: str, q: Tensor, call: Call) -> Config:
    used = {
        "bias": call.table is not None or call.slopes is not None or call.bias is not None,
        "softcap": call.softcap > 0,
        "dropout": call.seed is not None,
    }
    features = tuple(name for name, is_used in used.items() if is_used)
    return attention_configs.choose(kernel, 8 * q.element_size(), q.shape[-1], features)


library = torch.library.Library("tandem", "FRAGMENT")
library.define(f"attention_forward(Tensor q, Tensor k, Tensor v, {SCHEMA}) -> (Tensor, Tensor)")
library.define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{SCHEMA}, bool deterministic, bool wants_table, bool wants_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
for key in ("CPU", "CUDA"):
    library.impl("attention_forward", forward, key)
    library.impl("attention_backward", backward, key)
torch.library.register_fake("tandem::attention_forward", _fake_forward)
torch.library.register_fake("tandem::attention_backward", _fake_backward)
