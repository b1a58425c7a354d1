"""What a step of each model costs, measured once: by it draft lengths are chosen."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import TypeAlias

import torch
from torch import Tensor

from speculative_eft.kernels import Coefficients, DraftLoop, NoiseKey, Sampling, Stream, side_by_side

from .graphs import capture
from .protocol import EFTRunners, Runner, bind_passes, forward_each, steps_together

__all__ = ["StepCosts", "bind_plain_draft", "kept_step_costs", "measure_step_costs", "processor_name"]

_REPEATS = 25
_SECONDS = 1.5
_PROMPT = 32
_DRAFTED, _DRAFTED_BY_MANY = 4, 2
"""Tokens of a measured draft, and on a CPU of more than a few sequences: there no longer drafts pay, and rows
beyond those of short ones may cost a pass more than theirs do."""
_FEW = 4
_LEAST_COST = 1 / 128
_VERSION = 13
"""Of the measurement: results that were kept by another version are ignored."""

Pass: TypeAlias = Callable[[], object]
"""A pass of a model, or several, to be timed."""


@dataclass(frozen=True)
class StepCosts:
    """Costs in units of one step of the large model, rounded to eighths of an octave, so that they repeat.

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
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        # Users without a home, as in some containers, have no cache.
        return measure()
    name = sha256(json.dumps([str(fact) for fact in facts]).encode()).hexdigest()[:24]
    path = root / "speculative_eft" / f"step-costs-{_VERSION}-{name}.json"
    kept = _read(path)
    if kept is not None:
        return kept
    costs = measure()
    # Another process may have measured meanwhile: all go by what was written first.
    kept = _read(path)
    if kept is not None:
        return kept
    # Without a place to keep it, it is measured again in the next process.
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps(asdict(costs)))
        written.replace(path)
    return costs


def processor_name() -> str:
    """The CPU's, as its maker gives it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _read(path: Path) -> StepCosts | None:
    """What `path` holds; None where there is nothing, or nothing that can be read."""
    try:
        return StepCosts(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def measure_step_costs(runners: EFTRunners, drafting: Sequence[Runner], batch: int) -> StepCosts:
    """Time rounds' passes, in a round's order, over short sequences; the caches lose what they hold.

    In that order, because a small model that runs again finds its weights in a processor's caches, and one
    that runs after the large model does not. What the costs say of a drafted token against a step of plain
    decoding, (cost_ratio + row_cost) / (1 + 2 cost_ratio), is what was measured.
    """
    drafters, device = runners.drafters, runners.large.device
    measured = _DRAFTED_BY_MANY if device.type == "cpu" and batch > _FEW else _DRAFTED
    small = runners.small
    for runner in runners.every:
        runner.reserve(batch, _PROMPT + _DRAFTED + 1)
        runner.lengths.fill_(_PROMPT)
    drawn = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    # Without a draft all take the same step; compiled passes of models that share nothing gain nothing by it.
    together = not drafters and (device.type != "cpu" or steps_together(runners, batch))

    def passes(drafted: int) -> list[Pass]:
        stepping = drafting if drafted or not together else small
        draft: list[Pass]
        last: list[Pass]
        if device.type == "cpu":
            draft, last = _steps(drafters or stepping, batch, drafted, bool(drafters)), []
        else:
            draft = [partial(forward_each, drafters or drafting, drawn, _PROMPT + 1)] * drafted
            # The last step is made as the others score.
            last = [] if drafters else [partial(forward_each, stepping, drawn, _PROMPT + 1)]
        scoring = [runner for runner in small if drafters or runner not in stepping]
        scores = [*last, *(_pass(runner, batch, drafted + 1) for runner in scoring)]
        large = _pass(runners.large, batch, drafted + 1)
        return [*draft, lambda: side_by_side(device, large, lambda: _run(scores))]

    turns = _turns([passes(0), passes(measured), [_pass(runners.large, batch, 1)]], device)
    # Of each turn's times: from turn to turn a machine may have more or less to do besides.
    token = max(median(drafts / plain for plain, drafts, _ in turns) - 1, 0) / measured
    cost_ratio = max(median(plain / large for plain, _, large in turns) - 1, 0) / 2
    row_cost = token * (1 + 2 * cost_ratio) - cost_ratio
    if row_cost <= _LEAST_COST:
        row_cost, cost_ratio = 0.0, token / max(1 - 2 * token, _LEAST_COST)
    return StepCosts(_rounded(max(cost_ratio, _LEAST_COST)), _rounded(row_cost) if row_cost else 0.0)


def _rounded(ratio: float) -> float:
    """To a power of the eighth root of two, with as many digits as that means."""
    return float(f"{2.0 ** (round(8 * math.log2(ratio)) / 8):.3g}")


def _pass(runner: Runner, batch: int, rows: int) -> Pass:
    """A pass over `rows` tokens of each sequence, as a round makes it."""
    device = runner.device
    block = torch.zeros(batch, rows, dtype=torch.int64, device=device)
    bound = None
    if device.type == "cpu":
        counts = torch.full((batch,), rows)
        bound = runner.bind(block, counts, torch.empty(batch, rows, runner.vocab_size))
    return bound or partial(runner.forward, block, _PROMPT + rows)


def _steps(drafting: Sequence[Runner], batch: int, drafted: int, is_given: bool) -> list[Pass]:
    """The steps of a draft; where rounds draft in one call, that call with its draws, else without draws.

    `is_given` is for `EFTRunners.drafters`, which make no step after the last token.
    """
    (first, *others) = drafting
    zeros = torch.zeros(batch, dtype=torch.int64)
    lens, nobody = torch.full((batch,), drafted), torch.zeros(batch, dtype=torch.bool)
    draft = None if others else bind_plain_draft(first, lens, nobody, zeros.clone(), drafted, 1.0, is_given)
    if draft is None:
        step = bind_passes(
            drafting, zeros[:, None], torch.ones_like(zeros),
            [torch.empty(batch, 1, runner.vocab_size) for runner in drafting],
        )  # fmt: skip
        each = [*(step or (_pass(runner, batch, 1) for runner in drafting))]
        return each * (drafted + (not is_given))
    return [draft, lambda: first.lengths.fill_(_PROMPT)]


def bind_plain_draft(
    runner: Runner,
    draft_lens: Tensor,
    done: Tensor,
    counts: Tensor,
    drafted: int,
    temperature: float,
    is_given: bool = False,
) -> Callable[[], None] | None:
    """A draft by `Runner.bind_draft` to be timed, without memory or filter; None where there is none.

    Args:
        draft_lens, done, counts: as in `DraftLoop`, in the host's memory.
        drafted: tokens of the longest draft.
        temperature: 0 for draws without noise.
        is_given: whether `runner` is one of `EFTRunners.drafters`.
    """
    if runner.device.type != "cpu":
        return None
    batch = counts.shape[0]
    zeros, ones = torch.zeros(batch, dtype=torch.int64), torch.ones(batch)
    draft = DraftLoop(
        last_token=zeros,
        draft_lens=draft_lens,
        done=done,
        block=torch.zeros(batch, drafted + 1, dtype=torch.int64),
        counts=counts,
        coefficients=Coefficients(ones[:, None], ones, ones[:, None], None),
        sampling=Sampling(temperature * ones),
        noise=NoiseKey(zeros, zeros, zeros),
        stream=Stream.DRAFT,
        memory=None,
        early_stop=None,
        correction=torch.empty(batch, drafted if is_given else 0, runner.vocab_size),
        keeps_logits=is_given,
    )
    return runner.bind_draft(draft, torch.empty(drafted + 1, batch, runner.vocab_size))


def _turns(rounds: Sequence[Sequence[Pass]], device: torch.device) -> list[list[float]]:
    """Seconds of each of `rounds`, whose passes run in turn, over several turns."""
    for passes in rounds:
        _run(passes)
    if device.type == "cuda":
        return [[_replayed(passes, device) for passes in rounds]]
    turns: list[list[float]] = []
    begun = time.perf_counter()
    while len(turns) < _REPEATS or time.perf_counter() - begun < _SECONDS:
        turns.append([_clocked(passes) for passes in rounds])
    return turns


def _run(passes: Sequence[Pass]) -> None:
    for call in passes:
        call()


def _clocked(passes: Sequence[Pass]) -> float:
    start = time.perf_counter()
    _run(passes)
    return time.perf_counter() - start


def _replayed(passes: Sequence[Pass], device: torch.device) -> float:
    # As rounds run: without the time that a host takes to launch.
    graph = torch.cuda.CUDAGraph()
    with capture(graph, device):
        _run(passes)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(_REPEATS):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / _REPEATS
