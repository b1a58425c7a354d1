"""README and docs say what the committed measurements say, and the README's Python runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from speculative_eft.bench.benchmark import Report
from speculative_eft.bench.plots import figures, svg
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


def parts(figure: str) -> tuple[str, list[float]]:
    """The text of an SVG, and apart from it its coordinates, whose last digits may be another processor's.

    matplotlib makes some ids of coordinates; they are left out.
    """
    figure = re.sub(r"\b[a-z][0-9a-f]{10}\b", "", figure)
    number = r"-?\d+\.\d+"
    return re.sub(number, "", figure), [float(found) for found in re.findall(number, figure)]


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_as_they_are_drawn(name: str) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="the extra [bench] is not installed")
    (wanted,) = re.findall(r"matplotlib==([\d.]+); python_version >=", (ROOT / "constraints.txt").read_text())
    if matplotlib.__version__ != wanted:
        pytest.skip(f"the figures are those of matplotlib {wanted}, here is {matplotlib.__version__}")
    file, _ = FIGURES[name]
    digest = source_digest((RESULTS / RESULT).read_text())
    _, figure = figures(Report.load(RESULTS / RESULT))[name]
    text, coordinates = parts(svg(figure, digest))
    found, found_coordinates = parts((RESULTS / file).read_text())
    # Of texts this long pytest's account of a difference takes minutes.
    same = found == text
    assert same, f"{file} is not what python -P -m speculative_eft.bench.readme draws"
    np.testing.assert_allclose(found_coordinates, coordinates, rtol=0, atol=1e-3)


def test_who_asks_for_help_has_no_page_rewritten(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "speculative_eft.bench.readme", "--help"]
    # In a folder without results it could rewrite none.
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Usage" in found.stdout


@pytest.mark.parametrize("page", ["README.md", "docs/drop-in.md"])
def test_its_python_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    # The others need models that are not here.
    runnable = [block for block in blocks if "EFTModels.demo()" in block]
    assert runnable
    for block in runnable:
        exec(compile(block, page, "exec"), {})
        assert len(capsys.readouterr().out) > 50
