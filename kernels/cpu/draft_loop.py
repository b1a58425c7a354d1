"""What a draft is beside its models' steps, compiled for a CPU: its begin, and the draws after each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from ..noise import Stream
from .draft import draft_share
from .early_stop import early_stop_arrays, ends_draft
from .filters import sampling_arrays
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
    record,
    stay_a_function,
)
from .memory import memory_arrays, recall
from .threads import in_parallel

if TYPE_CHECKING:
    from ..draft import DraftLoop

__all__ = ["DRAWS", "begin_arguments", "begin_draft", "draw", "draw_arguments"]


@record(TABLES, MATRIX, TABLE, TABLE, "boolean", "int64", "boolean", VECTOR, CUBE, "boolean")
class DrawArrays(NamedTuple):
    """What the draws of a draft read, but for the state of its steps.

    Attributes:
        places: int64 [models, 3], where the logits of a draft begin, and their strides by sequence and step.
        law_weights: float32 [batch, models].
        seeds, counters: int64 [batch], where the noise lies; the counter of step j is j more if `is_shared`.
        may_end: whether drafts end early.
        beta: float32 [batch].
        correction, keeps_logits: as in `DraftLoop`.
    """

    places: Any
    law_weights: Any
    seeds: Any
    counters: Any
    is_shared: bool
    stream: int
    may_end: bool
    beta: Any
    correction: Any
    keeps_logits: bool


DRAWS = "DrawArrays, SamplingArrays, MemoryArrays, EarlyStopArrays"
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
    law_weights, beta = arrays(draft.coefficients, "draft_weights", "beta")
    seeds, counters = arrays(draft.noise, "seeds", "positions" if is_shared else "rounds")
    draws = DrawArrays(
        places=np.array(places),
        law_weights=law_weights,
        seeds=seeds,
        counters=counters,
        is_shared=is_shared,
        stream=int(draft.stream),
        may_end=draft.early_stop is not None,
        beta=beta,
        correction=correction.numpy(),
        keeps_logits=draft.keeps_logits,
    )
    early = early_stop_arrays(draft.early_stop)
    return draws, sampling_arrays(draft.sampling), memory_arrays(draft.memory), early


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
    f"DrawArrays, SamplingArrays, MemoryArrays, {TABLES}, {TABLE}, int64, {TABLES}, {TABLE}, {TABLE}, "
    f"{VECTOR}"
)


@compiled(f"void({_SHARES}, int64)")
def _draw_share(
    draws: Any,
    sampling: Any,
    memory: Any,
    table: Any,
    counter: Any,
    step: int,
    block: Any,
    takes_part: Any,
    drawn: Any,
    chances: Any,
    sequence: int,
) -> None:
    """What is remembered of one sequence's last token, if anything, and its draw."""
    stay_a_function()
    own = draws.correction[sequence, step]
    if takes_part[sequence] and memory.ratios.shape[0]:
        previous = block[sequence, step - 1] if step > 0 else -1
        recall(memory, sequence, drawn[sequence], previous, draws.beta[sequence], own)
    draft_share(
        table, draws.law_weights, sampling, draws.seeds, counter, 0 if draws.is_shared else step,
        draws.stream, own.shape[0], takes_part, drawn, chances, own if draws.keeps_logits else own[:0],
        sequence,
    )  # fmt: skip


@in_parallel(f"void(int64, {_SHARES})")
def _draw_together(
    sequence: int,
    draws: Any,
    sampling: Any,
    memory: Any,
    table: Any,
    counter: Any,
    step: int,
    block: Any,
    takes_part: Any,
    drawn: Any,
    chances: Any,
) -> None:
    _draw_share(
        draws, sampling, memory, table, counter, step, block, takes_part, drawn, chances, sequence
    )  # fmt: skip


@entry(f"int64(int64, {TABLES}, {TABLE}, {TABLE}, {TABLE}, {DRAWS})")
def draw(
    step: int,
    block: Any,
    counts: Any,
    drawn: Any,
    takes_part: Any,
    draws: Any,
    sampling: Any,
    memory: Any,
    early: Any,
) -> int:
    """The tokens that follow `step`, for all but its last; how many steps the longest draft takes now."""
    batch, places = drawn.shape[0], draws.places
    table = np.zeros_like(places)
    for model in range(places.shape[0]):
        table[model, 0], table[model, 1] = places[model, 0] + 4 * step * places[model, 2], places[model, 1]
    counter = np.empty(batch, np.int64)
    for sequence in range(batch):
        counter[sequence] = draws.counters[sequence] + (step if draws.is_shared else 0)
        takes_part[sequence] = step + 1 < counts[sequence]
    chances = np.empty(batch if draws.may_end else 0, FLOAT)
    if batch > 1:
        _draw_together(
            batch, draws, sampling, memory, table, counter, step, block, takes_part, drawn, chances
        )  # fmt: skip
    else:
        _draw_share(draws, sampling, memory, table, counter, step, block, takes_part, drawn, chances, 0)
    longest = 0
    for sequence in range(batch):
        block[sequence, step + 1] = drawn[sequence]
        if draws.may_end and takes_part[sequence] and ends_draft(early, sequence, step, chances[sequence]):
            counts[sequence] = step + 2
        longest = max(longest, counts[sequence])
    return longest
