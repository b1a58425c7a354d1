"""Imports go one way: speculative_eft -> serving, bench -> decoding -> models, kernels."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "kernels": set(),
    "models": {"kernels"},
    "decoding": {"kernels", "models"},
    "bench": {"kernels", "models", "decoding"},
    "serving": {"kernels", "models", "decoding"},
    "speculative_eft": {"kernels", "models", "decoding", "bench", "serving"},
}
FILES = [path for folder in ALLOWED for path in sorted((ROOT / folder).rglob("*.py"))]


def packages_imported(path: Path) -> set[str]:
    """Sub-packages of ours that a file imports, inside functions and type-checking blocks too."""
    folder = path.relative_to(ROOT).parts[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and folder == "speculative_eft":
            names = [f"speculative_eft.{node.module or alias.name}" for alias in node.names]
        for name in names:
            first, *rest = name.split(".")
            assert first not in set(ALLOWED) - {"speculative_eft"}, f"{path}: import {name} by its full name"
            if first == "speculative_eft" and rest and rest[0] in ALLOWED:
                found.add(rest[0])
    return found - {folder}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_lies_below(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    assert packages_imported(path) <= ALLOWED[folder]


def test_the_package_and_its_help_load_no_torch() -> None:
    code = "import sys, speculative_eft, speculative_eft.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_importing_every_public_name() -> None:
    import speculative_eft

    for name in speculative_eft.__all__:
        assert getattr(speculative_eft, name) is not None
    with pytest.raises(AttributeError):
        speculative_eft.EFTDecodr  # noqa: B018
