"""The memory of log-ratios compiled for a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..memory import LAST_WEIGHT, MEAN_FADING, MEAN_WEIGHT
from .compile import CUBE, FLAGS, FLOAT, MATRIX, TABLE, TABLES, VECTOR, array_at, compiled, entry

if TYPE_CHECKING:
    from ..memory import DraftMemory

__all__ = ["MEMORY", "NO_MEMORY", "arrays", "recall", "remember"]

MEMORY = f"{CUBE}, {TABLES}, {MATRIX}, {TABLE}"
"""Types of `arrays`."""
NO_MEMORY = (
    np.empty((0, 0, 0), np.float32), np.empty((0, 0), np.int64), np.empty((0, 0), np.float32),
    np.empty(0, np.int64),
)  # fmt: skip


def arrays(memory: DraftMemory) -> tuple[Any, ...]:
    """A memory as arrays: ratios, tokens, mean, count."""
    return memory.ratios.numpy(), memory.tokens.numpy(), memory.mean.numpy(), memory.count.numpy()


def remember(
    memory: DraftMemory, large: Tensor, base: Tensor, block: Tensor, accepted_lens: Tensor, done: Tensor
) -> None:
    """`kernels.remember` of tensors in the host's memory."""
    pair = [part.float().contiguous() for part in (large, base)]
    _remember(
        *arrays(memory), np.array([part.data_ptr() for part in pair]), large.shape[2],
        block.contiguous().numpy(), accepted_lens.numpy(), done.numpy(),
    )  # fmt: skip


@compiled(f"void({MEMORY}, int64, int64, float32, {VECTOR})")
def recall(
    ratios: Any, tokens: Any, mean: Any, count: Any, sequence: int, token: int, beta: float, out: Any
) -> None:
    """`kernels.recall` for one sequence, into `out` [vocab]."""
    slots = tokens.shape[1]
    own = mean[sequence]
    for back in range(min(slots, count[sequence])):
        slot = (count[sequence] - 1 - back) % slots
        if tokens[sequence, slot] == token:
            last = ratios[sequence, slot]
            for k in range(out.shape[0]):
                half = FLOAT(MEAN_WEIGHT) * own[k]
                out[k] = beta * (half + FLOAT(LAST_WEIGHT) * (last[k] - half))
            return
    for k in range(out.shape[0]):
        out[k] = beta * (FLOAT(MEAN_WEIGHT) * own[k])


@entry(f"void({MEMORY}, {TABLE}, int64, {TABLES}, {TABLE}, {FLAGS})")
def _remember(
    ratios: Any,
    tokens: Any,
    mean: Any,
    count: Any,
    addresses: Any,
    columns: int,
    block: Any,
    accepted_lens: Any,
    done: Any,
) -> None:
    batch, rows = block.shape
    vocab_size, slots = mean.shape[1], tokens.shape[1]
    for sequence in range(batch):
        if done[sequence]:
            continue
        own = mean[sequence]
        for row in range(accepted_lens[sequence] + 1):
            offset = 4 * columns * (sequence * rows + row)
            large = array_at(addresses[0] + offset, (vocab_size,))
            base = array_at(addresses[1] + offset, (vocab_size,))
            slot = count[sequence] % slots
            tokens[sequence, slot] = block[sequence, row]
            ratio = ratios[sequence, slot]
            total, finite = FLOAT(0), FLOAT(0)
            for k in range(vocab_size):
                ratio[k] = large[k] - base[k]
                is_finite = abs(ratio[k]) <= FLOAT(3.4028235e38)
                total += ratio[k] if is_finite else FLOAT(0)
                finite += FLOAT(1) if is_finite else FLOAT(0)
            centre = total / max(finite, FLOAT(1))
            for k in range(vocab_size):
                ratio[k] = ratio[k] - centre if abs(ratio[k]) <= FLOAT(3.4028235e38) else FLOAT(0)
                own[k] = FLOAT(MEAN_FADING) * own[k] + FLOAT(1 - MEAN_FADING) * ratio[k]
            count[sequence] += 1
