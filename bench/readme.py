"""Keeps README and docs equal to the committed measurements: `python -P -m speculative_eft.bench.readme`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import compiled_bodies, round_time
from .analysis import losses, noise_sentence
from .benchmark import Report
from .comparison import Spread
from .engine import ALONE, BY_COST_MODEL, PLAIN
from .markdown import markdown_table, with_part
from .plan import NAIVE, TUNED
from .plots import figures, svg
from .report import against_baselines, break_even_sentences, machine_line, main_table, spread_text

__all__ = [
    "BODIES", "FIGURES", "RESULT", "ROUNDS", "measurements_markdown", "source_digest", "with_compiled_bodies",
    "with_gpu", "with_measurements", "with_round_times",
]  # fmt: skip

RESULT = "bench-cpu.json"
ROUNDS = "round-time-cpu.json"
BODIES = "compiled-bodies-cpu.json"
FIGURES = {
    "draft-length": ("bench-cpu-draft-length.svg", "Speed against the draft length, with the cost model's"),
    "phases": ("bench-cpu-phases.svg", "Milliseconds a token by phase"),
}
"""Figures of the report that the README shows, by name: files beside the JSON, and what to call them."""

_COLUMNS = (0, 1, 2, 5, 6, 7, 8)
"""Of the report's table of a setting: those of the README's."""


def measurements_markdown(report: Report) -> str:
    """What the README says of a benchmark."""
    chosen = report.plan.chosen
    lines = [
        f"{machine_line(report)}; prompts: {report.prompts}, {report.plan.lengths[0]} new tokens each. "
        "Decoders take turns in one process; medians over pairs, quartiles in brackets. "
        f"{noise_sentence(report)}",
        "",
        f"**{chosen} over each baseline**, ratio of tokens a second:",
        "",
        *markdown_table(*against_baselines(report)),
        "",
        "The tuned model alone and the large model alone, speculating or not, sample from other laws; they "
        "are here for their speed.",
        "",
        *_loss_lines(report),
    ]
    for result in report.grid():
        if result.setting.batch == report.plan.batches[0]:
            heads, rows = main_table(report, result)
            shown = [name for name in (row[0] for row in rows) if "K=" not in name or "K=auto" in name]
            kept = [[row[column] for column in _COLUMNS] for row in rows if row[0] in shown]
            title = f"**{result.setting.label}**, {result.comparison.runs} runs of each:"
            lines += ["", title, "", *markdown_table([heads[column] for column in _COLUMNS], kept)]
    for file, title in FIGURES.values():
        lines += ["", f"![{title}](bench/results/{file})"]
    return "\n".join(lines)


def _loss_lines(report: Report) -> list[str]:
    found = [loss for loss in losses(report) if loss.baseline != TUNED]
    if not found:
        return ["It is slower than none of the others in any of these settings."]
    lines = [
        *(f"- {sentence}" for sentence in break_even_sentences(report)),
        "",
        "<details><summary>Where it is slower, and what the split of the time says of it</summary>",
        "",
        "The tuned model alone is left out: it makes none of the large model's passes.",
        "",
    ]
    lines += [f"- {loss.label}, {loss.baseline}: {spread_text(loss.ratio)}; {loss.reason}." for loss in found]
    return [*lines, "", "</details>"]


def source_digest(source: str) -> str:
    """What the figures say they were made of: the SHA-256 of the JSON's text."""
    return hashlib.sha256(source.encode()).hexdigest()


def with_measurements(readme: str, report: Report) -> str:
    """The README with the part between the markers made anew."""
    return with_part(readme, "measurements", measurements_markdown(report))


def with_round_times(page: str, path: Path) -> str:
    """docs/gpu.md with what a round spends on a CPU made anew from the JSON of `round_time`."""
    machine, times = round_time.load(path)
    lines = [f"{machine}:", "", *markdown_table(*round_time.table(times))]
    return with_part(page, "round times", "\n".join(lines))


def with_compiled_bodies(page: str, path: Path) -> str:
    """docs/gpu.md with what torch.compile does on a CPU made anew from the JSON of `compiled_bodies`."""
    machine, times = compiled_bodies.load(path)
    lines = [f"{machine}:", "", *markdown_table(*compiled_bodies.table(times))]
    return with_part(page, "compiled bodies", "\n".join(lines))


def with_gpu(page: str, paths: Iterable[Path], brief: bool = False) -> str:
    """A page with the whole rounds that `make gpu` timed, a table for each card, made anew.

    In `brief` those alone whose draft length the cost model chose.
    """
    lines: list[str] = []
    for path in sorted(paths):
        stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
        if stages.get("engine", {}).get("result"):
            lines += [*_gpu_lines(stages["engine"], brief), ""]
    return with_part(page, "gpu", "\n".join(lines[:-1]))


def _gpu_lines(stage: dict[str, Any], brief: bool) -> list[str]:
    result = stage["result"]
    machine = result["environment"]
    # Whole until it was shortened where it is found, and marked there if the source differs.
    digest, *mark = machine["commit"].split(" ", 1)
    commit = " ".join([digest[:12], *mark])
    heads = [
        "trio, context, batch", "decoder", "acceptance", "tokens a round", "ms a round", "times its bytes",
        "tokens/s", "times naive EFT", "times large alone", "host us",
    ]  # fmt: skip
    rows: list[list[str]] = []
    rounds: dict[int, int] = {}
    for row in result["rows"]:
        if row.get("kind") == "simulated" and row["decoder"] != PLAIN:
            rounds[row["batch"]] = row["rounds_a_window"]
        if "round_milliseconds" not in row or (brief and row["decoder"] not in BY_COST_MODEL):
            continue
        times = row.get("times", {})
        rows.append([
            f"{row['trio'].split(',')[0]}, {row['context']}, {row['batch']}",
            row["decoder"],
            "-" if row["acceptance"] is None else str(row["acceptance"]),
            f"{row['tokens_per_round']:.2f}",
            f"{row['round_milliseconds']['median']:.2f}",
            f"{row['times_roofline']:.2f}",
            f"{row['tokens_per_second']['median']:.0f}",
            *(
                spread_text(Spread(**times[other])) if other in times else "-"
                for other in (NAIVE, ALONE)
            ),
            f"{row['host_microseconds']:.0f}",
        ])  # fmt: skip
    return [
        f"{machine['device']}; torch {machine['torch']}, Triton {machine['triton']}, transformers "
        f"{machine['transformers']}, CUDA {machine['cuda']}; commit {commit}; a copy moves "
        f"{result['copy_bytes_per_second'] / 1e12:.2f} TB/s, read and written. Medians over windows, "
        "quartiles of ratios in brackets. Llama's and Qwen's rows are simulated: random weights in bfloat16 "
        "at the true shapes, each drafted token accepted with the stated chance. Their windows have "
        f"{', '.join(f'{count} rounds at batch {batch}' for batch, count in sorted(rounds.items()))}; the "
        f"stage {stage['status']} after {stage['seconds']:.0f} seconds.",
        "",
        *markdown_table(heads, rows),
    ]


def main() -> None:
    """Rewrite README.md, its figures and docs/gpu.md from bench/results in the current folder."""
    folder = Path("bench") / "results"
    source = (folder / RESULT).read_text(encoding="utf-8")
    report = Report.load(folder / RESULT)
    drawn = figures(report)
    for name, (file, _) in FIGURES.items():
        (folder / file).write_text(svg(drawn[name][1], source_digest(source)), encoding="utf-8")
    page = Path("docs") / "gpu.md"
    gpus = list(folder.glob("gpu-*.json"))
    text = with_round_times(page.read_text(encoding="utf-8"), folder / ROUNDS)
    text = with_compiled_bodies(text, folder / BODIES)
    page.write_text(with_gpu(text, gpus), encoding="utf-8")
    readme = Path("README.md")
    text = with_measurements(readme.read_text(encoding="utf-8"), report)
    readme.write_text(with_gpu(text, gpus, brief=True), encoding="utf-8")


if __name__ == "__main__":
    main()
