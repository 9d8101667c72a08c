"""Weights of linear layers in eight and four bits: what the integers mean, and how they are found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

GROUPS = (32, 64)
# Weights worked on at a time: few enough for a core's cache, many enough to hide torch's calls; on a GPU, to fill it.
SLICE, DEVICE_SLICE = 1 << 18, 1 << 24
# What a group's largest weight may become besides what fills the range: rounding the others is finer below it.
SYMMETRIC_TOPS = (8.9, 8.4, 7.9, 7.4)
SHRINKAGES = (1.0, 0.95, 0.9, 0.85)
LARGEST_HALF = torch.finfo(torch.float16).max
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix (out_features, in_features) of small integers and what they are multiplied by, on one device.

    Eight bits: w = scale * value, ``values`` int8 (N, K), ``scales`` float32 (N,). Four bits: w = scale * value +
    minimum, with a scale and a minimum for each ``group`` of 32 or 64 inputs of a row; without minimums, w = scale *
    (value - 8). ``values`` is then uint8 (N, K / 2), 0 to 15, two a byte, the even input in the low half; ``scales``
    and ``minimums`` are float16 (N, K / group).
    """

    values: Tensor
    scales: Tensor
    minimums: Tensor | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for tensors that are not of these shapes and dtypes together."""
        kinds = {torch.int8: (torch.float32, 1), torch.uint8: (torch.float16, 2)}
        if self.values.dtype not in kinds or self.values.dim() != 2:
            raise ValueError(f"quantised values are int8 or uint8 matrices, got {_described(self.values)}")
        dtype, dimensions = kinds[self.values.dtype]
        if self.scales.dtype != dtype or self.scales.dim() != dimensions or len(self.scales) != len(self.values):
            raise ValueError(f"values {_described(self.values)} do not go with scales {_described(self.scales)}")
        if self.bits == 4 and (not self.scales.shape[1] or self.group not in GROUPS or self.shape[1] % self.group):
            raise ValueError(
                f"four-bit weights have a scale for every 32 or 64 inputs, got {self.scales.shape[1]} for "
                f"{self.shape[1]}"
            )
        if self.minimums is not None and (
            self.bits == 8 or self.minimums.dtype != dtype or self.minimums.shape != self.scales.shape
        ):
            raise ValueError(f"scales {_described(self.scales)} do not go with minimums {_described(self.minimums)}")

    @property
    def bits(self) -> int:
        return 8 if self.values.dtype == torch.int8 else 4

    @property
    def shape(self) -> torch.Size:
        """(out_features, in_features)."""
        rows, columns = self.values.shape
        return torch.Size((rows, columns if self.bits == 8 else 2 * columns))

    @property
    def group(self) -> int:
        """Inputs that share a scale: all of a row in eight bits."""
        return self.shape[1] if self.bits == 8 else self.shape[1] // self.scales.shape[1]

    @property
    def symmetric(self) -> bool:
        return self.minimums is None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors())

    def rows(self, index: Tensor | slice) -> QuantizedWeight:
        """The rows of an index (int64) in its order, or of a slice."""
        return QuantizedWeight(*(tensor[index] for tensor in self._tensors()))

    def to(self, device: torch.device | str) -> QuantizedWeight:
        return QuantizedWeight(*(tensor.to(device) for tensor in self._tensors()))

    def dequantize(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """The weights (out_features, in_features) as floats, computed as float32."""
        out = torch.empty(self.shape, dtype=dtype, device=device)
        for part in _slices(*self.shape):
            out[part] = self.rows(part)._floats()
        return out

    def _floats(self) -> Tensor:
        if self.bits == 8:
            return self.values * self.scales[:, None]
        values = torch.stack((self.values & 15, self.values >> 4), dim=-1).view(len(self.values), -1, self.group)
        scales = self.scales.float()[..., None]
        if self.minimums is None:
            return ((values.float() - 8) * scales).flatten(1)
        return (values * scales + self.minimums.float()[..., None]).flatten(1)

    def _tensors(self) -> list[Tensor]:
        return [self.values, self.scales, *([] if self.minimums is None else [self.minimums])]


def concatenate(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One matrix of the rows of several of one kind. Raises ValueError for those of different kinds."""
    kinds = {(weight.bits, weight.shape[1], weight.group, weight.symmetric) for weight in weights}
    if len(kinds) != 1:
        raise ValueError(f"rows of {len(kinds)} kinds of quantised weights do not make one matrix")
    return QuantizedWeight(*map(torch.cat, zip(*(weight._tensors() for weight in weights), strict=True)))


def quantize(weight: Tensor, bits: int, *, group: int = 32, symmetric: bool = True) -> QuantizedWeight:
    """A matrix (out_features, in_features) of floats in 8 or 4 bits, on its device; the last two are about four.

    Eight bits take a row's largest magnitude to 127. Four bits take, of several scales (and minimums) for a group, the
    one of least squared error. Raises ValueError for weights that are not finite, or, in four bits, do not fit
    float16's range or divide into groups.
    """
    if bits not in (4, 8):
        raise ValueError(f"weights are quantised to 8 or 4 bits, got {bits}")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"only matrices of floating-point numbers are quantised, got {_described(weight)}")
    columns = weight.shape[1]
    if bits == 8:
        return _fill(weight, _quantize_rows, (torch.int8, columns), (torch.float32, None), False)
    if group not in GROUPS:
        raise ValueError(f"four-bit weights have groups of 32 or 64, got {group}")
    if columns % group or not columns:
        raise ValueError(f"rows of {columns} do not divide into groups of {group}: use eight bits")
    fit = _fit_symmetric if symmetric else _fit_range

    def quantize_groups(slice: Tensor) -> list[Tensor]:
        values, *scales = fit(slice.view(-1, group))
        pairs = values.to(torch.uint8).view(len(slice), -1, 2)
        return [pairs[..., 0] | (pairs[..., 1] << 4), *(scale.view(len(slice), -1) for scale in scales)]

    return _fill(weight, quantize_groups, (torch.uint8, columns // 2), (torch.float16, columns // group), not symmetric)


def _fill(
    weight: Tensor, quantize_slice: Callable[[Tensor], list[Tensor]], values: tuple[torch.dtype, int],
    scales: tuple[torch.dtype, int | None], minimums: bool,
) -> QuantizedWeight:  # fmt: skip
    """The whole weight, slice by slice: ``quantize_slice`` takes float32 rows. values, scales: dtype and columns."""
    rows = len(weight)
    shapes = [values, scales, *([scales] if minimums else [])]
    tensors = [
        torch.empty((rows,) if n is None else (rows, n), dtype=dtype, device=weight.device) for dtype, n in shapes
    ]
    size = SLICE if weight.device.type == "cpu" else DEVICE_SLICE
    for part in _slices(rows, weight.shape[1], size):
        slice = weight[part].detach().float().contiguous()
        for tensor, result in zip(tensors, quantize_slice(slice), strict=True):
            tensor[part] = result
    return QuantizedWeight(*tensors)


def _slices(rows: int, columns: int, size: int = SLICE) -> Iterator[slice]:
    step = max(1, size // max(1, columns))
    yield from (slice(start, end) for start, end in pairwise([*range(0, rows, step), rows]))


def _quantize_rows(rows: Tensor) -> list[Tensor]:
    largest = _finite(rows, rows.abs().amax(1)) if rows.shape[1] else rows.new_zeros(len(rows))
    scales = largest / 127
    # Smaller ones have no reciprocal, and what they would make of the row is nothing beside any other.
    scales[scales < SMALLEST_SCALE] = 0
    return [(rows * _reciprocal(scales)[:, None]).round_(), scales]


def _fit_symmetric(groups: Tensor) -> list[Tensor]:
    """Values (0 to 15) and float16 scales of groups (count, group), w = scale * (value - 8).

    The weight of largest magnitude goes to -8, the end with one value more, or near it: scales may be negative.
    """
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    _check_range(groups, largest.abs() / 6)
    best, most = torch.zeros_like(largest), torch.zeros_like(largest)
    for top in SYMMETRIC_TOPS:
        values = _rounded(groups, largest / -top, -8)
        scale, gain = _least_squares(groups, values)
        best, most = torch.where(gain > most, scale, best), torch.maximum(gain, most)
    scale = best.half()
    return [_rounded(groups, scale.float(), -8) + 8, scale]


def _fit_range(groups: Tensor) -> list[Tensor]:
    """Values (0 to 15), float16 scales and minimums of groups (count, group), w = scale * value + minimum."""
    low, high = groups.aminmax(dim=1, keepdim=True)
    _check_range(groups, torch.maximum(high, -low) * 2)
    mean, middle, reach = groups.mean(1, keepdim=True), (low + high) / 2, (high - low) / 2
    centred = groups - mean
    best, start, most = torch.zeros_like(mean), mean, torch.zeros_like(mean)
    for shrinkage in SHRINKAGES:
        values = _rounded(groups - (middle - shrinkage * reach), 2 / 15 * shrinkage * reach, 0)
        center = values.mean(1, keepdim=True)
        scale, gain = _least_squares(centred, values - center)
        better = gain > most
        best, start = torch.where(better, scale, best), torch.where(better, mean - scale * center, start)
        most = torch.maximum(gain, most)
    scale, minimum = best.half(), start.half()
    return [_rounded(groups - minimum, scale.float(), 0), scale, minimum]


def _least_squares(groups: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The scale that takes each group's values nearest to its weights, and what it takes off their squared error."""
    product, square = (groups * values).sum(1, keepdim=True), (values * values).sum(1, keepdim=True)
    scale = product / square.clamp_min(SMALLEST_SCALE)
    return scale, scale * product


def _rounded(groups: Tensor, scale: Tensor, low: int) -> Tensor:
    """The nearest of the values from ``low`` to low + 15."""
    return (groups * _reciprocal(scale)).round_().clamp_(low, low + 15)


def _reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for 0: all weights are 0 there, or too small for a scale."""
    return torch.where(scale.abs() < SMALLEST_SCALE, 0, 1 / scale)


def _finite(weights: Tensor, largest: Tensor) -> Tensor:
    if not torch.isfinite(largest).all():
        number = weights[~torch.isfinite(weights)][0].item()
        raise ValueError(f"a weight is {number}: only finite weights can be quantised")
    return largest


def _check_range(weights: Tensor, scales: Tensor) -> None:
    if not (scales <= LARGEST_HALF).all():
        _finite(weights, scales)
        raise ValueError(f"a weight of {weights.abs().max().item():.3g} is too large for four bits: use eight")


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
