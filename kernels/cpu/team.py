"""Threads of one call that go through stages together.

Two calls that threads share follow each other within a microsecond or two, which is what some products of a
small model take. Threads that stay in one call meet within a fraction of one. Each takes its own shares of a
stage, then those that others have not begun: so a stage ends too where fewer threads come than it was told,
or one is held up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .jit import TABLE, TABLES, compiled
from .threads import has_failed, let_others_run

__all__ = ["claim", "finish", "meetings", "wait"]

_LINE = 8
"""Integers that lie in one line of the caches: threads that count in the same would wait for each other."""

_WORD = ir.IntType(64)


def _at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _WORD.as_pointer())


@intrinsic  # type: ignore[untyped-decorator]
def _count(typing_context: Any, address: Any) -> Any:
    """Add one to the int64 at `address`, and return what it was."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _at(builder, arguments[0]), _WORD(1), "acq_rel")

    return types.int64(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _counted(typing_context: Any, address: Any) -> Any:
    """The int64 at `address`, and all that was written before it was counted up."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_at(builder, arguments[0]), "acquire", 8)

    return types.int64(types.int64), codegen


@compiled(f"{TABLES}(int64, int64)")
def meetings(stages: int, threads: int) -> Any:
    """int64 [stages, ..], what `threads` need to go through `stages`: one row, a meeting, for each."""
    return np.zeros((stages, _LINE * (1 + threads)), np.int64)


@compiled(f"int64({TABLE}, int64, int64, int64)")
def claim(meeting: Any, thread: int, threads: int, shares: int) -> int:
    """The share of a stage that `thread` does next, of 0 to shares - 1, or -1 if there is none left."""
    for turn in range(threads):
        owner = thread + turn if thread + turn < threads else thread + turn - threads
        first, last = owner * shares // threads, (owner + 1) * shares // threads
        begun = meeting.ctypes.data + 8 * _LINE * (1 + owner)
        if first + _counted(begun) < last:
            share = first + int(_count(begun))
            if share < last:
                return share
    return -1


@compiled(f"void({TABLE})")
def finish(meeting: Any) -> None:
    """A claimed share is done."""
    _count(meeting.ctypes.data)


@compiled(f"void({TABLE}, int64)")
def wait(meeting: Any, shares: int) -> None:
    """Return once all shares are done, and what they wrote can be read, or when one has failed."""
    done, looks = meeting.ctypes.data, 0
    while _counted(done) < shares and not has_failed():
        looks = let_others_run(looks)
