"""How functions for a CPU are compiled and kept."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("numba", reason="the extra [cpu] is not installed")

from numba.core import caching

from speculative_eft.kernels.cpu import jit


def test_where_nothing_can_be_kept_functions_are_compiled_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    jit._warn_that_nothing_is_kept.cache_clear()

    def twice(number: Any) -> Any:
        return 2 * number

    for make in (jit.entry, jit.strictly_compiled):
        make("float64(float64)")(twice)
    assert jit.entry("float64(float64)")(twice)(1.5) == 3.0
    (message,) = caplog.messages
    assert "NUMBA_CACHE_DIR" in message
