"""`speculative-eft bench` from its options to its report, and `bench compare`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from .conftest import Outcome, Trio

SHORT = (
    "--quick", "--temperature", "1", "--batch", "1", "--length", "6", "--draft-tokens", "2", "--acceptance",
    "block", "--beta", "1", "--beta", "1.5",
)  # fmt: skip


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("def add(\nreturn first\n")
    return file


def bench(run: Callable[..., Outcome], trio: Trio, prompts: Path, output: Path, *more: str) -> Outcome:
    return run("bench", *trio.options, "--prompts", str(prompts), *SHORT, "--output", str(output), *more)


def test_bench_writes_a_report_and_goes_on_with_it(
    run: Callable[..., Outcome], trio: Trio, prompts: Path, tmp_path: Path
) -> None:
    outcome = bench(run, trio, prompts, tmp_path / "b")
    assert outcome.status == 0, outcome.err
    for words in (
        "T=1, batch 1: 4 runs",
        "assisted",
        "Noise: ",
        "beta 1.5",
        "first",
    ):
        assert words in outcome.out
    assert "SIMULATED" not in outcome.out
    assert outcome.err.splitlines()[-2:] == ["Measuring T=1, batch 1", "Measuring T=1, batch 1, beta 1.5"]
    file = tmp_path / "b.json"
    saved: dict[str, Any] = json.loads(file.read_text())
    assert [result["label"] for result in saved["results"]] == ["T=1, batch 1", "T=1, batch 1, beta 1.5"]
    assert saved["derived"]["predictions"] and saved["projections"][0]["large"] == "llama-2-70b"
    assert saved["prompts"] == "2 of prompts.txt" and saved["environment"]["torch"]
    assert (tmp_path / "b.html").read_text().startswith("<!doctype html>")

    again = bench(run, trio, prompts, tmp_path / "b")
    assert again.status == 2 and "--resume" in again.err
    first = saved["results"].pop(0)
    file.write_text(json.dumps(saved))
    assert bench(run, trio, prompts, tmp_path / "b", "--resume").status == 0
    resumed = json.loads(file.read_text())
    # The setting that was there is kept as it was, the other one is measured again.
    assert resumed["results"][0] == saved["results"][0]
    assert resumed["results"][1]["label"] == "T=1, batch 1"
    assert resumed["results"][1]["measurements"] != first["measurements"]
    other = bench(run, trio, prompts, tmp_path / "b", "--resume", "--seed", "9")
    assert other.status == 2 and "cannot be resumed: another plan" in other.err

    assert run("bench", "report", str(file)).status == 0
    assert run("bench", "compare", str(file), str(file)).status == 0
    # On a machine without noise, one decoder became slower by a tenth.
    for result in resumed["results"]:
        for row in result["measurements"]:
            row["run_seconds"] = [1.0] * len(row["run_seconds"])
            row["ratio"] = dict.fromkeys(row["ratio"], 1.0)
            row["tokens_per_second"] = dict.fromkeys(row["tokens_per_second"], 6.0)
    (tmp_path / "before.json").write_text(json.dumps(resumed))
    (slowed,) = [row for row in resumed["results"][0]["measurements"] if row["name"].startswith("EFT")]
    slowed["ratio"] = dict.fromkeys(slowed["ratio"], 0.9)
    (tmp_path / "after.json").write_text(json.dumps(resumed))
    compared = run("bench", "compare", str(tmp_path / "before.json"), str(tmp_path / "after.json"))
    assert compared.status == 1 and "1 of 11 slower" in compared.out


def test_two_versions_take_turns_and_are_compared(
    run: Callable[..., Outcome], trio: Trio, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.write_text(f"#!{sys.executable}\nfrom speculative_eft.cli import main\nraise SystemExit(main())\n")
    other.chmod(0o755)
    options = ("--against", str(other), "--no-html")
    # The other version is told what the shell told this one.
    command = (
        "bench",
        *trio.options,
        "--prompts",
        str(prompts),
        *SHORT[:-4],
        "--output",
        str(tmp_path / "b"),
    )
    monkeypatch.setattr(sys, "argv", ["speculative-eft", *command, *options])
    outcome = run(*command, *options)
    assert outcome.status in (0, 1), outcome.err
    assert " of 8 slower by more than the noise." in outcome.out
    assert outcome.err.splitlines()[-1] == "Measuring T=1, batch 1"
    both = [json.loads((tmp_path / name).read_text()) for name in ("b.json", "b-against.json")]
    own, others = (
        [(row["name"], row["run_tokens"]) for result in saved["results"] for row in result["measurements"]]
        for saved in both
    )
    assert own == others and both[0]["plan"] == both[1]["plan"]
    assert both[1]["derived"]

    # It was interrupted when only the other version had measured everything.
    (tmp_path / "b.json").write_text(json.dumps({**both[0], "results": []}))
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--resume"])
    resumed = run(*command, *options, "--resume")
    assert resumed.status in (0, 1) and " of 8 slower" in resumed.out, resumed.err
    monkeypatch.setattr(sys, "argv", sys.argv[:-1])

    again = run(*command, *options)
    assert again.status == 2 and "b.json exists" in again.err
    (tmp_path / "b.json").unlink()
    again = run(*command, *options)
    assert again.status == 2 and "b-against.json exists" in again.err
    other.write_text("#!/bin/sh\nexit 2\n")
    (tmp_path / "b-against.json").unlink()
    failed = run(*command, *options)
    assert failed.status == 2 and f"--against: {other} ended with status 2" in failed.err
    other.write_text("#!/bin/sh\n")
    idle = run(*command, *options)
    assert idle.status == 2 and f"--against: {other} ended before its first turn" in idle.err
    assert len(idle.err.splitlines()) == 1 and not (tmp_path / "b.json").exists()


def test_a_simulation_says_so(
    run: Callable[..., Outcome], trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"large_base": trio.large, "small_tuned": trio.tuned, "small_base": trio.base}
    monkeypatch.setattr("speculative_eft.models.demo.weights_folder", folders.__getitem__)
    outcome = run("bench", *SHORT, "--simulate-acceptance", "0.8", "--output", str(tmp_path / "s"))
    assert outcome.status == 0, outcome.err
    assert "SIMULATED" in outcome.out and "(simulated)" in outcome.out
    assert json.loads((tmp_path / "s.json").read_text())["simulated_acceptance"] == 0.8
    assert "Simulated:" in (tmp_path / "s.html").read_text()


def test_a_shape_mistyped_is_told_in_a_line(
    run: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silence(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(HfApi, "model_info", silence)
    names = ("--large", "lama-2-7b", "--tuned", "llama-2-7b", "--base", "llama-2-7b")
    outcome = run("bench", "--simulate-acceptance", "0.9", *names, "--output", str(tmp_path / "s"))
    assert outcome.status == 2 and outcome.out == "" and not list(tmp_path.iterdir())
    assert "--large: 'lama-2-7b' is not a folder" in outcome.err.splitlines()[-1]
    assert len(outcome.err.splitlines()) == 1 and "llama-2-7b, llama-2-13b" in outcome.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--batch", "0"), "greater than or equal to 1"),
        (("--temperature", "-1"), "finite number"),
        (("--draft-tokens", "0"), "neither an integer"),
        (("--acceptance", "best"), "not one of"),
        (("--conservative-top-p", "2"), "at most 1"),
        (("--project", "llama-2-70b"), "LARGE/SMALL@DEVICES"),
        (("--project", "lama2-70b/llama-2-7b"), "'--project': 'lama2-70b' is not one of llama-2-7b, "),
        (("--project", "llama-2-70b/llama-2-7@2"), "'--project': 'llama-2-7' is not one of llama-2-7b, "),
        (("--beta", "1", "--beta", "1"), "twice"),
        (("--large", "somewhere/model"), "all three"),
        (("--resume",), "does not exist"),
        (("--output", "/nowhere/b"), "no folder"),
        (("--simulate-acceptance", "1.5"), "at most 1"),
        (("--against", "no-such-program"), "there is no program"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(
    run: Callable[..., Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "speculative_eft.bench_command.load_models", lambda *_: pytest.fail("models were loaded")
    )
    outcome = run("bench", *options)
    assert outcome.status == 2 and words in outcome.err and outcome.out == ""


def test_a_page_that_cannot_be_written_is_told_before_anything_runs(
    run: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b.html").mkdir()
    monkeypatch.setattr(
        "speculative_eft.bench_command.load_models", lambda *_: pytest.fail("models were loaded")
    )
    outcome = run("bench", "--output", str(tmp_path / "b"))
    assert outcome.status == 2 and "--output" in outcome.err and "b.html cannot be written" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["b.html"]


def test_without_matplotlib_one_line_says_what_to_install(
    run: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speculative_eft.bench.plots.find_spec", lambda _: None)
    outcome = run("bench", "--output", str(tmp_path / "b"))
    assert outcome.status == 2 and "'.[bench]' in the checkout" in outcome.err and "--no-html" in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_a_context_too_long_is_told(
    run: Callable[..., Outcome], trio: Trio, prompts: Path, tmp_path: Path
) -> None:
    outcome = bench(run, trio, prompts, tmp_path / "b", "--context", "60")
    assert outcome.status == 2 and "context of 64 tokens" in outcome.err
