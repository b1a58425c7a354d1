"""Locks of models, and what a fork must not leave to the process that it makes.

There only the thread that forked goes on. What others had locked nobody would free, and OpenMP would wait for
threads that are not there, in the first large tensor that torch fills.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from threading import RLock
from typing import Any
from weakref import WeakSet

__all__ = ["Turns", "reentrant_lock"]

_HARD = 2
"""To OpenMP: give up everything that can be made anew."""

_reentrant: WeakSet[Any] = WeakSet()


class Turns:
    """A lock for which other threads wait, and which the thread that has it is refused."""

    def __init__(self) -> None:
        self._lock = reentrant_lock()

    def __enter__(self) -> None:
        """Raises RuntimeError for a call within a call."""
        if self._lock._is_owned():
            raise RuntimeError(
                "these models are in the middle of a call, whose caches another call from within it (by a "
                "streamer, a logits processor or a stopping criterion) would overwrite; give that one models "
                "of its own: models.with_own_caches()"
            )
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def reentrant_lock() -> Any:
    """An RLock that is free in a forked process, unless the thread that goes on there has it."""
    lock = RLock()
    _reentrant.add(lock)
    return lock


def _free_locks() -> None:
    for lock in _reentrant:
        if lock.acquire(blocking=False):
            lock.release()
        else:
            lock._at_fork_reinit()


def _end_threads_of_openmp() -> None:
    """Those that share the work of the thread that is about to fork; they are made anew when needed."""
    # Not where torch runs without OpenMP, or by one that lacks this function.
    with suppress(AttributeError):
        ctypes.CDLL(None).omp_pause_resource_all(_HARD)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_end_threads_of_openmp, after_in_child=_free_locks)
