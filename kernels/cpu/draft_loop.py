"""What a draft is beside its models' steps, compiled for a CPU: its begin, and the draws after each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import prange
from torch import Tensor

from ..noise import Stream
from .draft import draft_share
from .early_stop import EARLY_STOP, early_stop_arrays, ends_draft
from .filters import SAMPLING, sampling_arrays
from .jit import (
    CUBE,
    FLAGS,
    FLOAT,
    MATRIX,
    TABLE,
    TABLES,
    VECTOR,
    arrays,
    compiled,
    entry,
    in_parallel,
    stay_a_function,
)
from .memory import MEMORY, memory_arrays, recall

if TYPE_CHECKING:
    from ..draft import DraftLoop

__all__ = ["DRAWS", "begin_arguments", "begin_draft", "draw", "draw_arguments"]

DRAWS = (
    f"{TABLES}, {MATRIX}, {SAMPLING}, {TABLE}, {TABLE}, boolean, int64, {MEMORY}, boolean, {EARLY_STOP}, "
    f"{VECTOR}, {CUBE}, boolean"
)
"""Types of `draw_arguments`."""


def begin_arguments(draft: DraftLoop) -> tuple[Any, ...]:
    """What `begin_draft` needs to know of a draft, but for `drawn` and `takes_part`."""
    return arrays(draft, "last_token", "draft_lens", "done", "block", "counts")


def draw_arguments(draft: DraftLoop, logits: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """What `draw` needs to know of a draft.

    Args:
        logits: of the large base, the tuned models and the small base, contiguous float32
            [drafted + 1, batch, >= vocabulary]; None for those whose weight in the draft law is 0.
    """
    places = [
        (0, 0, 0) if part is None else (part.data_ptr(), part.stride(1), part.stride(0)) for part in logits
    ]
    correction, is_shared = draft.correction, draft.stream is Stream.SHARED
    if draft.memory is not None:
        places.append((correction.data_ptr(), correction.stride(0), correction.stride(1)))
    return (
        np.array(places), *arrays(draft.coefficients, "draft_weights"), *sampling_arrays(draft.sampling),
        *arrays(draft.noise, "seeds", "positions" if is_shared else "rounds"), is_shared, int(draft.stream),
        *memory_arrays(draft.memory), draft.early_stop is not None, *early_stop_arrays(draft.early_stop),
        *arrays(draft.coefficients, "beta"), correction.numpy(), draft.keeps_logits,
    )  # fmt: skip


@entry(f"int64({TABLE}, {TABLE}, {FLAGS}, {TABLES}, {TABLE}, {TABLE}, {TABLE})")
def begin_draft(
    last_token: Any, draft_lens: Any, done: Any, block: Any, counts: Any, drawn: Any, takes_part: Any
) -> int:
    """Set what the first step reads; returns how many steps the longest draft takes.

    Into int64 `block` [batch, drafted + 1] go the tokens, into `counts` the steps of each sequence, 0 for one
    that is done. `drawn` are each sequence's tokens of the next step, in which it runs if `takes_part` is 1.
    """
    longest = 0
    for sequence in range(last_token.shape[0]):
        block[sequence, 0] = drawn[sequence] = last_token[sequence]
        counts[sequence] = 0 if done[sequence] else draft_lens[sequence] + 1
        takes_part[sequence] = counts[sequence] > 0
        longest = max(longest, counts[sequence])
    return longest


_SHARES = (
    f"{TABLES}, {MATRIX}, {SAMPLING}, {TABLE}, {TABLE}, int64, int64, {MEMORY}, {VECTOR}, {CUBE}, boolean, "
    f"int64, {TABLES}, {TABLE}, {TABLE}, {VECTOR}"
)


@compiled(f"void({_SHARES}, int64)")
def _draw_share(
    table: Any,
    law_weights: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    seeds: Any,
    counter: Any,
    row: int,
    stream: int,
    ratios: Any,
    remembered: Any,
    mean: Any,
    count: Any,
    beta: Any,
    correction: Any,
    keeps_logits: bool,
    step: int,
    block: Any,
    takes_part: Any,
    drawn: Any,
    chances: Any,
    sequence: int,
) -> None:
    """What is remembered of one sequence's last token, if anything, and its draw."""
    stay_a_function()
    own = correction[sequence, step]
    if takes_part[sequence] and ratios.shape[0]:
        previous = block[sequence, step - 1] if step > 0 else -1
        recall(ratios, remembered, mean, count, sequence, drawn[sequence], previous, beta[sequence], own)
    draft_share(
        table, law_weights, temperature, top_k, top_p, min_p, seeds, counter, row, stream,
        correction.shape[2], takes_part, drawn, chances, own if keeps_logits else own[:0], sequence,
    )  # fmt: skip


@in_parallel(f"void({_SHARES})")
def _draw_together(
    table: Any,
    law_weights: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    seeds: Any,
    counter: Any,
    row: int,
    stream: int,
    ratios: Any,
    remembered: Any,
    mean: Any,
    count: Any,
    beta: Any,
    correction: Any,
    keeps_logits: bool,
    step: int,
    block: Any,
    takes_part: Any,
    drawn: Any,
    chances: Any,
) -> None:
    for share in prange(drawn.shape[0]):
        _draw_share(
            table, law_weights, temperature, top_k, top_p, min_p, seeds, counter, row, stream, ratios,
            remembered, mean, count, beta, correction, keeps_logits, step, block, takes_part, drawn, chances,
            np.int64(share),
        )  # fmt: skip


@entry(f"int64(int64, {TABLES}, {TABLE}, {TABLE}, {TABLE}, {DRAWS})")
def draw(
    step: int,
    block: Any,
    counts: Any,
    drawn: Any,
    takes_part: Any,
    places: Any,
    law_weights: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    seeds: Any,
    counters: Any,
    shared: bool,
    stream: int,
    ratios: Any,
    remembered: Any,
    mean: Any,
    count: Any,
    may_end: bool,
    accepted: Any,
    tested: Any,
    least: Any,
    reach: Any,
    grades: Any,
    least_chances: Any,
    fading: float,
    prior_accepted: float,
    prior_tested: float,
    beta: Any,
    correction: Any,
    keeps_logits: bool,
) -> int:
    """The tokens that follow `step`, for all but its last; how many steps the longest draft takes now."""
    batch = drawn.shape[0]
    table = np.zeros_like(places)
    for model in range(places.shape[0]):
        table[model, 0], table[model, 1] = places[model, 0] + 4 * step * places[model, 2], places[model, 1]
    counter = np.empty(batch, np.int64)
    for sequence in range(batch):
        counter[sequence] = counters[sequence] + (step if shared else 0)
        takes_part[sequence] = step + 1 < counts[sequence]
    chances = np.empty(batch if may_end else 0, FLOAT)
    row = 0 if shared else step
    if batch > 1:
        _draw_together(
            table, law_weights, temperature, top_k, top_p, min_p, seeds, counter, row, stream, ratios,
            remembered, mean, count, beta, correction, keeps_logits, step, block, takes_part, drawn, chances,
        )  # fmt: skip
    else:
        _draw_share(
            table, law_weights, temperature, top_k, top_p, min_p, seeds, counter, row, stream, ratios,
            remembered, mean, count, beta, correction, keeps_logits, step, block, takes_part, drawn, chances,
            0,
        )  # fmt: skip
    longest = 0
    for sequence in range(batch):
        block[sequence, step + 1] = drawn[sequence]
        if (
            may_end
            and takes_part[sequence]
            and ends_draft(accepted, tested, least, reach, grades, sequence, step, chances[sequence])
        ):
            counts[sequence] = step + 2
        longest = max(longest, counts[sequence])
    return longest
