"""The report's pictures as SVG; matplotlib, of the extra `[bench]`, is imported when one is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from speculative_eft.models.extras import install_command

from .analysis import baselines_of, predictions
from .benchmark import Report, Result
from .comparison import PHASES, Comparison, Spread
from .cost_model import measured_cost_ratio, speed_up_over_naive
from .plan import LARGE, NAIVE, DraftTokens, eft_name

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figures", "require_matplotlib", "svg"]

# Okabe and Ito's colours, which the colour-blind tell apart too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_PHASE_COLOURS = dict(zip(PHASES, ("#56B4E9", "#0072B2", "#009E73", "#E69F00", "#999999"), strict=True))
_MARKERS = "osD^vP"
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "path",
    # Fixed, so that the same numbers give the same file.
    "svg.hashsalt": "speculative-eft",
}
_INCHES = 9.6


def require_matplotlib() -> None:
    """Raise ImportError, saying what to install, where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise ImportError(
            f"the report's plots need matplotlib: {install_command('bench')}, or give bench --no-html"
        )


def svg(figure: Figure, source: str) -> str:
    """A figure as SVG, with what it was made of as its description."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure.savefig(text, format="svg", metadata={"Date": None, "Description": source})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def figures(report: Report) -> dict[str, tuple[str, Figure]]:
    """By name: the caption and the figure of everything that was measured often enough to be drawn."""
    import matplotlib
    from matplotlib.figure import Figure

    made: dict[str, tuple[str, Figure]] = {}

    def panels(columns: int, height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
        figure = Figure(figsize=(_INCHES, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        return figure, list(axes.flat)

    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        first = [result for result in report.grid() if result.setting.batch == report.plan.batches[0]]
        if first and len(report.plan.draft_tokens) > 1:
            figure, axes = panels(len(first), 3.9)
            for axis, result in zip(axes, first, strict=True):
                _draw_draft_lengths(axis, report, result)
            _legend_below(figure, axes)
            made["draft-length"] = (
                "Speed against the draft length, in times naive EFT: medians over pairs with quartiles. "
                "Dashed: the cost model with the measured acceptance and cost ratio. K=auto stands at the "
                "right.",
                figure,
            )
        drafting = [result for result in first if _longest_drafts(report, result)]
        if drafting:
            figure, axes = panels(len(drafting), 3.4)
            for axis, result in zip(axes, drafting, strict=True):
                _draw_positions(axis, report, result)
            _legend_below(figure, axes)
            made["acceptance"] = (
                "Share of the drafted tokens accepted at each position of the draft, among those whose "
                "predecessors were accepted, for the longest fixed draft.",
                figure,
            )
        grid = report.grid()
        if grid:
            columns = len(report.plan.temperatures)
            rows = math.ceil(len(grid) / columns)
            bars = max(len(_shown_phases(report, result.comparison)) for result in grid)
            figure, axes = panels(columns, rows * (0.9 + 0.24 * bars) + 0.5, rows)
            for axis, result in zip(axes, grid, strict=False):
                _draw_phases(axis, report, result)
            for axis in axes[len(grid) :]:
                axis.remove()
            _legend_below(figure, axes[:1], columns=len(PHASES))
            made["phases"] = (
                "Where the time goes: milliseconds for one new token of any sequence of the batch, by phase, "
                "prefill left out. Less is faster.",
                figure,
            )
        if len(report.plan.batches) > 1 and grid:
            figure, axes = panels(len(report.plan.temperatures), 3.9)
            for axis, temperature in zip(axes, report.plan.temperatures, strict=True):
                _draw_batches(axis, report, temperature)
            _legend_below(figure, axes)
            made["batch"] = (
                f"Speed of {report.plan.chosen} over each baseline against the batch size: medians over "
                "pairs with quartiles. Below 1 the baseline is faster.",
                figure,
            )
        swept = list(dict.fromkeys(r.setting.varied for r in report.results if r.setting.varied is not None))
        if swept:
            columns = min(3, len(swept))
            rows = math.ceil(len(swept) / columns)
            figure, axes = panels(columns, 2.9 * rows + 0.6, rows)
            for axis, name in zip(axes, swept, strict=False):
                _draw_sweep(axis, report, name)
            for axis in axes[len(swept) :]:
                axis.remove()
            _legend_below(figure, axes[:1])
            made["sweeps"] = (
                f"Speed of {report.plan.chosen} over naive EFT and over the large model alone, one quantity "
                "varied at a time: medians over pairs with quartiles.",
                figure,
            )
    if report.simulated_acceptance is not None:
        for _, figure in made.values():
            figure.text(
                0.5, 0.5, "simulated acceptance", fontsize=34, color="#D55E00", alpha=0.15, rotation=18,
                ha="center", va="center",
            )  # fmt: skip
    return made


def _legend_below(figure: Figure, axes: Sequence[Axes], columns: int = 3) -> None:
    """One legend for all panels, under them, where it hides nothing."""
    found: dict[str, Artist] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(str(label), handle)
    figure.legend(handles=list(found.values()), labels=list(found), loc="outside lower center", ncols=columns)


def _draw_draft_lengths(axis: Axes, report: Report, result: Result) -> None:
    comparison = result.comparison
    places: dict[DraftTokens, int] = {count: at for at, count in enumerate(report.plan.draft_tokens)}
    fixed = [count for count in places if isinstance(count, int)]
    predicted = {row.name: row for row in predictions(comparison)}
    for index, rule in enumerate(report.plan.rules):
        rows = [(at, eft_name(rule, count)) for count, at in places.items()]
        rows = [(at, name) for at, name in rows if name in comparison]
        if rows:
            label = f"{rule} rule" if result.setting.temperature > 0 else f"{rule} rule (greedy: all are one)"
            spread = [comparison[name].ratio for _, name in rows]
            # Side by side, so that the bars of the quartiles do not hide each other.
            shift = (index - (len(report.plan.rules) - 1) / 2) * 0.14 if result.setting.temperature > 0 else 0
            axis.errorbar(
                [at + shift for at, _ in rows],
                [value.median for value in spread],
                yerr=_bars(spread),
                color=_COLOURS[index],
                marker=_MARKERS[index],
                linestyle="none",
                capsize=2,
                label=label,
            )
    acceptance = [row.acceptance for name, row in predicted.items() if "K=auto" not in name]
    if acceptance and fixed:
        mean = sum(acceptance) / len(acceptance)
        ratio = measured_cost_ratio(comparison, NAIVE)
        axis.plot(
            [places[count] for count in fixed],
            [speed_up_over_naive(mean, count, ratio) for count in fixed],
            color="#555555",
            linestyle="--",
            label="cost model",
        )
    if LARGE in comparison:
        axis.axhline(comparison[LARGE].ratio.median, color="#999999", linestyle=":", label="large alone")
    axis.axhline(1, color="#999999", linewidth=0.8, label="naive EFT")
    axis.set_xticks(list(places.values()), [str(count) for count in places])
    axis.set_xlabel("drafted tokens a round, K")
    axis.set_ylabel("speed, times naive EFT")
    axis.set_title(result.setting.label, loc="left")
    axis.set_ylim(bottom=0)


def _longest_drafts(report: Report, result: Result) -> list[str]:
    fixed = [count for count in report.plan.draft_tokens if isinstance(count, int)]
    if not fixed:
        return []
    names = [eft_name(rule, max(fixed)) for rule in report.plan.rules]
    return [name for name in names if name in result.comparison]


def _draw_positions(axis: Axes, report: Report, result: Result) -> None:
    longest = 0
    for index, name in enumerate(_longest_drafts(report, result)):
        row = result.comparison[name]
        longest = max(longest, len(row.accepted_by_position))
        axis.plot(
            range(1, len(row.accepted_by_position) + 1),
            row.accepted_by_position,
            color=_COLOURS[index],
            marker=_MARKERS[index],
            label=name.removeprefix("EFT, "),
        )
    axis.set_xticks(range(1, longest + 1))
    axis.set_xlabel("position in the draft")
    axis.set_ylabel("share accepted")
    axis.set_ylim(0, 1.03)
    axis.set_title(result.setting.label, loc="left")


def _shown_phases(report: Report, comparison: Comparison) -> list[str]:
    """The baselines and the chosen decoder; other draft lengths would repeat it."""
    names = [row.name for row in comparison.measurements]
    return [name for name in names if not name.startswith("EFT") and "K=" not in name] + [report.plan.chosen]


def _draw_phases(axis: Axes, report: Report, result: Result) -> None:
    names = _shown_phases(report, result.comparison)
    left = [0.0] * len(names)
    for phase in PHASES:
        widths = [result.comparison[name].phases_per_token[phase] for name in names]
        axis.barh(names, widths, left=left, color=_PHASE_COLOURS[phase], label=phase, height=0.7)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("milliseconds a token")
    axis.set_title(result.setting.label, loc="left")


def _draw_batches(axis: Axes, report: Report, temperature: float) -> None:
    grid = [result for result in report.grid() if result.setting.temperature == temperature]
    grid.sort(key=lambda result: result.setting.batch)
    for index, name in enumerate(baselines_of(report)):
        rows = [
            (result.setting.batch, result.comparison.ratio(report.plan.chosen, name))
            for result in grid
            if name in result.comparison
        ]
        if rows:
            spread = [value for _, value in rows]
            axis.errorbar(
                [batch for batch, _ in rows],
                [value.median for value in spread],
                yerr=_bars(spread),
                color=_COLOURS[index],
                marker=_MARKERS[index],
                capsize=2,
                label=f"over {name}",
            )
    axis.axhline(1, color="#555555", linewidth=0.8)
    axis.set_xscale("log", base=2)
    batches = sorted(report.plan.batches)
    axis.set_xticks(batches, [str(batch) for batch in batches], minor=False)
    axis.set_xlabel("sequences in the batch")
    axis.set_ylabel("ratio of tokens/s")
    axis.set_ylim(bottom=0)
    axis.set_title(f"T={temperature:g}", loc="left")


_SWEPT_AXES = {
    "context": "tokens of each prompt",
    "new_tokens": "tokens generated",
    "alpha": "alpha, weight of F - B",
    "beta": "beta, weight of L - B",
    "conservative_top_p": "conservative filter, top-p",
}


def _draw_sweep(axis: Axes, report: Report, varied: str) -> None:
    first = [result for result in report.grid() if result.setting.batch == report.plan.batches[0]]
    settings = [*first, *(result for result in report.results if result.setting.varied == varied)]
    values = {getattr(result.setting, varied) for result in settings}
    # None, prompts as they are or no filter, has no place among numbers.
    ordered = sorted(value for value in values if value is not None)
    ticks: list[Any] = [*([None] if None in values else []), *ordered]
    plain = "as given" if varied == "context" else "off"
    for index, temperature in enumerate(report.plan.temperatures):
        own = [result for result in settings if result.setting.temperature == temperature]
        own.sort(key=lambda result: ticks.index(getattr(result.setting, varied)))
        for other, style in ((NAIVE, "-"), (LARGE, "--")):
            spread = [result.comparison.ratio(report.plan.chosen, other) for result in own]
            axis.errorbar(
                [ticks.index(getattr(result.setting, varied)) for result in own],
                [value.median for value in spread],
                yerr=_bars(spread),
                color=_COLOURS[index],
                marker=_MARKERS[index],
                linestyle=style,
                capsize=2,
                label=f"T={temperature:g}, over {other}",
            )
    axis.axhline(1, color="#555555", linewidth=0.8)
    axis.set_xticks(range(len(ticks)), [plain if tick is None else f"{tick:g}" for tick in ticks])
    axis.set_xlabel(_SWEPT_AXES[varied])
    axis.set_ylabel("ratio of tokens/s")
    axis.set_ylim(bottom=0)


def _bars(spreads: Sequence[Spread]) -> list[list[float]]:
    """Lengths of error bars from the medians to the quartiles."""
    return [
        [spread.median - spread.lower_quartile for spread in spreads],
        [spread.upper_quartile - spread.median for spread in spreads],
    ]
