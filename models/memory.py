"""Whether caches and weights fit a device's memory, and what would fit where they do not."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .describe import ModelDescription
from .placement import is_dispatched
from .protocol import Runner
from .runner import ModelRunner
from .slot_cache import SPAN_MULTIPLE, SlotCache, round_up

__all__ = ["caches_fit", "caches_hold", "check_caches", "free_bytes", "weights_do_not_fit"]


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be allocated on `device`; None where that is not known, as on a CPU.

    What torch's allocator holds for later counts as free.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def caches_hold(runners: Sequence[Runner], batch: int, lengths: Sequence[int]) -> bool:
    """Whether the present caches have room for `batch` sequences of each runner's length in `lengths`."""
    pairs = zip(_models(runners), _own(runners, lengths), strict=False)
    return all(runner.cache.holds(batch, length) for runner, length in pairs)


def caches_fit(
    runners: Sequence[Runner], batch: int, lengths: Sequence[int], beside: int, *, growing: bool = False
) -> bool:
    """Whether `reserve` of each runner for `batch` sequences of its length in `lengths` finds the memory.

    Args:
        beside: bytes a sequence that are needed beside the caches.
        growing: whether the caches keep what they hold, so that each is there twice for a moment.
    """
    free = free_bytes(runners[0].device)
    models = [] if free is None else _models(runners)
    if free is None or not models:
        return True
    taken, most = batch * beside, batch * beside
    for runner, length in zip(models, _own(runners, lengths), strict=True):
        slots, capacity = batch, _capacity(runner.cache, length)
        held = _held(runner)
        if runner.cache.holds(batch, length):
            slots, capacity = runner.cache.slots, runner.cache.capacity
        elif growing:
            slots, capacity = max(slots, runner.cache.slots), max(capacity, runner.cache.capacity)
            most = max(most, taken + slots * capacity * runner.cache_bytes_per_token)
        taken += slots * capacity * runner.cache_bytes_per_token - held
        most = max(most, taken)
    return most <= free


def check_caches(
    runners: Sequence[Runner], batch: int, lengths: Sequence[int], beyond: int, beside: int, names: str
) -> None:
    """Refuse, before anything is allocated, caches that do not fit the memory.

    Runners that are no `ModelRunner`, and models that accelerate spreads over devices, are not counted.

    Args:
        lengths: of each runner the most tokens of a sequence.
        beyond: tokens that a round may write past these.
        beside: bytes a sequence that are needed beside the caches.
        names: the arguments that ask for them.

    Raises:
        ValueError: naming how many such sequences would fit, and how many tokens for so many sequences.
    """
    whole = [length + beyond for length in lengths]
    if caches_fit(runners, batch, whole, beside):
        return
    models, own = _models(runners), _own(runners, whole)
    device = models[0].device
    free = (free_bytes(device) or 0) + sum(map(_held, models))
    capacities = [_capacity(runner.cache, length) for runner, length in zip(models, own, strict=True)]
    each = beside + sum(
        capacity * runner.cache_bytes_per_token for runner, capacity in zip(models, capacities, strict=True)
    )
    tokens_of_all = sum(runner.cache_bytes_per_token for runner in models)
    spare = max(runner.cache.spare for runner in models)
    positions = max(free // batch - beside, 0) // tokens_of_all // SPAN_MULTIPLE * SPAN_MULTIPLE
    tokens = max(positions - spare - beyond, 0)
    longest = max(lengths)
    raise ValueError(
        f"{names}: {batch} sequences of {longest} tokens need {_gigabytes(batch * each)}, but {device} has "
        f"{_gigabytes(free)} for them; at most {free // each} sequences of that length, or {batch} of "
        f"{tokens} tokens, would fit"
    )


def weights_do_not_fit(models: Sequence[ModelDescription], free: int | None) -> str:
    """A sentence on models that ran out of memory while they were loaded, with `free` bytes before that."""
    needs = ", ".join(f"{model.role} {_gigabytes(model.bytes)}" for model in models)
    there = "" if free is None else f", but {_gigabytes(free)} were free"
    return (
        f"the models do not fit the device's memory: {needs}, {_gigabytes(sum(m.bytes for m in models))} "
        f"in all{there}; give smaller models, a smaller dtype, or device_map='auto' to spread them."
    )


def _models(runners: Sequence[Runner]) -> list[ModelRunner]:
    """Those whose caches are counted."""
    known = [runner for runner in runners if isinstance(runner, ModelRunner)]
    return [] if any(is_dispatched(runner.model) for runner in known) else known


def _own(runners: Sequence[Runner], lengths: Sequence[int]) -> list[int]:
    pairs = zip(runners, lengths, strict=True)
    return [length for runner, length in pairs if isinstance(runner, ModelRunner)]


def _capacity(cache: SlotCache, length: int) -> int:
    return round_up(length + cache.spare)


def _held(runner: ModelRunner) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in runner.cache.storage())


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
