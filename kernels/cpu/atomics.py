"""Numbers that threads count in: int64 at an address, each read or changed by one thread at a time."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = ["LINE", "WORD", "added", "exchanged", "place_at", "seen"]

LINE = 8
"""Integers that lie in one line of the caches: threads that count in the same would wait for each other."""
WORD = ir.IntType(64)


def place_at(builder: Any, address: Any) -> Any:
    """The int64 at `address`, for instructions that read or write it."""
    return builder.inttoptr(address, WORD.as_pointer())


@intrinsic  # type: ignore[untyped-decorator]
def added(typing_context: Any, address: Any, number: Any) -> Any:
    """Add to the int64 at `address`, and return what it was."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", place_at(builder, arguments[0]), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def exchanged(typing_context: Any, address: Any, number: Any) -> Any:
    """Put an int64 at `address`, and return what was there."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("xchg", place_at(builder, arguments[0]), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def seen(typing_context: Any, address: Any) -> Any:
    """The int64 at `address`, and all that was written before it was changed to that."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(place_at(builder, arguments[0]), "seq_cst", 8)

    return types.int64(types.int64), codegen
