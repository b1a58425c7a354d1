"""Checks of single values that a caller gives."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

__all__ = ["between", "int64_of", "integer", "is_integral", "token_ids"]


def _index_of(value: Any) -> int | None:
    """An integer of Python, numpy or torch (of one element) as an int; None for all else, booleans too."""
    if isinstance(value, bool) or getattr(value, "dtype", None) in (torch.bool, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def int64_of(value: Any) -> int | None:
    """An integer of 64 bits, as seeds and token ids are, as an int; None for all else."""
    found = _index_of(value)
    return found if found is not None and -(2**63) <= found < 2**63 else None


def is_integral(tensor: Tensor) -> bool:
    """Whether a tensor holds integers; booleans are none."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)


def integer(name: str, value: Any, least: int = 0, other: str = "") -> int:
    """`value` as an int. Raises ValueError if it is none, or below `least`.

    `other` says what else the caller would take.
    """
    found = _index_of(value)
    if found is None or found < least:
        also = f" or {other}" if other else ""
        raise ValueError(f"{name} must be an integer of at least {least}{also}, got {value!r}")
    return found


def between(name: str, value: Any, low: float, high: float, other: str = "") -> float:
    """`value` as a float. Raises ValueError if it is no number, not finite, or outside `low`..`high`.

    To a user a `high` of infinity is any finite number, and the least float is 0. `other` says what else the
    caller would take.
    """
    number = _as_float(value)
    if not low <= number <= high or math.isinf(number):
        above_zero = low == math.ulp(0.0)
        if high == math.inf:
            least = "" if low == -math.inf else " above 0" if above_zero else f" of at least {low:g}"
            wanted = f"be a finite number{least}{f' or {other}' if other else ''}"
        else:
            wanted = f"lie in (0, {high:g}]" if above_zero else f"lie between {low:g} and {high:g}"
            wanted += f" or be {other}" if other else ""
        raise ValueError(f"{name} must {wanted}, got {value!r}")
    return number


def _as_float(value: Any) -> float:
    """A real number as a float, infinity where it is beyond floats; NaN for all else, booleans too."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def token_ids(name: str, value: int | Iterable[int] | Tensor | None) -> tuple[int, ...]:
    """Token ids that a caller gives as one, several or None, as a tuple. Raises ValueError for all else."""
    if value is None:
        return ()
    if isinstance(value, Tensor):
        value = value.flatten().tolist()
    ids = tuple(map(int64_of, value if isinstance(value, Iterable) else (value,)))
    if any(token is None for token in ids):
        raise ValueError(f"{name} must be a token id or a list of them, got {value!r}")
    return tuple(token for token in ids if token is not None)
