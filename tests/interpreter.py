"""Repairs of the interpreter of triton 3.6.0, which multiplies bfloat16 as raw bits, truncates where it should round,
makes wrong float8 of float32, breaks on numpy 2.4's scalars, and patches the language again in every nested call.

Import it after TRITON_INTERPRET is set and before a kernel runs; ``install`` does nothing to other versions.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton

REPAIRED = "3.6.0"


def install() -> None:
    """Repairs the interpreter of this process, once."""
    if triton.__version__ != REPAIRED:
        return
    from triton.runtime import interpreter

    if getattr(interpreter, "repaired", False):
        return
    interpreter.repaired = True
    _repair_bfloat16(interpreter)
    _repair_scalars(interpreter)
    _patch_the_language_once(interpreter)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 bits (uint16), rounded to nearest, ties to even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Floats as float8_e4m3fn bits (uint8), rounded to nearest, ties to even, and saturated, as on a GPU."""
    wide = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).clamp(-448, 448)
    return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _repair_bfloat16(interpreter: Any) -> None:
    import triton.language as tl

    builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def is_narrow(handle: Any) -> bool:
        return handle.dtype.scalar == tl.bfloat16

    def widened(handle: Any) -> Any:
        return Handle(widen(handle.data), tl.float32) if is_narrow(handle) else handle

    def through_float32(method: Callable[..., Any]) -> Callable[..., Any]:
        """An operation of the builder, computed in float32 where an operand is bfloat16, its result rounded."""

        def compute(self: Any, *args: Any) -> Any:
            if not any(isinstance(arg, Handle) and is_narrow(arg) for arg in args):
                return method(self, *args)
            out = method(self, *[widened(arg) if isinstance(arg, Handle) else arg for arg in args])
            if out.data.dtype == np.float32:
                return Handle(narrow(out.data), tl.bfloat16)
            return Handle(out.data, tl.bfloat16)  # a comparison: the caller gives it its type

        return compute

    for name in ("binary_op", "unary_op", "create_fma", "create_clampf", "create_fabs", "create_rsqrt", "create_erf"):
        setattr(builder, name, through_float32(getattr(builder, name)))

    cast = builder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if is_narrow(src):
            src = widened(src)
            if dst_type.scalar == tl.float32:
                return src
        if dst_type.scalar == tl.bfloat16:
            return Handle(narrow(src.data.astype(np.float32)), tl.bfloat16)
        return cast(self, src, dst_type)

    builder.cast_impl = cast_impl
    convert = builder.create_fp_to_fp

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        ours = (tl.bfloat16, tl.float16, tl.float32, tl.float64)
        if src.dtype.scalar in ours and dst_type.scalar in ours:
            return cast_impl(self, src, dst_type)
        if src.dtype.scalar in ours and dst_type.scalar == tl.float8e4nv:
            return Handle(eight_bits(widened(src).data), tl.float8e4nv)
        return convert(self, src, dst_type, rounding_mode)

    builder.create_fp_to_fp = create_fp_to_fp

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        left, right = (x.data.astype(d.data.dtype) for x in (widened(a), widened(b)))
        return Handle(left @ right + d.data, d.dtype.scalar)

    builder.create_dot = create_dot


def _repair_scalars(interpreter: Any) -> None:
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def _patch_the_language_once(interpreter: Any) -> None:
    import triton.language as tl

    class Everywhere:
        """Stands for a kernel that sees both modules of the language."""

        __globals__ = {"tl": tl, "core": tl.core}  # noqa: RUF012

    patch, execute = interpreter._patch_lang, interpreter.GridExecutor.__call__
    running: list[Any] = []

    def patch_lang(function: Any) -> Any:
        if running:
            return interpreter._LangPatchScope()
        return patch(Everywhere)

    @contextlib.contextmanager
    def grid() -> Iterator[None]:
        scope = patch(Everywhere)
        running.append(scope)
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):  # a GPU does not warn either
                yield
        finally:
            running.pop()
            scope.restore()

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        with grid():
            execute(self, *args, **kwargs)

    interpreter._patch_lang = patch_lang
    interpreter.GridExecutor.__call__ = call
