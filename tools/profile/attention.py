"""`attention`: ours against torch's fused back ends, FlexAttention and the plain formula, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from kernels.attention import attention
from kernels.attention_options import RelativeBias
from tools.profile.attention_shapes import SHAPES as SHAPES
from tools.profile.attention_shapes import Shape, shapes
from tools.profile.contenders import OURS, Contender, Problem, chosen, compiled, our_backends
from tools.profile.machine import memory
from tools.profile.measure import OPTIONS as OPTIONS
from tools.profile.measure import measure
from tools.profile.options import MODES, Options
from tools.profile.report import Report

SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
PEERS = (*SDPA, "flex", "eager", "compile")
GPU_PEERS = ("cudnn", "efficient")
BUCKETS, MAX_DISTANCE = 32, 128  # T5's
SCORE_SHARE = 8  # a peer that writes all scores is left out where they are more than this share of memory

Function = Callable[..., Tensor]


def run(options: Options) -> Report:
    on_gpu = torch.cuda.is_available()
    against = options.against
    if against is None:
        against = [name for name in PEERS if on_gpu or name not in GPU_PEERS]
    wanted = shapes(options.shapes, on_gpu)
    return measure("attention", wanted, partial(problem, against=against), options, rate="FLOP")


def problem(shape: Shape, device: torch.device, dtype: torch.dtype, against: list[str] | None) -> Problem:
    """q, k, v and, for T5, the bias table, all with gradients."""
    q, k, v = (
        torch.randn(shape.batch, length, shape.heads, shape.head_dim, device=device).to(dtype).requires_grad_()
        for length in (shape.seqlen_q, shape.seqlen_k, shape.seqlen_k)
    )
    inputs: tuple[Tensor, ...] = (q, k, v)
    if shape.t5:
        inputs += (torch.randn(BUCKETS, shape.heads, device=device).to(dtype).requires_grad_(),)
    everyone = {f"{OURS} {name}": ours(shape, name) for name in our_backends(device, dtype)}
    if f"{OURS} triton" in everyone:
        everyone[f"{OURS} triton, deterministic"] = ours(shape, "triton", deterministic=True)
    everyone |= peers(shape)
    return Problem(
        dtype,
        inputs,
        reference=partial(head_by_head, shape),
        contenders=chosen(everyone, against),
        forward=shape.forward(dtype.itemsize),
        backward=shape.backward(dtype.itemsize),
    )


def ours(shape: Shape, backend: str, deterministic: bool = False) -> Contender:
    """A model makes its bias of all distances once for all layers: that is not timed, its gradient is."""

    def prepare(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> tuple[Any, ...]:
        bias = None if table is None else relative_bias(shape, table)
        return q, k, v, bias, None if bias is None else bias.distance_bias

    def function(q: Tensor, k: Tensor, v: Tensor, bias: RelativeBias | None, _: Tensor | None) -> Tensor:
        out = attention(q, k, v, causal=shape.causal, relative_bias=bias, deterministic=deterministic, backend=backend)
        assert isinstance(out, Tensor)
        return out

    return Contender(function, prepare, ("backward", "both") if deterministic else MODES)


def peers(shape: Shape) -> dict[str, Contender]:
    """T5's bias is to them a tensor of all scores' biases, made once and not timed."""
    prepare = partial(with_dense_bias, shape)
    scores = partial(writes_scores, shape)
    fused = {
        name: Contender(partial(sdpa, shape, backend), scores if name == "math" else prepare)
        for name, backend in SDPA.items()
    }
    return fused | {
        "flex": Contender(flex(shape), partial(with_dense_bias, shape, masked=False)),
        "eager": Contender(partial(formula, shape), scores),
        "compile": Contender(compiled(partial(formula, shape)), scores),
    }


def relative_bias(shape: Shape, table: Tensor) -> RelativeBias:
    return RelativeBias(table, MAX_DISTANCE, bidirectional=not shape.causal)


def with_dense_bias(
    shape: Shape, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None, *, masked: bool = True
) -> tuple[Any, ...]:
    if table is None:
        return q, k, v, None
    return q, k, v, dense_bias(shape, relative_bias(shape, table).distance_bias, masked and shape.causal)


def dense_bias(shape: Shape, distance_bias: Tensor, masked: bool) -> Tensor:
    """What is added to the scores: (1, heads, seqlen_q, seqlen_k), -inf where a causal mask hides.

    Every query's row is a window of one line over all distances, whose gradient is quick to sum, as that of looking
    each element up is not; it is summed in float32.
    """
    distance = torch.arange(1 - shape.seqlen_k, shape.seqlen_q, device=distance_bias.device)
    wide = distance_bias.to(torch.promote_types(distance_bias.dtype, torch.float32))
    line = wide.index_select(1, distance.clamp(-MAX_DISTANCE, MAX_DISTANCE) + MAX_DISTANCE)
    if masked:
        line = line.masked_fill(distance > 0, -math.inf)
    return line.unfold(1, shape.seqlen_k, 1).flip(1)[None].to(distance_bias.dtype)


def writes_scores(shape: Shape, q: Tensor, *others: Tensor) -> tuple[Any, ...]:
    """For peers that write all scores to memory. Raises ValueError where they would take too much of it."""
    if 4 * shape.scores * SCORE_SHARE > memory(q.device):
        raise ValueError(f"left out: its scores take {4 * shape.scores / 1e9:.0f} GB as float32")
    return with_dense_bias(shape, q, *others)


def sdpa(shape: Shape, backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias,
            is_causal=shape.causal and bias is None,
        ).transpose(1, 2)  # fmt: skip


def formula(shape: Shape, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """As a model without fused attention writes it, in its inputs' dtype but for the softmax."""
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / math.sqrt(shape.head_dim)
    if bias is not None:
        scores = scores + bias
    elif shape.causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return (weights @ v.transpose(1, 2)).transpose(1, 2)


def flex(shape: Shape) -> Function:
    from torch.nn.attention import flex_attention

    fused: Function = compiled(flex_attention.flex_attention)
    blocks: list[Any] = []  # the causal mask's, made at the first call

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        if shape.causal and not blocks:
            lengths = shape.seqlen_q, shape.seqlen_k
            mask = flex_attention.create_block_mask(_causal, None, None, *lengths, device=q.device.type)
            blocks.append(mask)
        score_mod = None if bias is None else lambda score, b, h, i, j: score + bias[0, h, i, j]
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return fused(*heads_first, score_mod=score_mod, block_mask=blocks[0] if blocks else None).transpose(1, 2)

    return function


def _causal(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def head_by_head(shape: Shape, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
    """The formula, a head at a time and once more for the gradient, so that it never holds all scores."""

    def one_head(q: Tensor, k: Tensor, v: Tensor, distance_bias: Tensor | None) -> Tensor:
        bias = None if distance_bias is None else dense_bias(shape, distance_bias, shape.causal)
        return formula(shape, q, k, v, bias)

    biases = [None] * shape.heads if table is None else relative_bias(shape, table).distance_bias.split(1)
    heads = zip(q.split(1, dim=2), k.split(1, dim=2), v.split(1, dim=2), biases, strict=True)
    outputs = [checkpoint(one_head, *head, use_reentrant=False, preserve_rng_state=False) for head in heads]
    return torch.cat(outputs, dim=2)
