"""CUDA graphs: what a round launches, recorded once for a shape and replayed by one call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from threading import RLock
from typing import Any

import torch

from .errors import first_line
from .placement import is_dispatched
from .protocol import Runner
from .runner import ModelRunner

__all__ = ["CapturedFunctions", "capture", "captured_functions"]

_log = logging.getLogger(__name__)

_CAPTURING = RLock()
"""Torch captures one graph at a time in a process."""


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    # Torch's own is that of the device on which it captured first.
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def capture(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any = None) -> Iterator[None]:
    """Capture what is launched on `device` within, the current one; other threads' work goes on."""
    stream = torch.cuda.current_stream(device)
    try:
        with (
            _CAPTURING,
            torch.cuda.graph(
                graph, pool=pool, stream=_capture_stream(device), capture_error_mode="thread_local"
            ),
        ):
            yield
    finally:
        # A capture that fails leaves its own stream behind.
        torch.cuda.set_stream(stream)


@dataclass
class CapturedFunctions:
    """Functions that work in place on the same tensors each time, captured as CUDA graphs.

    A key is run as it is when it is first seen, which compiles and allocates what it needs, captured when it
    is seen again, and replayed from then on. All graphs share one pool of memory.

    Attributes:
        device: where they run.
        budget: bytes that the pool may take; a key beyond it runs as it is.
    """

    device: torch.device
    budget: int
    _graphs: dict[Hashable, tuple[list[torch.cuda.CUDAGraph], Any] | None] = field(default_factory=dict)
    _used: int = 0
    _pool: Any = None

    @property
    def used(self) -> int:
        """Bytes that the pool has taken; the whole budget once a graph did not fit."""
        return self._used

    def clear(self) -> None:
        """Forget the graphs, whose tensors are no longer in use."""
        self._graphs.clear()
        self._used, self._pool = 0, None

    def run(self, key: Hashable, *functions: Callable[..., Any]) -> Any:
        """Run `functions` in turn, each on the result of the one before; what the last one returns."""
        if key not in self._graphs:
            result = _in_turn(functions)
            self._graphs[key] = None
            return result
        captured = self._graphs[key] or self._capture(key, functions)
        if captured is None:
            return _in_turn(functions)
        graphs, result = captured
        for graph in graphs:
            graph.replay()
        return result

    def _capture(
        self, key: Hashable, functions: tuple[Callable[..., Any], ...]
    ) -> tuple[list[torch.cuda.CUDAGraph], Any] | None:
        if self._used >= self.budget:
            return None
        free = 0
        graphs: list[torch.cuda.CUDAGraph] = []
        result: tuple[Any, ...] = ()
        try:
            # What a capture gives back before it begins is none of the pool's. Once one has failed torch may
            # take it to be still under way, and give nothing back.
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(self.device)
            for function in functions:
                graph = torch.cuda.CUDAGraph()
                with capture(graph, self.device, self._pool):
                    result = (function(*result),)
                self._pool = self._pool or graph.pool()
                graphs.append(graph)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                why = f"a graph did not fit in the {free / 2**30:.1f} GiB left"
            else:
                why = f"a round could not be captured ({first_line(error)})"
            _log.warning("%s; such rounds run without one", why)
            # A pool may be left in the middle of a capture, so that none goes on with it.
            self._used, self._pool = self.budget, None
            return None
        self._used += max(free - torch.cuda.mem_get_info(self.device)[0], 0)
        self._graphs[key] = captured = (graphs, result[0])
        return captured


def _in_turn(functions: tuple[Callable[..., Any], ...]) -> Any:
    result: tuple[Any, ...] = ()
    for function in functions:
        result = (function(*result),)
    return result[0]


def captured_functions(runners: Sequence[Runner]) -> CapturedFunctions | None:
    """For rounds of `runners` on a GPU, with an eighth of what is free for graphs; None elsewhere.

    None too where accelerate moves weights or inputs from device to device as a pass runs.
    """
    device = runners[0].device
    if device.type != "cuda":
        return None
    if any(isinstance(runner, ModelRunner) and is_dispatched(runner.model) for runner in runners):
        return None
    return CapturedFunctions(device, torch.cuda.mem_get_info(device)[0] // 8)
