"""All that needs a GPU, in one command: `python -P -m speculative_eft.bench.gpu`, or `make gpu`.

Runs the tests of the kernels and the exactness suite on the device, the ahead-of-time compilation for its
target, and every benchmark script, and writes `bench/results/gpu-<card>.json` as it goes. A stage that fails
or takes too long does not keep the others from running. The exit status is 1 where a stage failed, which a
missed bar is not, and 2 where there is nothing to run on.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import Annotated, Any
from xml.etree import ElementTree

import torch
import typer
from rich.console import Console
from rich.table import Table

from .json_files import write_json
from .kernels.timing import facts

__all__ = ["STAGES", "Stage", "run_stage"]

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "triton", "transformers", "pytest", "numpy", "typer", "rich", "safetensors")
_TAIL = 6000
"""Characters of a stage's output that are kept."""
_REFRESH = 5.0
"""Seconds between looks at what a running stage has written."""


@dataclass(frozen=True)
class Stage:
    """One part of the run.

    Attributes:
        name: what `--only` calls it.
        arguments: of Python, given the file that its result goes to and whether to be quick.
        seconds: after which it is stopped.
        read: how its result is read; raises ValueError or ElementTree.ParseError where it is incomplete.
    """

    name: str
    arguments: Callable[[Path, bool], list[str]]
    seconds: float
    read: Callable[[str], Any] = json.loads


def _tests(folder: str, seconds: float) -> Stage:
    def arguments(result: Path, quick: bool) -> list[str]:
        # Kernels are compiled on the CPU, for minutes on one core.
        workers = ["-n", str(min(os.cpu_count() or 1, 14))] if find_spec("xdist") else []
        options = ["--device", "cuda", *workers, f"--junitxml={result}", "-p", "no:cacheprovider"]
        return ["-m", "pytest", *options, folder]

    return Stage(folder, arguments, seconds, _read_tests)


def _script(name: str, seconds: float) -> Stage:
    """A script of `bench/` that takes --json and --quick."""

    def arguments(result: Path, quick: bool) -> list[str]:
        module = f"speculative_eft.bench.{name}"
        return ["-m", module, "--json", str(result), *(["--quick"] if quick else [])]

    return Stage(name, arguments, seconds)


def _kernel_script(name: str, seconds: float) -> Stage:
    """A script of `bench/kernels/`, which also ends by itself in time."""
    stage = _script(f"kernels.{name}", seconds)

    def arguments(result: Path, quick: bool) -> list[str]:
        # What is left is for a measurement that has begun.
        return [*stage.arguments(result, quick), "--seconds", str(seconds - 60)]

    return Stage(stage.name, arguments, seconds)


def _compile(result: Path, quick: bool) -> list[str]:
    major, minor = torch.cuda.get_device_capability()
    module = "speculative_eft.kernels.compile"
    return ["-m", module, "--target", f"sm_{major}{minor}", "--json", str(result)]


def _read_tests(text: str) -> dict[str, Any]:
    """Counts, and the names of the tests that failed, from pytest's XML."""
    suite = ElementTree.fromstring(text)
    cases = list(suite.iter("testcase"))

    def having(*tags: str) -> list[str]:
        found = [case for case in cases if any(case.find(tag) is not None for tag in tags)]
        return [f"{case.get('classname')}::{case.get('name')}" for case in found]

    failed = having("failure", "error")
    skipped = len(having("skipped"))
    passed = len(cases) - len(failed) - skipped
    return {"passed": passed, "failed": len(failed), "skipped": skipped, "failures": failed}


# The shortest first, so that a run that is cut off has most to show.
STAGES = (
    _kernel_script("verify", 420),
    *(_kernel_script(name, 120) for name in ("filters", "draft", "noise", "commit", "memory")),
    _kernel_script("attention", 300),
    _kernel_script("layers", 300),
    _script("engine", 900),
    _script("compiled_bodies", 600),
    Stage("compile", _compile, 600),
    _tests("tests/kernels", 600),
    _tests("tests/models/test_attention.py", 300),
    _tests("tests/decoding/test_device.py", 120),
    _tests("tests/exactness", 1200),
)


def run_stage(
    stage: Stage, quick: bool, environment: dict[str, str], on_result: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Run one stage to its end or its time limit.

    Args:
        on_result: called with what there is of the report whenever the stage has written its result anew.

    Returns:
        Its status, "passed", "failed" or "timed out", its exit status, seconds, the end of its output, and
        its result, None where it left none that can be read.
    """
    begun = monotonic()
    report: dict[str, Any] = {"status": "running", "exit_status": None, "seconds": 0.0, "result": None}
    with tempfile.TemporaryDirectory() as folder:
        result, output = Path(folder) / "result", Path(folder) / "output"
        with output.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, *stage.arguments(result, quick)],
                cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        try:
            while report["status"] == "running":
                left = stage.seconds - (monotonic() - begun)
                try:
                    report["exit_status"] = process.wait(timeout=max(min(left, _REFRESH), 0.0))
                    report["status"] = "passed" if report["exit_status"] == 0 else "failed"
                except subprocess.TimeoutExpired:
                    if left <= _REFRESH:
                        report["status"] = "timed out"
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
    return report


def _environment() -> dict[str, str]:
    """That of a stage: this package's place, kernels that are compiled, and no choice of backend."""
    environment = dict(os.environ)
    for name in ("TRITON_INTERPRET", "SPECULATIVE_EFT_BACKEND"):
        environment.pop(name, None)
    # As -P does, and for what the stages start too.
    environment["PYTHONSAFEPATH"] = "1"
    environment["TRANSFORMERS_OFFLINE"] = environment["HF_HUB_OFFLINE"] = "1"
    return environment


def _result_path(card: str) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    return ROOT / "bench" / "results" / f"gpu-{name}.json"


def _obstacle() -> str | None:
    """Why nothing can be run here."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "There is no NVIDIA GPU that torch can use here: nothing was run."
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    return f"This Python lacks {', '.join(missing)}: nothing was run." if missing else None


def _show(console: Console, stages: dict[str, Any]) -> None:
    table = Table("stage", "status", "seconds", "bars met", "tests")
    for name, report in stages.items():
        result = report["result"] or {}
        bars = result.get("bars", [])
        met = f"{sum(bar['met'] for bar in bars)} of {len(bars)}" if bars else ""
        tests = f"{result['passed']} passed, {result['failed']} failed" if "passed" in result else ""
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
) -> None:
    """Test, compile and measure everything on this machine's GPU."""
    chosen = _choose(only or [])
    obstacle = _obstacle()
    if obstacle is not None:
        print(obstacle, file=sys.stderr)
        raise typer.Exit(2)
    environment = facts(torch.device("cuda"))
    path = _result_path(environment["device"])
    content: dict[str, Any] = {"environment": environment, "stages": {}}
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        # Stages that ran apart belong together if the kernels are the same.
        if before["environment"]["kernels_sha256"] == environment["kernels_sha256"]:
            content["stages"] = before["stages"]
    console = Console(width=None if sys.stdout.isatty() else 120)
    for stage in chosen:
        console.print(f"{stage.name}: at most {stage.seconds:.0f} seconds", markup=False)

        def keep(report: dict[str, Any], name: str = stage.name) -> None:
            content["stages"][name] = report
            write_json(path, content)

        report = run_stage(stage, quick, _environment(), keep)
        keep(report)
        if report["status"] != "passed":
            console.print(report["output_tail"], markup=False, highlight=False)
        console.print(f"{stage.name}: {report['status']} in {report['seconds']:.0f} seconds", markup=False)
    _show(console, content["stages"])
    console.print(f"Written to {path}", markup=False)
    wrong = [stage.name for stage in chosen if content["stages"][stage.name]["status"] != "passed"]
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
