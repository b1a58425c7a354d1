"""The end of a round compiled for a CPU: verification, what is remembered, and the commit in one call.

Between passes that read all of a model, each operation that a host starts is slow, as its own code and data
have left the processor's caches. What stays from round to round is therefore found once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from ..verify import AcceptanceRule, Verdict, verification_streams
from .commit import COMMIT, commit_arrays, commit_rows, rule_arguments
from .early_stop import EARLY_STOP, early_stop_arrays, learn_rows
from .filters import CONSERVATIVE, SAMPLING, conservative_arrays, sampling_arrays
from .jit import (
    CUBE,
    FLAGS,
    MATRIX,
    TABLE,
    TABLES,
    arrays,
    entry,
    in_parallel,
    logits_table,
    use_threads,
)
from .memory import MEMORY, memory_arrays, remember_rows, remember_sequence
from .verify import RULES, VERIFICATION, verify_rows, verify_sequence

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
    call = partial(
        _end_round, table, block.numpy(), counts.numpy(),
        *arrays(coefficients, "target_weights", "draft_weights"), *conservative_arrays(coefficients),
        *sampling_arrays(sampling), *sampling_arrays(draft_sampling), *arrays(state, "seeds"),
        *verification_streams(), RULES[rule], *(law.numpy() for law in laws),
        *arrays(verdict, "accepted_lens", "next_token", "expected_acceptance", "log_probs"),
        state.memory is not None, *memory_arrays(state.memory), state.early_stop is not None,
        *early_stop_arrays(state.early_stop), *commit_arrays(state), eos_token_ids.numpy(),
        *rule_arguments(draft_length_rule),
        np.array([(lengths.data_ptr(), stepped) for lengths, stepped in caches]), report.numpy(),
        _shares(batch),
    )  # fmt: skip
    return verdict, report, call


def _shares(batch: int) -> int:
    """In how many shares whole sequences are verified; 0 if they are so few that threads share their rows."""
    threads = use_threads()
    return threads if batch >= 2 * threads else 0


@in_parallel(f"void({VERIFICATION}, boolean, {MEMORY}, {TABLES}, {TABLES}, {FLAGS}, int64)")
def _verify_and_remember(
    table: Any,
    target_weights: Any,
    draft_weights: Any,
    conservative: Any,
    plain_weights: Any,
    delta_weights: Any,
    draft_tokens: Any,
    counts: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    draft_temperature: Any,
    draft_top_k: Any,
    draft_top_p: Any,
    draft_min_p: Any,
    seeds: Any,
    counters: Any,
    positions: Any,
    accept_stream: int,
    residual_stream: int,
    shared_stream: int,
    rule: int,
    log_target: Any,
    target: Any,
    draft: Any,
    accepted_lens: Any,
    next_token: Any,
    expected: Any,
    log_probs: Any,
    remembers: bool,
    ratios: Any,
    remembered: Any,
    mean: Any,
    count: Any,
    pair: Any,
    block: Any,
    done: Any,
    shares: int,
) -> None:
    for share in prange(shares):
        own = np.int64(share)
        for sequence in range(own, counts.shape[0], shares):
            verify_sequence(
                table, target_weights, draft_weights, conservative, plain_weights, delta_weights,
                draft_tokens, counts, temperature, top_k, top_p, min_p, draft_temperature, draft_top_k,
                draft_top_p, draft_min_p, seeds, counters, positions, accept_stream, residual_stream,
                shared_stream, rule, log_target, target, draft, accepted_lens, next_token, expected,
                log_probs, own, sequence,
            )  # fmt: skip
            if remembers:
                remember_sequence(
                    ratios, remembered, mean, count, pair, block, accepted_lens, done, sequence
                )  # fmt: skip


@entry(
    f"void({TABLES}, {TABLES}, {TABLE}, {MATRIX}, {MATRIX}, {CONSERVATIVE}, {SAMPLING}, {SAMPLING}, {TABLE}, "
    f"int64, int64, int64, int64, {CUBE}, {CUBE}, {CUBE}, {TABLE}, {TABLE}, {MATRIX}, {MATRIX}, boolean, "
    f"{MEMORY}, boolean, {EARLY_STOP}, {COMMIT}, {TABLES}, {TABLES}, int64)"
)
def _end_round(
    table: Any,
    block: Any,
    counts: Any,
    target_weights: Any,
    draft_weights: Any,
    conservative: Any,
    plain_weights: Any,
    delta_weights: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    draft_temperature: Any,
    draft_top_k: Any,
    draft_top_p: Any,
    draft_min_p: Any,
    seeds: Any,
    accept_stream: int,
    residual_stream: int,
    shared_stream: int,
    rule: int,
    log_target: Any,
    target: Any,
    draft: Any,
    accepted_lens: Any,
    next_token: Any,
    expected: Any,
    log_probs: Any,
    remembers: bool,
    ratios: Any,
    remembered: Any,
    mean: Any,
    count: Any,
    learns: bool,
    accepted_by_grade: Any,
    tested_by_grade: Any,
    least: Any,
    reach: Any,
    grades: Any,
    least_chances: Any,
    grade_fading: float,
    all_accepted: float,
    all_tested: float,
    last_token: Any,
    rounds: Any,
    positions: Any,
    generated: Any,
    limits: Any,
    done: Any,
    draft_lens: Any,
    output: Any,
    accepted_history: Any,
    tested_history: Any,
    drafted_total: Any,
    tested_total: Any,
    accepted_total: Any,
    expected_total: Any,
    tested_at: Any,
    accepted_at: Any,
    eos_token_ids: Any,
    adaptive: bool,
    thresholds: Any,
    fading: float,
    prior_accepted: float,
    prior_tested: float,
    caches: Any,
    report: Any,
    shares: int,
) -> None:
    batch, drafted = expected.shape
    draft_tokens = np.empty((batch, drafted), np.int64)
    for sequence in range(batch):
        for column in range(drafted):
            draft_tokens[sequence, column] = block[sequence, column + 1]
        draft_lens[sequence] = max(counts[sequence] - 1, 0)
    pair = np.empty((2, 3), np.int64)
    if remembers:
        # Of the large base and the small one, which stands before the correction.
        pair[0], pair[1] = table[0], table[draft_weights.shape[1] - 2]
    if shares > 0:
        _verify_and_remember(
            table, target_weights, draft_weights, conservative, plain_weights, delta_weights, draft_tokens,
            counts, temperature, top_k, top_p, min_p, draft_temperature, draft_top_k, draft_top_p,
            draft_min_p, seeds, rounds, positions, accept_stream, residual_stream, shared_stream, rule,
            log_target, target, draft, accepted_lens, next_token, expected, log_probs, remembers, ratios,
            remembered, mean, count, pair, block, done, shares,
        )  # fmt: skip
    else:
        verify_rows(
            table, target_weights, draft_weights, conservative, plain_weights, delta_weights, draft_tokens,
            counts, temperature, top_k, top_p, min_p, draft_temperature, draft_top_k, draft_top_p,
            draft_min_p, seeds, rounds, positions, accept_stream, residual_stream, shared_stream, rule,
            log_target, target, draft, accepted_lens, next_token, expected, log_probs,
        )  # fmt: skip
        if remembers:
            remember_rows(ratios, remembered, mean, count, pair, block, accepted_lens, done)
    if learns:
        learn_rows(
            accepted_by_grade, tested_by_grade, least, reach, grades, least_chances, grade_fading,
            all_accepted, all_tested, counts, accepted_lens,
        )  # fmt: skip
    commit_rows(
        last_token, rounds, positions, generated, limits, done, draft_lens, output, accepted_history,
        tested_history, drafted_total, tested_total, accepted_total, expected_total, tested_at, accepted_at,
        eos_token_ids, adaptive, thresholds, fading, prior_accepted, prior_tested, draft_tokens,
        accepted_lens, next_token, expected, caches, report,
    )  # fmt: skip
