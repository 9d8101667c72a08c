"""Rotary positions (arXiv:2104.09864): one pass on a GPU by Triton, and for float32 on a CPU by csrc/elementwise.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import native_elementwise as native
from kernels import reference
from kernels.backend import TRITON_DEVICE, available, check_devices, choose, triton_serves

if TRITON_DEVICE is not None:
    from kernels.gpu import rotary as gpu_rotary


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, backend: str | None = None) -> Tensor:
    """Rotates x (..., seqlen, heads, head_dim) by the tokens' angles, in pairs of elements, into a tensor of its own.

    Args:
        x: padded as above or packed (tokens, heads, head_dim); a view with any strides.
        cos, sin: float32 (seqlen, 1, rotated / 2), or (batch, seqlen, 1, rotated / 2) where sequences differ, or packed
            (tokens, 1, rotated / 2), without gradient. The rest of a head wider than ``rotated`` stays as it is.
        interleaved: elements 2i and 2i + 1 pair (GPT-J); else element i of the first half of what is rotated pairs
            with element i of the second.
        backend: ``triton`` (half precision and float32 on a GPU, gradients once), ``native`` (C++; float32 on a CPU,
            halves, the same angles for every sequence, gradients once), ``torch`` or ``reference``; chosen by
            ``kernels.backend`` unless given.

    Raises ValueError for a backend that is missing, and for angles that are not x's.
    """
    _check(x, cos, sin)
    name = choose("rotate", _available(x, cos, sin, interleaved), backend)
    if name == "triton":
        return gpu_rotary.Rotate.apply(x, cos, sin, interleaved)
    if name == "native":
        return _native(x, cos, sin)
    return reference.rotate(x, cos, sin, interleaved=interleaved)


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_devices("rotate", x, cos, sin)
    fits = (
        x.dim() in (3, 4)
        and x.is_floating_point()
        and cos.shape == sin.shape
        and cos.shape[-2:-1] == (1,)
        and 2 * cos.shape[-1] <= x.shape[-1]
        and cos.dim() <= x.dim()
        and all(have in (1, want) for have, want in zip(cos.shape[-3::-1], x.shape[-3::-1], strict=False))
    )
    if not fits:
        raise ValueError(
            "rotate needs x ([batch,] seqlen, heads, head_dim) and angles (seqlen, 1, at most head_dim / 2), "
            f"got {x.dtype} {tuple(x.shape)}, {tuple(cos.shape)} and {tuple(sin.shape)}"
        )


def _available(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[str, ...]:
    on_gpu = triton_serves(x, cos, sin) and _fits_triton(cos, sin)
    on_cpu = not interleaved and native.serves(x, cos, sin) and _fits(x, cos)
    return available(x.device, triton=on_gpu, native=on_cpu)


def _fits_triton(cos: Tensor, sin: Tensor) -> bool:
    return cos.dtype == sin.dtype == torch.float32 and cos.shape[-1] > 0


def _fits(x: Tensor, cos: Tensor) -> bool:
    """Positions that differ from sequence to sequence of a padded batch are left to the formula."""
    return x.dim() in (3, 4) and cos.shape[:-1] == (x.shape[-3], 1)


def _native(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated = 2 * cos.shape[-1]
    if rotated < x.shape[-1]:
        return torch.cat((_native(x[..., :rotated], cos, sin), x[..., rotated:]), dim=-1)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotate.apply(x, cos, sin)
    return native.rotate(x, cos, sin, back=False)


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return native.rotate(x, cos, sin, back=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return native.rotate(grad, *ctx.saved_tensors, back=True), None, None
