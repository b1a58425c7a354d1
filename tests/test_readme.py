"""The README says what the committed measurements say, and its Python runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from speculative_eft.bench.readme import RESULT, with_measurements

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_measurements_are_those_of_the_committed_json() -> None:
    result = json.loads((ROOT / "bench" / "results" / RESULT).read_text())
    assert with_measurements(README, result) == README


def test_its_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    first, drop_in, *_ = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(first, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("# Task: Return the larger of two numbers.")
    exec(compile(drop_in, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("def total(values):\n")
