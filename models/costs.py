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
from statistics import quantiles
from typing import TypeAlias

import torch

from .protocol import EFTRunners, Runner

__all__ = ["StepCosts", "kept_step_costs", "measure_step_costs"]

_REPEATS = 25
_SECONDS = 1.5
_PROMPT = 32
_DRAFTED = 4
_LEAST_COST = 1 / 128
_METHOD = 3
"""Of the measurement: what an earlier one found is not read."""

Passes: TypeAlias = list[tuple[Runner, int]]
"""Passes in turn: who runs, over how many tokens of each sequence."""


@dataclass(frozen=True)
class StepCosts:
    """Costs in units of one step of the large model, rounded to quarters of an octave, so that they repeat.

    Attributes:
        cost_ratio: one step of the models that draft, and one of the small base.
        row_cost: what one more drafted token adds beyond a step of the models that draft, chiefly a row of
            each sequence in the large model's pass.
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
    path = root / "speculative_eft" / f"step-costs-{_METHOD}-{name}.json"
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
    """Time rounds' passes, in a round's order, over short sequences; the caches lose what they hold.

    In that order, because a small model that runs again finds its weights in a processor's caches, and one
    that runs after the large model does not. What the costs say of a drafted token against a step of plain
    decoding, (cost_ratio + row_cost) / (1 + 2 cost_ratio), is what was measured.
    """
    scoring = [runner for runner in (runners.large, runners.base) if runner not in drafting]

    def passes(drafted: int) -> Passes:
        steps = [(runner, 1) for _ in range(drafted + 1) for runner in drafting]
        return steps + [(runner, drafted + 1) for runner in scoring]

    for runner in {*drafting, *scoring}:
        runner.reserve(batch, _PROMPT + _DRAFTED + 1)
        runner.lengths.fill_(_PROMPT)
    plain, drafts, large = _seconds([passes(0), passes(_DRAFTED), [(runners.large, 1)]], batch)
    token = max(drafts - plain, 0) / _DRAFTED / plain
    cost_ratio = max(plain / large - 1, 0) / 2
    row_cost = token * (1 + 2 * cost_ratio) - cost_ratio
    if row_cost <= _LEAST_COST:
        row_cost, cost_ratio = 0.0, token / max(1 - 2 * token, _LEAST_COST)
    return StepCosts(_rounded(max(cost_ratio, _LEAST_COST)), _rounded(row_cost) if row_cost else 0.0)


def _rounded(ratio: float) -> float:
    """To a power of the fourth root of two, with as many digits as that means."""
    return float(f"{2.0 ** (round(4 * math.log2(ratio)) / 4):.3g}")


def _seconds(rounds: Sequence[Passes], batch: int) -> list[float]:
    """Seconds of each of `rounds`; all of its passes are over tokens of each of `batch` sequences."""
    device = rounds[0][0][0].device
    tokens = torch.zeros(batch, _DRAFTED + 1, dtype=torch.int64, device=device)

    def run(passes: Passes) -> None:
        for runner, rows in passes:
            runner.forward(tokens[:, :rows], _PROMPT + rows)

    for passes in rounds:
        run(passes)
    if device.type != "cuda":
        turns: list[list[float]] = []
        begun = time.perf_counter()
        while len(turns) < _REPEATS or time.perf_counter() - begun < _SECONDS:
            turns.append([_clocked(run, passes) for passes in rounds])
        # The lower quartile, since other work on the machine only ever adds.
        return [quantiles(times)[0] for times in zip(*turns, strict=True)]
    return [_replayed(run, passes) for passes in rounds]


def _clocked(run: Callable[[Passes], None], passes: Passes) -> float:
    start = time.perf_counter()
    run(passes)
    return time.perf_counter() - start


def _replayed(run: Callable[[Passes], None], passes: Passes) -> float:
    # As rounds run: without the time that a host takes to launch.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run(passes)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(_REPEATS):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / _REPEATS
