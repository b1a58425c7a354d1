"""README and docs say what the committed measurements say, and the README's Python runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from speculative_eft.bench.benchmark import Report
from speculative_eft.bench.readme import (
    BODIES,
    FIGURES,
    RESULT,
    ROUNDS,
    source_digest,
    with_compiled_bodies,
    with_gpu,
    with_measurements,
    with_round_times,
)

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
README = (ROOT / "README.md").read_text()


def test_measurements_are_those_of_the_committed_json() -> None:
    assert with_measurements(README, Report.load(RESULTS / RESULT)) == README


def test_what_a_round_spends_is_what_the_committed_json_says() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert with_round_times(page, RESULTS / ROUNDS) == page
    assert with_compiled_bodies(page, RESULTS / BODIES) == page


@pytest.mark.parametrize("page", ["README.md", "docs/gpu.md"])
def test_rounds_on_a_gpu_are_those_of_the_committed_json(page: str) -> None:
    text = (ROOT / page).read_text()
    assert with_gpu(text, RESULTS.glob("gpu-*.json"), brief=page == "README.md") == text


def test_figures_are_made_of_the_committed_json() -> None:
    digest = source_digest((RESULTS / RESULT).read_text())
    for file, _ in FIGURES.values():
        assert digest in (RESULTS / file).read_text()
        assert file in README


def test_its_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    first, drop_in, *_ = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(first, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("# Task: Return the larger of two numbers.")
    exec(compile(drop_in, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("def total(values):\n")
