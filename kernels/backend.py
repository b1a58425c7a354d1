"""Which implementation of the kernels runs: the only place that decides it."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Literal, cast, get_args

import torch

__all__ = ["Backend", "backend", "warm_up"]

Backend = Literal["torch", "numba", "triton"]

_VARIABLE = "SPECULATIVE_EFT_BACKEND"


@cache
def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


def _can_run(name: Backend, device: torch.device) -> bool:
    if name == "numba":
        return device.type == "cpu" and _is_installed("numba")
    if name == "triton":
        # Triton's interpreter runs kernels on a CPU, slowly: for tests.
        interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        return (device.type == "cuda" or interpreted) and _is_installed("triton")
    return True


_NEEDS = {
    "numba": "tensors on a CPU and Numba, the extra [cpu]",
    "triton": "Triton and tensors on a GPU (or, for tests on a CPU, TRITON_INTERPRET=1)",
}


def backend(device: torch.device) -> Backend:
    """The implementation for tensors on `device`: Triton's on a GPU, Numba's on a CPU, else torch's.

    The environment variable SPECULATIVE_EFT_BACKEND overrides the choice. Where a compiled kernel does not
    know a case, it is left to torch's.

    Raises:
        ValueError: if the variable names no backend, or one that cannot run there.
    """
    chosen = os.environ.get(_VARIABLE)
    if not chosen:
        preferred: Backend = "numba" if device.type == "cpu" else "triton"
        return preferred if _can_run(preferred, device) else "torch"
    if chosen not in get_args(Backend):
        raise ValueError(f"{_VARIABLE} must be one of {', '.join(get_args(Backend))}, got {chosen!r}")
    name = cast(Backend, chosen)
    if not _can_run(name, device):
        raise ValueError(f"{_VARIABLE}={name} needs {_NEEDS[name]}")
    return name


def warm_up(device: torch.device) -> None:
    """Compile the kernels for `device` now, where there is something to compile, and not in the first round.

    Numba keeps what it compiled, beside the source or in the user's cache: once a machine is enough.
    """
    if backend(device) == "numba":
        for name in ("draft", "verify", "commit", "memory", "round_end"):
            import_module(f"{__package__}.cpu.{name}")
