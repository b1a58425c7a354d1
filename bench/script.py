"""What the benchmark scripts share: their command line, their inputs, and the rows and bars of their JSON."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from speculative_eft.kernels import Coefficients, NoiseKey, Sampling, backend, derive_seeds
from speculative_eft.models.errors import first_line

from .json_files import write_json
from .machine import facts
from .timing import Timing, copy_bandwidth, launch_floor, time_operation

__all__ = [
    "BATCHES",
    "DTYPE",
    "FIGURES",
    "VOCABULARIES",
    "LeftOut",
    "Script",
    "coefficients",
    "count_compilations",
    "filtered",
    "noise_key",
    "random_logits",
    "run",
]

DTYPE = torch.bfloat16
BATCHES, VOCABULARIES = (1, 4, 16, 64, 256), (32_000, 128_256, 151_936)
FIGURES = {
    "microseconds", "lower_quartile", "upper_quartile", "bytes_moved", "share_of_copy",
    "gigabytes_per_second", "replays", "cold", "method", "left_out", "failed",
}  # fmt: skip
"""What a row says of its measurement; all else tells it from others."""


class LeftOut(Exception):
    """Says why something is not measured."""


@dataclass
class Script:
    """One run of a benchmark script.

    Attributes:
        name: of the script.
        device: where it measures. On a CPU its shapes are tiny, to show that the script runs.
        quick: whether to leave out most of the sweep.
        path: where the JSON goes, anew after each row; None for nowhere.
        deadline: on the monotonic clock; measurements after it are left out.
        bandwidth: bytes a second of a copy on the device.
        content: the JSON.
    """

    name: str
    device: torch.device
    quick: bool
    path: Path | None
    deadline: float
    bandwidth: float
    content: dict[str, Any] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def ours(self) -> str:
        """The implementation that the package chooses on the device: "triton" on a GPU."""
        return backend(self.device)

    def sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Batches and vocabularies of a sweep."""
        if not self.on_gpu:
            return (2,), (100,)
        return ((1, 64), (128_256,)) if self.quick else (BATCHES, VOCABULARIES)

    def note(self, text: str) -> None:
        """Say something of the whole run."""
        self.content["notes"].append(text)

    def attempt(self, step: Callable[[], None]) -> dict[str, str]:
        """Run a step, if there is time left; for its row why it was "left_out" or "failed", else nothing.

        One broken combination must not hide what all others take.
        """
        if monotonic() > self.deadline:
            return {"left_out": "no time left"}
        try:
            step()
        except torch.OutOfMemoryError:
            return {"left_out": "does not fit the memory"}
        except LeftOut as error:
            return {"left_out": str(error)}
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {first_line(error)}"}
        return {}

    def release(self) -> None:
        """Give back what a GPU's memory does not use, if torch does: after a failed capture it may not."""
        if self.on_gpu:
            self.attempt(torch.cuda.empty_cache)

    def measure(
        self,
        implementation: str,
        operation: Callable[[], object],
        labels: Mapping[str, object],
        *,
        cold: bool,
        bytes_moved: int | None = None,
    ) -> float | None:
        """Time an operation and keep a row.

        Args:
            implementation: whose time it is; `ours` for the kernels that run on the device.
            operation, cold: as in `time_operation`.
            labels: what else tells the row from others.
            bytes_moved: what the operation has to read and write; None where that is not the point.

        Returns:
            The median in microseconds; None where it was left out, for which the row gives a reason.
        """
        row: dict[str, Any] = {"implementation": implementation, **labels}
        self.content["rows"].append(row)
        timings: list[Timing] = []
        row |= self.attempt(lambda: timings.append(time_operation(operation, self.device, cold=cold)))
        if not timings:
            self.release()
            self.write()
            return None
        (timing,) = timings
        spread = timing.microseconds
        row["microseconds"] = spread.median
        row["lower_quartile"], row["upper_quartile"] = spread.lower_quartile, spread.upper_quartile
        row |= {"replays": timing.replays, "cold": timing.cold, "method": timing.method}
        if bytes_moved is not None:
            row["bytes_moved"] = bytes_moved
            row["share_of_copy"] = bytes_moved / (spread.median / 1e6) / self.bandwidth
        self.write()
        return spread.median

    def bar(self, bar: str, measured: float | None, met: bool) -> None:
        """Keep whether a bar is met; what could not be measured meets none."""
        self.content["bars"].append({"bar": bar, "measured": measured, "met": measured is not None and met})
        self.write()

    def write(self) -> None:
        if self.path is not None:
            write_json(self.path, self.content)

    def show(self) -> None:
        """Print the rows, each kind of label a column, and the bars."""
        console = Console(width=None if sys.stdout.isatty() else 150)
        labels = list(dict.fromkeys(key for row in self.content["rows"] for key in row if key not in FIGURES))
        table = Table(*labels)
        for title in ("microseconds", "quartiles", "of copy"):
            table.add_column(title, justify="right")
        for row in self.content["rows"]:
            cells = [str(row.get(label, "")) for label in labels]
            if "microseconds" in row:
                share = row.get("share_of_copy")
                cells += [
                    f"{row['microseconds']:.1f}",
                    f"{row['lower_quartile']:.1f}-{row['upper_quartile']:.1f}",
                    "" if share is None else f"{share:.0%}",
                ]
            else:
                cells += ["-", row.get("left_out") or row["failed"], ""]
            table.add_row(*cells)
        console.print(table)
        self.show_bars(console)

    def show_bars(self, console: Console) -> None:
        """Print the bars, and the notes."""
        for bar in self.content["bars"]:
            measured = "not measured" if bar["measured"] is None else f"{bar['measured']:.2f}"
            console.print(f"{'met   ' if bar['met'] else 'MISSED'} {bar['bar']}: {measured}", markup=False)
        for note in self.content["notes"]:
            console.print(note, markup=False)


def run(
    name: str,
    measure: Callable[[Script], None],
    show: Callable[[Script], None] = Script.show,
    limit: float = 600.0,
) -> None:
    """The command line of a benchmark script: time what `measure` says, `show` it, and keep it as JSON.

    `limit` is the default of --seconds.

    The exit status is 1 where a measurement failed for another reason than memory or time.
    """

    def main(
        json_path: Annotated[
            Path | None, typer.Option("--json", help="Write the measurements there.")
        ] = None,
        device: Annotated[
            str, typer.Option(help="cuda, or cpu to see the script run on tiny shapes.")
        ] = "cuda",
        quick: Annotated[bool, typer.Option("--quick", help="Leave out most of the sweep.")] = False,
        seconds: Annotated[float, typer.Option(help="Start no measurement after so long.")] = limit,
    ) -> None:
        script = start(name, torch.device(device), quick=quick, path=json_path, seconds=seconds)
        measure(script)
        show(script)
        raise typer.Exit(1 if any("failed" in row for row in script.content["rows"]) else 0)

    main.__doc__ = measure.__doc__
    typer.run(main)


def start(name: str, device: torch.device, *, quick: bool, path: Path | None, seconds: float) -> Script:
    """A run with the machine's facts and no rows yet.

    Raises:
        typer.BadParameter: if there is no such device.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no NVIDIA GPU that torch sees; --device cpu shows that it runs")
    bandwidth = copy_bandwidth(device)
    content: dict[str, Any] = {
        "script": name,
        "environment": facts(device),
        "quick": quick,
        "copy_bytes_per_second": bandwidth,
        "launch_floor_microseconds": launch_floor(device),
        "notes": [],
        "bars": [],
        "rows": [],
    }
    script = Script(name, device, quick, path, monotonic() + seconds, bandwidth, content)
    if device.type != "cuda":
        script.note(
            "On a CPU, by the wall clock, at tiny shapes: the script runs; these are no measurements."
        )
    return script


@contextmanager
def count_compilations() -> Iterator[Counter[str]]:
    """How often each Triton kernel is compiled, or fetched from the disk's cache, inside."""
    import triton

    counted: Counter[str] = Counter()

    def count(*_: Any, fn: Any, **__: Any) -> None:
        counted[fn.name] += 1

    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = count
    try:
        yield counted
    finally:
        triton.knobs.runtime.jit_cache_hook = before


def random_logits(models: int, shape: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """Logits of models that resemble each other as a base and its tuned versions do; the base comes last."""
    base = 3 * torch.randn(shape, device=device)
    others = [(base + 0.7 * torch.randn(shape, device=device)).to(DTYPE) for _ in range(models - 1)]
    return [*others, base.to(DTYPE)]


def coefficients(batch: int, device: torch.device, *, pair: bool = False) -> Coefficients:
    """Emulated fine-tuning, alpha = beta = 1, drafted by F alone; `pair` lets B join at alpha 0.8."""
    ones = torch.ones(batch, device=device)
    alpha = ones[:, None] * (0.8 if pair else 1.0)
    return Coefficients(alpha, ones, alpha, 1 - alpha[:, 0] if pair else None, some_weight_is_zero=False)


def filtered(batch: int, vocab_size: int, device: torch.device, *filters: str) -> Sampling:
    """Temperature 0.8 with those of "top_k", "top_p" and "min_p" that are named."""

    def all_alike(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((batch,), value, dtype=dtype, device=device)

    return Sampling(
        temperature=all_alike(0.8),
        top_k=all_alike(min(50, vocab_size), torch.int64) if "top_k" in filters else None,
        top_p=all_alike(0.9) if "top_p" in filters else None,
        min_p=all_alike(0.05) if "min_p" in filters else None,
    )


def noise_key(batch: int, device: torch.device) -> NoiseKey:
    """Seeds of their own, at the third round and at position 100."""
    number = torch.ones(batch, dtype=torch.int64, device=device)
    return NoiseKey(derive_seeds(0, batch).to(device), 3 * number, 100 * number)
