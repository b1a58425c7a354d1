"""Numbers as models hold them, of 32 or 16 bits, where compiled functions read and write them.

All arithmetic is in float32, so that numbers of 16 bits cost nothing but a conversion on their way, and save
half of what passes wait for: the bytes of weights and of caches.
"""

from __future__ import annotations

import platform
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from .jit import FLOAT, VECTOR, array_at, bits_of_float, compiled, words_at

__all__ = [
    "BFLOAT16", "ELEMENTS", "FEATURES", "FLOAT16", "FLOAT32", "element_bytes", "floats_at", "put_floats",
    "read_floats", "widened",
]  # fmt: skip

# Numba may be told to compile for less than the processor that it runs on.
_FEATURES = get_host_cpu_features() if numba.config.CPU_FEATURES is None else numba.config.CPU_FEATURES
FEATURES = {feature[1:] for feature in _FEATURES.split(",") if feature.startswith("+")}
"""What the processor has that is compiled for, by its names in LLVM."""

FLOAT32, BFLOAT16, FLOAT16 = range(3)

# Without the instruction, of 2012, LLVM calls a function of the C compiler's for it.
_KNOWS_HALVES = "f16c" in FEATURES or platform.machine().lower() in ("arm64", "aarch64")

ELEMENTS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16} | (
    {torch.float16: FLOAT16} if _KNOWS_HALVES else {}
)
"""What compiled functions call the numbers of these dtypes."""

_WORD, _HALF, _REAL = ir.IntType(16), ir.HalfType(), ir.FloatType()


def widened(builder: Any, words: Any, element: int) -> Any:
    """The float32 of numbers of 16 bits, which are given as integers, one or a vector of them."""
    is_vector = isinstance(words.type, ir.VectorType)

    def like(kind: Any) -> Any:
        return ir.VectorType(kind, words.type.count) if is_vector else kind

    if element == FLOAT16:
        return builder.fpext(builder.bitcast(words, like(_HALF)), like(_REAL))
    number = like(ir.IntType(32))
    sixteen = ir.Constant(number, [16] * words.type.count if is_vector else 16)
    return builder.bitcast(builder.shl(builder.zext(words, number), sixteen), like(_REAL))


@intrinsic  # type: ignore[untyped-decorator]
def _float_of_brain(typing_context: Any, word: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return widened(builder, arguments[0], BFLOAT16)

    return types.float32(types.uint16), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _float_of_half(typing_context: Any, word: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return widened(builder, arguments[0], FLOAT16) if _KNOWS_HALVES else ir.Constant(_REAL, 0.0)

    return types.float32(types.uint16), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _half_of_float(typing_context: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if not _KNOWS_HALVES:
            return ir.Constant(_WORD, 0)
        return builder.bitcast(builder.fptrunc(arguments[0], _HALF), _WORD)

    return types.uint16(types.float32), codegen


@compiled("int64(int64)")
def element_bytes(element: int) -> int:
    """Bytes of one of these numbers."""
    return 4 if element == FLOAT32 else 2


@compiled(f"void(int64, int64, {VECTOR})")
def read_floats(address: int, element: int, out: Any) -> None:
    """Fill `out` with the numbers from `address` on."""
    size = out.shape[0]
    if element == FLOAT32:
        numbers = array_at(address, (size,))
        for k in range(size):
            out[k] = numbers[k]
        return
    words = words_at(address, (size,))
    if element == BFLOAT16:
        for k in range(size):
            out[k] = _float_of_brain(words[k])
    else:
        for k in range(size):
            out[k] = _float_of_half(words[k])


@compiled(f"{VECTOR}(int64, int64, int64)")
def floats_at(address: int, element: int, size: int) -> Any:
    """The `size` numbers from `address` on, which are not copied where they are float32."""
    if element == FLOAT32:
        return array_at(address, (size,))
    out = np.empty(size, FLOAT)
    read_floats(address, element, out)
    return out


@compiled(f"void({VECTOR}, int64, int64)")
def put_floats(values: Any, address: int, element: int) -> None:
    """Write `values`, rounded to the nearest of these numbers, from `address` on."""
    size = values.shape[0]
    if element == FLOAT32:
        numbers = array_at(address, (size,))
        for k in range(size):
            numbers[k] = values[k]
        return
    words = words_at(address, (size,))
    if element == BFLOAT16:
        for k in range(size):
            bits = np.uint32(bits_of_float(values[k]))
            # To the nearest, and where two are as near to the even one.
            last = np.uint32(bits >> np.uint32(16)) & np.uint32(1)
            nearest = np.uint32(bits + np.uint32(0x7FFF) + last)
            # What is no number must not be rounded to one.
            is_number = np.uint32(bits & np.uint32(0x7FFFFFFF)) <= np.uint32(0x7F800000)
            words[k] = np.uint16((nearest if is_number else bits | np.uint32(0x400000)) >> np.uint32(16))
    else:
        for k in range(size):
            words[k] = _half_of_float(values[k])
