"""Passes with and without torch.compile, in turns: `python -P -m speculative_eft.bench.compiled_bodies`.

Models that run by transformers' modules, `ModelRunner(compile_body=True)` against the same without, with
random weights: small shapes on a CPU, some that exist on a GPU, where passes run in captured graphs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer

from speculative_eft.models import ModelRunner

from .comparison import Spread
from .machine import Environment, save, show
from .report import environment_line, spread_text
from .shapes import fill_with_noise, random_model
from .timing import time_operation

__all__ = ["FAMILIES", "BodyTime", "load", "table", "time_family"]

_SMALL = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 2048}

FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt2": (
        {"n_embd": 512, "n_layer": 8, "n_head": 8},
        {"vocab_size": 50257, "n_embd": 1024, "n_layer": 24, "n_head": 16},
    ),
    "gpt_neox": (
        _SMALL,
        {"vocab_size": 50304, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
         "intermediate_size": 8192},
    ),
}  # fmt: skip
"""For each type of model the settings of a small shape, for a CPU, and of one that exists (gpt2-medium,
pythia-1.4b)."""

_VOCABULARY = 4096
_CONTEXT = 256
_ROWS = (1, 5)


@dataclass(frozen=True)
class BodyTime:
    """A pass of one sequence.

    Attributes:
        rows: tokens of the pass.
        plain, compiled: milliseconds.
        times: plain over compiled, of the same turns.
        compile_seconds: the first call.
    """

    family: str
    rows: int
    plain: Spread
    compiled: Spread
    times: Spread
    compile_seconds: float


def time_family(
    family: str, settings: dict[str, Any], device: torch.device, dtype: torch.dtype, turns: int
) -> list[BodyTime]:
    """Time passes of one and of five tokens, with `turns` of each runner on a CPU."""
    with device:
        model = random_model({"model_type": family, "vocab_size": _VOCABULARY, **settings}, dtype)
    plain, compiled = ModelRunner(model), ModelRunner(model, compile_body=True)
    found = []
    for runner in (plain, compiled):
        fill_with_noise(runner, 1, _CONTEXT + max(_ROWS))
        runner.lengths.fill_(_CONTEXT)
    for rows in _ROWS:
        block = torch.zeros(1, rows, dtype=torch.int64, device=device)
        passes = [partial(runner.forward, block, _CONTEXT + rows) for runner in (plain, compiled)]
        begun = perf_counter()
        passes[1]()
        seconds = perf_counter() - begun
        own, other = _in_turns(passes, turns) if device.type == "cpu" else _in_graphs(passes, device, turns)
        ratios = [before / after for before, after in zip(own, other, strict=True)]
        found.append(BodyTime(family, rows, Spread.of(own), Spread.of(other), Spread.of(ratios), seconds))
    return found


def _in_turns(passes: Sequence[Callable[[], object]], turns: int) -> list[list[float]]:
    """Milliseconds of each pass in each turn, after one to warm up."""
    times: list[list[float]] = [[] for _ in passes]
    for _ in range(turns + 1):
        for call, own in zip(passes, times, strict=True):
            begun = perf_counter()
            call()
            own.append(1000 * (perf_counter() - begun))
    return [own[1:] for own in times]


def _in_graphs(passes: Sequence[Callable[[], object]], device: torch.device, turns: int) -> list[list[float]]:
    times = [
        [time_operation(call, device, cold=True).microseconds.median / 1000 for call in passes]
        for _ in range(turns)
    ]
    return [list(own) for own in zip(*times, strict=True)]


def table(times: Sequence[BodyTime]) -> tuple[list[str], list[list[str]]]:
    """The heads and the rows of a table."""
    heads = ["model", "rows", "as it is, ms", "compiled, ms", "times as fast", "seconds to compile"]
    return heads, [
        [
            time.family, str(time.rows), f"{time.plain.median:.2f}", f"{time.compiled.median:.2f}",
            spread_text(time.times), f"{time.compile_seconds:.0f}",
        ]
        for time in times
    ]  # fmt: skip


def load(path: Path) -> tuple[str, list[BodyTime]]:
    """The machine's line and the times of what `main` wrote."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    spreads = ("plain", "compiled", "times")
    times = [BodyTime(**row | {name: Spread(**row[name]) for name in spreads}) for row in saved["passes"]]
    return environment_line(Environment(**saved["environment"]), saved["dtype"], saved["commit"]), times


def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the measurements there.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The first family alone.")] = False,
) -> None:
    """Time every family, and print a table."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype, turns = (torch.bfloat16, 3) if on_gpu else (torch.float32, 60)
    times = []
    for family in list(FAMILIES)[: 1 if quick else None]:
        times += time_family(family, FAMILIES[family][on_gpu], device, dtype, turns)
        # A run that is cut off has the families before.
        passes = [asdict(time) for time in times]
        save(json_path, dtype=str(dtype).removeprefix("torch."), passes=passes)
    show(*table(times))


if __name__ == "__main__":
    typer.run(main)
