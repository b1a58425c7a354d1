"""The one command for a machine with a GPU: its stages end in time, and their results are kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from speculative_eft.bench import gpu
from speculative_eft.bench.gpu import STAGES, Stage, run_stage


def stage(code: str, seconds: float = 60.0, name: str = "stage") -> Stage:
    return Stage(name, lambda result, quick: ["-c", code, str(result)], seconds)


def run(one: Stage) -> tuple[dict[str, Any], list[Any]]:
    kept: list[Any] = []
    report = run_stage(one, False, dict(os.environ), lambda report: kept.append(report["result"]))
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
    report, kept = run(stage(WRITE + "sys.stdout.flush(); time.sleep(600)", seconds=3.0))
    assert (report["status"], report["exit_status"], report["result"]) == ("timed out", None, RESULT)
    assert report["seconds"] < 60 and kept and report["output_tail"] == "said\n"


def test_the_tests_result_is_read(tmp_path: Path) -> None:
    code = "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip('no')\n"
    (tmp_path / "test_it.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml=out.xml", "test_it.py"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 1
    result = gpu._read_tests((tmp_path / "out.xml").read_text())
    assert result == {"passed": 1, "failed": 1, "skipped": 1, "failures": ["test_it::test_b"]}


def test_stages_run_apart_share_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = (stage(WRITE, name="good"), stage("raise SystemExit(1)", name="bad"))
    monkeypatch.setattr(gpu, "STAGES", stages)
    monkeypatch.setattr(gpu, "_obstacle", lambda: None)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    found = {"device": "NVIDIA H100 80GB (a card)", "kernels_sha256": "same"}
    monkeypatch.setattr(gpu, "facts", lambda device: found)
    statuses = []
    for name in ("bad", "good"):
        with pytest.raises(gpu.typer.Exit) as stopped:
            gpu.main(only=[name])
        statuses.append(stopped.value.exit_code)
    assert statuses == [1, 0]
    path = tmp_path / "bench" / "results" / "gpu-nvidia-h100-80gb-a-card.json"
    kept = json.loads(path.read_text())
    assert kept["environment"] == found
    assert {name: report["status"] for name, report in kept["stages"].items()} == {
        "bad": "failed",
        "good": "passed",
    }
    found["kernels_sha256"] = "other"
    with pytest.raises(gpu.typer.Exit):
        gpu.main(only=["good"])
    assert list(json.loads(path.read_text())["stages"]) == ["good"]


def test_every_stage_knows_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for one in STAGES:
        arguments = one.arguments(tmp_path / "result", True)
        assert arguments[0] == "-m" and any("result" in argument for argument in arguments)
        if one.name == "compile":
            assert "sm_90" in arguments


def test_without_a_gpu_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(gpu.typer.Exit) as stopped:
        gpu.main()
    assert stopped.value.exit_code == 2
    assert capsys.readouterr().err == "There is no NVIDIA GPU that torch can use here: nothing was run.\n"
