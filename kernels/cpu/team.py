"""Threads of one call that go through stages together.

Two calls that threads share follow each other within a microsecond or two, which is what some products of a
small model take. Threads that stay in one call meet within a fraction of one. Each takes its own shares of a
stage, then those that others have not begun: so a stage ends too where fewer threads come than it was told,
or one is held up.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .atomics import LINE, added, seen
from .jit import TABLE, TABLES, compiled
from .threads import has_failed, let_others_run

__all__ = ["claim", "finish", "meetings", "wait"]


@compiled(f"{TABLES}(int64, int64)")
def meetings(stages: int, threads: int) -> Any:
    """int64 [stages, ..], what `threads` need to go through `stages`: one row, a meeting, for each."""
    return np.zeros((stages, LINE * (1 + threads)), np.int64)


@compiled(f"int64({TABLE}, int64, int64, int64)")
def claim(meeting: Any, thread: int, threads: int, shares: int) -> int:
    """The share of a stage that `thread` does next, of 0 to shares - 1, or -1 if there is none left."""
    for turn in range(threads):
        owner = thread + turn if thread + turn < threads else thread + turn - threads
        first, last = owner * shares // threads, (owner + 1) * shares // threads
        begun = meeting.ctypes.data + 8 * LINE * (1 + owner)
        if first + seen(begun) < last:
            share = first + int(added(begun, 1))
            if share < last:
                return share
    return -1


@compiled(f"void({TABLE})")
def finish(meeting: Any) -> None:
    """A claimed share is done."""
    added(meeting.ctypes.data, 1)


@compiled(f"void({TABLE}, int64)")
def wait(meeting: Any, shares: int) -> None:
    """Return once all shares are done, and what they wrote can be read, or when one has failed."""
    done, looks = meeting.ctypes.data, 0
    while seen(done) < shares and not has_failed():
        looks = let_others_run(looks)
