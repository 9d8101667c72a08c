"""Linear layers over weights packed for a GPU: integers of eight or four bits, floats of eight, or halves.

Activations stay floats: a weight's bits become numbers on their way to the tensor cores. Up to 64 rows one kernel reads
the weight once; beyond, a product is bound by its arithmetic, so the weight is made floats first and torch multiplies.
There are no gradients.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.activation import TORCH, glu
from kernels.backend import TRITON_DEVICE, TRITON_DTYPES, available, choose, triton_serves
from kernels.quantization import QuantizedWeight

if TRITON_DEVICE is not None:
    from kernels.gpu import weight_only_linear as gpu

ACTIVATIONS = ("none", "relu", "gelu", "gelu_new", "silu")
FLOAT8 = torch.float8_e4m3fn
FLOAT8_CAPABILITY = (9, 0)
MOST_ROWS = 64
TILE, BLOCK, GROUP = 256, 64, 32  # inputs in four bits: whose scales lie together, whose values do, who share a scale
SLICE = 1 << 26  # weights that are floats at once beyond MOST_ROWS
COUNTERS = 4096  # of blocks of outputs and rows that several programs share


@dataclass(frozen=True, eq=False)
class DeviceWeight:
    """A weight (out_features, in_features) as the kernel reads it, on its device.

    values: int8, float8_e4m3fn or halves (N, K padded to whole 16 bytes); four bits int32 (K / 64, N, 8), K padded to
    256: the word (b, n, i) has the inputs 64 b + 32 g + 16 j + 2 i + h of row n at the bits 8 g + 4 j + 16 h.
    scales: float32 (N,), or float16 (K / 256, N, 8), one for 32 inputs, with ``minimums`` alike where there are.
    dtype: of the rows it multiplies, and of the results.

    Launches on one weight follow each other, on one stream: they share counters.
    """

    values: Tensor
    scales: Tensor | None
    minimums: Tensor | None
    counters: Tensor
    out_features: int
    in_features: int
    dtype: torch.dtype

    @classmethod
    def pack(
        cls, weight: QuantizedWeight | Tensor, device: torch.device | str, dtype: torch.dtype, *, float8: bool = False
    ) -> DeviceWeight:
        """A quantised weight with its values as they are, or floats in ``dtype``, or rounded to eight bits: ``float8``.

        Raises ValueError for floats of eight bits on a GPU that has none, and for what is no matrix.
        """
        device = torch.device(device)
        if dtype not in TRITON_DTYPES:
            raise ValueError(f"a packed weight multiplies float32, bfloat16 or float16, not {dtype}")
        scales = minimums = None
        if isinstance(weight, QuantizedWeight):
            values, scales = weight.values.to(device), weight.scales.to(device)
            if weight.bits == 8:
                values = _padded(values, 16)
            else:
                values = pack_nibbles(values)
                scales = pack_groups(scales, weight.group)
                minimums = None if weight.minimums is None else pack_groups(weight.minimums.to(device), weight.group)
        else:
            if weight.dim() != 2 or not weight.is_floating_point():
                raise ValueError(f"only matrices of floats are packed, got {weight.dtype} {tuple(weight.shape)}")
            values = weight.detach().to(device)
            if float8:
                check_float8(device)
                values, scales = round_to_float8(values)
                values = _padded(values.view(torch.int8), 16).view(FLOAT8)
            else:
                values = _padded(values.to(dtype), 16 // dtype.itemsize)
        rows, columns = weight.shape
        counters = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        return cls(values, scales, minimums, counters, rows, columns, dtype)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def bits(self) -> int:
        return 4 if self.values.dtype == torch.int32 else 8 * self.values.dtype.itemsize

    @property
    def is_float8(self) -> bool:
        return self.values.dtype == FLOAT8

    @property
    def nbytes(self) -> int:
        """Of what is read for a product."""
        return sum(0 if tensor is None else tensor.nbytes for tensor in (self.values, self.scales, self.minimums))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The floats (out_features, in_features) that it stands for, rounded to ``dtype``, its own unless given."""
        dtype = dtype or self.dtype
        if self.bits != 4:
            values = self.values[:, : self.in_features]
            return values.to(dtype) if self.scales is None else (values.float() * self.scales[:, None]).to(dtype)
        assert self.scales is not None
        values = unpack_nibbles(self.values).float().unflatten(1, (-1, GROUP))
        scales = self.scales.transpose(0, 1).flatten(1).float()[..., None]
        if self.minimums is None:
            floats = (values - 8) * scales
        else:
            floats = values * scales + self.minimums.transpose(0, 1).flatten(1).float()[..., None]
        return floats.flatten(1)[:, : self.in_features].to(dtype)


def pack_nibbles(values: Tensor) -> Tensor:
    """int32 (K / 64, N, 8) of uint8 (N, K / 2), two inputs a byte, the even one low: see ``DeviceWeight``."""
    rows = len(values)
    nibbles = torch.stack((values & 15, values >> 4), dim=-1).flatten(1)
    nibbles = F.pad(nibbles, (0, -nibbles.shape[1] % TILE), value=8).int()
    halves = nibbles.view(rows, -1, 2, 2, 8, 2)  # row, block, g, j, i, h
    shifts = torch.tensor([[[0, 16], [4, 20]], [[8, 24], [12, 28]]], dtype=torch.int32, device=values.device)
    words = (halves << shifts[:, :, None, :]).sum(dim=(2, 3, 5), dtype=torch.int64)  # (rows, blocks, 8), below 2^32
    return words.to(torch.int32).transpose(0, 1).contiguous()


def unpack_nibbles(words: Tensor) -> Tensor:
    """uint8 (N, K), the values 0 to 15 that ``pack_nibbles`` packed, with what it added at the end of a row."""
    shifts = torch.tensor([[[0, 16], [4, 20]], [[8, 24], [12, 28]]], dtype=torch.int32, device=words.device)
    nibbles = (words[:, :, None, None, :, None] >> shifts[:, :, None, :]) & 15  # block, row, g, j, i, h
    return nibbles.transpose(0, 1).flatten(1).to(torch.uint8)


def pack_groups(scales: Tensor, group: int) -> Tensor:
    """float16 (K / 256, N, 8), one for 32 inputs, of float16 (N, K / group)."""
    thirties = scales.repeat_interleave(group // GROUP, dim=1)
    padded = F.pad(thirties, (0, -thirties.shape[1] % 8))
    return padded.unflatten(1, (-1, 8)).transpose(0, 1).contiguous()


def round_to_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn values and float32 scales (N,): a row's largest magnitude becomes 448, the largest there is."""
    weight = weight.float()
    largest = weight.abs().amax(1) if weight.shape[1] else weight.new_zeros(len(weight))
    if not torch.isfinite(largest).all():
        raise ValueError("only finite weights can be quantised")
    scales = largest / torch.finfo(FLOAT8).max
    scaled = weight / torch.where(scales > 0, scales, 1)[:, None]
    return scaled.clamp(-448, 448).to(FLOAT8), scales


def check_float8(device: torch.device) -> None:
    """Raises ValueError for a GPU without floats of eight bits. (Triton's interpreter has them.)"""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
        raise ValueError("weights in fp8 need a GPU of compute capability 9.0")


def weight_only_linear(
    x: Tensor, weight: DeviceWeight, bias: Tensor | None = None, *, activation: str = "none", gated: bool = False,
    residual: Tensor | None = None, out_dtype: torch.dtype | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """activation(x W^T + bias) + residual, (..., out_features), for x (..., in_features) in the weight's dtype.

    Args:
        bias: (out_features,). residual: of the result's shape.
        activation: none, relu, gelu, gelu_new or silu.
        gated: the first half of the weight's rows makes gates, the other factors: activation(gates) * factors.
        out_dtype: x's unless given.
        backend: ``triton``, ``torch`` (makes the weight floats each time) or ``reference`` (the same in float32);
            chosen by ``kernels.backend`` unless given.

    Sums are float32, in an order that depends on the number of rows alone. It can be captured in a CUDA graph. Raises
    ValueError for what does not fit together, and for a backend that is missing; RuntimeError where a gradient would be
    lost.
    """
    _check(x, weight, bias, activation, gated, residual)
    name = choose("weight_only_linear", available(x.device, triton=triton_serves(x)), backend, has=BACKENDS)
    if name == "triton" and x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("packed weights have no gradients: call them under torch.no_grad()")
    dtype = out_dtype or x.dtype
    width = weight.out_features // 2 if gated else weight.out_features
    rows = x.reshape(-1, weight.in_features)
    residual = None if residual is None else residual.reshape(-1, width)
    if name == "triton":
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            compute = _of_few_rows if len(rows) <= MOST_ROWS else _of_many_rows
            out = compute(rows.contiguous(), weight, bias, activation, gated, residual, dtype)
    else:
        number = x.dtype if name == "torch" else torch.float32
        product = F.linear(rows.to(number), weight.dequantize(number), None if bias is None else bias.to(number))
        out = _finished(product, activation, gated, residual, dtype)
    return out.view(*x.shape[:-1], width)


BACKENDS = ("triton", "torch", "reference")


def _of_few_rows(
    x: Tensor, weight: DeviceWeight, bias: Tensor | None, activation: str, gated: bool, residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    # Scales, minimums and two sums of many rows are more than a thread has registers for.
    joins = not gated or weight.bits > 4 or len(x) <= (16 if weight.minimums is None else 8)
    if not joins:
        product = gpu.linear(x, weight, bias, "none", False, None, torch.float32)
        return _finished(product, activation, True, residual, dtype)
    return gpu.linear(x, weight, bias, activation, gated, None if residual is None else residual.contiguous(), dtype)


def _of_many_rows(
    x: Tensor, weight: DeviceWeight, bias: Tensor | None, activation: str, gated: bool, residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The weight's rows become floats some at a time, so that a large vocabulary takes no memory of its own size."""
    bias = None if bias is None else bias.to(x.dtype)
    if weight.scales is None:
        product = F.linear(x, weight.values[:, : weight.in_features].to(x.dtype), bias)
        return _finished(product, activation, gated, residual, dtype)
    product = torch.empty((len(x), weight.out_features), dtype=x.dtype, device=x.device)
    step = max(1, SLICE // max(1, weight.in_features))
    for start in range(0, weight.out_features, step):
        part = slice(start, min(start + step, weight.out_features))
        floats = gpu.dequantize(weight, part, x.dtype)
        product[:, part] = F.linear(x, floats, None if bias is None else bias[part])
    return _finished(product, activation, gated, residual, dtype)


def _finished(product: Tensor, activation: str, gated: bool, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    product = product.to(torch.promote_types(product.dtype, dtype))
    if gated and activation == "none":
        gates, factors = product.chunk(2, dim=-1)
        product = gates * factors
    elif gated:
        product = glu(product, activation)  # type: ignore[arg-type]
    elif activation != "none":
        product = TORCH[activation](product)
    return (product if residual is None else product + residual).to(dtype)


def _check(
    x: Tensor, weight: DeviceWeight, bias: Tensor | None, activation: str, gated: bool, residual: Tensor | None
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
    if x.shape[-1:] != (weight.in_features,) or x.dtype != weight.dtype:
        raise ValueError(
            f"a weight {tuple(weight.shape)} multiplies {weight.dtype} rows of {weight.in_features}, "
            f"got {x.dtype} {tuple(x.shape)}"
        )
    for tensor in (weight.values, bias, residual):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"weight_only_linear needs its tensors on one device, got {x.device} and {tensor.device}")
    if gated and weight.out_features % 2:
        raise ValueError(f"a gated layer has as many gates as factors, got {weight.out_features} outputs")
    if bias is not None and bias.shape != (weight.out_features,):
        raise ValueError(f"a bias is ({weight.out_features},), got {tuple(bias.shape)}")
    wanted = (*x.shape[:-1], weight.out_features // 2 if gated else weight.out_features)
    if residual is not None and residual.shape != wanted:
        raise ValueError(f"a residual is {wanted}, got {tuple(residual.shape)}")


def _padded(values: Tensor, multiple: int) -> Tensor:
    """Rows of a whole multiple, contiguous: the same tensor where they are."""
    return F.pad(values, (0, -values.shape[1] % multiple)).contiguous()
