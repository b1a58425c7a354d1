"""All that needs a GPU, in one command: `python -P -m speculative_eft.bench.gpu`, or `make gpu`.

Runs the tests of the kernels and the exactness suite on the device, the ahead-of-time compilation for its
target, and every benchmark script, and writes `bench/results/gpu-<card>.json` as it goes. A stage that fails
or takes too long does not keep the others from running; `--seconds` shares out the time that there is. The
exit status is 1 where a stage failed, which a missed bar is not, and 2 where there is nothing to run on.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Annotated, Any
from xml.etree import ElementTree

import torch
import typer
from rich.console import Console
from rich.table import Table

from .json_files import write_json
from .machine import facts

__all__ = ["STAGES", "Stage", "run_stage"]

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "triton", "transformers", "pytest", "numpy", "typer", "rich", "safetensors")
_TAIL = 6000
"""Characters of a stage's output that are kept."""
_REFRESH = 5.0
"""Seconds between looks at what a running stage has written."""
_GRACE = 20.0
"""Seconds that an interrupted stage has to write what it found. pytest's workers take up to 10 to end."""
_TARGETS = (80, 90, 100)
"""Compute capabilities that `kernels/compile.py` compiles for; importing it would need Triton."""


@dataclass(frozen=True)
class Stage:
    """One part of the run.

    Attributes:
        name: what `--only` calls it.
        arguments: of Python, given the file that its result goes to, whether to be quick, and its seconds.
        seconds: that it has at most.
        least: seconds below which it is not begun.
        read: how its result is read; raises ValueError or ElementTree.ParseError where it is incomplete.
    """

    name: str
    arguments: Callable[[Path, bool, float], list[str]]
    seconds: float
    least: float
    read: Callable[[str], dict[str, Any]] = json.loads


def _tests(folder: str, seconds: float, least: float) -> Stage:
    def arguments(result: Path, quick: bool, seconds: float) -> list[str]:
        # Kernels are compiled on the CPU, for minutes on one core.
        workers = ["-n", str(min(os.cpu_count() or 1, 14))] if find_spec("xdist") else []
        options = ["--device", "cuda", *workers, f"--junitxml={result}", "-p", "no:cacheprovider"]
        return ["-m", "pytest", *options, folder]

    return Stage(folder, arguments, seconds, least, _read_tests)


def _script(name: str, seconds: float, least: float, *, ends_in_time: bool = True) -> Stage:
    """A script of `bench/` that takes --json and --quick, and --seconds where it ends by itself in time."""

    def arguments(result: Path, quick: bool, seconds: float) -> list[str]:
        module = f"speculative_eft.bench.{name}"
        # What is left is for imports and for a measurement that has begun.
        until = ["--seconds", str(max(seconds - 60, seconds / 2))] if ends_in_time else []
        return ["-m", module, "--json", str(result), *until, *(["--quick"] if quick else [])]

    return Stage(name, arguments, seconds, least)


def _compile(result: Path, quick: bool, seconds: float) -> list[str]:
    major, minor = torch.cuda.get_device_capability()
    # For another card what is compiled for the one before it; for an older one what is the oldest known.
    target = max((known for known in _TARGETS if known <= 10 * major + minor), default=_TARGETS[0])
    module = "speculative_eft.kernels.compile"
    return ["-m", module, "--target", f"sm_{target}", "--json", str(result)]


def _read_tests(text: str) -> dict[str, Any]:
    """Counts, and the names of the tests that failed, from pytest's XML."""
    suite = ElementTree.fromstring(text)
    # A test that was interrupted has a nameless element.
    cases = [case for case in suite.iter("testcase") if case.get("name")]

    def having(*tags: str) -> list[str]:
        found = [case for case in cases if any(case.find(tag) is not None for tag in tags)]
        return [f"{case.get('classname')}::{case.get('name')}" for case in found]

    failed = having("failure", "error")
    skipped = len(having("skipped"))
    passed = len(cases) - len(failed) - skipped
    return {"passed": passed, "failed": len(failed), "skipped": skipped, "failures": failed}


# What matters most first: where time is short, the last ones are left out.
STAGES = (
    _tests("tests/kernels", 600, 120),
    _tests("tests/models/test_attention.py", 300, 30),
    _tests("tests/decoding/test_device.py", 180, 45),
    _script("engine", 900, 240),
    _tests("tests/exactness", 1200, 90),
    _script("kernels.verify", 420, 60),
    _script("kernels.attention", 300, 60),
    _script("kernels.layers", 300, 60),
    *(_script(f"kernels.{name}", 120, 30) for name in ("filters", "draft", "noise", "commit", "memory")),
    Stage("compile", _compile, 600, 60),
    _script("compiled_bodies", 600, 120, ends_in_time=False),
)


def run_stage(
    stage: Stage,
    seconds: float,
    quick: bool,
    environment: dict[str, str],
    on_result: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Run one stage to its end or its time limit, then to the end of what it writes when interrupted.

    Args:
        seconds: after which it is interrupted.
        on_result: called with what there is of the report whenever the stage has written its result anew.

    Returns:
        Its status, "passed", "failed" or "timed out", its exit status, seconds, the end of its output, and
        its result, None where it left none that can be read. A result of a stage that timed out is marked as
        `cut_off`.
    """
    begun = monotonic()
    report: dict[str, Any] = {"status": "running", "exit_status": None, "seconds": 0.0, "result": None}
    with tempfile.TemporaryDirectory() as folder:
        result, output = Path(folder) / "result", Path(folder) / "output"
        with output.open("wb") as sink, _heeding_interrupts():
            process = subprocess.Popen(
                [sys.executable, *stage.arguments(result, quick, seconds)],
                cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        try:
            while report["status"] == "running":
                left = seconds - (monotonic() - begun)
                try:
                    report["exit_status"] = process.wait(timeout=max(min(left, _REFRESH), 0.0))
                    report["status"] = "passed" if report["exit_status"] == 0 else "failed"
                except subprocess.TimeoutExpired:
                    if left <= _REFRESH:
                        report["status"] = "timed out"
                        # pytest writes its result when it ends, and also when it is interrupted.
                        process.send_signal(signal.SIGINT)
                        with contextlib.suppress(subprocess.TimeoutExpired):
                            process.wait(timeout=_GRACE)
                report["seconds"] = round(monotonic() - begun, 1)
                with contextlib.suppress(OSError, ValueError, ElementTree.ParseError):
                    report["result"] = stage.read(result.read_text(encoding="utf-8"))
                    on_result(report)
        finally:
            # Its children too: the compiler's workers.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        report["output_tail"] = output.read_text(encoding="utf-8", errors="replace")[-_TAIL:]
    if report["status"] == "timed out" and report["result"] is not None:
        report["result"]["cut_off"] = True
    return report


@contextlib.contextmanager
def _heeding_interrupts() -> Iterator[None]:
    """What is started inside can be interrupted, also from a shell whose background jobs ignore that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _share(stages: Sequence[Stage], left: float) -> float | None:
    """Seconds of the first of some stages that share what is left; None where that is too little for it.

    As many as can have their least, the first ones before others; the rest is shared in proportion to what
    each could use.
    """
    first, *later = stages
    if first.least > left:
        return None
    rest, wanted = left - first.least, first.seconds - first.least
    for stage in later:
        if stage.least <= rest:
            rest -= stage.least
            wanted += stage.seconds - stage.least
    return first.seconds if rest >= wanted else first.least + (first.seconds - first.least) * rest / wanted


def _environment() -> dict[str, str]:
    """That of a stage: this package's place, kernels that are compiled, and no choice of backend."""
    environment = dict(os.environ)
    for name in ("TRITON_INTERPRET", "SPECULATIVE_EFT_BACKEND"):
        environment.pop(name, None)
    # As -P does, and for what the stages start too.
    environment["PYTHONSAFEPATH"] = "1"
    environment["TRANSFORMERS_OFFLINE"] = environment["HF_HUB_OFFLINE"] = "1"
    return environment


def _result_path(folder: Path, card: str) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    return folder / f"gpu-{name}.json"


def _stages_before(path: Path, digest: str) -> dict[str, Any]:
    """The stages that an earlier run left, but for those of other sources.

    A file that cannot be read so keeps another name.
    """
    if not path.exists():
        return {}
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
        return {name: report for name, report in stages.items() if report["sources_sha256"] == digest}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        # No longer *.json, of which pages are made.
        others = (path.with_name(f"{path.name}.old{number or ''}") for number in count())
        other = next(other for other in others if not other.exists())
        path.rename(other)
        print(
            f"{path} is broken or of an older kind ({type(error).__name__}): it is now {other.name}",
            file=sys.stderr,
        )
        return {}


def _obstacle() -> str | None:
    """Why nothing can be run here."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "There is no NVIDIA GPU that torch can use here: nothing was run."
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        return f"This Python lacks {', '.join(missing)}: nothing was run."
    # Triton compiles what launches a kernel with both.
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or shutil.which(compiler) is None:
        return "Triton needs a C compiler, gcc, clang or the one that CC names: nothing was run."
    include = sysconfig.get_paths("posix_prefix")["include"]
    command = [compiler, "-fsyntax-only", "-x", "c", f"-I{include}", "-"]
    if subprocess.run(command, input=b"#include <Python.h>\n", capture_output=True).returncode:
        return (
            f"Triton needs Python's headers, and {compiler} finds no Python.h in {include}: nothing was run."
        )
    return None


def _show(console: Console, stages: dict[str, Any]) -> None:
    table = Table("stage", "status", "seconds", "bars met", "tests")
    for name, report in stages.items():
        result = report["result"] or {}
        bars = result.get("bars", [])
        met = f"{sum(bar['met'] for bar in bars)} of {len(bars)}" if bars else ""
        tests = f"{result['passed']} passed, {result['failed']} failed" if "passed" in result else ""
        tests += ", cut off" if tests and "cut_off" in result else ""
        table.add_row(name, report["status"], f"{report['seconds']:.0f}", met, tests)
    console.print(table)
    for name, report in stages.items():
        for bar in (report["result"] or {}).get("bars", []):
            if not bar["met"]:
                console.print(f"missed by {name}: {bar['bar']}: {bar['measured']}", markup=False)


def _choose(only: Sequence[str]) -> list[Stage]:
    known = {stage.name: stage for stage in STAGES}
    for name in only:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint="--only")
    return [known[name] for name in only] if only else list(STAGES)


def main(
    only: Annotated[list[str] | None, typer.Option(help="Run this stage alone; repeatable.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out most of the sweeps.")] = False,
    seconds: Annotated[
        float | None, typer.Option(help="Take no longer: the stages share this, what matters most first.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder of the result.", show_default="bench/results")
    ] = None,
) -> None:
    """Test, compile and measure everything on this machine's GPU."""
    begun = monotonic()
    chosen = _choose(only or [])
    obstacle = _obstacle()
    if obstacle is not None:
        print(obstacle, file=sys.stderr)
        raise typer.Exit(2)
    environment = facts(torch.device("cuda"))
    path = _result_path(out or ROOT / "bench" / "results", environment["device"])
    source = {name: environment[name] for name in ("commit", "sources_sha256")}
    # Stages that ran apart belong together if the sources are the same.
    stages, left_out = _stages_before(path, source["sources_sha256"]), dict[str, str]()
    content = {"environment": environment, "stages": stages, "left_out": left_out}
    console = Console(width=None if sys.stdout.isatty() else 120)
    ran = []
    for place, stage in enumerate(chosen):
        # The end of the last one may take its grace.
        left = float("inf") if seconds is None else seconds - _GRACE - (monotonic() - begun)
        limit = _share(chosen[place:], left)
        if limit is None:
            left_out[stage.name] = f"{max(left, 0.0):.0f} seconds left, where it needs {stage.least:.0f}"
            console.print(f"{stage.name}: left out, {left_out[stage.name]}", markup=False)
            write_json(path, content)
            continue
        console.print(f"{stage.name}: at most {limit:.0f} seconds", markup=False)

        def keep(report: dict[str, Any], name: str = stage.name) -> None:
            stages[name] = {**source, **report}
            write_json(path, content)

        report = run_stage(stage, limit, quick, _environment(), keep)
        keep(report)
        ran.append(report["status"])
        if report["status"] != "passed":
            console.print(report["output_tail"], markup=False, highlight=False)
        console.print(f"{stage.name}: {report['status']} in {report['seconds']:.0f} seconds", markup=False)
    _show(console, stages)
    console.print(f"Written to {path}", markup=False)
    raise typer.Exit(0 if all(status == "passed" for status in ran) else 1)


if __name__ == "__main__":
    typer.run(main)
