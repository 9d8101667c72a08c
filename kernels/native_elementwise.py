"""The C++ of csrc/elementwise.h and csrc/transpose.h behind torch tensors, without gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.extension import _C


def serves(*tensors: Tensor) -> bool:
    """Whether the C++ takes these tensors. torch.compile and autocast have plans of their own."""
    for x in tensors:
        if x.dtype is not torch.float32 or not x.is_cpu:
            return False
    return not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")


def gelu(x: Tensor, tanh: bool) -> Tensor:
    out = torch.empty(x.shape)
    _C.gelu(_run(x), tanh, out.numpy(), torch.get_num_threads())
    return out


def gelu_backward(x: Tensor, grad: Tensor, tanh: bool) -> Tensor:
    grad_x = torch.empty(x.shape)
    _C.gelu_backward(_run(x), _run(grad), tanh, grad_x.numpy(), torch.get_num_threads())
    return grad_x


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """x (..., seqlen, heads, head_dim) by cos and sin (seqlen, 1, head_dim / 2), or by their opposite angles."""
    out = torch.empty(x.shape)
    rows = x.detach() if x.dim() == 4 else x.detach()[None]
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    _C.rotate(rows.numpy(), _run(cos), _run(sin), back, out.numpy(), torch.get_num_threads())
    return out


def transpose(x: Tensor, sums: Tensor | None = None) -> Tensor:
    """A contiguous x^T of a matrix x; ``sums`` receives the sum of each column of x from the same pass."""
    out = torch.empty(x.shape[1], x.shape[0])
    rows = x if x.stride(1) == 1 else x.contiguous()
    _C.transpose(rows.detach().numpy(), out.numpy(), None if sums is None else sums.numpy(), torch.get_num_threads())
    return out


def _run(x: Tensor) -> Any:
    return x.detach().contiguous().numpy()
