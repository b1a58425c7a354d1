"""`check` tells good trios from bad ones; `demo` shows texts, tables and a verdict, and saves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalEntryNotFoundError

from .conftest import CONTEXT, Outcome, Trio, byte_tokenizer, save_model
from .test_bad_input import assert_one_line


def test_check_of_models_that_fit(run: Callable[..., Outcome], trio: Trio) -> None:
    outcome = run("check", *trio.arguments, "--batch", "2")
    assert outcome.status == 0
    assert "would work together" in outcome.out
    for words in (
        "LlamaForCausalLM",
        "large_base",
        "small_tuned",
        "small_base",
        f"memory for 2 x {CONTEXT} tokens",
    ):
        assert words in outcome.out


def test_check_of_a_context_too_long(run: Callable[..., Outcome], trio: Trio) -> None:
    outcome = run("check", *trio.arguments, "--context", "100")
    assert outcome.status == 1
    assert "problem: small_base ends at 64 tokens, before 100." in outcome.out
    assert outcome.out.endswith("They would not work together.\n")


def test_check_of_another_tokenizer(run: Callable[..., Outcome], trio: Trio, tmp_path: Path) -> None:
    other = save_model(tmp_path / "tuned", byte_tokenizer("select * from a where b is null; " * 9), 1, 16)
    outcome = run("check", str(trio.large), str(other), str(trio.base))
    assert outcome.status == 1
    assert "small_tuned" in outcome.out and "would not work together" in outcome.out


def test_check_of_a_missing_folder(run: Callable[..., Outcome], trio: Trio) -> None:
    outcome = run("check", str(trio.large), "/nowhere", str(trio.base))
    assert outcome.status == 2 and outcome.out == ""


def silence(*_: object, **__: object) -> None:
    raise ConnectionError("no route to host")


def test_what_cannot_be_looked_at_is_not_called_incompatible(
    run: Callable[..., Outcome], trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HfApi, "model_info", silence)
    unreachable = run("check", str(trio.large), "some/model", str(trio.base))
    assert_one_line(unreachable, "could not be checked", "cannot be reached")
    assert_one_line(
        run("check", *trio.arguments[:2], str(tmp_path)), "could not be checked", "no config.json"
    )


def test_a_file_of_the_hub_that_cannot_be_had_is_not_called_missing(
    run: Callable[..., Outcome], trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise LocalEntryNotFoundError("the network went away")

    files = [SimpleNamespace(rfilename=name) for name in ("config.json", "model.safetensors")]
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=files))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lost)
    outcome = run("check", str(trio.large), "some/model", str(trio.base))
    assert_one_line(outcome, "could not be checked", "config.json of 'some/model'")


@pytest.fixture
def small_demo(trio: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with the tiny trio in place of the bundled one."""
    folders = {"large_base": trio.large, "small_tuned": trio.tuned, "small_base": trio.base}
    monkeypatch.setattr("speculative_eft.models.demo.weights_folder", folders.__getitem__)
    monkeypatch.setattr("speculative_eft.models.demo.held_out_prompts", lambda: ["def add(", "return first"])


@pytest.mark.usefixtures("small_demo")
def test_demo(run: Callable[..., Outcome], tmp_path: Path) -> None:
    options = ("--max-new-tokens", "8", "--repeats", "1", "--json", str(tmp_path / "demo.json"))
    outcome = run("demo", "--prompts", "2", *options)
    # No terminal, no bar: a line says what is measured.
    assert (
        "Measuring at T=1: naive EFT, large alone, EFT" in outcome.err and "Measuring at T=0" in outcome.err
    )
    assert outcome.status == 0 and "\x1b" not in outcome.out
    for words in (
        "def add(",
        "drafted",
        "T=1:",
        "T=0:",
        "naive EFT",
        "large alone",
        "block rule",
        "token rule",
    ):
        assert words in outcome.out
    verdict = outcome.out.splitlines()[-1]
    assert verdict.startswith("EFT, block rule: ") and "x naive EFT" in verdict and "x large alone" in verdict

    report = json.loads((tmp_path / "demo.json").read_text())
    assert [len(continuation["tokens"]) for continuation in report["continuations"]] == [8, 8]
    assert set(report["comparisons"]) == {"T=1", "T=0"}
    greedy = report["comparisons"]["T=0"]["measurements"]
    assert [row["name"] for row in greedy] == ["naive EFT", "large alone", "EFT, block rule"]
    assert greedy[2]["same_output"] == 2
    assert report["environment"]["torch"]


@pytest.mark.usefixtures("small_demo")
def test_demo_has_only_so_many_prompts(run: Callable[..., Outcome]) -> None:
    outcome = run("demo", "--prompts", "3")
    assert outcome.status == 2 and "there are 2" in outcome.err
