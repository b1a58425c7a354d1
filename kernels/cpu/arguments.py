"""Arguments that compiled functions find in memory, where each would have to be taken out of a Python object.

Numba looks into every array and record it is given. After passes that have read whole models none of these
objects is left in a processor's caches, and to look into sixty takes longer than verification does. Here all
of them are one row of integers.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import count
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np import numpy_support
from numba.np.arrayobj import make_array, populate_array

from .jit import type_of

__all__ = ["arguments_at", "bound_call"]


def arguments_at(types_: str) -> Any:
    """What gives compiled functions the arguments of these types, a tuple, from the address of their row."""

    @intrinsic  # type: ignore[untyped-decorator]
    def read(typing_context: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            word = ir.IntType(64)
            row = builder.inttoptr(arguments[0], word.as_pointer())
            places = count()

            def following() -> Any:
                return builder.load(builder.gep(row, [word(next(places))]))

            return _read(context, builder, signature.return_type, following)

        return _kind(types_)(types.int64), codegen

    return read


def _kind(types_: str) -> Any:
    return types.Tuple(type_of(f"void({types_})").args)


def _read(context: Any, builder: Any, kind: Any, following: Callable[[], Any]) -> Any:
    """The value of this Numba type in the next of its row's words."""
    if isinstance(kind, types.BaseTuple):
        return context.make_tuple(
            builder, kind, [_read(context, builder, part, following) for part in kind.types]
        )
    if isinstance(kind, types.Array):
        array = make_array(kind)(context, builder)
        data = builder.inttoptr(following(), array.data.type)
        shape = [following() for _ in range(kind.ndim)]
        size = context.get_constant(types.intp, numpy_support.as_dtype(kind.dtype).itemsize)
        strides = [size]
        for length in reversed(shape[1:]):
            strides.insert(0, builder.mul(strides[0], length))
        # Nobody counts who uses it: `bound_call` keeps it.
        populate_array(array, data, shape, strides, size, None)
        return array._getvalue()
    word = following()
    if kind == types.boolean:
        return builder.icmp_unsigned("!=", word, word.type(0))
    if isinstance(kind, types.Float):
        value = builder.bitcast(word, ir.DoubleType())
        return value if kind == types.float64 else builder.fptrunc(value, ir.FloatType())
    return word


@cache
def _parts(types_: str) -> list[tuple[Any, Any]]:
    """Of each that stands in no record, in order: its type, and NumPy's if it is an array."""

    def parts(kind: Any) -> Iterator[Any]:
        if isinstance(kind, types.BaseTuple):
            for own in kind.types:
                yield from parts(own)
        else:
            yield kind

    return [
        (kind, numpy_support.as_dtype(kind.dtype) if isinstance(kind, types.Array) else None)
        for kind in parts(_kind(types_))
    ]


def _values(value: Any) -> list[Any]:
    """The values of `_parts`."""
    return [part for own in value for part in _values(own)] if isinstance(value, tuple) else [value]


def _words(value: Any, types_: str) -> Iterator[int]:
    """What `_read` reads."""
    for part, (own, dtype) in zip(_values(value), _parts(types_), strict=True):
        if dtype is not None:
            if part.dtype != dtype or part.ndim != own.ndim or not part.flags.c_contiguous:
                raise TypeError(f"this is no {own}: {part.dtype} {list(part.shape)}")
            yield part.__array_interface__["data"][0]
            yield from part.shape
        elif own in (types.boolean, types.int64):
            yield int(part)
        elif own in (types.float32, types.float64):
            yield from struct.unpack("q", struct.pack("d", part))
        else:
            raise TypeError(f"no argument can be a {own}")


def bound_call(
    function: Callable[[int], None], types_: str, arguments: tuple[Any, ...], kept: object = None
) -> Callable[[], None]:
    """A call of `function`, which reads its arguments by `arguments_at`, with these very ones.

    It keeps them, and what else is to be `kept` since arguments hold its address.

    Raises TypeError for what is not of these types: contiguous arrays, int64, booleans and floats, in
    records or not.
    """
    row = np.array([*_words(arguments, types_)], np.int64)
    return partial(_call, function, row.ctypes.data, (row, arguments, kept))


def _call(function: Callable[[int], None], address: int, kept: object) -> None:
    function(address)
