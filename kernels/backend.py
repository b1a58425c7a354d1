"""Which implementation of the kernels runs: the only place that decides it."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Literal, cast, get_args

import torch

__all__ = ["Backend", "backend", "warm_up"]

Backend = Literal["torch", "numba"]

_VARIABLE = "SPECULATIVE_EFT_BACKEND"


@cache
def _numba_is_installed() -> bool:
    return find_spec("numba") is not None


def backend(device: torch.device) -> Backend:
    """The implementation for tensors on `device`: Numba's on a CPU if it is installed, else torch's.

    The environment variable SPECULATIVE_EFT_BACKEND overrides the choice. Where a compiled kernel does not
    know a case, it is left to torch's.

    Raises:
        ValueError: if the variable names no backend, or one that cannot run there.
    """
    chosen = os.environ.get(_VARIABLE)
    if not chosen:
        return "numba" if device.type == "cpu" and _numba_is_installed() else "torch"
    if chosen not in get_args(Backend):
        raise ValueError(f"{_VARIABLE} must be one of {', '.join(get_args(Backend))}, got {chosen!r}")
    if chosen == "numba" and not (device.type == "cpu" and _numba_is_installed()):
        raise ValueError(
            f"{_VARIABLE}=numba needs tensors on a CPU and Numba: pip install speculative-eft[cpu]"
        )
    return cast(Backend, chosen)


def warm_up(device: torch.device) -> None:
    """Compile the kernels for `device` now, where there is something to compile, and not in the first round.

    Numba keeps what it compiled, beside the source or in the user's cache: once a machine is enough.
    """
    if backend(device) == "numba":
        for name in ("sampler", "commit", "memory"):
            import_module(f"{__package__}.cpu.{name}")
