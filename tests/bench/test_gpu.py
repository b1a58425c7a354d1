"""The one command for a machine with a GPU: its stages end in time, and their results are kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch

from speculative_eft.bench import gpu
from speculative_eft.bench.gpu import STAGES, Stage, run_stage

ROOT = Path(__file__).parent.parent.parent


def stage(code: str, seconds: float = 60.0, name: str = "stage", least: float = 1.0) -> Stage:
    return Stage(name, lambda result, quick, seconds: ["-c", code, str(result)], seconds, least)


def run(one: Stage) -> tuple[dict[str, Any], list[Any]]:
    kept: list[Any] = []
    report = run_stage(
        one, one.seconds, False, dict(os.environ), lambda report: kept.append(report["result"])
    )
    return report, kept


RESULT = {"rows": 1}
WRITE = "import sys, pathlib, time; pathlib.Path(sys.argv[1]).write_text('{\"rows\": 1}'); print('said'); "


def test_a_stage_reports_its_end() -> None:
    report, kept = run(stage(WRITE))
    assert report["status"] == "passed" and report["result"] == RESULT and kept == [RESULT]
    assert report["output_tail"] == "said\n"
    report, _ = run(stage(WRITE + "sys.exit(3)"))
    assert (report["status"], report["exit_status"], report["result"]) == ("failed", 3, RESULT)
    report, kept = run(stage("raise SystemExit('broken')"))
    assert (report["status"], report["result"], kept) == ("failed", None, [])


def test_a_stage_is_stopped_and_what_it_wrote_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_REFRESH", 0.5)
    monkeypatch.setattr(gpu, "_GRACE", 1.0)
    # Even where it does not heed what asks it to end.
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    report, kept = run(stage(deaf + WRITE + "sys.stdout.flush(); time.sleep(600)", seconds=3.0))
    assert (report["status"], report["exit_status"]) == ("timed out", None)
    assert report["result"] == {**RESULT, "cut_off": True}
    assert report["seconds"] < 60 and kept and report["output_tail"] == "said\n"


@pytest.mark.parametrize("workers", [[], ["-n", "1"]])
def test_tests_that_are_cut_off_keep_their_results(
    workers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if workers:
        pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    monkeypatch.setattr(gpu, "_REFRESH", 0.5)
    begun = tmp_path / "begun"
    code = "import pathlib, time\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c():\n"
    code += f"    pathlib.Path({str(begun)!r}).touch()\n    time.sleep(600)\n"
    (tmp_path / "test_it.py").write_text(code)

    def arguments(result: Path, quick: bool, seconds: float) -> list[str]:
        options = [f"--rootdir={tmp_path}", "-p", "no:cacheprovider", f"--junitxml={result}", *workers]
        return ["-m", "pytest", "-c", os.devnull, *options, str(tmp_path / "test_it.py")]

    # The limit is reached as soon as the last test has begun.
    monkeypatch.setattr(gpu, "monotonic", lambda: monotonic() + 600 * begun.exists())
    # As begun in the background by a shell.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        report, _ = run(Stage("tests", arguments, 300.0, 1.0, gpu._read_tests))
    finally:
        signal.signal(signal.SIGINT, before)
    assert begun.exists() and report["status"] == "timed out"
    counts = {key: report["result"][key] for key in ("passed", "failed", "skipped", "cut_off")}
    assert counts == {"passed": 1, "failed": 1, "skipped": 0, "cut_off": True}


def test_the_tests_result_is_read(tmp_path: Path) -> None:
    code = "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip('no')\n"
    (tmp_path / "test_it.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml=out.xml", "test_it.py"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 1
    result = gpu._read_tests((tmp_path / "out.xml").read_text())
    assert result == {"passed": 1, "failed": 1, "skipped": 1, "failures": ["test_it::test_b"]}


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A machine that has a GPU."""
    facts = {"device": "NVIDIA H100 80GB (a card)", "commit": "a1", "sources_sha256": "same"}
    monkeypatch.setattr(gpu, "_obstacle", lambda: None)
    monkeypatch.setattr(gpu, "facts", lambda device: facts)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    return facts


def run_all(folder: Path, **options: Any) -> tuple[int, dict[str, Any]]:
    """The exit status, and what `folder` then holds."""
    with pytest.raises(gpu.typer.Exit) as stopped:
        gpu.main(**options)
    path = folder / "gpu-nvidia-h100-80gb-a-card.json"
    return stopped.value.exit_code, json.loads(path.read_text())


def test_stages_run_apart_share_a_file(
    found: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = (stage(WRITE, name="good"), stage("raise SystemExit(1)", name="bad"))
    monkeypatch.setattr(gpu, "STAGES", stages)
    folder = tmp_path / "bench" / "results"
    assert run_all(folder, only=["bad"])[0] == 1
    found["commit"] = "b2"
    status, kept = run_all(folder, only=["good"])
    assert status == 0 and kept["environment"] == found and kept["left_out"] == {}
    both = {
        name: [report[key] for key in ("status", "commit", "sources_sha256")]
        for name, report in kept["stages"].items()
    }
    assert both == {"bad": ["failed", "a1", "same"], "good": ["passed", "b2", "same"]}
    found["sources_sha256"] = "other"
    assert list(run_all(folder, only=["good"])[1]["stages"]) == ["good"]


@pytest.mark.parametrize(
    "text",
    [
        '{"environ',
        "[]",
        '{"environment": {"kernels_sha256": "same"}, "stages": {"good": {"status": "passed"}}}',
        '{"stages": ["good"]}',
    ],
)
def test_a_file_that_cannot_be_read_keeps_another_name(
    text: str,
    found: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu, "STAGES", (stage(WRITE, name="good"),))
    path = tmp_path / "gpu-nvidia-h100-80gb-a-card.json"
    for name in ("gpu-nvidia-h100-80gb-a-card.json.old", "gpu-nvidia-h100-80gb-a-card.json.old1"):
        path.write_text(text)
        status, kept = run_all(tmp_path, out=tmp_path)
        assert status == 0 and kept["stages"]["good"]["result"] == RESULT
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{path} is broken") and line.endswith(name)
        assert (tmp_path / name).read_text() == text
    assert [other.name for other in tmp_path.glob("gpu-*.json")] == [path.name]


def test_time_goes_to_what_matters_most() -> None:
    first, second, third = (
        stage("", seconds, least=least) for seconds, least in ((60, 20), (40, 20), (30, 5))
    )
    assert gpu._share((first, second, third), float("inf")) == 60
    assert gpu._share((first, second, third), 130) == 60
    # Of 40 beyond what each needs, shared as 40 to 20 to 25.
    assert gpu._share((first, second, third), 85) == pytest.approx(20 + 40 * 40 / 85)
    # The second is left out, so the third may share.
    assert gpu._share((first, second, third), 35) == pytest.approx(20 + 10 * 40 / 65)
    assert gpu._share((first, second, third), 19) is None
    assert gpu._share((third,), 20) == 20
    # A quarter of an hour is enough for the tests, the engine, exactness and most kernels.
    left, begun = 900.0 - gpu._GRACE, []
    for place, one in enumerate(STAGES):
        if (limit := gpu._share(STAGES[place:], left)) is not None:
            assert one.least <= limit <= one.seconds
            begun.append(one.name)
            left -= limit
    assert left >= 0
    wanted = ("tests/kernels", "engine", "tests/exactness", "kernels.verify", "kernels.layers")
    assert begun[0] == "tests/kernels" and set(wanted) <= set(begun)


def test_what_there_is_no_time_for_is_named(
    found: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = "import sys, json; json.dump({'seconds': float(sys.argv[2])}, open(sys.argv[1], 'w'))"

    def arguments(result: Path, quick: bool, seconds: float) -> list[str]:
        # What the stage before gave is there.
        if (tmp_path / "out").exists():
            seen.append(sorted(read()["stages"]))
        return ["-c", limits, str(result), str(seconds)]

    def read() -> Any:
        return json.loads((tmp_path / "out" / "gpu-nvidia-h100-80gb-a-card.json").read_text())

    seen: list[list[str]] = []
    stages = [
        Stage(name, arguments, 100.0, least) for name, least in (("a", 20.0), ("b", 500.0), ("c", 10.0))
    ]
    monkeypatch.setattr(gpu, "STAGES", stages)
    status, kept = run_all(tmp_path / "out", seconds=75.0, out=tmp_path / "out")
    assert status == 0 and list(kept["stages"]) == ["a", "c"] and seen == [["a"]]
    given = [kept["stages"][name]["result"]["seconds"] for name in "ac"]
    # Of the 55 seconds without the last one's grace.
    assert 20 < given[0] < 50 and 10 < given[1] < 60
    assert list(kept["left_out"]) == ["b"] and "where it needs 500" in kept["left_out"]["b"]


def test_every_stage_knows_its_command(tmp_path: Path) -> None:
    for one in STAGES:
        if one.name == "compile":
            continue
        arguments = one.arguments(tmp_path / "result", True, one.least)
        assert arguments[0] == "-m" and any("result" in argument for argument in arguments)
        if "--seconds" in arguments:
            assert 0 < float(arguments[arguments.index("--seconds") + 1]) < one.least


@pytest.mark.parametrize(
    ("capability", "target"),
    [((9, 0), "sm_90"), ((8, 0), "sm_80"), ((8, 9), "sm_80"), ((12, 0), "sm_100"), ((7, 5), "sm_80")],
)
def test_another_card_has_kernels_compiled_for_the_nearest_known(
    capability: tuple[int, int], target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    (compiling,) = (one for one in STAGES if one.name == "compile")
    arguments = compiling.arguments(tmp_path / "result", False, 60.0)
    assert arguments[arguments.index("--target") + 1] == target
    known = (ROOT / "kernels" / "compile.py").read_text()
    assert all(f'"sm_{capability}": GPUTarget' in known for capability in gpu._TARGETS)


def test_what_triton_needs_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(gpu, "_PACKAGES", ("torch",))
    compiler = tmp_path / "cc"
    monkeypatch.setenv("CC", str(compiler))
    assert "needs a C compiler" in (gpu._obstacle() or "")
    for status, wanted in ((1, "no Python.h"), (0, "")):
        compiler.write_text(f"#!/bin/sh\ncat > /dev/null\nexit {status}\n")
        compiler.chmod(0o755)
        assert wanted in (gpu._obstacle() or "")
    assert gpu._obstacle() is None
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.delenv("CC")
    assert "needs a C compiler" in (gpu._obstacle() or "")
    monkeypatch.setattr(gpu, "_PACKAGES", ("torch", "no_such_package"))
    assert "lacks no_such_package" in (gpu._obstacle() or "")


def test_without_a_gpu_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(gpu.typer.Exit) as stopped:
        gpu.main()
    assert stopped.value.exit_code == 2
    assert capsys.readouterr().err == "There is no NVIDIA GPU that torch can use here: nothing was run.\n"
