"""What a GPU runs side by side."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TypeVar

import torch

from .backend import backend

__all__ = ["side_by_side"]

First = TypeVar("First")
Second = TypeVar("Second")


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def side_by_side(
    device: torch.device, first: Callable[[], First], second: Callable[[], Second]
) -> tuple[First, Second]:
    """What `first` and `second` return, which a GPU runs on two streams, or two branches of a captured graph.

    Neither may write what the other reads. Elsewhere one runs after the other.
    """
    if device.type != "cuda":
        return first(), second()
    own_storage: AbstractContextManager[None] = nullcontext()
    if backend(device) == "triton":
        from .gpu.tile import apart

        own_storage = apart()
    current, beside = torch.cuda.current_stream(device), _beside(device)
    beside.wait_stream(current)
    try:
        with torch.cuda.stream(beside), own_storage:
            other = second()
        own = first()
    finally:
        # Also where one of them fails: a capture with a stream apart could not even be ended.
        current.wait_stream(beside)
    return own, other
