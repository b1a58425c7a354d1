"""Timing of kernels: replays of a captured CUDA graph between CUDA events.

A kernel of a few microseconds is shorter than its launch from Python, so the host has to be ahead of the
device: before each timed replay the device reads a buffer larger than its second-level cache. That also
leaves the cache cold, which is how a kernel finds data that was written before gigabytes of weights were
read, and as weights do it leaves nothing to be written back; `cold` says which of the two is measured. On a
CPU the wall clock serves, for smoke tests alone.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch

from speculative_eft.models.graphs import capture

from .comparison import Spread

__all__ = [
    "Timing",
    "copy_bandwidth",
    "launch_floor",
    "reference_kernels",
    "time_operation",
]

_SHORTEST_FLUSH = 128 * 2**20
_SECONDS = 0.4
"""Time that the replays of one measurement may take, once there are the fewest."""
_FEWEST_REPLAYS, _MOST_REPLAYS = 10, 100
_WARM_CALLS = 10


@dataclass(frozen=True)
class Timing:
    """What one call of an operation takes.

    Attributes:
        microseconds: of one call, over replays.
        replays: timed ones.
        cold: whether the second-level cache held nothing of use before each.
        method: "CUDA graph" or "wall clock".
    """

    microseconds: Spread
    replays: int
    cold: bool
    method: str


def time_operation(operation: Callable[[], object], device: torch.device, *, cold: bool) -> Timing:
    """Capture an operation in a CUDA graph and time its replays.

    Args:
        operation: launches work on `device` and may be repeated; it neither waits for the device nor draws
            on memory whose place changes.
        cold: whether to find the second-level cache cold. If not, a replay holds ten calls in a row, and
            follows ten others.

    Raises:
        torch.OutOfMemoryError: if the operation's memory does not fit twice, once for its warm-up and once
            for the graph.
    """
    if device.type != "cuda":
        return _wall_clock(operation)
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            operation()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    # What the warm-up has cached the graph's own pool may need.
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    calls = 1 if cold else _WARM_CALLS
    with capture(graph, device):
        for _ in range(calls):
            operation()
    _replay(graph, device, cold, 3)
    estimate = statistics.median(_replay(graph, device, cold, 3)) / 1e6
    count = min(max(int(_SECONDS / max(estimate, 1e-6)), _FEWEST_REPLAYS), _MOST_REPLAYS)
    microseconds = [time / calls for time in _replay(graph, device, cold, count)]
    del graph
    torch.cuda.empty_cache()
    return Timing(Spread.of(microseconds), count, cold, "CUDA graph")


def _replay(graph: torch.cuda.CUDAGraph, device: torch.device, cold: bool, count: int) -> list[float]:
    """Microseconds of each of some replays."""
    swept = torch.zeros(_flush_bytes(device) // 4, device=device)
    total = torch.zeros((), device=device)
    events = [
        [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        for _ in range(count)
    ]
    for start, end in events:
        torch.sum(swept, 0, out=total)
        if not cold:
            graph.replay()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize(device)
    return [1000 * start.elapsed_time(end) for start, end in events]


def _flush_bytes(device: torch.device) -> int:
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    return max(2 * int(cache), _SHORTEST_FLUSH)


def _wall_clock(operation: Callable[[], object]) -> Timing:
    start = perf_counter()
    operation()
    return Timing(Spread.of([1e6 * (perf_counter() - start)]), 1, False, "wall clock")


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written together, of a copy that no cache holds.

    By a kernel: a copy that is a node of a graph of its own kind took 1.6 times as long on an H200.
    """
    size = 2**30 if device.type == "cuda" else 2**24
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    timing = time_operation(lambda: torch.neg(source, out=target), device, cold=True)
    return 2 * size / (timing.microseconds.median / 1e6)


def launch_floor(device: torch.device) -> float:
    """Microseconds of the smallest kernel there is: what no launch can be faster than in `time_operation`."""
    number = torch.zeros(1, device=device)
    return time_operation(number.zero_, device, cold=True).microseconds.median


@contextmanager
def reference_kernels() -> Iterator[None]:
    """Run the torch references inside, whatever the device."""
    name = "SPECULATIVE_EFT_BACKEND"
    before = os.environ.get(name)
    os.environ[name] = "torch"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
