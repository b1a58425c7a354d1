"""README and docs say what the committed measurements say, and the README's Python runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from speculative_eft.bench.readme import FIGURES, RESULT, pages, source_digest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def test_pages_say_what_the_committed_json_says() -> None:
    for path, text in pages(ROOT).items():
        assert path.read_text() == text, path.name


def test_figures_are_made_of_the_committed_json() -> None:
    digest = source_digest((RESULTS / RESULT).read_text())
    for file, _ in FIGURES.values():
        assert digest in (RESULTS / file).read_text()
        assert file in (ROOT / "docs" / "measurements.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/drop-in.md"])
def test_its_python_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    # The others need models that are not here.
    runnable = [block for block in blocks if "EFTModels.demo()" in block]
    assert runnable
    for block in runnable:
        exec(compile(block, page, "exec"), {})
        assert len(capsys.readouterr().out) > 50
