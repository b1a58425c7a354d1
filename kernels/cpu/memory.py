"""The memory of log-ratios compiled for a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from ..memory import LAST_WEIGHT, LAST_WEIGHT_AFTER_TWO, MEAN_FADING, MEAN_WEIGHT
from .jit import (
    CUBE,
    FLAGS,
    FLOAT,
    LARGEST_FLOAT,
    MATRIX,
    TABLE,
    TABLES,
    VECTOR,
    array_at,
    arrays,
    compiled,
    entry,
    logits_table,
    record,
    stay_a_function,
)
from .threads import in_parallel, use_threads

if TYPE_CHECKING:
    from ..memory import DraftMemory

__all__ = ["MemoryArrays", "memory_arrays", "recall", "remember", "remember_rows", "remember_sequence"]


@record(CUBE, TABLES, MATRIX, TABLE)
class MemoryArrays(NamedTuple):
    """A `DraftMemory` as arrays; empty ones without it."""

    ratios: Any
    tokens: Any
    mean: Any
    count: Any


_NO_MEMORY = MemoryArrays(
    np.empty((0, 0, 0), np.float32), np.empty((0, 0), np.int64), np.empty((0, 0), np.float32),
    np.empty(0, np.int64),
)  # fmt: skip


def memory_arrays(memory: DraftMemory | None) -> MemoryArrays:
    """A memory for compiled functions; empty for None."""
    return (
        _NO_MEMORY if memory is None else MemoryArrays(*arrays(memory, "ratios", "tokens", "mean", "count"))
    )


def remember(
    memory: DraftMemory, large: Tensor, base: Tensor, block: Tensor, accepted_lens: Tensor, done: Tensor
) -> None:
    """`kernels.remember` of tensors in the host's memory."""
    _kept, table = logits_table([large, base])
    use_threads()
    remember_rows(
        memory_arrays(memory), table, block.contiguous().numpy(), accepted_lens.numpy(), done.numpy()
    )


@compiled(f"void(MemoryArrays, int64, int64, int64, float32, {VECTOR})")
def recall(
    memory: Any,
    sequence: int,
    token: int,
    previous: int,
    beta: float,
    out: Any,
) -> None:
    """`kernels.recall` for one sequence, into `out` [vocab]; `previous` is -1 for None."""
    own, known, seen = memory.mean[sequence], memory.tokens[sequence], memory.count[sequence]
    slots = known.shape[0]
    if previous < 0:
        previous = known[(seen - 1) % slots]
    best, weight = -1, FLOAT(LAST_WEIGHT)
    for back in range(min(slots, seen)):
        slot = (seen - 1 - back) % slots
        if known[slot] == token:
            if back < slots - 1 and known[(slot - 1) % slots] == previous:
                best, weight = slot, FLOAT(LAST_WEIGHT_AFTER_TWO)
                break
            if best < 0:
                best = slot
    if best < 0:
        for k in range(out.shape[0]):
            out[k] = beta * (FLOAT(MEAN_WEIGHT) * own[k])
        return
    last = memory.ratios[sequence, best]
    for k in range(out.shape[0]):
        half = FLOAT(MEAN_WEIGHT) * own[k]
        out[k] = beta * (half + weight * (last[k] - half))


@compiled(f"void(MemoryArrays, {TABLES}, {TABLES}, {TABLE}, {FLAGS}, int64)")
def remember_sequence(
    memory: Any,
    table: Any,
    block: Any,
    accepted_lens: Any,
    done: Any,
    sequence: int,
) -> None:
    """`remember_rows` for one sequence."""
    stay_a_function()
    tokens, count = memory.tokens, memory.count
    own, slots = memory.mean[sequence], tokens.shape[1]
    vocab_size = own.shape[0]
    for row in range(0 if done[sequence] else accepted_lens[sequence] + 1):
        large = array_at(table[0, 0] + 4 * (sequence * table[0, 1] + row * table[0, 2]), (vocab_size,))
        base = array_at(table[1, 0] + 4 * (sequence * table[1, 1] + row * table[1, 2]), (vocab_size,))
        slot = count[sequence] % slots
        tokens[sequence, slot] = block[sequence, row]
        ratio = memory.ratios[sequence, slot]
        # Loops are in such parts as are taken in vectors: no sum of floats under a condition is.
        finite = np.int32(0)
        for k in range(vocab_size):
            known = abs(large[k] - base[k]) <= LARGEST_FLOAT
            ratio[k] = large[k] - base[k] if known else FLOAT(0)
            finite = np.int32(finite + np.int32(known))
        total = FLOAT(0)
        for k in range(vocab_size):
            total += ratio[k]
        centre = total / max(FLOAT(finite), FLOAT(1))
        for k in range(vocab_size):
            ratio[k] = ratio[k] - centre if abs(large[k] - base[k]) <= LARGEST_FLOAT else FLOAT(0)
        for k in range(vocab_size):
            own[k] = FLOAT(MEAN_FADING) * own[k] + FLOAT(1 - MEAN_FADING) * ratio[k]
        count[sequence] += 1


@in_parallel(f"void(int64, MemoryArrays, {TABLES}, {TABLES}, {TABLE}, {FLAGS})")
def _remember_together(
    sequence: int, memory: Any, table: Any, block: Any, accepted_lens: Any, done: Any
) -> None:
    remember_sequence(memory, table, block, accepted_lens, done, sequence)


@entry(f"void(MemoryArrays, {TABLES}, {TABLES}, {TABLE}, {FLAGS})")
def remember_rows(
    memory: Any,
    table: Any,
    block: Any,
    accepted_lens: Any,
    done: Any,
) -> None:
    """`remember`; the first rows of `table`, as `logits_table` makes it, are of the large and small base."""
    if block.shape[0] > 1:
        _remember_together(block.shape[0], memory, table, block, accepted_lens, done)
    else:
        remember_sequence(memory, table, block, accepted_lens, done, 0)
