"""`speculative-eft bench`: decoders against each other, a report of it, and reports against each other."""

from __future__ import annotations

import math
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .bench.published import SHAPES
from .command_options import (
    DRAFTING,
    LAW,
    MODELS,
    OUTPUT,
    SAMPLING,
    Acceptance,
    LargeBase,
    ModelDtype,
    SmallBase,
    SmallTuned,
    between,
    check_writable,
    choice,
    draft_tokens_value,
    each,
    in_a_folder,
    load_models,
    may_compile,
    option,
    seed_value,
    tokenizer_of,
    trio_or_demo,
    weight_values,
)

if TYPE_CHECKING:
    from .bench.against import Line
    from .bench.benchmark import Report
    from .models import EFTModels

__all__ = ["bench_app"]

_PLAN, _SIMULATION = "What is measured", "Simulation and projection"

bench_app = typer.Typer(
    help="Measure speculative EFT against every baseline, and report it.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)


def _program(value: str | None) -> str | None:
    """The program's place, as a shell would find it."""
    found = value if value is None else which(value)
    if value is not None and found is None:
        raise typer.BadParameter(f"there is no program {value!r}.")
    return found


def _projection(value: str) -> tuple[str, str, int]:
    """LARGE/SMALL@DEVICES taken apart."""
    pair, _, devices = value.partition("@")
    large, _, small = pair.partition("/")
    if not (large and small) or not (devices or "1").isdigit() or int(devices or 1) < 1:
        raise typer.BadParameter(f"{value!r} is not LARGE/SMALL@DEVICES, such as llama-2-70b/llama-2-7b@2.")
    for name in (large, small):
        if name not in SHAPES:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(SHAPES)}.")
    return large, small, int(devices or 1)


_FULL: dict[str, tuple[Any, ...]] = {
    "temperatures": (1.0, 0.0),
    "batches": (1, 4, 16),
    "contexts": (256, 1024),
    "lengths": (128, 32, 512),
    "alphas": (1.0, 0.5, 1.5),
    "betas": (1.0, 0.5, 1.5),
    "conservative_top_ps": (0.9,),
    "rules": ("block", "token", "shared_seed"),
    "draft_tokens": (1, 2, 3, 4, 5, 6, 8, "auto"),
}
_QUICK: dict[str, tuple[Any, ...]] = {
    "temperatures": (1.0, 0.0),
    "batches": (1, 4),
    "contexts": (),
    "lengths": (40,),
    "alphas": (1.0,),
    "betas": (1.0,),
    "conservative_top_ps": (),
    "rules": ("block",),
    "draft_tokens": (2, 4, 8, "auto"),
}
_FEW_PROMPTS, _SIMULATED_PROMPTS = 7, 12
"""Of a short plan, and of simulated models, which may be large. The bundled set has more: what they draw
moves the ratio of one draft length to another by several percent."""


@bench_app.callback()
def bench(
    invocation: typer.Context,
    large: LargeBase = None,
    tuned: SmallTuned = None,
    base: SmallBase = None,
    dtype: ModelDtype = "auto",
    device: Annotated[str | None, option("cpu, cuda, cuda:1...", "TEXT", MODELS)] = None,
    prompts: Annotated[
        Path | None,
        option(
            "A line each, or .jsonl with a field prompt; the bundled held-out set unless given.",
            "FILE",
            _PLAN,
            exists=True,
            dir_okay=False,
            readable=True,
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", rich_help_panel=_PLAN, help="A short plan; the options below replace its parts."
        ),
    ] = False,
    temperature: Annotated[
        list[float] | None,
        option(
            "0 is greedy; may be repeated.",
            "X",
            _PLAN,
            callback=each(between(0, math.inf)),
            show_default="1, 0",
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        option("Sequences decoded together; may be repeated.", "N", _PLAN, min=1, show_default="1, 4, 16"),
    ] = None,
    context: Annotated[
        list[int] | None,
        option("Also prompts of that many tokens; may be repeated.", "N", _PLAN, min=1),
    ] = None,
    length: Annotated[
        list[int] | None,
        option("New tokens; may be repeated, the first is used elsewhere.", "N", _PLAN, min=1),
    ] = None,
    draft_tokens: Annotated[
        list[Any] | None,
        option("Tokens drafted a round; may be repeated.", "K|auto", DRAFTING, parser=draft_tokens_value),
    ] = None,
    acceptance: Annotated[
        list[Any] | None, choice(Acceptance, "Rule; may be repeated, the first is used elsewhere.", DRAFTING)
    ] = None,
    alpha: Annotated[
        list[float] | None,
        option(
            "Scale of F - B; may be repeated, the first is used elsewhere.", "X", LAW, callback=weight_values
        ),
    ] = None,
    beta: Annotated[
        list[float] | None,
        option(
            "Scale of L - B; may be repeated, the first is used elsewhere.", "X", LAW, callback=weight_values
        ),
    ] = None,
    conservative_top_p: Annotated[
        list[float] | None,
        option(
            "Also with this conservative filter; may be repeated.",
            "X",
            LAW,
            callback=each(between(0, 1, without_low=True)),
        ),
    ] = None,
    repeats: Annotated[int, option("Runs on each batch of prompts.", "N", SAMPLING, min=1)] = 1,
    seed: Annotated[int, option("Of the first turn.", "N", SAMPLING, callback=seed_value)] = 0,
    simulate_acceptance: Annotated[
        float | None,
        option(
            "Random weights at the models' shapes, drafts accepted with this chance. Models may be named by "
            "shape (llama-2-7b...).",
            "X",
            _SIMULATION,
            callback=between(0, 1),
        ),
    ] = None,
    project: Annotated[
        list[Any] | None,
        option(
            "Project to shapes that share devices; may be repeated.",
            "LARGE/SMALL@DEVICES",
            _SIMULATION,
            parser=_projection,
            show_default="llama-2-70b/llama-2-7b@2",
        ),
    ] = None,
    bandwidth: Annotated[
        float,
        option(
            "GB/s of a projected device's memory.",
            "X",
            _SIMULATION,
            callback=between(0, math.inf, without_low=True),
        ),
    ] = 3350.0,
    output: Annotated[
        Path, option("Writes PREFIX.json and PREFIX.html.", "PREFIX", OUTPUT, callback=in_a_folder)
    ] = Path("speculative-eft-bench"),
    against: Annotated[
        str | None,
        option(
            "Another version's speculative-eft, which measures the same in turns with this one, into "
            "PREFIX-against.json, for both to be compared; status 1 if this one is slower anywhere.",
            "PROGRAM",
            OUTPUT,
            callback=_program,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", rich_help_panel=OUTPUT, help="Go on where PREFIX.json ends.")
    ] = False,
    with_html: Annotated[
        bool,
        typer.Option(
            "--html/--no-html", rich_help_panel=OUTPUT, help="The HTML report, which needs matplotlib."
        ),
    ] = True,
) -> None:
    """Measure speculative EFT and every baseline, interleaved in one process, and write a report."""
    if invocation.invoked_subcommand is not None:
        return
    from .bench.against import inherited_line
    from .bench.plots import require_matplotlib

    # The other version is told what this one was told.
    line = inherited_line()
    if line is not None:
        against = None
    if with_html:
        require_matplotlib()
    json_file, other_file = _with_suffix(output, ".json"), _with_suffix(output, "-against.json")
    for file in (json_file, other_file) if against else (json_file,):
        if file.exists() != resume:
            what = "does not exist" if resume else "exists; --resume goes on with it"
            raise typer.BadParameter(f"{file} {what}.", param_hint="'--resume'" if resume else "'--output'")
    pages = (_with_suffix(output, ".html"),) if with_html else ()
    for file in (json_file, *pages, *((other_file,) if against else ())):
        check_writable(file, "'--output'")
    if simulate_acceptance is not None and prompts is not None:
        raise typer.BadParameter("a simulation has no text to take prompts from.", param_hint="'--prompts'")
    swept = _swept(
        _QUICK if quick else _FULL,
        temperatures=temperature,
        batches=batch,
        contexts=context,
        lengths=length,
        alphas=alpha,
        betas=beta,
        conservative_top_ps=conservative_top_p,
        rules=acceptance,
        draft_tokens=draft_tokens,
    )
    out = Console(highlight=False)
    err = Console(stderr=True, highlight=False, quiet=line is not None)
    models = _models(large, tuned or [], base, dtype, device, simulate_acceptance, err)

    from .bench.benchmark import Report, check_contexts, new_report
    from .bench.plan import Plan

    plan = Plan(**swept, repeats=repeats, least_runs=4 if quick else 6, seed=seed)
    ids, described = _prompt_ids(models, prompts, quick, simulate_acceptance)
    check_contexts(models, plan, ids)
    command = shlex.join(["speculative-eft", *sys.argv[1:]])
    report = new_report(models, plan, command, described, simulate_acceptance)
    if resume:
        report = _resumed(json_file, report)
    _measure(models, ids, report, output, err, line, against)
    _add_projections(report, project or [("llama-2-70b", "llama-2-7b", 2)], bandwidth)
    _write(report, json_file, with_html)
    _show(report, out)
    written = f"Written: {json_file}" + (f" and {_with_suffix(output, '.html')}" if with_html else "")
    out.print(written, markup=False, soft_wrap=True)
    if against is not None:
        _show_changes(Report.load(other_file), report, out)


def _swept(defaults: dict[str, tuple[Any, ...]], **given: list[Any] | None) -> dict[str, tuple[Any, ...]]:
    """The values of each of the plan's quantities: those that were given, or else the plan's own."""
    swept = defaults | {name: tuple(values) for name, values in given.items() if values}
    for name in ("contexts", "conservative_top_ps"):
        swept[name] = (None, *swept[name])
    for name, values in swept.items():
        if len(set(values)) < len(values):
            raise typer.BadParameter(
                f"{name.replace('_', ' ')} has a value twice: {', '.join(map(str, values))}."
            )
    return swept


def _with_suffix(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _models(
    large: str | None,
    tuned: list[str],
    base: str | None,
    dtype: str,
    device: str | None,
    simulate_acceptance: float | None,
    err: Console,
) -> EFTModels:
    named = trio_or_demo(large, tuned, base, dtype)
    if simulate_acceptance is None:
        return load_models(*named, device, err)
    from transformers.utils import logging

    from .bench.simulation import random_models

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    with err.status("Drawing random weights"):
        models = random_models(*named, device)
    with may_compile("Preparing the models", err):
        models.runners()
    return models


def _prompt_ids(
    models: EFTModels, file: Path | None, quick: bool, simulate_acceptance: float | None
) -> tuple[list[list[int]], str]:
    """Prompts as token ids, and where they came from."""
    if simulate_acceptance is not None:
        import torch

        most = _FEW_PROMPTS if quick else _SIMULATED_PROMPTS
        drawn = torch.randint(models.vocab_size, (most, 32), generator=torch.Generator().manual_seed(0))
        return drawn.tolist(), f"{most} of 32 random tokens"
    from .bench.prompts import read_prompt_file
    from .models.demo import held_out_prompts

    texts = held_out_prompts() if file is None else read_prompt_file(file)
    if file is None and quick:
        texts = texts[:_FEW_PROMPTS]
    tokenizer = tokenizer_of(models)
    where = "of the bundled held-out set" if file is None else f"of {file.name}"
    return [tokenizer(text).input_ids for text in texts], f"{len(texts)} {where}"


def _resumed(file: Path, fresh: Report) -> Report:
    """The report of a run that was interrupted, if it is of what would be measured now."""
    from .bench.benchmark import Report

    saved = Report.load(file)
    for name in ("plan", "environment", "commit", "models", "prompts", "simulated_acceptance"):
        then, now = getattr(saved, name), getattr(fresh, name)
        if then != now:
            raise ValueError(
                f"{file} cannot be resumed: another {name.replace('_', ' ')} ({then} then, {now} now)"
            )
    return saved


def _measure(
    models: EFTModels,
    ids: list[list[int]],
    report: Report,
    output: Path,
    err: Console,
    line: Line | None,
    against: str | None,
) -> None:
    """What the report does not have yet, in turns with the version at the line's other end, or `against`."""
    from . import console_tables as tables
    from .bench.against import other_version
    from .bench.benchmark import Report, missing_settings, run_benchmark, total_runs

    with ExitStack() as stack:
        if against is not None:
            arguments = [*sys.argv[1:], "--output", str(_with_suffix(output, "-against")), "--no-html"]
            # What is resumed may have been interrupted after the other version's last setting.
            other_file = _with_suffix(output, "-against.json")
            is_done = other_file.exists() and not missing_settings(Report.load(other_file))
            line = stack.enter_context(other_version(against, arguments, is_done))
        progress = stack.enter_context(tables.progress_bar(err))
        task = progress.add_task("Measuring", total=total_runs(report, len(ids)))
        run_benchmark(
            models,
            ids,
            report,
            on_setting=lambda setting: tables.announce(progress, task, f"Measuring {setting.label}"),
            on_run=lambda: progress.advance(task),
            on_result=lambda: report.save(_with_suffix(output, ".json")),
            give_way=(lambda: None) if line is None else line.give_way,
        )


def _add_projections(report: Report, asked: list[tuple[str, str, int]], bandwidth: float) -> None:
    """Projections with the acceptance that the chosen decoder met in the first setting."""
    from .bench.cost_model import project

    row = report.results[0].comparison[report.plan.chosen]
    if row.expected_acceptance is not None:
        report.projections = [
            project(large, small, devices, 1e9 * bandwidth, row.expected_acceptance)
            for large, small, devices in asked
        ]


def _write(report: Report, json_file: Path, with_html: bool) -> None:
    from .bench.analysis import derived

    report.save(json_file, derived(report))
    if with_html:
        _write_html(report, json_file)


def _write_html(report: Report, json_file: Path) -> Path:
    from .bench.plots import figures, svg
    from .bench.report import html_page

    drawn = figures(report).items()
    drawings = {name: (caption, svg(figure, json_file.name)) for name, (caption, figure) in drawn}
    page = json_file.with_suffix(".html")
    page.write_text(html_page(report, drawings), encoding="utf-8")
    return page


def _show(report: Report, out: Console) -> None:
    from . import console_tables as tables
    from .bench.analysis import losses, noise_sentence
    from .bench.report import against_baselines, break_even_sentences, machine_line, sweep_rows

    if report.simulated_acceptance is not None:
        out.print(
            f"SIMULATED: random weights, an acceptance of {report.simulated_acceptance:g} forced on every "
            "draft.",
            style="bold red",
        )
    for result in report.grid():
        title = f"{result.setting.label}: {result.comparison.runs} runs of each; medians over quartiles"
        if report.simulated_acceptance is not None:
            title += " (simulated)"
        out.print(tables.comparison_table(result.comparison, title))
        out.print(tables.latency_table(result.comparison))
        out.print(tables.phases_table(result.comparison))
    swept = sweep_rows(report)
    if swept[1]:
        title = f"{report.plan.chosen}, one quantity varied at a time: ratios of tokens/s"
        out.print(tables.text_table(title, *swept))
    heads, rows = against_baselines(report)
    out.print(tables.text_table(f"{report.plan.chosen}: ratios of tokens/s over each baseline", heads, rows))
    lines = [f"{loss.label}: slower than {loss.baseline} ({loss.reason})." for loss in losses(report)]
    for line in (*lines, *break_even_sentences(report), noise_sentence(report), f"{machine_line(report)}."):
        out.print(line, markup=False, soft_wrap=True)


@bench_app.command()
def report(
    json_file: Annotated[
        Path,
        typer.Argument(metavar="JSON", exists=True, dir_okay=False, readable=True, help="Of a benchmark."),
    ],
) -> None:
    """Make the HTML report of a benchmark's JSON again, beside it."""
    from .bench.benchmark import Report
    from .bench.plots import require_matplotlib

    require_matplotlib()
    page = _write_html(Report.load(json_file), json_file)
    Console(highlight=False).print(f"Written: {page}", markup=False, soft_wrap=True)


@bench_app.command()
def compare(
    before: Annotated[
        Path, typer.Argument(metavar="BEFORE", exists=True, dir_okay=False, readable=True, help="JSON.")
    ],
    after: Annotated[
        Path, typer.Argument(metavar="AFTER", exists=True, dir_okay=False, readable=True, help="JSON.")
    ],
) -> None:
    """Tell where the second benchmark is slower than the first by more than the noise.

    The exit status is 1 if it is anywhere.
    """
    from .bench.benchmark import Report

    _show_changes(Report.load(before), Report.load(after), Console(highlight=False))


def _show_changes(before: Report, after: Report, out: Console) -> None:
    """Print them, and exit with status 1 if anything became slower."""
    from . import console_tables as tables
    from .bench.regressions import changes

    if before.environment != after.environment:
        out.print("The machines or versions differ: tokens a second compare only loosely, ratios better.")
    found = changes(before, after)
    out.print(tables.changes_table(found))
    slower = sum(change.verdict == "slower" for change in found)
    out.print(
        f"{slower} of {len(found)} slower by more than the noise.", style="bold red" if slower else "bold"
    )
    if slower:
        raise typer.Exit(1)
