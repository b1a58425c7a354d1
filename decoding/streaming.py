"""Tokens handed out as they are committed: to a streamer of transformers' kind, or to a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

__all__ = ["Streamer", "TokenCallback", "begin_stream", "check_streamer", "end_stream", "stream"]


class Streamer(Protocol):
    """What receives tokens as they are committed; transformers' streamers fit."""

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


def stream(streamer: Streamer | TokenCallback | None, reports: Iterable[tuple[int, Sequence[int]]]) -> None:
    """Hand out what a round gave, by a sequence's index: a count, its next draft length, and its tokens."""
    if streamer is None:
        return
    for index, (count, _, *tokens) in reports:
        if not count:
            continue
        if hasattr(streamer, "put"):
            streamer.put(torch.tensor(tokens[:count]))
        else:
            streamer(index, torch.tensor(tokens[:count]))


def end_stream(streamer: Streamer | TokenCallback | None) -> None:
    """Say that the output is complete, to who wants to know."""
    if streamer is not None and hasattr(streamer, "end"):
        streamer.end()
