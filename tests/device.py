"""Where the tests' tensors lie: on the CPU, or with `pytest --device cuda` on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

__all__ = ["on_device", "skip_unless_compiled", "test_device"]

_TESTS = str(Path(__file__).parent)
_device = torch.device("cpu")


def test_device() -> torch.device:
    """The device of this run, for what a test or a stand-in places by hand."""
    return _device


# pytest looks for tests of this name.
test_device.__test__ = False  # type: ignore[attr-defined]


def skip_unless_compiled(dtype: torch.dtype) -> None:
    """Skip a test of models whose passes are compiled for a CPU where there are none of this `dtype`."""
    pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    if _device.type != "cpu":
        pytest.skip("compiled passes are a CPU's")
    from speculative_eft.kernels.cpu.elements import ELEMENTS

    if dtype not in ELEMENTS:
        pytest.skip(f"this processor has no instruction for {dtype}")


class _Placed(TorchFunctionMode):
    """Puts what a test creates on the device, drawn from the generator it names, which is a CPU's.

    What the package creates is left alone: where that lies is under test.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        creates = func in _device_constructors() and kwargs.get("device") is None
        if creates and sys._getframe(1).f_code.co_filename.startswith(_TESTS):
            if kwargs.get("generator") is not None:
                return func(*args, **kwargs).to(_device)
            kwargs = {**kwargs, "device": _device}
        return func(*args, **kwargs)


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Create the tests' tensors on `device` inside."""
    global _device
    before, _device = _device, device
    try:
        with _Placed():
            yield
    finally:
        _device = before
