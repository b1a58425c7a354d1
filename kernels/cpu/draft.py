"""One drafted token a sequence, compiled for a CPU: `kernels/draft.py` is the specification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .filters import filter_law, is_filtered, sampling_arrays
from .jit import (
    FLOAT,
    MATRIX,
    TABLE,
    TABLES,
    VECTOR,
    argmax,
    compiled,
    entry,
    logits_table,
    stay_a_function,
)
from .mix import mix, normalise, softmax
from .noise import race_of_logits
from .threads import in_parallel, use_threads

if TYPE_CHECKING:
    from ..filters import Sampling

__all__ = ["draft", "draft_share"]


def draft(
    logits: Sequence[Tensor],
    weights: Tensor,
    sampling: Sampling,
    seeds: Tensor,
    counters: Tensor,
    row: int,
    stream: int,
    vocab_size: int,
    chances: Tensor | None,
) -> Tensor:
    """One token a sequence from the law of the weighted `logits`, each [batch, 1, >= vocab_size].

    `weights` is float32 [batch, models]; the draw is that of `exponential_noise` at (seeds, counters, row).
    `chances` as in `kernels.draft_step`. Returns int64 [batch].
    """
    batch = weights.shape[0]
    _kept, table = logits_table(logits)
    tokens = torch.empty(batch, dtype=torch.int64)
    if chances is None:
        chances = torch.empty(0)
    use_threads()
    _draft_rows(
        table, weights.contiguous().numpy(), sampling_arrays(sampling), seeds.contiguous().numpy(),
        counters.contiguous().numpy(), row, stream, vocab_size, tokens.numpy(), chances.numpy(),
    )  # fmt: skip
    return tokens


@compiled(
    f"void({TABLES}, {MATRIX}, SamplingArrays, {TABLE}, {TABLE}, int64, int64, int64, {TABLE}, {TABLE}, "
    f"{VECTOR}, {VECTOR}, int64)"
)
def draft_share(
    table: Any,
    weights: Any,
    sampling: Any,
    seeds: Any,
    counters: Any,
    row: int,
    stream: int,
    vocab_size: int,
    takes_part: Any,
    tokens: Any,
    chances: Any,
    kept: Any,
    sequence: int,
) -> None:
    """One sequence's draw, and, where there is room for them, its chance and the logits it was drawn from.

    Float32 `chances` are [batch] or empty, `kept` [vocab_size] or empty.
    """
    stay_a_function()
    if takes_part[sequence] == 0:
        return
    values = np.empty(vocab_size, FLOAT)
    mix(table, weights[sequence], sequence, 0, values)
    for token in range(kept.shape[0]):
        kept[token] = values[token]
    scale = sampling.temperature[sequence]
    filtered = is_filtered(sampling, sequence, vocab_size)
    law = np.empty(vocab_size if filtered or chances.shape[0] > 0 else 0, FLOAT)
    if filtered:
        softmax(values, scale, law)
        filter_law(values, law, sampling, sequence)
        scale = FLOAT(1)
    elif chances.shape[0] > 0:
        normalise(values.copy(), scale if scale > FLOAT(0) else FLOAT(1), law)
    if scale > FLOAT(0):
        tokens[sequence] = race_of_logits(values, scale, seeds[sequence], counters[sequence], row, stream)
    else:
        tokens[sequence] = argmax(values)
    if chances.shape[0] > 0:
        chances[sequence] = law[tokens[sequence]]


@in_parallel(
    f"void(int64, {TABLES}, {MATRIX}, SamplingArrays, {TABLE}, {TABLE}, int64, int64, int64, {TABLE}, "
    f"{TABLE}, {VECTOR})"
)
def _draft_together(
    sequence: int,
    table: Any,
    weights: Any,
    sampling: Any,
    seeds: Any,
    counters: Any,
    row: int,
    stream: int,
    vocab_size: int,
    takes_part: Any,
    tokens: Any,
    chances: Any,
) -> None:
    nothing = np.empty(0, FLOAT)
    draft_share(
        table, weights, sampling, seeds, counters, row, stream, vocab_size, takes_part, tokens, chances,
        nothing, sequence,
    )  # fmt: skip


@entry(f"void({TABLES}, {MATRIX}, SamplingArrays, {TABLE}, {TABLE}, int64, int64, int64, {TABLE}, {VECTOR})")
def _draft_rows(
    table: Any,
    weights: Any,
    sampling: Any,
    seeds: Any,
    counters: Any,
    row: int,
    stream: int,
    vocab_size: int,
    tokens: Any,
    chances: Any,
) -> None:
    takes_part = np.ones(tokens.shape[0], np.int64)
    if tokens.shape[0] > 1:
        _draft_together(
            tokens.shape[0], table, weights, sampling, seeds, counters, row, stream, vocab_size, takes_part,
            tokens, chances,
        )  # fmt: skip
    else:
        nothing = np.empty(0, FLOAT)
        draft_share(
            table, weights, sampling, seeds, counters, row, stream, vocab_size, takes_part, tokens, chances,
            nothing, 0,
        )  # fmt: skip
