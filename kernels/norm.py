"""RMSNorm (arXiv:1910.07467) and LayerNorm (arXiv:1607.06450), on their own or after a residual addition."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from kernels import reference
from kernels.backend import TRITON_DEVICE, available, check_devices, choose, triton_serves

if TRITON_DEVICE is not None:
    from kernels.gpu import norm as gpu_norm

BACKENDS = ("triton", "torch", "reference")


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, *, residual: None = None, backend: str | None = None) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor, other: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    other: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean of x^2 + eps) * weight over the last dimension, in weight's dtype, from float32 statistics.

    Args:
        x: (..., width), any floating dtype. weight: (width,).
        residual: x's shape; then x + residual is what is normed, and is returned as well, in the dtype that torch
            gives the sum: (norm, sum), both with gradients.
        other: x's shape, beside a residual: x + other, rounded as torch does, in place of x. In the same pass where
            their dtypes are the same.
        backend: ``triton`` (half precision and float32 on a GPU, gradients once), ``torch`` or ``reference``;
            chosen by ``kernels.backend`` unless given.

    Raises ValueError for a backend that is missing, and when shapes or dtypes do not fit.
    """
    _check("rms_norm", x, weight, None, residual, other)
    x, other = _one_dtype(x, other)
    name = choose("rms_norm", _available(x, weight, None, residual), backend, has=BACKENDS)
    if name == "triton":
        return gpu_norm.Norm.apply(x, residual, weight, None, eps, False, other)
    norm = reference.rms_norm if name == "reference" else _rms_norm
    if residual is None:
        return norm(x, weight, eps)
    total = _sum(x, other) + residual
    return norm(total, weight, eps), total


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, residual: None = None, backend: str | None = None
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor,
    other: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    other: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension: see ``rms_norm``.

    bias is (width,) or None. Where x's dtype is not weight's, torch on a CPU goes its own way: it takes bfloat16 x
    with float32 weight, and returns bfloat16.
    """
    _check("layer_norm", x, weight, bias, residual, other)
    x, other = _one_dtype(x, other)
    name = choose("layer_norm", _available(x, weight, bias, residual), backend, has=BACKENDS)
    if name == "triton":
        return gpu_norm.Norm.apply(x, residual, weight, bias, eps, True, other)
    norm = reference.layer_norm if name == "reference" else _layer_norm
    if residual is None:
        return norm(x, weight, bias, eps)
    total = _sum(x, other) + residual
    return norm(total, weight, bias, eps), total


def _one_dtype(x: Tensor, other: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return (x, other) if other is None or other.dtype == x.dtype else (x + other, None)


def _sum(x: Tensor, other: Tensor | None) -> Tensor:
    return x if other is None else x + other


def _check(
    operation: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, other: Tensor | None
) -> None:
    check_devices(operation, x, weight, bias, residual, other)
    if x.dim() == 0 or not (x.is_floating_point() and weight.is_floating_point()):
        raise ValueError(
            f"{operation} needs floating point x (..., width) and weight, got {x.dtype} and {weight.dtype}"
        )
    if weight.shape != x.shape[-1:] or (bias is not None and bias.shape != weight.shape):
        given = [tuple(parameter.shape) for parameter in (weight, bias) if parameter is not None]
        raise ValueError(f"the parameters of a norm over {tuple(x.shape)} must be ({x.shape[-1]},), got {given}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if other is not None and (residual is None or other.shape != x.shape):
        raise ValueError(f"other must have x's shape {tuple(x.shape)} and goes with a residual")


def _available(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> tuple[str, ...]:
    # The sum's dtype must be that of one of its terms, and bias goes with weight.
    fits = TRITON_DEVICE is not None and (
        triton_serves(x, weight, bias, residual)
        and (bias is None or bias.dtype == weight.dtype)
        and (residual is None or torch.promote_types(x.dtype, residual.dtype) in (x.dtype, residual.dtype))
    )
    return available(x.device, triton=fits)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype == weight.dtype:
        return torch.rms_norm(x, weight.shape, weight, eps)
    wide = torch.promote_types(x.dtype, weight.dtype)
    return torch.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(weight.dtype)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return torch.layer_norm(x, weight.shape, weight, bias, eps)
