"""Four-bit weights as AutoAWQ and AutoGPTQ store them: ``X.qweight``, ``X.qzeros`` and ``X.scales`` for ``X.weight``.

Both keep matrices (in_features, out_features), eight values an int32, a scale and a zero for each group of inputs:
w = scale * (value - zero). AWQ packs neighbouring outputs (awq/utils/packing_utils.py), GPTQ neighbouring inputs
(auto_gptq/nn_modules/qlinear), whose first format stores zeros less one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.quantization import GROUPS, QuantizedWeight
from models.config import ConfigError
from models.families.family import need, optional, refuse_unless
from models.files import CheckpointError
from models.weights import Weights

AWQ_HALVES = (0, 4, 1, 5, 2, 6, 3, 7)  # of an int32, from the low end: where the eight outputs lie
IN_ORDER = tuple(range(8))
MIDDLE = 8  # the zero of symmetric weights
COLUMNS = 512  # of int32 unpacked at a time, which bounds the memory for it


class PackedFile(Weights):
    """The weights of a folder whose config.json has this ``quantization_config``. ``where`` is for messages.

    A matrix's minimums, -scale * zero, are rounded to float16: weights are within 0.75% of a step of what is stored.
    Raises ConfigError for a method or option that we lack, CheckpointError for parts that are missing or do not fit.
    """

    def __init__(self, weights: Weights, config: Any, where: Path) -> None:
        self._weights, self._where = weights, where
        self._is_awq = _check_method(config)
        self._group, self._stored = _group_size(config), set(weights.names())
        self._less_one = not self._is_awq and _format(config, "checkpoint_format", "gptq") == "gptq"
        suffix = ".qweight"
        self._modules = {name.removesuffix(suffix) for name in self._stored if name.endswith(suffix)}
        hidden: set[str] = set()
        for module in self._modules:
            if missing := [part for part in ("qzeros", "scales") if f"{module}.{part}" not in self._stored]:
                raise CheckpointError(f"{where} has {module}{suffix}, but no {module}.{missing[0]}")
            hidden |= {f"{module}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}
            # AutoGPTQ gives layers that have no bias one of zeros.
            if (bias := f"{module}.bias") in self._stored and not weights.read(bias).any():
                hidden.add(bias)
        self._names = [name for name in weights.names() if name not in hidden]
        self._names += [f"{module}.weight" for module in self._modules]

    def names(self) -> list[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        if (module := self._module(name)) is None:
            return self._weights.shape(name)
        rows, columns = self._packed_shape(module)
        return (8 * columns, rows) if self._is_awq else (columns, 8 * rows)

    def read(self, name: str) -> Tensor:
        weight = self.quantized(name)
        return self._weights.read(name) if weight is None else weight.dequantize()

    def quantized(self, name: str) -> QuantizedWeight | None:
        if (module := self._module(name)) is None:
            return None
        outputs, inputs = self.shape(name)
        group = inputs if self._group == -1 else self._group
        self._check(module, outputs, inputs, group)
        zeros, scales = self._zeros(module), self._weights.read(f"{module}.scales").t().to(torch.float16)
        if not torch.isfinite(scales).all():
            raise CheckpointError(f"{self._where}: {module}.scales holds numbers that float16 does not")
        minimums = None if (zeros == MIDDLE).all() else (-scales.float() * zeros).half()
        own = next(size for size in reversed(GROUPS) if group % size == 0)
        parts = (each.repeat_interleave(group // own, dim=1) for each in (scales, minimums) if each is not None)
        return QuantizedWeight(self._values(module), *parts)

    def _module(self, name: str) -> str | None:
        module = name.removesuffix(".weight")
        return module if module != name and module in self._modules else None

    def _packed_shape(self, module: str) -> tuple[int, int]:
        shape = self._weights.shape(f"{module}.qweight")
        if len(shape) != 2:
            raise CheckpointError(f"{self._where}: {module}.qweight is {shape}, expected a matrix")
        return shape[0], shape[1]

    def _check(self, module: str, outputs: int, inputs: int, group: int) -> None:
        if not group or inputs % group or group % GROUPS[0] or outputs % 8:
            raise CheckpointError(
                f"{self._where}: {module}.weight is ({outputs}, {inputs}), which is no multiple of (8, {group}), or "
                f"the group no multiple of {GROUPS[0]}"
            )
        groups = inputs // group
        for part, shape in (("qzeros", (groups, outputs // 8)), ("scales", (groups, outputs))):
            if (found := self._weights.shape(f"{module}.{part}")) != shape:
                raise CheckpointError(f"{self._where}: {module}.{part} is {found}, expected {shape}")
        for part in ("qweight", "qzeros"):
            if (dtype := self._weights.read(f"{module}.{part}").dtype) != torch.int32:
                raise CheckpointError(f"{self._where}: {module}.{part} holds {dtype}, expected torch.int32")
        if (order := f"{module}.g_idx") in self._stored:
            found_order, plain = self._weights.read(order), torch.arange(inputs) // group
            if found_order.shape != plain.shape or not torch.equal(found_order.long(), plain):
                raise CheckpointError(f"{self._where}: {order} reorders inputs (desc_act), which is not supported")

    def _zeros(self, module: str) -> Tensor:
        """(out_features, groups), 0 to 15."""
        packed = self._weights.read(f"{module}.qzeros")
        zeros = _unpacked(packed, AWQ_HALVES if self._is_awq else IN_ORDER)
        return ((zeros + 1) & 15 if self._less_one else zeros).t()

    def _values(self, module: str) -> Tensor:
        packed = self._weights.read(f"{module}.qweight")
        if not self._is_awq:
            return packed.t().contiguous().view(torch.uint8)  # two a byte, the even input low: as we have it
        values = torch.empty(8 * packed.shape[1], packed.shape[0] // 2, dtype=torch.uint8)
        for part, place in zip(packed.split(COLUMNS, dim=1), values.split(8 * COLUMNS), strict=True):
            rows = _unpacked(part, AWQ_HALVES).t()
            torch.bitwise_or(rows[:, ::2], rows[:, 1::2] << 4, out=place)
        return values


def _unpacked(packed: Tensor, halves: tuple[int, ...]) -> Tensor:
    """The values (rows, 8 * columns), uint8, of int32 (rows, columns) that hold eight in this order."""
    return torch.stack([((packed >> 4 * half) & 15).to(torch.uint8) for half in halves], dim=-1).flatten(1)


def _check_method(config: Any) -> bool:
    """Whether the method is AWQ. Raises ConfigError for one, or an option of one, that we do not read."""
    if not isinstance(config, dict):
        raise ConfigError(f"quantization_config is {str(config)[:40]!r}: expected an object")
    if (method := config.get("quant_method")) not in ("awq", "gptq"):
        raise ConfigError(
            f"quantization_config of {str(method)[:40]!r} is not supported: expected awq or gptq, or else load the "
            "model it was made of, or a GGUF file"
        )
    if (bits := need(config, "bits", int)) != 4:
        raise ConfigError(f"{method} in {bits} bits is not supported: expected 4")
    refuse_unless(config, "is_marlin_format", False)
    key, *known = ("version", "gemm") if method == "awq" else ("checkpoint_format", "gptq", "gptq_v2")
    if (form := _format(config, key, known[0])) not in known:
        raise ConfigError(f"{key} {form[:40]!r} of {method} is not supported: expected {' or '.join(known)}")
    return method == "awq"


def _format(config: dict[str, Any], key: str, default: str) -> str:
    return optional(config, key, default).lower()


def _group_size(config: dict[str, Any]) -> int:
    size = need(config, "group_size", int)
    if size != -1 and (size < 1 or size % GROUPS[0]):
        raise ConfigError(f"group_size {size} is not supported: expected a multiple of {GROUPS[0]}, or -1")
    return size
