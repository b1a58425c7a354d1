"""Keeps the README's measurements equal to the committed JSON: `python -m speculative_eft.bench.readme`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from .comparison import speeds

BEGIN, END = "<!-- measurements: begin -->", "<!-- measurements: end -->"
RESULT = "demo-cpu.json"


def measurements_markdown(result: dict[str, Any]) -> str:
    """The tables of one saved `speculative-eft demo --json` as Markdown."""
    machine = result["environment"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, float32, batch 1; torch {machine['torch']}, "
        f"transformers {machine['transformers']}, kernels by {machine['backend']}.",
    ]
    for label, comparison in result["comparisons"].items():
        runs = comparison["prompts"] * comparison["repeats"]
        lines += [
            "",
            f"**{label}**, {comparison['prompts']} held-out prompts, {runs} interleaved runs each; "
            "medians, quartiles in brackets:",
            "",
            "| decoder | tokens/s | times naive EFT | tokens a round | acceptance | expected "
            "| large calls a token |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in comparison["measurements"]:
            speed, ratio = row["tokens_per_second"], row["ratio"]
            lines.append(
                f"| {row['name']} | {speed['median']:.0f} | {ratio['median']:.2f} "
                f"[{ratio['lower_quartile']:.2f}, {ratio['upper_quartile']:.2f}] "
                f"| {row['tokens_per_round']:.2f} | {_share(row['acceptance_rate'])} "
                f"| {_share(row['expected_acceptance'])} | {row['large_calls_per_token']:.2f} |"
            )
    lines += ["", "Against the large model alone, medians over pairs:"]
    for label, comparison in result["comparisons"].items():
        rows = comparison["measurements"]
        by_name = {row["name"]: speeds(row["run_tokens"], row["run_seconds"]) for row in rows}
        for name, own in by_name.items():
            if name.startswith("EFT"):
                pairs = zip(own, by_name["large alone"], strict=True)
                ratio = statistics.median(speed / other for speed, other in pairs)
                lines.append(f"{name} at {label} {ratio:.2f} times its speed;")
    lines[-1] = lines[-1].replace(";", ".")
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def with_measurements(readme: str, result: dict[str, Any]) -> str:
    """The README with the part between the markers made anew."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{measurements_markdown(result)}\n{END}{after}"


def main() -> None:
    """Rewrite README.md from bench/results in the current folder."""
    readme = Path("README.md")
    result = json.loads((Path("bench") / "results" / RESULT).read_text())
    readme.write_text(with_measurements(readme.read_text(), result))


if __name__ == "__main__":
    main()
