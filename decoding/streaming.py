"""Tokens handed out as they are committed: to a streamer of transformers' kind, or to a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from .round import SOURCES, TraceBuffers

__all__ = ["Streamer", "TokenCallback", "begin_stream", "check_streamer", "end_stream", "stream"]


class Streamer(Protocol):
    """What receives tokens as they are committed; transformers' streamers fit.

    Where the call has a trace, `put_drafted(value, drafted)` of one that has it takes each round's tokens in
    place of `put`: of these `drafted`, the first ones, were drafted.
    """

    def put(self, value: Tensor) -> None:
        """Take the prompt, int64 [1, width], and then each round's tokens, int64 [count]."""

    def end(self) -> None:
        """The output is complete."""


TokenCallback: TypeAlias = Callable[[int, Tensor], None]
"""Takes the index of a sequence and its new tokens, int64 [count] on the CPU, after each round."""


def check_streamer(streamer: Any, batch: int) -> None:
    """Raise ValueError for what cannot take the tokens of `batch` sequences."""
    if streamer is None or (callable(streamer) and not hasattr(streamer, "put")):
        return
    if not hasattr(streamer, "put") or not hasattr(streamer, "end"):
        raise ValueError("streamer must have put and end, or be a function of a sequence's index and tokens")
    if batch > 1:
        raise ValueError(
            f"streamer takes one sequence, got a batch of {batch}; give a function of a sequence's index and "
            "tokens instead"
        )


def begin_stream(streamer: Streamer | TokenCallback | None, input_ids: Tensor) -> None:
    """Hand out the prompt, to who takes it."""
    if streamer is not None and hasattr(streamer, "put"):
        streamer.put(input_ids.cpu())


def stream(
    streamer: Streamer | TokenCallback | None,
    reports: Iterable[tuple[int, Sequence[int]]],
    streamed: Sequence[int] = (),
    trace: TraceBuffers | None = None,
) -> None:
    """Hand out what a round gave, by a sequence's index: a count, its next draft length, and its tokens.

    With a `trace` there is `streamed`, for each sequence the number of its tokens handed out before.
    """
    if streamer is None:
        return
    for index, (count, following, *tokens) in reports:
        if not count:
            continue
        new = torch.tensor(tokens[:count])
        if not hasattr(streamer, "put"):
            streamer(index, new)
        elif trace is not None and hasattr(streamer, "put_drafted"):
            # Only at its end can a sequence be cut within a draft. To look there each round would be to wait.
            is_last = following < 0
            streamer.put_drafted(new, _drafted(trace, streamed[index], count) if is_last else count - 1)
        else:
            streamer.put(new)


def _drafted(trace: TraceBuffers, start: int, count: int) -> int:
    """How many of the `count` tokens from `start` on of the one sequence that is streamed were drafted."""
    return int((trace.source[0, start : start + count] == SOURCES.index("draft")).sum())


def end_stream(streamer: Streamer | TokenCallback | None) -> None:
    """Say that the output is complete, to who wants to know."""
    if streamer is not None and hasattr(streamer, "end"):
        streamer.end()
