"""How functions for a CPU are compiled by Numba, and what they all use: types, pointers, exp and log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

__all__ = [
    "CUBE", "FLAGS", "FLOAT", "LARGEST_FLOAT", "MATRIX", "TABLE", "TABLES", "VECTOR", "WORDS", "argmax",
    "array_at", "arrays", "bits_of_float", "bytes_at", "compiled", "entry", "exp", "external",
    "integers_at", "largest", "log", "logits_table", "record", "stay_a_function", "strictly_compiled",
    "type_of", "words_at",
]  # fmt: skip

_log = logging.getLogger(__name__)

FLOAT = np.float32
LARGEST_FLOAT = np.finfo(FLOAT).max
"""What the magnitude of a finite float32 does not exceed, and that of infinity does."""

# Sums may be reordered, so that they are taken in vectors; what is not a number stays so.
_FAST = {"reassoc", "contract", "nsz", "arcp"}

_INTERNAL: dict[str, Any] = {"no_cfunc_wrapper": True, "no_cpython_wrapper": True}

# Numba knows numbers that its callers do not: types are its business, in the strings.
Function: TypeAlias = Callable[..., Any]
Record = TypeVar("Record")


def _stamp(file: Path) -> tuple[str, float, int]:
    status = file.stat()
    return file.name, status.st_mtime, status.st_size


_SOURCES = [_stamp(file) for file in sorted(Path(__file__).parents[1].rglob("*.py"))]


_RECORDS: dict[str, Any] = {}
"""Numba's types of records, by their names in strings of types."""


def type_of(text: str) -> Any:
    """The type of Numba's that a string stands for."""
    return eval(text, {**vars(types), **_RECORDS})


def record(*types_: str) -> Callable[[type[Record]], type[Record]]:
    """Makes a NamedTuple, whose fields have these types, known by its name to strings of types."""

    def register(named_tuple: type[Record]) -> type[Record]:
        _RECORDS[named_tuple.__name__] = types.BaseTuple.from_types(list(map(type_of, types_)), named_tuple)
        return named_tuple

    return register


def _keep_compiled(dispatcher: Any) -> None:
    try:
        dispatcher.enable_caching()
    except RuntimeError:
        _warn_that_nothing_is_kept()
        return
    # Numba keeps what it compiled until the function's own file changes. It also holds what the function
    # calls, from other files.
    kept = dispatcher._cache._cache_file
    kept._source_stamp = (kept._source_stamp, _SOURCES)


@cache
def _warn_that_nothing_is_kept() -> None:
    _log.warning(
        "what is compiled for this CPU can be kept in no folder, so each process compiles for a minute or "
        "two: set NUMBA_CACHE_DIR to a folder that can be written"
    )


def _decorator(types_: str, **options: Any) -> Callable[[Function], Function]:
    def decorate(function: Function) -> Function:
        dispatcher = numba.njit(error_model="numpy", **options)(function)
        _keep_compiled(dispatcher)
        # With types given, it is compiled once, and not again for every constant it is called with.
        dispatcher.compile(type_of(types_))
        dispatcher.disable_compile()
        compiled_function: Function = dispatcher
        return compiled_function

    return decorate


def entry(types_: str, nogil: bool = False) -> Callable[[Function], Function]:
    """Compiles what Python calls, for the types given; with `nogil` its other threads go on meanwhile."""
    return _decorator(types_, fastmath=_FAST, no_cfunc_wrapper=True, nogil=nogil)


def compiled(types_: str) -> Callable[[Function], Function]:
    """Compiles what compiled functions call, for the types given."""
    return _decorator(types_, fastmath=_FAST, **_INTERNAL)


def strictly_compiled(types_: str) -> Callable[[Function], Function]:
    """The same for functions whose operations must be done in the order they are written in."""
    return _decorator(types_, fastmath={"contract"}, **_INTERNAL)


VECTOR, MATRIX, CUBE = "float32[::1]", "float32[:, ::1]", "float32[:, :, ::1]"
TABLE, TABLES, FLAGS, WORDS = "int64[::1]", "int64[:, ::1]", "boolean[::1]", "uint32[:, ::1]"
"""Types of contiguous arrays."""


def arrays(part: Any, *names: str) -> tuple[Any, ...]:
    """NumPy arrays over the tensors of these names in `part`, which keeps what was found.

    A tensor that is not contiguous is copied, so it must be one that nobody writes. Each conversion takes
    microseconds where models' weights have just gone through the caches, and a round's tensors stay where
    they are.
    """
    known: dict[tuple[str, ...], tuple[Any, ...]] = part.__dict__.setdefault("_arrays", {})
    found = known.get(names)
    if found is None:
        found = known[names] = tuple(getattr(part, name).contiguous().numpy() for name in names)
    return found


def logits_table(logits: Sequence[Tensor]) -> tuple[list[Tensor], np.ndarray[Any, Any]]:
    """Float32 logits [batch, rows, vocab], and for each where it begins and its two strides, in elements."""
    kept, table = [], []
    for part in logits:
        rows = part if part.dtype == torch.float32 else part.float()
        strides = rows.stride()
        if strides[2] != 1:
            rows = rows.contiguous()
            strides = rows.stride()
        kept.append(rows)
        table.append((rows.data_ptr(), strides[0], strides[1]))
    return kept, np.array(table)


def _pointer_to(kind: Any) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def pointer(typing_context: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), codegen

    return pointer


_float_pointer, _integer_pointer, _byte_pointer, _word_pointer = map(
    _pointer_to, (types.float32, types.int64, types.int8, types.uint16)
)


def external(builder: Any, name: str, result: Any, *parameters: Any) -> Any:
    """The function of this name, of LLVM or of the C library, as the module under construction knows it."""
    known = builder.module.globals.get(name)
    return known or ir.Function(builder.module, ir.FunctionType(result, parameters), name)


@intrinsic  # type: ignore[untyped-decorator]
def _float_of_bits(typing_context: Any, bits: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic  # type: ignore[untyped-decorator]
def stay_a_function(typing_context: Any) -> Any:
    """In a function: it is called, not copied to every place that calls it, which takes long to compile."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.function.attributes.add("noinline")

    return types.void(), codegen


@intrinsic  # type: ignore[untyped-decorator]
def bits_of_float(typing_context: Any, value: Any) -> Any:
    """The int32 of the same bits as a float32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@numba.njit(cache=True, **_INTERNAL)  # type: ignore[untyped-decorator]
def array_at(address: int, shape: Any) -> Any:
    """The float32 array of `shape` that begins at `address`."""
    return numba.carray(_float_pointer(address), shape)


@numba.njit(cache=True, **_INTERNAL)  # type: ignore[untyped-decorator]
def bytes_at(address: int, shape: Any) -> Any:
    """The int8 array of `shape` that begins at `address`."""
    return numba.carray(_byte_pointer(address), shape)


@numba.njit(cache=True, **_INTERNAL)  # type: ignore[untyped-decorator]
def words_at(address: int, shape: Any) -> Any:
    """The uint16 array of `shape` that begins at `address`."""
    return numba.carray(_word_pointer(address), shape)


@numba.njit(cache=True, **_INTERNAL)  # type: ignore[untyped-decorator]
def integers_at(address: int, shape: Any) -> Any:
    """The int64 array of `shape` that begins at `address`."""
    return numba.carray(_integer_pointer(address), shape)


@intrinsic  # type: ignore[untyped-decorator]
def _larger(typing_context: Any, left: Any, right: Any) -> Any:
    """The larger of two floats that are numbers; Numba's own `max` is not taken in vectors."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        real = ir.FloatType()
        function = external(builder, "llvm.maxnum.f32", real, real, real)
        return builder.call(function, arguments, fastmath=("nnan", "nsz", "reassoc"))

    return types.float32(types.float32, types.float32), codegen


@compiled(f"float32({VECTOR})")
def largest(values: Any) -> Any:
    """The largest of at least one value, none of which is NaN."""
    highest = values[0]
    for k in range(values.shape[0]):
        highest = _larger(highest, values[k])
    return highest


@compiled(f"int64({VECTOR})")
def argmax(values: Any) -> Any:
    """The first id of the largest value."""
    size = np.int32(values.shape[0])
    highest = largest(values)
    # Of every id, since a search that may end early is not made in vectors.
    winner = size
    for token in range(size):
        winner = min(winner, np.int32(token) if values[token] == highest else size)
    return np.int64(winner) % values.shape[0]


@strictly_compiled("float32(float32)")
def exp(x: Any) -> Any:
    """exp of a float32 within 1e-7 relative, 0 below -87; without a jump, so that loops are vectorised."""
    clamped = min(max(x, FLOAT(-87)), FLOAT(88))
    power = np.floor(clamped * FLOAT(1.4426950408889634) + FLOAT(0.5))
    # ln 2 in two parts, the first of few bits, so that the remainder is exact.
    rest = (clamped - power * FLOAT(0.693359375)) - power * FLOAT(-2.12194440e-4)
    series = FLOAT(1.9875691500e-4)
    series = series * rest + FLOAT(1.3981999507e-3)
    series = series * rest + FLOAT(8.3334519073e-3)
    series = series * rest + FLOAT(4.1665795894e-2)
    series = series * rest + FLOAT(1.6666665459e-1)
    series = series * rest + FLOAT(5.0000001201e-1)
    series = series * rest * rest + rest + FLOAT(1)
    value = series * _float_of_bits((np.int32(power) + np.int32(127)) << np.int32(23))
    return value if x >= FLOAT(-87) else FLOAT(0)


@strictly_compiled("float32(float32)")
def log(x: Any) -> Any:
    """log of a positive, normal float32 within 1e-7 relative; without a jump."""
    bits = bits_of_float(x)
    # Numba makes 64 bits of what 32 bits are added to, of which vectors hold half as many.
    # x = mantissa * 2 ** power with mantissa in [sqrt(1/2), sqrt(2)).
    power = np.int32(np.int32(bits - np.int32(0x3F3504F3)) >> np.int32(23))
    rest = _float_of_bits(np.int32(bits - np.int32(power << np.int32(23)))) - FLOAT(1)
    square = rest * rest
    series = FLOAT(7.0376836292e-2)
    for coefficient in (
        -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
        2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
    ):  # fmt: skip
        series = series * rest + FLOAT(coefficient)
    scale = FLOAT(power)
    series = series * rest * square + scale * FLOAT(-2.12194440e-4) - FLOAT(0.5) * square
    return rest + series + scale * FLOAT(0.693359375)
