"""The sequences of a batch as rows of its tensors: some of them, in another order, or others instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from speculative_eft.kernels import RoundState

__all__ = ["end_rows", "narrowed", "put", "rearrange", "refill"]

Part = TypeVar("Part")

_SHARED = frozenset({"tested_at", "accepted_at", "eos_token_ids", "thresholds", "least_chances"})
"""Tensors of a batch's parts that hold nothing of a single sequence."""


def _rows_of(part: Any) -> Iterator[Tensor]:
    """Every tensor of `part`, a dataclass that may hold others, whose first dimension counts sequences."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Tensor) and field.name not in _SHARED:
            yield value
        elif isinstance(value, list):
            yield from value
        elif dataclasses.is_dataclass(value):
            yield from _rows_of(value)


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


def rearrange(part: Any, rows: Sequence[int], sources: Sequence[int]) -> None:
    """Let each of `rows` hold what its source, another of them, holds."""
    tensors = list(_rows_of(part))
    # Torch would have the host wait for such a copy until all that a GPU was given is over.
    at, source = torch.tensor([rows, sources]).to(tensors[0].device, non_blocking=True)
    for tensor in tensors:
        tensor[at] = tensor[source]


def put(part: Any, row: int, one: Any) -> None:
    """Write `one`, which holds a single sequence, into a row of `part`."""
    for tensor, own in zip(_rows_of(part), _rows_of(one), strict=True):
        tensor[row] = own[0]


def end_rows(state: RoundState, rows: Sequence[int]) -> None:
    """Mark the sequences of `rows`, which the host ended."""
    if rows:
        at = torch.tensor(list(rows)).to(state.done.device, non_blocking=True)
        state.done[at] = True
        state.draft_lens[at] = 0


def refill(kept: Any, new: Any) -> bool:
    """Write what `new` holds into the tensors of `kept`, if the two are alike but for these."""
    if not _alike(kept, new):
        return False
    _write(kept, new)
    return True


def _alike(kept: Any, new: Any) -> bool:
    if isinstance(kept, Tensor) and isinstance(new, Tensor):
        return kept.shape == new.shape and kept.dtype == new.dtype
    if isinstance(kept, list) and isinstance(new, list):
        return len(kept) == len(new) and all(map(_alike, kept, new))
    if dataclasses.is_dataclass(kept) and type(kept) is type(new):
        names = [field.name for field in dataclasses.fields(kept)]
        return all(_alike(getattr(kept, name), getattr(new, name)) for name in names)
    return bool(kept == new)


def _write(kept: Any, new: Any) -> None:
    if isinstance(kept, Tensor):
        # Several rows in one place are of constants, which are the same in both.
        if 0 not in kept.stride():
            kept.copy_(new)
    elif isinstance(kept, list):
        for own, other in zip(kept, new, strict=True):
            _write(own, other)
    elif dataclasses.is_dataclass(kept):
        for field in dataclasses.fields(kept):
            _write(getattr(kept, field.name), getattr(new, field.name))
