"""Keeps the tables of docs/kernels.md equal to the JSON: `python -P -m speculative_eft.bench.kernels.page`.

With --compile it first compiles every kernel for every target, which takes minutes, and keeps what they take.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..markdown import markdown_table, with_part
from ..script import FIGURES

__all__ = ["COMPILED", "compiled_markdown", "measured_markdown", "results_in", "with_tables"]

COMPILED = "kernels-compiled.json"
_DTYPES = {"bf16", "fp16", "fp32"}


def _kernel(report: dict[str, Any]) -> str:
    """The operation, and what its variant's name says before dtype and options."""
    words = [report["operation"]]
    for word in report["variant"].split():
        if word.rstrip(",") in _DTYPES or word == "vocabulary":
            break
        words.append(word)
    return " ".join(words)


def _range(values: Iterable[int | None]) -> str:
    numbers = sorted({value for value in values if value is not None})
    if not numbers:
        return "-"
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def compiled_markdown(compiled: dict[str, Any]) -> str:
    """What kernels take on each target, variants together, from `kernels.compile --json`."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for report in compiled["kernels"]:
        groups.setdefault((_kernel(report), report["target"]), []).append(report)
    rows = [
        [name, target, str(len(group))]
        + [_range(one[key] for one in group) for key in ("registers", "spills", "shared", "load", "launches")]
        for (name, target), group in groups.items()
    ]
    titles = ("kernel", "target", "variants", "registers", "spills", "shared bytes", "load bytes", "launches")
    return "\n".join([f"Compiled by Triton {compiled['triton']}.", "", *markdown_table(titles, rows)])


def _measured_rows(name: str, result: dict[str, Any]) -> list[list[str]]:
    """Our times at batch 1 and 64 and, where there is a choice, vocabulary 128,256, against the floor."""

    def labels(row: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in row.items() if key not in {"implementation", *FIGURES}}

    timed = [row for row in result["rows"] if "microseconds" in row]
    rows = []
    for row in timed:
        own = labels(row)
        if row["implementation"] != "triton" or own["batch"] not in (1, 64):
            continue
        if own.get("vocabulary", 128_256) != 128_256 or own.get("drafted", 8) != 8:
            continue
        floor = result["launch_floor_microseconds"]
        if "bytes_moved" in row:
            floor = max(floor, 1e6 * row["bytes_moved"] / result["copy_bytes_per_second"])
        cells = [name, _words(own), str(own["batch"]), f"{row['microseconds']:.1f}", f"{floor:.1f}"]
        others = {other["implementation"]: other["microseconds"] for other in timed if labels(other) == own}
        for other in ("torch reference", "torch.compile", "mix, softmax, probabilities"):
            cells.append(f"{others[other] / row['microseconds']:.1f}" if other in others else "-")
        rows.append(cells)
    return rows


def _words(labels: dict[str, Any]) -> str:
    """The labels that tell rows apart, but for sizes."""
    words = []
    for key, value in labels.items():
        if key in ("batch", "vocabulary", "drafted", "slots") or value is False:
            continue
        words.append(key if value is True else str(value))
    return ", ".join(words)


def measured_markdown(results: Sequence[dict[str, Any]]) -> str:
    """The kernels' times on each card, from the JSON of `make gpu`."""
    results = [
        result
        for result in results
        if any(name.startswith("kernels.") and report["result"] for name, report in result["stages"].items())
    ]
    if not results:
        return (
            "No GPU has measured these kernels yet. On a machine with one `make gpu` writes the figures to\n"
            "`bench/results/`, and `python -P -m speculative_eft.bench.kernels.page` puts them here."
        )
    lines: list[str] = []
    for result in results:
        machine = result["environment"]
        lines += [
            f"**{machine['device']}**, torch {machine['torch']}, Triton {machine['triton']}, CUDA "
            f"{machine['cuda']}; bf16, vocabulary 128,256, 8 drafted. The floor is the bytes over the copy "
            "bandwidth measured there, or the smallest kernel; the last three columns are how many times as "
            "long the others take.",
            "",
        ]
        stages = {
            name.removeprefix("kernels."): report["result"]
            for name, report in result["stages"].items()
            if name.startswith("kernels.") and report["result"]
        }
        rows = [row for name, stage in stages.items() for row in _measured_rows(name, stage)]
        titles = (
            "kernel",
            "case",
            "batch",
            "microseconds",
            "floor",
            "torch",
            "torch.compile",
            "probabilities",
        )
        lines += [*markdown_table(titles, rows), ""]
        bars = [(name, bar) for name, stage in stages.items() for bar in stage["bars"]]
        lines += markdown_table(
            ("kernel", "bar", "measured", "met"),
            [
                [
                    name, bar["bar"], "-" if bar["measured"] is None else f"{bar['measured']:.2f}",
                    "yes" if bar["met"] else "no",
                ]
                for name, bar in bars
            ],
        )  # fmt: skip
        lines.append("")
    return "\n".join(lines[:-1])


def with_tables(page: str, compiled: dict[str, Any], measured: Sequence[dict[str, Any]]) -> str:
    """The page with the parts between its markers made anew."""
    for name, text in (("compiled", compiled_markdown(compiled)), ("measured", measured_markdown(measured))):
        page = with_part(page, name, text)
    return page


def results_in(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the kernels take when compiled, and what was measured on each card."""
    compiled = json.loads((folder / COMPILED).read_text(encoding="utf-8"))
    return compiled, [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("gpu-*.json"))
    ]


def main(
    compile_first: Annotated[
        bool, typer.Option("--compile", help="Compile every kernel anew first.")
    ] = False,
) -> None:
    """Rewrite docs/kernels.md from bench/results in the current folder."""
    results, page = Path("bench") / "results", Path("docs") / "kernels.md"
    status = 0
    if compile_first:
        command = [sys.executable, "-P", "-m", "speculative_eft.kernels.compile", "--json"]
        # It fails where a kernel spills, and has written what it found all the same.
        status = subprocess.run([*command, str(results / COMPILED)]).returncode
    page.write_text(with_tables(page.read_text(encoding="utf-8"), *results_in(results)), encoding="utf-8")
    raise typer.Exit(status)


if __name__ == "__main__":
    typer.run(main)
