"""CUDA graphs: what a round launches, recorded once for a shape and replayed by one call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["CapturedFunctions", "graph_budget"]

_log = logging.getLogger(__name__)


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
            self._graphs[key] = None
            return _in_turn(functions)
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
        # What a capture gives back before it begins is none of the pool's.
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        stream = torch.cuda.current_stream(self.device)
        graphs: list[torch.cuda.CUDAGraph] = []
        result: tuple[Any, ...] = ()
        try:
            for function in functions:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    result = (function(*result),)
                self._pool = self._pool or graph.pool()
                graphs.append(graph)
        except torch.OutOfMemoryError:
            left = free / 2**30
            _log.warning("a graph did not fit in the %.1f GiB left; its rounds run without one", left)
            self._used = self.budget
            return None
        finally:
            # A capture that fails leaves its own stream behind.
            torch.cuda.set_stream(stream)
        self._used += max(free - torch.cuda.mem_get_info(self.device)[0], 0)
        self._graphs[key] = captured = (graphs, result[0])
        return captured


def _in_turn(functions: tuple[Callable[..., Any], ...]) -> Any:
    result: tuple[Any, ...] = ()
    for function in functions:
        result = (function(*result),)
    return result[0]


def graph_budget(device: torch.device) -> int:
    """Bytes that graphs may take: an eighth of what is free."""
    return torch.cuda.mem_get_info(device)[0] // 8
