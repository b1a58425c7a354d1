"""What a step of each model costs, measured once: by it draft lengths are chosen."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from statistics import median

import torch

from .protocol import EFTRunners, Runner

__all__ = ["StepCosts", "kept_step_costs", "measure_step_costs"]

_REPEATS = 9
_PROMPT = 32
_ROWS = 5
_LEAST_ROW_COST = 1 / 32


@dataclass(frozen=True)
class StepCosts:
    """Costs in units of one step of the large model, rounded to powers of two, so that they repeat.

    Attributes:
        cost_ratio: one step of the models that draft.
        row_cost: what one more row of each sequence adds to a pass of the large model; 0 below 1/32.
    """

    cost_ratio: float
    row_cost: float


def kept_step_costs(facts: Sequence[object], measure: Callable[[], StepCosts]) -> StepCosts:
    """What was measured on this machine for the same `facts` before, else what `measure` finds now.

    It is kept in the user's cache, so that a seed gives the same text in another process: draft lengths
    depend on it.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = sha256(json.dumps([str(fact) for fact in facts]).encode()).hexdigest()[:24]
    path = root / "speculative_eft" / f"step-costs-{name}.json"
    try:
        return StepCosts(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        costs = measure()
    # Without a place to keep it, it is measured again in the next process.
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps(asdict(costs)))
        written.replace(path)
    return costs


def measure_step_costs(runners: EFTRunners, drafting: Sequence[Runner], batch: int) -> StepCosts:
    """Time a few passes over short sequences; the runners' caches lose what they hold."""
    large = _seconds(runners.large, batch, 1)
    small = sum(_seconds(runner, batch, 1) for runner in drafting)
    more = (_seconds(runners.large, batch, _ROWS) - large) / (_ROWS - 1)
    row_cost = _rounded(more / large) if more > _LEAST_ROW_COST * large else 0.0
    return StepCosts(_rounded(small / large), row_cost)


def _rounded(ratio: float) -> float:
    return 2.0 ** round(math.log2(ratio))


def _seconds(runner: Runner, batch: int, rows: int) -> float:
    """Seconds of one pass over `rows` tokens of each of `batch` sequences."""
    tokens = torch.zeros(batch, rows, dtype=torch.int64, device=runner.device)
    runner.reserve(batch, _PROMPT + rows)
    runner.lengths.fill_(_PROMPT)
    runner.forward(tokens, _PROMPT + rows)
    if runner.device.type != "cuda":
        return median(_clocked(runner, tokens) for _ in range(_REPEATS))
    # As rounds run: without the time that a host takes to launch.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        runner.forward(tokens, _PROMPT + rows)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(_REPEATS):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / _REPEATS


def _clocked(runner: Runner, tokens: torch.Tensor) -> float:
    start = time.perf_counter()
    runner.forward(tokens, _PROMPT + tokens.shape[1])
    return time.perf_counter() - start
