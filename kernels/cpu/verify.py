"""Verification compiled for a CPU.

A row's logits are read once and stay in a core's cache until its law is known. The formulas are those of
`kernels/verify.py`, which is the specification; rows are shared among threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from .filters import CONSERVATIVE, SAMPLING, conservative_arrays, sampling_arrays
from .jit import (
    CUBE,
    FLOAT,
    MATRIX,
    TABLE,
    TABLES,
    VECTOR,
    argmax,
    arrays,
    compiled,
    entry,
    exp,
    in_parallel,
    logits_table,
    stay_a_function,
    strictly_compiled,
    use_threads,
)
from .mix import filtered_law, mix, mix_conservatively, softmax
from .noise import race_of_logits, race_of_weights, uniform

if TYPE_CHECKING:
    from ..filters import Sampling
    from ..mix import Coefficients
    from ..noise import NoiseKey

__all__ = ["RULES", "VERIFICATION", "verify", "verify_rows", "verify_sequence"]

RULES = {"token": 0, "block": 1, "shared_seed": 2}
_TOKEN, _BLOCK, _SHARED_SEED = range(3)


def verify(
    logits: Sequence[Tensor],
    coefficients: Coefficients,
    draft_tokens: Tensor,
    draft_lens: Tensor,
    sampling: Sampling,
    draft_sampling: Sampling,
    noise: NoiseKey,
    streams: tuple[int, int, int],
    rule: int,
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of a `Verdict` for `logits`, each [batch, drafted + 1, >= vocab_size].

    A correction of the draft, with a row less, comes last; `streams` are those of acceptance, of replacement
    and of shared noise.
    """
    batch, drafted = draft_tokens.shape
    _kept, table = logits_table(logits)
    accepted = torch.empty(batch, dtype=torch.int64)
    next_tokens = torch.empty(batch, dtype=torch.int64)
    expected = torch.empty(batch, drafted)
    log_target, target, draft_law = (np.empty((batch, drafted + 1, vocab_size), np.float32) for _ in range(3))
    log_probs = torch.empty(batch, drafted + 1)
    use_threads()
    verify_rows(
        table, *arrays(coefficients, "target_weights", "draft_weights"), *conservative_arrays(coefficients),
        draft_tokens.contiguous().numpy(), (draft_lens + 1).numpy(),
        *sampling_arrays(sampling), *sampling_arrays(draft_sampling),
        *arrays(noise, "seeds", "rounds", "positions"), *streams, rule, log_target, target, draft_law,
        accepted.numpy(), next_tokens.numpy(), expected.numpy(), log_probs.numpy(),
    )  # fmt: skip
    return accepted, next_tokens, expected, log_probs


@strictly_compiled("float32(float32, float32, float32, float32)")
def _difference(logit: Any, shift: Any, small: Any, small_shift: Any) -> Any:
    """Of two log-probabilities, which cold temperatures make small differences of large numbers."""
    return (logit - shift) - (small - small_shift)


@compiled(
    f"void({TABLES}, {MATRIX}, {MATRIX}, {CONSERVATIVE}, {TABLES}, {TABLE}, {SAMPLING}, {SAMPLING}, "
    f"{TABLE}, {TABLE}, int64, int64, {MATRIX}, {MATRIX}, {MATRIX}, {VECTOR}, {VECTOR}, {TABLE}, int64, "
    "int64)"
)
def _row_laws(
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
    positions: Any,
    shared_stream: int,
    rule: int,
    log_target: Any,
    target: Any,
    draft: Any,
    shifts: Any,
    log_ratio: Any,
    winners: Any,
    sequence: int,
    row: int,
) -> None:
    """One row's laws, and what compares them at the drafted token or races for the winner.

    `log_target`, `target` and `draft` [rows, vocabulary], `shifts`, `log_ratio` and `winners` [rows] are the
    sequence's own. `log_target` exceeds the log-probabilities by the row's shift. None beyond a sequence's
    own draft and bonus token. For a greedy sequence `draft` stays unset, and `log_ratio` is unused.
    """
    stay_a_function()
    if row >= counts[sequence]:
        return
    logits, law = log_target[row], target[row]
    size = logits.shape[0]
    if conservative.shape[0] > 0:
        mix_conservatively(
            table, plain_weights[sequence], delta_weights[sequence], conservative[sequence], sequence, row,
            logits, law,
        )  # fmt: skip
    else:
        mix(table, target_weights[sequence], sequence, row, logits)
    if temperature[sequence] == FLOAT(0):
        winners[row] = argmax(logits)
        shifts[row] = softmax(logits, FLOAT(1), law)
        return
    shift = filtered_law(logits, law, temperature, top_k, top_p, min_p, sequence)
    if rule == _SHARED_SEED:
        for token in range(size):
            logits[token] -= shift
        shift = FLOAT(0)
        winners[row] = race_of_logits(
            logits, FLOAT(1), seeds[sequence], positions[sequence] + row, 0, shared_stream
        )
    shifts[row] = shift
    if row < counts[sequence] - 1:
        small = np.empty(size, FLOAT)
        mix(table, draft_weights[sequence], sequence, row, small)
        small_shift = filtered_law(
            small, draft[row], draft_temperature, draft_top_k, draft_top_p, draft_min_p, sequence
        )
        token = draft_tokens[sequence, row]
        log_ratio[row] = _difference(logits[token], shift, small[token], small_shift)


@in_parallel(
    f"void({TABLES}, {MATRIX}, {MATRIX}, {CONSERVATIVE}, {TABLES}, {TABLE}, {SAMPLING}, {SAMPLING}, "
    f"{TABLE}, {TABLE}, int64, int64, {CUBE}, {CUBE}, {CUBE}, {MATRIX}, {MATRIX}, {TABLES}, {TABLE})"
)
def _laws(
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
    positions: Any,
    shared_stream: int,
    rule: int,
    log_target: Any,
    target: Any,
    draft: Any,
    shifts: Any,
    log_ratio: Any,
    winners: Any,
    wanted: Any,
) -> None:
    for share in prange(wanted.shape[0]):
        sequence, row = divmod(wanted[np.int64(share)], log_target.shape[1])
        _row_laws(
            table, target_weights, draft_weights, conservative, plain_weights, delta_weights, draft_tokens,
            counts, temperature, top_k, top_p, min_p, draft_temperature, draft_top_k, draft_top_p,
            draft_min_p, seeds, positions, shared_stream, rule, log_target[sequence], target[sequence],
            draft[sequence], shifts[sequence], log_ratio[sequence], winners[sequence], sequence, row,
        )  # fmt: skip


@compiled(f"int64({VECTOR}, int64, int64, int64, int64)")
def _accept_token(log_ratio: Any, length: int, seed: int, counter: int, stream: int) -> int:
    for row in range(length):
        if not uniform(seed, counter, row, stream) < exp(log_ratio[row]):
            return row
    return length


@compiled(f"Tuple((int64, float32))({MATRIX}, {MATRIX}, {VECTOR}, int64, int64, int64, int64)")
def _accept_block(
    target: Any, draft: Any, log_ratio: Any, length: int, seed: int, counter: int, stream: int
) -> Any:
    """The accepted length tau and the prefix probability p_tau."""
    accepted, scale = 0, FLOAT(1)
    walk = peak = FLOAT(0)
    for row in range(length):
        walk += log_ratio[row]
        peak = max(peak, walk)
        prefix = exp(walk - peak)
        chance = prefix
        if row + 1 < length:
            excess = FLOAT(0)
            law, small = target[row + 1], draft[row + 1]
            for token in range(law.shape[0]):
                excess += max(prefix * law[token] - small[token], FLOAT(0))
            slack = excess + FLOAT(1) - prefix
            # Without slack the prefix is surely kept, as the limit says.
            chance = excess / slack if slack > FLOAT(0) else FLOAT(1)
        if uniform(seed, counter, row, stream) < chance:
            accepted, scale = row + 1, prefix
    return accepted, scale


@compiled(f"int64({MATRIX}, {MATRIX}, int64, int64, float32, int64, int64, int64)")
def _replacement(
    target: Any, draft: Any, accepted: int, length: int, scale: float, seed: int, counter: int, stream: int
) -> Any:
    """Race (scale p - q)_+ at the first row not accepted, or p at the bonus row."""
    law = target[accepted]
    weights = np.empty(law.shape[0], FLOAT)
    total = FLOAT(0)
    if accepted < length:
        small = draft[accepted]
        for token in range(law.shape[0]):
            weights[token] = max(scale * law[token] - small[token], FLOAT(0))
            total += weights[token]
    # Rounding can empty the residual of two laws that are equal but for rounding: draw from p.
    if not total > FLOAT(0):
        for token in range(law.shape[0]):
            weights[token] = law[token]
    return race_of_weights(weights, seed, counter, accepted, stream)


@compiled(
    f"Tuple((int64, float32))({TABLES}, {TABLE}, {VECTOR}, {TABLE}, {TABLE}, int64, int64, {MATRIX}, "
    f"{MATRIX}, {VECTOR}, {TABLE}, {VECTOR}, int64)"
)
def _accept(
    draft_tokens: Any,
    counts: Any,
    temperature: Any,
    seeds: Any,
    counters: Any,
    accept_stream: int,
    rule: int,
    target: Any,
    draft: Any,
    log_ratio: Any,
    winners: Any,
    expected: Any,
    sequence: int,
) -> Any:
    """How many of a sequence's drafted tokens are accepted, and the scale of its residual's target law.

    From the laws of its drafted rows; those from `target` on are as in `_row_laws`. The chances of acceptance
    go to `expected` [drafted].
    """
    stay_a_function()
    length = counts[sequence] - 1
    greedy = temperature[sequence] == FLOAT(0)
    for row in range(expected.shape[0]):
        overlap = FLOAT(0)
        if row >= length:
            overlap = FLOAT(0)
        elif greedy:
            overlap = FLOAT(winners[row] == draft_tokens[sequence, row])
        else:
            law, small = target[row], draft[row]
            for token in range(law.shape[0]):
                overlap += min(law[token], small[token])
        expected[row] = overlap
    seed, counter = seeds[sequence], counters[sequence]
    if greedy or rule == _SHARED_SEED:
        count = 0
        while count < length and winners[count] == draft_tokens[sequence, count]:
            count += 1
        return count, FLOAT(1)
    if rule == _TOKEN:
        return _accept_token(log_ratio, length, seed, counter, accept_stream), FLOAT(1)
    return _accept_block(target, draft, log_ratio, length, seed, counter, accept_stream)


@compiled(
    f"void({TABLES}, {TABLE}, {VECTOR}, {TABLE}, {TABLE}, int64, int64, {MATRIX}, {MATRIX}, {MATRIX}, "
    f"{VECTOR}, {TABLE}, int64, float32, {TABLE}, {TABLE}, {VECTOR}, int64)"
)
def _follow(
    draft_tokens: Any,
    counts: Any,
    temperature: Any,
    seeds: Any,
    counters: Any,
    residual_stream: int,
    rule: int,
    log_target: Any,
    target: Any,
    draft: Any,
    shifts: Any,
    winners: Any,
    count: int,
    scale: float,
    accepted: Any,
    next_tokens: Any,
    log_probs: Any,
    sequence: int,
) -> None:
    """The token that follows `count` accepted ones, and the log-probabilities of all of them."""
    stay_a_function()
    if temperature[sequence] == FLOAT(0) or rule == _SHARED_SEED:
        following = winners[count]
    else:
        following = _replacement(
            target, draft, count, counts[sequence] - 1, scale, seeds[sequence], counters[sequence],
            residual_stream,
        )  # fmt: skip
    accepted[sequence], next_tokens[sequence] = count, following
    for row in range(count):
        log_probs[row] = log_target[row, draft_tokens[sequence, row]] - shifts[row]
    log_probs[count] = log_target[count, following] - shifts[count]


@compiled(f"void({TABLE}, {TABLE}, {VECTOR}, int64)")
def _skip(accepted: Any, next_tokens: Any, expected: Any, sequence: int) -> None:
    """The verdict on a sequence of which none is wanted."""
    accepted[sequence] = next_tokens[sequence] = 0
    for row in range(expected.shape[0]):
        expected[row] = FLOAT(0)


@in_parallel(
    f"void({TABLES}, {TABLE}, {VECTOR}, {TABLE}, {TABLE}, int64, int64, int64, {CUBE}, {CUBE}, {CUBE}, "
    f"{MATRIX}, {MATRIX}, {TABLES}, {TABLE}, {TABLE}, {MATRIX}, {MATRIX})"
)
def _decide(
    draft_tokens: Any,
    counts: Any,
    temperature: Any,
    seeds: Any,
    counters: Any,
    accept_stream: int,
    residual_stream: int,
    rule: int,
    log_target: Any,
    target: Any,
    draft: Any,
    shifts: Any,
    log_ratio: Any,
    winners: Any,
    accepted: Any,
    next_tokens: Any,
    expected: Any,
    log_probs: Any,
) -> None:
    for share in prange(counts.shape[0]):
        sequence = np.int64(share)
        if counts[sequence] == 0:
            _skip(accepted, next_tokens, expected[sequence], sequence)
        else:
            count, scale = _accept(
                draft_tokens, counts, temperature, seeds, counters, accept_stream, rule, target[sequence],
                draft[sequence], log_ratio[sequence], winners[sequence], expected[sequence], sequence,
            )  # fmt: skip
            _follow(
                draft_tokens, counts, temperature, seeds, counters, residual_stream, rule,
                log_target[sequence], target[sequence], draft[sequence], shifts[sequence], winners[sequence],
                count, scale, accepted, next_tokens, log_probs[sequence], sequence,
            )  # fmt: skip


VERIFICATION = (
    f"{TABLES}, {MATRIX}, {MATRIX}, {CONSERVATIVE}, {TABLES}, {TABLE}, {SAMPLING}, {SAMPLING}, {TABLE}, "
    f"{TABLE}, {TABLE}, int64, int64, int64, int64, {CUBE}, {CUBE}, {CUBE}, {TABLE}, {TABLE}, {MATRIX}, "
    f"{MATRIX}"
)
"""Types of what `verify_rows` takes."""


@compiled(f"void({VERIFICATION}, int64, int64)")
def verify_sequence(
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
    accepted: Any,
    next_tokens: Any,
    expected: Any,
    log_probs: Any,
    share: int,
    sequence: int,
) -> None:
    """`verify_rows` for one sequence, in the room of a share of the sequences, which uses it again and again.

    So laws are read where they were written, in a core's own cache. The bonus token's is made only where all
    drafted tokens are accepted.
    """
    stay_a_function()
    if counts[sequence] == 0:
        _skip(accepted, next_tokens, expected[sequence], sequence)
        return
    rows, length = log_target.shape[1], counts[sequence] - 1
    logits, law, small = log_target[share], target[share], draft[share]
    shifts, log_ratio = np.empty(rows, FLOAT), np.empty(rows, FLOAT)
    winners = np.empty(rows, np.int64)
    for row in range(length):
        _row_laws(
            table, target_weights, draft_weights, conservative, plain_weights, delta_weights, draft_tokens,
            counts, temperature, top_k, top_p, min_p, draft_temperature, draft_top_k, draft_top_p,
            draft_min_p, seeds, positions, shared_stream, rule, logits, law, small, shifts, log_ratio,
            winners, sequence, row,
        )  # fmt: skip
    count, scale = _accept(
        draft_tokens, counts, temperature, seeds, counters, accept_stream, rule, law, small, log_ratio,
        winners, expected[sequence], sequence,
    )  # fmt: skip
    if count == length:
        _row_laws(
            table, target_weights, draft_weights, conservative, plain_weights, delta_weights, draft_tokens,
            counts, temperature, top_k, top_p, min_p, draft_temperature, draft_top_k, draft_top_p,
            draft_min_p, seeds, positions, shared_stream, rule, logits, law, small, shifts, log_ratio,
            winners, sequence, length,
        )  # fmt: skip
    _follow(
        draft_tokens, counts, temperature, seeds, counters, residual_stream, rule, logits, law, small, shifts,
        winners, count, scale, accepted, next_tokens, log_probs[sequence], sequence,
    )  # fmt: skip


@entry(f"void({VERIFICATION})")
def verify_rows(
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
    accepted: Any,
    next_tokens: Any,
    expected: Any,
    log_probs: Any,
) -> None:
    """`verify` of arrays, whose rows threads share; `log_target`, `target` and `draft` are room for laws."""
    batch, rows = log_target.shape[:2]
    shifts, log_ratio = np.empty((batch, rows), FLOAT), np.empty((batch, rows), FLOAT)
    winners = np.empty((batch, rows), np.int64)
    # Threads get equal parts of a loop in order: of all rows some would get none that is not passed over.
    wanted, number = np.empty(batch * rows, np.int64), 0
    for sequence in range(batch):
        for row in range(counts[sequence]):
            wanted[number] = sequence * rows + row
            number += 1
    _laws(
        table, target_weights, draft_weights, conservative, plain_weights, delta_weights, draft_tokens,
        counts, temperature, top_k, top_p, min_p, draft_temperature, draft_top_k, draft_top_p, draft_min_p,
        seeds, positions, shared_stream, rule, log_target, target, draft, shifts, log_ratio, winners,
        wanted[:number],
    )  # fmt: skip
    _decide(
        draft_tokens, counts, temperature, seeds, counters, accept_stream, residual_stream, rule, log_target,
        target, draft, shifts, log_ratio, winners, accepted, next_tokens, expected, log_probs,
    )  # fmt: skip
