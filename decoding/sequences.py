"""The sequences of a batch as rows of its tensors: narrowing to some, and moving one to another's place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["exchange", "narrowed", "rows_of"]

Part = TypeVar("Part")

_SHARED = frozenset({"tested_at", "accepted_at", "eos_token_ids", "thresholds"})
"""Tensors of a batch's parts that hold nothing of a single sequence."""


def rows_of(part: Any) -> Iterator[Tensor]:
    """Every tensor of `part`, a dataclass that may hold others, whose first dimension counts sequences."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Tensor) and field.name not in _SHARED:
            yield value
        elif isinstance(value, list):
            yield from value
        elif dataclasses.is_dataclass(value):
            yield from rows_of(value)


def narrowed(part: Part, batch: int) -> Part:
    """`part` of the first `batch` sequences, over the same storage."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(part):  # type: ignore[arg-type]
        value = getattr(part, field.name)
        if isinstance(value, Tensor) and field.name not in _SHARED:
            changes[field.name] = value[:batch]
        elif isinstance(value, list):
            changes[field.name] = [tensor[:batch] for tensor in value]
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            changes[field.name] = narrowed(value, batch)
    return dataclasses.replace(part, **changes)  # type: ignore[type-var]


def exchange(part: Any, first: int, second: int) -> None:
    """Let two sequences of `part` change places."""
    for tensor in rows_of(part):
        held = tensor[first].clone()
        tensor[first] = tensor[second]
        tensor[second] = held
