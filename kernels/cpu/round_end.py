"""The end of a round compiled for a CPU: verification, what is remembered, and the commit in one call.

Between passes that read all of a model, each operation that a host starts is slow, as its own code and data
have left the processor's caches. What stays from round to round is therefore found once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..verify import AcceptanceRule, Verdict
from .arguments import arguments_at, bound_call
from .commit import commit_rows, rule_arrays, state_arrays
from .early_stop import early_stop_arrays, learn_rows
from .filters import conservative_arrays, sampling_arrays
from .jit import (
    FLAGS,
    TABLE,
    TABLES,
    arrays,
    entry,
    logits_table,
)
from .memory import memory_arrays, remember_rows, remember_sequence
from .threads import in_parallel, use_threads
from .verify import (
    VERIFICATION,
    LawRoom,
    VerdictArrays,
    submitted_arrays,
    verify_rows,
    verify_sequence,
)

if TYPE_CHECKING:
    from ..commit import DraftLengthRule, RoundState
    from ..filters import Sampling
    from ..mix import Coefficients

__all__ = ["bind_round_end"]


def bind_round_end(
    state: RoundState,
    logits: Sequence[Tensor],
    block: Tensor,
    counts: Tensor,
    coefficients: Coefficients,
    sampling: Sampling,
    draft_sampling: Sampling,
    rule: AcceptanceRule,
    eos_token_ids: Tensor,
    draft_length_rule: DraftLengthRule | None,
    caches: Sequence[tuple[Tensor, bool]],
    laws: Sequence[Tensor],
) -> tuple[Verdict, Tensor, Callable[[], None]]:
    """A call that does what `verify`, `remember`, `learn` and `commit` do, in turn, with these very tensors.

    Args:
        logits: float32, of the large base, the tuned models, the small base, and the correction, if any.
        block: int64 [batch, drafted + 1], the last committed token and the drafted ones.
        counts: int64 [batch], one more than each sequence's draft length, which `state.draft_lens` then
            becomes; 0 where its verdict is not wanted.
        laws: room for three laws, float32 [batch, drafted + 1, vocabulary].
        coefficients to caches: as in these operations.

    Returns:
        The verdict, whose tensors the call writes, and the report of `commit`, which it writes too.
    """
    batch, rows = block.shape
    verdict = Verdict(
        accepted_lens=torch.zeros(batch, dtype=torch.int64),
        next_token=torch.zeros(batch, dtype=torch.int64),
        expected_acceptance=torch.zeros(batch, rows - 1),
        log_probs=torch.zeros(batch, rows),
    )
    report = torch.zeros(batch, rows + 2, dtype=torch.int64)
    _rows, table = logits_table(logits)
    arguments = (
        submitted_arrays(table, coefficients, block, counts, state.noise, rule),
        conservative_arrays(coefficients), sampling_arrays(sampling),
        sampling_arrays(draft_sampling), LawRoom(*(law.numpy() for law in laws)),
        VerdictArrays(*arrays(verdict, *VerdictArrays._fields)),
        state.memory is not None, memory_arrays(state.memory), state.early_stop is not None,
        early_stop_arrays(state.early_stop), state_arrays(state), eos_token_ids.numpy(),
        rule_arrays(draft_length_rule),
        np.array([(lengths.data_ptr(), stepped) for lengths, stepped in caches]), report.numpy(),
        _shares(batch),
    )  # fmt: skip
    return verdict, report, bound_call(_end_round, _ARGUMENTS, arguments, (logits, caches))


def _shares(batch: int) -> int:
    """In how many shares whole sequences are verified; 0 if they are so few that threads share their rows."""
    threads = use_threads()
    return threads if batch >= 2 * threads else 0


@in_parallel(f"void(int64, {VERIFICATION}, boolean, MemoryArrays, {TABLES}, {FLAGS}, int64)")
def _verify_and_remember(
    share: int,
    submitted: Any,
    conservative: Any,
    sampling: Any,
    draft_sampling: Any,
    room: Any,
    verdict: Any,
    remembers: bool,
    memory: Any,
    pair: Any,
    done: Any,
    shares: int,
) -> None:
    for sequence in range(share, done.shape[0], shares):
        verify_sequence(submitted, conservative, sampling, draft_sampling, room, verdict, share, sequence)
        if remembers:
            remember_sequence(memory, pair, submitted.block, verdict.accepted_lens, done, sequence)


_ARGUMENTS = (
    f"{VERIFICATION}, boolean, MemoryArrays, boolean, EarlyStopArrays, StateArrays, {TABLE}, RuleArrays, "
    f"{TABLES}, {TABLES}, int64"
)
_arguments = arguments_at(_ARGUMENTS)


@entry("void(int64)")
def _end_round(address: int) -> None:
    (
        submitted, conservative, sampling, draft_sampling, room, verdict, remembers, memory, learns, early,
        state, eos_token_ids, rule, caches, report, shares,
    ) = _arguments(address)  # fmt: skip
    counts, block = submitted.counts, submitted.block
    for sequence in range(counts.shape[0]):
        state.draft_lens[sequence] = max(counts[sequence] - 1, 0)
    pair = np.empty((2, 3), np.int64)
    if remembers:
        # Of the large base and the small one, which stands before the correction.
        last = submitted.draft_weights.shape[1] - 2
        pair[0], pair[1] = submitted.table[0], submitted.table[last]
    if shares > 0:
        _verify_and_remember(
            shares, submitted, conservative, sampling, draft_sampling, room, verdict, remembers, memory, pair,
            state.done, shares,
        )  # fmt: skip
    else:
        verify_rows(submitted, conservative, sampling, draft_sampling, room, verdict)
        if remembers:
            remember_rows(memory, pair, block, verdict.accepted_lens, state.done)
    if learns:
        learn_rows(early, counts, verdict.accepted_lens)
    commit_rows(state, eos_token_ids, rule, block, verdict, caches, report)
