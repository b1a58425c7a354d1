"""Imports go one way: speculative_eft -> bench -> decoding -> models, kernels."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "kernels": set(),
    "models": {"kernels"},
    "decoding": {"kernels", "models"},
    "bench": {"kernels", "models", "decoding"},
    "speculative_eft": {"kernels", "models", "decoding", "bench"},
}
FILES = [path for folder in ALLOWED for path in sorted((ROOT / folder).rglob("*.py"))]


def packages_imported(path: Path, root: Path = ROOT) -> set[str]:
    """Packages of ours that a file imports, inside functions and type-checking blocks too.

    All that is in none of the sub-packages counts as "speculative_eft".
    """
    folder, *parents = path.relative_to(root).parts[:-1]
    package = ".".join(["speculative_eft", *([] if folder == "speculative_eft" else [folder]), *parents])
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            names += [f"{module}.{alias.name}" for alias in node.names]
    found = set()
    for name in names:
        first, second, *_ = [*name.split("."), ""]
        assert first == "speculative_eft" or first not in ALLOWED, f"{path}: import {name} by its full name"
        if first == "speculative_eft":
            found.add(second if second in ALLOWED else first)
    return found - {folder}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_lies_below(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    assert packages_imported(path) <= ALLOWED[folder]


@pytest.mark.parametrize(
    ("file", "statement", "imported"),
    [
        ("kernels/verify.py", "from ..decoding import EFTDecoder", {"decoding"}),
        ("kernels/verify.py", "from ..decoding.round import speculative_round", {"decoding"}),
        ("kernels/verify.py", "from .. import models, bench", {"models", "bench"}),
        ("kernels/verify.py", "from .mix import Coefficients", set()),
        ("kernels/cpu/round_end.py", "from ..verify import Verdict", set()),
        ("kernels/cpu/round_end.py", "from ...models.runner import ModelRunner", {"models"}),
        ("models/__init__.py", "from .runner import ModelRunner", set()),
        ("models/runner.py", "def run():\n    from ..cli import main", {"speculative_eft"}),
        ("models/runner.py", "from speculative_eft import EFTModels", {"speculative_eft"}),
        ("decoding/round.py", "import torch, speculative_eft.models.runner", {"models"}),
        ("speculative_eft/cli.py", "from .bench import analysis", {"bench"}),
        ("speculative_eft/cli.py", "from . import bench, console_text", {"bench"}),
    ],
)
def test_imports_are_found(file: str, statement: str, imported: set[str], tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(statement)
    assert packages_imported(path, tmp_path) == imported


def test_a_package_by_its_bare_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bench" / "plan.py"
    path.parent.mkdir()
    path.write_text("from kernels import verify")
    with pytest.raises(AssertionError, match=r"plan.py: import kernels.verify by its full name"):
        packages_imported(path, tmp_path)


def test_the_package_and_its_help_load_no_torch() -> None:
    code = "import sys, speculative_eft, speculative_eft.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_importing_every_public_name() -> None:
    import speculative_eft

    for name in speculative_eft.__all__:
        assert getattr(speculative_eft, name) is not None
    with pytest.raises(AttributeError):
        speculative_eft.EFTDecodr  # noqa: B018
