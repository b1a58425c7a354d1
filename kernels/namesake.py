"""Lets the Hub's package of the name `kernels` be found where this folder hides it."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

__all__ = ["stand_aside"]


def stand_aside() -> None:
    """Put the package `kernels` that lies elsewhere on Python's path in the place of this folder.

    Python that is started in the root of a checkout looks for packages there first, and transformers asks for
    the Hub's by this name. Where there is no other, transformers takes a package without a file for none.
    """
    root = Path(__file__).resolve().parent.parent
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != root]
    spec = PathFinder.find_spec("kernels", elsewhere)
    ours = sys.modules["kernels"]
    del sys.modules["kernels.namesake"]
    if spec is None or spec.loader is None:
        ours.__file__ = None
        return
    other = sys.modules["kernels"] = module_from_spec(spec)
    try:
        spec.loader.exec_module(other)
    except BaseException:
        sys.modules["kernels"] = ours
        raise
