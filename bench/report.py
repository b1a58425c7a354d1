"""A benchmark as one HTML page that stands alone, and as the texts that the page and the README share."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from .analysis import (
    Loss,
    baselines_of,
    break_evens,
    losses,
    noise,
    noise_sentence,
    predictions,
    roofline_share,
)
from .benchmark import Report, Result
from .comparison import Measurement, Spread
from .machine import Environment
from .plan import AGAIN, BASELINES, LARGE

__all__ = [
    "Table",
    "against_baselines",
    "break_even_sentences",
    "html_page",
    "machine_line",
    "main_table",
    "spread_text",
    "sweep_rows",
]

Table = tuple[list[str], list[list[str]]]
"""Column heads, and rows of cells."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222 }
body { max-width: 80rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem } h3 { font-size: 1rem }
table { border-collapse: collapse; font-size: 13px; margin: .5rem 0 1rem }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top }
td, th { white-space: nowrap } .wide th { text-align: left }
.wide td { white-space: normal; text-align: left } .wide td:nth-child(2) { white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { border-bottom: 2px solid #888 }
.scroll { overflow-x: auto } figure { margin: 1rem 0 } figure svg { max-width: 100%; height: auto }
figcaption, .note { color: #555; font-size: 13px }
.warning { background: #fff0e0; border: 2px solid #d55e00; padding: .6rem 1rem; font-weight: 600 }
code { background: #f4f4f4; padding: .1rem .3rem }
"""

_TERMS = {
    "tokens/s": "new tokens of all sequences over the wall-clock time of the call, prefill included",
    "ratio": "taken within pairs: two decoders on the same prompts in the same turn, with the same seed",
    "run": "the answer to one batch of prompts; where runs pause for each other, who is faster than the "
    "reference answers again until the reference has, and the mean counts",
    "first token": "milliseconds until the first new tokens of a sequence",
    "per token": "milliseconds a sequence waits for a token after its first; tokens of one round share its "
    "time",
    "tokens a round": "new tokens a sequence gains with each call of the large model",
    "acceptance": "share of the tested drafted tokens that were accepted; a round tests up to the first it "
    "rejects",
    "expected": "mean of the sum of min(p, q) over the tested tokens: what the token rule's acceptance "
    "estimates and the block rule's exceeds",
    "memory": "most held in the warm-up run, everything loaded included: on a GPU what torch allocated "
    "there, on a CPU the whole process's. It grows from decoder to decoder where each has caches of its own",
}


def machine_line(report: Report) -> str:
    """Where and with what it was measured, in one line."""
    dtypes = ", ".join(dict.fromkeys(model["dtype"] for model in report.models))
    return environment_line(report.environment, dtypes, report.commit)


def environment_line(machine: Environment, dtypes: str, commit: str | None) -> str:
    """`machine_line` of its parts."""
    where = ", ".join(machine.accelerators) or machine.processor
    return f"{where}; {dtypes}; {machine.software}; commit {commit or 'not known'}"


def spread_text(spread: Spread, digits: int = 2) -> str:
    """A median, with its quartiles in brackets."""
    lower, upper = spread.lower_quartile, spread.upper_quartile
    return f"{spread.median:.{digits}f} [{lower:.{digits}f}, {upper:.{digits}f}]"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def against_baselines(report: Report) -> Table:
    """The chosen decoder over each baseline, a column a setting of the grid."""
    grid = report.grid()
    rows = []
    for name in baselines_of(report):
        cells = [
            spread_text(result.comparison.ratio(report.plan.chosen, name))
            if name in result.comparison
            else "-"
            for result in grid
        ]
        rows.append([name, *cells])
    return ["over", *(result.setting.label for result in grid)], rows


def main_table(report: Report, result: Result) -> Table:
    """A row a decoder of one setting, with everything but the split of the time."""
    heads = [
        "decoder", "tokens/s", "times naive EFT", "first token ms", "per token ms p50 / p95 / p99",
        "tokens a round", "acceptance", "expected", "large calls a token", "memory MiB",
    ]  # fmt: skip
    if report.bandwidth is not None:
        heads.append("of the roofline")
    return heads, [_main_row(report, row) for row in result.comparison.measurements]


def _main_row(report: Report, row: Measurement) -> list[str]:
    waits = row.milliseconds_per_token
    cells = [
        row.name,
        spread_text(row.tokens_per_second, 0),
        spread_text(row.ratio),
        f"{1000 * row.seconds_to_first_token.median:.1f}",
        f"{waits.p50:.2f} / {waits.p95:.2f} / {waits.p99:.2f}",
        f"{row.tokens_per_round:.2f}",
        _number(row.acceptance_rate, 3),
        _number(row.expected_acceptance, 3),
        f"{row.large_calls_per_token:.2f}",
        "-" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**20:.0f}",
    ]
    if report.bandwidth is not None:
        share = roofline_share(report, row)
        cells.append("-" if share is None else f"{100 * share:.0f}%")
    return cells


def _phase_table(result: Result) -> Table:
    phases = list(result.comparison.measurements[0].milliseconds_per_round)
    rows = []
    for row in result.comparison.measurements:
        spent = [row.milliseconds_per_round[phase] for phase in phases]
        rows.append(
            [row.name, *(f"{value:.3f}" for value in (*spent, sum(spent))), f"{row.prefill_milliseconds:.1f}"]
        )
    return ["ms a round", *phases, "in all", "prefill"], rows


def _prediction_table(result: Result) -> Table:
    rows = [
        [
            row.name, f"{row.acceptance:.3f}", f"{row.cost_ratio:.3f}", f"{row.drafted:.2f}",
            f"{row.tokens_per_round:.2f}", f"{row.measured_tokens_per_round:.2f}",
            f"{row.over_naive:.2f}", f"{row.measured_over_naive:.2f}",
            f"{row.over_large:.2f}", f"{row.measured_over_large:.2f}",
        ]
        for row in predictions(result.comparison)
    ]  # fmt: skip
    heads = [
        "decoder", "a", "c", "K", "tokens a round, model", "measured", "over naive, model", "measured",
        "over large, model", "measured",
    ]  # fmt: skip
    return heads, rows


def sweep_rows(report: Report) -> Table:
    """A row a setting in which one quantity is varied."""
    rows = []
    for result in report.results:
        if result.setting.varied is not None:
            row = result.comparison[report.plan.chosen]
            ratios = (row.ratio, result.comparison.ratio(row.name, LARGE))
            cells = [result.setting.label, *map(spread_text, ratios), f"{row.tokens_per_round:.2f}"]
            rows.append([*cells, _number(row.acceptance_rate, 3)])
    return ["setting", "over naive EFT", "over large alone", "tokens a round", "acceptance"], rows


def _loss_table(found: Sequence[Loss]) -> Table:
    rows = [[f"{loss.label}: {loss.baseline}", spread_text(loss.ratio), loss.reason] for loss in found]
    return ["slower than", "ratio", "why, from the split of the time"], rows


def break_even_sentences(report: Report, baselines: Sequence[str] = BASELINES) -> list[str]:
    """Up to which batch the chosen decoder is faster than some baselines, by temperature and baseline."""
    sentences = []
    for row in break_evens(report):
        if row["baseline"] not in baselines:
            continue
        until = (
            f"faster at every batch measured, up to {row['largest_measured']}"
            if row["batch"] is None
            else f"break-even at a batch of {row['batch']:.1f}"
            if row["batch"] > min(report.plan.batches)
            else f"slower from a batch of {row['batch']:.0f} on"
        )
        sentences.append(f"T={row['temperature']:g}, against {row['baseline']}: {until}.")
    return sentences


def _projection_table(report: Report) -> Table:
    heads = [
        "projection", "weights L / small", "bandwidth of a device", "a", "c", "L's step", "best K",
        "tokens a round", "over naive", "over L alone", "tokens/s at most",
    ]  # fmt: skip
    rows = [
        [
            f"{row.large} over {row.devices} device{'s' if row.devices > 1 else ''}, {row.small}",
            f"{row.large_bytes / 1e9:.1f} / {row.small_bytes / 1e9:.1f} GB",
            f"{row.bandwidth / 1e9:.0f} GB/s",
            f"{row.acceptance:.3f}", f"{row.cost_ratio:.3f}", f"{row.large_milliseconds:.1f} ms",
            str(row.drafted), f"{row.tokens_per_round:.2f}", f"{row.over_naive:.2f}", f"{row.over_large:.2f}",
            f"{row.tokens_per_second:.0f}",
        ]
        for row in report.projections
    ]  # fmt: skip
    return heads, rows


def html_page(report: Report, drawings: dict[str, tuple[str, str]]) -> str:
    """The page.

    Args:
        drawings: by name, the caption and the SVG of each figure, as text.
    """
    simulated = report.simulated_acceptance
    title = "speculative-eft benchmark" + (" (simulated acceptance)" if simulated is not None else "")
    parts = [f"<h1>{title}</h1>"]
    if simulated is not None:
        parts.append(
            '<p class="warning">Simulated: networks of random weights at their true shapes, with an '
            f"acceptance of {simulated:g} forced on every draft. Times are real; acceptance and tokens a "
            "round are not measurements.</p>"
        )
    unfinished = len(report.plan.settings()) - len(report.results)
    if unfinished:
        parts.append(f'<p class="warning">Unfinished: {unfinished} settings are still to be measured.</p>')
    models = [
        [
            str(model["role"]), str(model["name"] or model["architecture"]),
            f"{model['parameters'] / 1e6:.1f}M", str(model["dtype"]), str(model["device"]),
        ]
        for model in report.models
    ]  # fmt: skip
    parts += [
        f"<p>{_escape(machine_line(report))}. Started {_escape(report.started)}.</p>",
        f"<p><code>{_escape(report.command)}</code></p>",
        f"<p>Prompts: {_escape(report.prompts)}. Every decoder generates the same number of tokens; decoders "
        "take turns in one process, after one warm-up each. Medians, quartiles in brackets.</p>",
        _table((["model", "name", "parameters", "dtype", "device"], models)),
        f"<p><b>{_escape(noise_sentence(report))}</b></p>",
        f"<h2>{_escape(report.plan.chosen)} over each baseline</h2>",
        "<p>Ratio of tokens a second; above 1 speculative EFT is faster. The tuned model alone and the large "
        "model alone, speculating or not, sample from other laws: they are here for their speed.</p>",
        _table(against_baselines(report)),
    ]
    lost = losses(report)
    parts.append("<h3>Where it is slower, and why</h3>")
    parts.append(_table(_loss_table(lost), wide=True) if lost else "<p>Nowhere in this benchmark.</p>")
    sentences = break_even_sentences(report)
    if sentences:
        parts += ["<h3>Break-even batch size</h3>", _list(sentences)]
    for name, (caption, drawing) in drawings.items():
        parts.append(
            f'<figure id="{name}">{drawing[drawing.index("<svg") :]}<figcaption>{_escape(caption)}'
            "</figcaption></figure>"
        )
    parts.append("<h2>All measurements</h2>")
    for result in report.results:
        parts += [
            f"<h3>{_escape(result.setting.label)}: {result.comparison.runs} runs of each</h3>",
            _table(main_table(report, result)),
            _table(_phase_table(result)),
        ]
        if result.setting.varied is None:
            parts.append(_table(_prediction_table(result)))
    parts += [
        "<h2>The cost model</h2>",
        "<p>With a the chance of acceptance of one token (the expected one above) and c the time of a small "
        "model's step over the large model's (from naive EFT's own steps), a round of K drafted tokens gives "
        "(1 - a<sup>K+1</sup>) / (1 - a) tokens and costs (K + 1) c + 1 + c large steps; naive EFT costs "
        "1 + 2 c a token. It counts neither verification nor launches, and takes a pass over K + 1 rows to "
        "cost as much as one over a single row: where a measurement falls short of it, the split of the time "
        "tells which of these is to blame.</p>",
    ]
    if report.projections:
        parts += [
            "<h2>Projection (not measured)</h2>",
            "<p>The cost model for machines that were not at hand. Steps are taken to read their weights at "
            "the full bandwidth of their devices and to do nothing else, so the tokens a second are an upper "
            "bound. The acceptance a is an input, not a finding: what those models reach depends on them and "
            "on the text.</p>",
            _table(_projection_table(report)),
        ]
    spreads = noise(report)
    if spreads:
        rows = [[label, spread_text(spread, 3)] for label, spread in spreads.items()]
        parts += [
            "<h2>Noise</h2>",
            f"<p>{_escape(report.plan.chosen)} over its twin, the same decoder measured again in the same "
            f"turns (the rows ending in “{AGAIN.strip()}”).</p>",
            _table((["setting", "ratio of a decoder to itself"], rows)),
        ]
    parts += ["<h2>Terms</h2>", _list(f"{term}: {meaning}." for term, meaning in _TERMS.items())]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _escape(value: Any) -> str:
    return html.escape(str(value))


def _list(sentences: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{_escape(sentence)}</li>' for sentence in sentences)}</ul>"


def _table(table: Table, wide: bool = False) -> str:
    heads, rows = table
    kind = ' class="wide"' if wide else ""
    head = "".join(f"<th>{_escape(cell)}</th>" for cell in heads)
    body = "".join(f"<tr>{''.join(f'<td>{_escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
