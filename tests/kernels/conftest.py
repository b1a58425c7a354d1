"""Kernels beside their references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ..device import test_device


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Any]]:
    """What a function gives with the references and with compiled kernels."""

    def run(function: Callable[[], Any], compiled: str = "triton") -> tuple[Any, Any]:
        if compiled == "numba" and test_device().type != "cpu":
            pytest.skip("Numba's kernels are a CPU's")
        pytest.importorskip(compiled, reason=f"{compiled} is not installed")
        results = []
        for name in ("torch", compiled):
            monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", name)
            results.append(function())
        return results[0], results[1]

    return run
