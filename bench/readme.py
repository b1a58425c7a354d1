"""Keeps README and docs equal to the committed measurements: `python -P -m speculative_eft.bench.readme`.

README.md has the ratios, docs/measurements.md everything, docs/gpu.md and docs/cpu.md what a round spends.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer

from . import compiled_bodies, round_time
from .analysis import losses, noise_sentence
from .benchmark import Report
from .comparison import Spread
from .cost_model import expected_tokens
from .engine import ALONE, PLAIN
from .markdown import markdown_table, with_part
from .plan import AGAIN, LARGE, NAIVE, TUNED
from .plots import figures, svg
from .report import against_baselines, break_even_sentences, machine_line, main_table, spread_text

__all__ = ["FIGURES", "RESULT", "pages", "source_digest"]

RESULT = "bench-cpu.json"
_ROUNDS, _BODIES = "round-time-cpu.json", "compiled-bodies-cpu.json"
_SIMULATED = "simulated-qwen2.5-3b-cpu.json"
FIGURES = {
    "draft-length": ("bench-cpu-draft-length.svg", "Speed against the draft length, with the cost model's"),
    "phases": ("bench-cpu-phases.svg", "Milliseconds a token by phase"),
}
"""Figures of the report that the pages show, by name: files beside the JSON, and what to call them."""

_COLUMNS = (0, 1, 2, 5, 6, 7, 8)
"""Of the report's table of a setting: those of the page."""
_GPU_HEADS = (
    "trio, context, batch", "decoder", "acceptance", "tokens a round", "ms a round", "times its bytes",
    "tokens/s", "times naive EFT", "times large alone", "host us",
)  # fmt: skip
_BRIEF_BASELINES = (NAIVE, LARGE)
_BRIEF_GPU_COLUMNS = (0, 1, 3, 4, 6, 7, 8)


def _brief_measurements(report: Report) -> str:
    """What the README says of a benchmark: ratios alone, and where it does not pay."""
    lines = [
        *_ratio_lines(report), "", *_figure_lines("draft-length", "bench/results"), "",
        *(f"- {sentence}" for sentence in break_even_sentences(report, _BRIEF_BASELINES)),
    ]  # fmt: skip
    grid = {result.setting.label for result in report.grid()}
    lines += [
        f"- {loss.label}, against {loss.baseline}: {spread_text(loss.ratio)}."
        for loss in losses(report)
        if loss.label not in grid and loss.baseline in _BRIEF_BASELINES
    ]
    return "\n".join(lines)


def _measurements(report: Report) -> str:
    """What docs/measurements.md says of a benchmark."""
    lines = [*_ratio_lines(report), "", *_loss_lines(report)]
    for result in report.grid():
        if result.setting.batch == report.plan.batches[0]:
            heads, rows = main_table(report, result)
            shown = [name for name in (row[0] for row in rows) if "K=" not in name or "K=auto" in name]
            kept = [[row[column] for column in _COLUMNS] for row in rows if row[0] in shown]
            title = f"**{result.setting.label}**, {result.comparison.runs} runs of each:"
            lines += ["", title, "", *markdown_table([heads[column] for column in _COLUMNS], kept)]
    for name in FIGURES:
        lines += ["", *_figure_lines(name, "../bench/results")]
    return "\n".join(lines)


def _ratio_lines(report: Report) -> list[str]:
    return [
        f"{machine_line(report)}; prompts: {report.prompts}, {report.plan.lengths[0]} new tokens each. "
        "Decoders take turns in one process; medians over pairs, quartiles in brackets. "
        f"{noise_sentence(report)}",
        "",
        f"**{report.plan.chosen} over each baseline**, ratio of tokens a second:",
        "",
        *markdown_table(*against_baselines(report)),
        "",
        "The tuned model alone and the large model alone, speculating or not, sample from other laws; they "
        "are here for their speed.",
    ]


def _figure_lines(name: str, folder: str) -> list[str]:
    file, title = FIGURES[name]
    return [f"![{title}]({folder}/{file})"]


def _loss_lines(report: Report) -> list[str]:
    found = [loss for loss in losses(report) if loss.baseline != TUNED]
    if not found:
        return ["It is slower than none of the others in any of these settings."]
    lines = [
        *(f"- {sentence}" for sentence in break_even_sentences(report)),
        "",
        "Where it is slower, and what the split of the time says of it (the tuned model alone is left out: "
        "it makes none of the large model's passes):",
        "",
    ]
    return lines + [
        f"- {loss.label}, {loss.baseline}: {spread_text(loss.ratio)}; {loss.reason}." for loss in found
    ]


def source_digest(source: str) -> str:
    """What the figures say they were made of: the SHA-256 of the JSON's text."""
    return hashlib.sha256(source.encode()).hexdigest()


def pages(root: Path) -> dict[Path, str]:
    """Each page that quotes bench/results, by its path, as it has to be; `root` is the repository's."""
    folder, docs = root / "bench" / "results", root / "docs"
    report = Report.load(folder / RESULT)
    stages = _engine_stages(folder.glob("gpu-*.json"))
    engines = [stage["result"] for stage in stages]
    machine, times = round_time.load(folder / _ROUNDS)
    bodies_machine, bodies = compiled_bodies.load(folder / _BODIES)
    readme, whole = root / "README.md", docs / "measurements.md"
    gpu, cpu = docs / "gpu.md", docs / "cpu.md"
    return {
        readme: _with_parts(
            readme,
            {"measurements": _brief_measurements(report), "gpu": "\n".join(map(_brief_gpu, engines))},
        ),
        whole: _with_parts(
            whole, {"measurements": _measurements(report), "gpu": "\n\n".join(map(_gpu, stages))}
        ),
        gpu: _with_parts(
            gpu,
            {
                "gpu bars": "\n\n".join(map(_bars, engines)),
                "gpu phases": "\n\n".join(map(_phases, engines)),
                "compiled bodies": _timed(bodies_machine, compiled_bodies.table(bodies)),
            },
        ),
        cpu: _with_parts(
            cpu,
            {
                "simulated": _simulated(Report.load(folder / _SIMULATED)),
                "round times": _timed(machine, round_time.table(times)),
            },
        ),
    }


def _simulated(report: Report) -> str:
    """What docs/cpu.md says of models of random weights."""
    large, *_, base = (model["name"] for model in report.models)
    (result,) = report.grid()
    heads = ["decoder", "tokens/s", "times naive EFT", "over it", "tokens a round"]
    rows = []
    for row in result.comparison.measurements:
        if "K=2" not in row.name and not row.name.endswith(AGAIN):
            over = result.comparison.ratio(report.plan.chosen, row.name)
            cells = [spread_text(row.tokens_per_second, 1), spread_text(row.ratio), spread_text(over)]
            rows.append([row.name, *cells, f"{row.tokens_per_round:.2f}"])
    return "\n".join([
        f"{machine_line(report)}; `{report.command}`: random weights at the shapes of {large} and twice "
        f"{base}, each drafted token accepted with a chance of {report.simulated_acceptance:g}, "
        f"{result.setting.label}, {result.setting.new_tokens} new tokens, prompts included; "
        f"{result.comparison.runs} runs of each in turns. The fourth column is {report.plan.chosen} over "
        "each:",
        "",
        *markdown_table(heads, rows),
    ])  # fmt: skip


def _with_parts(path: Path, parts: Mapping[str, str]) -> str:
    page = path.read_text(encoding="utf-8")
    for name, text in parts.items():
        page = with_part(page, name, text)
    return page


def _timed(machine: str, table: tuple[list[str], list[list[str]]]) -> str:
    return "\n".join([f"{machine}:", "", *markdown_table(*table)])


def _engine_stages(paths: Iterable[Path]) -> list[dict[str, Any]]:
    stages = (json.loads(path.read_text(encoding="utf-8"))["stages"] for path in sorted(paths))
    return [stage["engine"] for stage in stages if stage.get("engine", {}).get("result")]


def _gpu_line(result: dict[str, Any]) -> str:
    machine = result["environment"]
    # Some files hold all its digits. A mark follows where the source differed.
    digest, *mark = (machine["commit"] or "unknown").split(" ", 1)
    commit = " ".join([digest[:12], *mark])
    return (
        f"{machine['device']}; torch {machine['torch']}, Triton {machine['triton']}, transformers "
        f"{machine['transformers']}, CUDA {machine['cuda']}; commit {commit}; a copy moves "
        f"{result['copy_bytes_per_second'] / 1e12:.2f} TB/s, read and written. Medians over windows, "
        "quartiles of ratios in brackets. Llama's and Qwen's rows are simulated: random weights in bfloat16 "
        "at the true shapes, each drafted token accepted with the stated chance."
    )


def _rounds(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if "round_milliseconds" in row]


def _gpu_row(row: dict[str, Any]) -> list[str]:
    times = row.get("times", {})
    return [
        f"{row['trio'].split(',')[0]}, {row['context']}, {row['batch']}",
        row["decoder"],
        "-" if row["acceptance"] is None else str(row["acceptance"]),
        f"{row['tokens_per_round']:.2f}",
        f"{row['round_milliseconds']['median']:.2f}",
        f"{row['times_roofline']:.2f}",
        f"{row['tokens_per_second']['median']:.0f}",
        *(spread_text(Spread(**times[other])) if other in times else "-" for other in (NAIVE, ALONE)),
        f"{row['host_microseconds']:.0f}",
    ]


def _gpu(stage: dict[str, Any]) -> str:
    result = stage["result"]
    rounds = {
        row["batch"]: row["rounds_a_window"]
        for row in _rounds(result)
        if row["kind"] == "simulated" and row["decoder"] != PLAIN
    }
    windows = ", ".join(f"{count} rounds at batch {batch}" for batch, count in sorted(rounds.items()))
    line = (
        f"{_gpu_line(result)} Their windows have {windows}; the stage {stage['status']} after "
        f"{stage['seconds']:.0f} seconds."
    )
    rows = [_gpu_row(row) for row in _rounds(result)]
    return "\n".join([line, "", *markdown_table(list(_GPU_HEADS), rows)])


def _brief_gpu(result: dict[str, Any]) -> str:
    """The best decoder by own weights and the best by copies, at batch 1 and the highest chance."""
    rows = [_gpu_row(row) for row in _best(result)]
    kept = [[row[column] for column in _BRIEF_GPU_COLUMNS] for row in rows]
    table = markdown_table([_GPU_HEADS[column] for column in _BRIEF_GPU_COLUMNS], kept)
    return "\n".join([_gpu_line(result), "", *table])


def _best(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each shape at batch 1 and the highest chance, the best fixed length of each kind of draft."""
    rows = [
        row for row in _rounds(result) if row["batch"] == 1 and row["trio"] != "demo" and row["acceptance"]
    ]
    highest = max((row["acceptance"] for row in rows), default=0.0)
    best: dict[tuple[str, int, str], dict[str, Any]] = {}
    for row in rows:
        kind, is_fixed, _ = row["decoder"].rpartition(", K=")
        if row["acceptance"] == highest and is_fixed:
            key = (row["trio"], row["context"], kind)
            best[key] = max(best.get(key, row), row, key=_tokens_by_chance_a_millisecond)
    return list(best.values())


def _tokens_by_chance(row: dict[str, Any]) -> float:
    """Tokens a round that its chance of acceptance promises; a window's draws give some more or fewer."""
    return expected_tokens(row["acceptance"], row["mean_drafted"])


def _tokens_by_chance_a_millisecond(row: dict[str, Any]) -> float:
    return _tokens_by_chance(row) / float(row["round_milliseconds"]["median"])


def _bars(result: dict[str, Any]) -> str:
    rounds, rows = _rounds(result), []
    for row in _best(result):
        cells = [f"{row['trio'].split(',')[0]}, {row['context']}", row["decoder"]]
        for other in (NAIVE, ALONE):
            milliseconds = next(
                reference["round_milliseconds"]["median"]
                for reference in rounds
                if reference["decoder"] == other
                and all(reference[key] == row[key] for key in ("trio", "context", "batch"))
            )
            ratio = milliseconds * _tokens_by_chance_a_millisecond(row)
            at_bytes = row["times_at_the_roofline"][other] * _tokens_by_chance(row) / row["tokens_per_round"]
            cells += [f"{row['times'][other]['median']:.2f} ({ratio:.2f})", f"{at_bytes:.2f}"]
        rows.append(cells)
    heads = ["trio, context", "decoder", "times naive EFT", "by bytes", "times large alone", "by bytes"]
    return "\n".join(markdown_table(heads, rows))


def _phases(result: dict[str, Any]) -> str:
    rows = [row for row in result["rows"] if "phase_microseconds" in row]
    names = list(rows[0]["phase_microseconds"]) if rows else []
    cells = [
        [
            f"{row['trio'].split(',')[0]}, {row['context']}, {row['batch']}",
            str(row["drafted"]),
            *(f"{row['phase_microseconds'][name]['median'] / 1000:.2f}" for name in names),
        ]
        for row in rows
    ]
    return "\n".join(markdown_table(["trio, context, batch", "K", *names], cells))


def main() -> None:
    """Rewrite the pages and the figures from bench/results in the current folder."""
    folder = Path("bench") / "results"
    source = (folder / RESULT).read_text(encoding="utf-8")
    drawn = figures(Report.load(folder / RESULT))
    for name, (file, _) in FIGURES.items():
        (folder / file).write_text(svg(drawn[name][1], source_digest(source)), encoding="utf-8")
    for path, text in pages(Path()).items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    # No option, but --help and a mistake rewrite nothing.
    typer.run(main)
