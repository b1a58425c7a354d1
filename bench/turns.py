"""Jobs in one thread that take turns of some milliseconds, so that a machine's moods hit all of them alike.

What others do to a shared machine's memory lasts from milliseconds to minutes: two runs a tenth of a second
apart meet nearly the same, two runs a few seconds apart do not. With greenlets each job has a stack of its
own and gives way where it asks its `Watch`, between two rounds of decoding. The thread stays one and the
same, and with it the pools of threads that torch and Numba keep for it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from time import perf_counter

__all__ = ["Watch", "can_pause", "take_turns"]


def can_pause() -> bool:
    """Whether jobs can give way in the middle: where greenlet is installed."""
    return find_spec("greenlet") is not None


class Watch:
    """A job's own clock, which stands while others have their turn.

    Args:
        turn: seconds until `pause` gives way; infinite, it never does.
    """

    def __init__(self, turn: float = math.inf) -> None:
        self.turn = turn
        self.away = 0.0
        """Seconds of others so far."""
        self._began = perf_counter()

    def now(self) -> float:
        """Seconds of this job alone, from an arbitrary start."""
        return perf_counter() - self.away

    def begin(self) -> None:
        """Begin a turn here."""
        self._began = perf_counter()

    def pause(self) -> None:
        """Give way if the turn is over; `take_turns` comes back to here."""
        left = perf_counter()
        if left - self._began < self.turn:
            return
        from greenlet import getcurrent

        others = getcurrent().parent
        assert others is not None
        others.switch()
        self._began = perf_counter()
        self.away += self._began - left


def take_turns(
    jobs: Sequence[Iterator[None]], pausing: bool, give_way: Callable[[], None] = lambda: None
) -> None:
    """Run every job to its end, each a piece at a time: to its next pause, or else to its next yield.

    `give_way` is called where nobody's clock runs: after a piece of every job, or else after each piece.
    """
    if not pausing:
        waiting = deque(jobs)
        while waiting:
            job = waiting.popleft()
            if next(job, job) is None:
                waiting.append(job)
                give_way()
        return
    from greenlet import greenlet

    workers = [greenlet(lambda job=job: deque(job, maxlen=0)) for job in jobs]
    try:
        while workers:
            for worker in workers:
                worker.switch()
            workers = [worker for worker in workers if not worker.dead]
            give_way()
    finally:
        # After an exception the others end here, and not when somebody happens to let go of them.
        for worker in workers:
            if not worker.dead:
                worker.throw()
