"""Tables and sentences of the command line, made from measurements and reports, and its progress bar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from speculative_eft.bench.comparison import Comparison, Spread
    from speculative_eft.bench.regressions import Change
    from speculative_eft.decoding import EFTStats
    from speculative_eft.models import ModelDescription

__all__ = [
    "announce",
    "changes_table",
    "comparison_table",
    "count_text",
    "latency_table",
    "memory_table",
    "models_table",
    "phases_table",
    "progress_bar",
    "size_text",
    "stats_table",
    "text_table",
    "verdict",
]

_NOTHING = "-"


def _table(title: str | None, first: str, *others: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )
    # On a narrow console names wrap, between words, and numbers do not.
    table.add_column(first, overflow="fold", min_width=12)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _with_quartiles(spread: Spread, digits: int) -> str:
    median, lower, upper = (
        f"{value:.{digits}f}" for value in (spread.median, spread.lower_quartile, spread.upper_quartile)
    )
    return f"{median}\n[dim]{lower}-{upper}[/]"


def comparison_table(comparison: Comparison, title: str) -> Table:
    """A row a decoder: speed with its quartiles, and how speculation went."""
    table = _table(
        title,
        "decoder",
        "tokens/s",
        f"ratio to\n{comparison.reference}",
        "tokens\na round",
        "acceptance\nmeasured",
        "\nexpected",
        "L calls\na token",
    )
    for row in comparison.measurements:
        measured = expected = _NOTHING
        if row.acceptance_rate is not None:
            error = (row.acceptance_rate * (1 - row.acceptance_rate) / row.tested_tokens) ** 0.5
            measured, expected = (
                f"{row.acceptance_rate:.3f}\n[dim]±{error:.3f}[/]",
                f"{row.expected_acceptance:.3f}",
            )
        table.add_row(
            row.name,
            _with_quartiles(row.tokens_per_second, 1 if row.tokens_per_second.largest < 100 else 0),
            _with_quartiles(row.ratio, 2),
            f"{row.tokens_per_round:.2f}",
            measured,
            expected,
            f"{row.large_calls_per_token:.2f}",
        )
    return table


def phases_table(comparison: Comparison) -> Table:
    """A row a decoder: where the time of a round goes."""
    phases = list(comparison.measurements[0].milliseconds_per_round)
    table = _table(None, "milliseconds a round", *phases, "in all")
    for row in comparison.measurements:
        values = list(row.milliseconds_per_round.values())
        table.add_row(row.name, *(f"{value:.2f}" for value in (*values, sum(values))))
    return table


def verdict(comparisons: dict[str, Comparison], fast: str, slow: str, alone: str) -> str:
    """One line: how the decoder `fast` did against `slow` and `alone`, by label of the comparison."""
    parts = []
    for label, comparison in comparisons.items():
        over_slow, over_alone = (comparison.ratio(fast, other).median for other in (slow, alone))
        parts.append(f"{over_slow:.2f}x {slow} and {over_alone:.2f}x {alone} at {label}")
        if not comparison.generation_options["do_sample"]:
            row = comparison[fast]
            parts.append(f"{row.same_output} of {len(row.run_tokens)} greedy texts those of {slow}")
    return f"{fast}: {', '.join(parts)} (tokens/s, medians over pairs)."


def stats_table(stats: EFTStats, seed: int, seconds: float) -> Table:
    """Two columns: one call of `generate` in numbers."""
    table = Table.grid(padding=(0, 2))
    rounds = max(stats.rounds, 1)
    split = ", ".join(
        f"{phase} {1000 * spent / rounds:.2f}" for phase, spent in stats.seconds.items() if phase != "prefill"
    )
    acceptance = "nothing was drafted"
    if stats.drafted_tokens:
        acceptance = (
            f"{stats.acceptance_rate:.3f} measured, {stats.expected_acceptance:.3f} expected of the token "
            f"rule; {stats.accepted_tokens} of {stats.drafted_tokens} drafted tokens accepted"
        )
    rows = {
        "seed": str(seed),
        "tokens": f"{stats.emitted_tokens} in {seconds:.2f} s, {stats.emitted_tokens / seconds:.1f} a second",
        "rounds": f"{stats.rounds}, {stats.tokens_per_round:.2f} tokens a round",
        "large calls": f"{stats.large_calls_per_token:.2f} a token",
        "acceptance": acceptance,
        "milliseconds": f"{split} a round; prefill {1000 * stats.seconds.get('prefill', 0.0):.1f}",
    }
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/]", value)
    return table


def size_text(count: int) -> str:
    """Bytes in the unit that suits them."""
    size, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"


def count_text(count: int) -> str:
    """A number of parameters as one says it."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.1f}{name}"
    return str(count)


def models_table(models: Sequence[ModelDescription]) -> Table:
    """A row a model: what it is."""
    table = _table(None, "model", "class", "params", "dtype", "context", "vocab", "chat")
    for model in models:
        table.add_row(
            model.role,
            model.architecture,
            count_text(model.parameters),
            model.dtype,
            "no limit" if model.context is None else f"{model.context:,}",
            f"{model.vocabulary:,}",
            "yes" if model.chat_template else "no",
        )
    return table


def memory_table(models: Sequence[ModelDescription], context: int, batch: int) -> Table:
    """A row a model, and their sum: what it needs for `batch` sequences of `context` tokens."""
    table = _table(None, f"memory for {batch} x {context:,} tokens", "weights", "cache", "in all")
    weights = [model.bytes for model in models]
    caches = [model.cache_bytes_per_token * context * batch for model in models]
    for model, weight, cache in zip(models, weights, caches, strict=True):
        table.add_row(model.role, size_text(weight), size_text(cache), size_text(weight + cache))
    table.add_section()
    table.add_row(
        "in all", size_text(sum(weights)), size_text(sum(caches)), size_text(sum(weights) + sum(caches))
    )
    return table


def latency_table(comparison: Comparison) -> Table:
    """A row a decoder: how long one waits for tokens, and the memory it took."""
    table = _table(None, "milliseconds", "first token", "per token p50", "p95", "p99", "peak memory")
    for row in comparison.measurements:
        waits = row.milliseconds_per_token
        table.add_row(
            row.name,
            f"{1000 * row.seconds_to_first_token.median:.1f}",
            *(f"{value:.2f}" for value in (waits.p50, waits.p95, waits.p99)),
            _NOTHING if row.peak_memory_bytes is None else size_text(row.peak_memory_bytes),
        )
    return table


def text_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Cells that are text already; quartiles in brackets go below their medians, as in other tables."""
    table = _table(title, heads[0], *(head.replace(", ", ",\n") for head in heads[1:]))
    for first, *cells in rows:
        below = (cell.replace(" [", "\n").replace(", ", "-").rstrip("]") for cell in cells)
        table.add_row(escape(first), *below)
    return table


def changes_table(changes: Sequence[Change]) -> Table:
    """A row a decoder and setting of two benchmarks."""
    table = _table("Times naive EFT, and naive EFT's tokens/s", "", "before", "after", "change", "noise", "")
    styles = {"slower": "bold red", "faster": "green", "same": ""}
    label = None
    for change in changes:
        if change.label != label:
            label = change.label
            table.add_section()
            table.add_row(f"[bold]{label}[/]")
        table.add_row(
            f"  {change.name}",
            f"{change.before:.2f}",
            f"{change.after:.2f}",
            f"{100 * change.change:+.1f}%",
            f"{100 * change.tolerance:.1f}%",
            change.verdict,
            style=styles[change.verdict],
        )
    return table


def progress_bar(console: Console) -> Progress:
    """What is measured, how far it is and how long it will take; nothing where there is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def announce(progress: Progress, task: TaskID, what: str, details: str = "") -> None:
    """Put `what` beside the bar; where there is none, print it with its details on a line."""
    progress.update(task, description=what)
    if not progress.console.is_terminal:
        # A log has no bar, but it can tell how far the run is.
        progress.console.print(what + details, markup=False, soft_wrap=True)
