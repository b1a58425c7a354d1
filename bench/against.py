"""Another version's benchmark, in a process of its own, that takes turns with this one.

What a shared machine's memory does for others changes within seconds and stays changed for hours, so the
ratios of one and the same program differ from one hour to the next. Two processes of which one works while
the other waits meet the same moods: what differs then is the programs.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

__all__ = ["Line", "inherited_line", "other_version"]

_VARIABLE = "SPECULATIVE_EFT_BENCH_LINE"
"""Tells a process which of its files is its end of the line."""


class Line:
    """One end of a line between two processes, of which one at a time works.

    Args:
        on_end: called once, when the other end turns out to be closed.
    """

    def __init__(self, end: socket.socket, on_end: Callable[[], None]) -> None:
        self._end = end
        self._on_end = on_end
        self._is_open = True

    @property
    def is_open(self) -> bool:
        """Whether the other had not left when it was last waited for."""
        return self._is_open

    def wait(self) -> None:
        """Wait for one's turn; it never ends once the other has left."""
        if not self._is_open:
            return
        try:
            self._is_open = bool(self._end.recv(1))
        except ConnectionError:
            # It left without having read that its turn was there.
            self._is_open = False
        if not self._is_open:
            self._on_end()

    def give_way(self) -> None:
        """Let the other have its turn, and wait for the next of one's own."""
        if self._is_open:
            # Whether it has left is found out by waiting.
            with suppress(ConnectionError):
                self._end.send(b".")
            self.wait()


def inherited_line() -> Line | None:
    """The line on which this process was started by `other_version` of another; its turn is now."""
    number = os.environ.pop(_VARIABLE, None)
    return None if number is None else Line(socket.socket(fileno=int(number)), lambda: None)


@contextmanager
def other_version(program: str, arguments: Sequence[str], is_done: bool = False) -> Iterator[Line]:
    """Start another version's `speculative-eft`, and come back when it gives way for the first time.

    At the end it goes on alone, and its end is waited for; after an exception it is ended. With `is_done` it
    may have nothing left to measure, and so end without having had a turn.

    Raises:
        ValueError: if it cannot be started, ends with a status other than 0, whenever that is noticed, or
            ends before its first turn although it is not done.
    """
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            try:
                process = subprocess.Popen(
                    [program, *arguments],
                    env=os.environ | {_VARIABLE: str(theirs.fileno())},
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                )
            except OSError as error:
                raise ValueError(f"--against: {program} cannot be started ({error.strerror})") from error

        def check() -> None:
            if status := process.wait():
                raise ValueError(
                    f"--against: {program} ended with status {status}, so there is nothing to compare with"
                )

        try:
            line = Line(ours, check)
            line.wait()
            # What is no speculative-eft takes no turns, and may end as if all were well.
            if not line.is_open and not is_done:
                raise ValueError(f"--against: {program} ended before its first turn, so it measured nothing")
            yield line
            ours.close()
            check()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
