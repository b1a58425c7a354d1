"""Verification compiled for a CPU.

A row's logits are read once and stay in a core's cache until its law is known. The formulas are those of
`kernels/verify.py`, which is the specification; rows are shared among threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..verify import RULES, AcceptanceRule, verification_streams
from .filters import conservative_arrays, sampling_arrays
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
    logits_table,
    record,
    stay_a_function,
    strictly_compiled,
)
from .mix import filtered_law, mix, mix_conservatively, softmax
from .noise import race_of_logits, race_of_weights, uniform
from .threads import in_parallel, use_threads

if TYPE_CHECKING:
    from ..filters import Sampling
    from ..mix import Coefficients
    from ..noise import NoiseKey

__all__ = [
    "VERIFICATION", "LawRoom", "SubmittedArrays", "VerdictArrays", "as_block", "submitted_arrays", "verify",
    "verify_rows", "verify_sequence",
]  # fmt: skip

_TOKEN, _SHARED_SEED = RULES.index("token"), RULES.index("shared_seed")


@record(TABLES, MATRIX, MATRIX, TABLES, TABLE, TABLE, TABLE, TABLE, *["int64"] * 4)
class SubmittedArrays(NamedTuple):
    """What a verification is asked: where models' logits lie, what was drafted, and where the noise lies.

    Attributes:
        table: as `logits_table` makes it.
        target_weights, draft_weights: float32 [batch, models].
        block: int64 [batch, drafted + 1], of which the first column is not read.
        counts: int64 [batch], one more than each sequence's draft length; 0 where no verdict is wanted.
        seeds, rounds, positions: int64 [batch].
        accept_stream, residual_stream, shared_stream: of noise.
        rule: its place in `RULES`.
    """

    table: Any
    target_weights: Any
    draft_weights: Any
    block: Any
    counts: Any
    seeds: Any
    rounds: Any
    positions: Any
    accept_stream: int
    residual_stream: int
    shared_stream: int
    rule: int


@record(CUBE, CUBE, CUBE)
class LawRoom(NamedTuple):
    """Room for laws, float32 [sequences or shares of them, drafted + 1, vocabulary] each."""

    log_target: Any
    target: Any
    draft: Any


@record(TABLE, TABLE, MATRIX, MATRIX)
class VerdictArrays(NamedTuple):
    """A `Verdict` as arrays, which are written."""

    accepted_lens: Any
    next_token: Any
    expected_acceptance: Any
    log_probs: Any


def verify(
    logits: Sequence[Tensor],
    coefficients: Coefficients,
    draft_tokens: Tensor,
    draft_lens: Tensor,
    sampling: Sampling,
    draft_sampling: Sampling,
    noise: NoiseKey,
    rule: AcceptanceRule,
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of a `Verdict` for `logits`, each [batch, drafted + 1, >= vocab_size].

    A correction of the draft, with a row less, comes last.
    """
    batch, drafted = draft_tokens.shape
    _kept, table = logits_table(logits)
    accepted = torch.empty(batch, dtype=torch.int64)
    next_tokens = torch.empty(batch, dtype=torch.int64)
    expected = torch.empty(batch, drafted)
    log_probs = torch.empty(batch, drafted + 1)
    use_threads()
    verify_rows(
        submitted_arrays(table, coefficients, as_block(draft_tokens), draft_lens + 1, noise, rule),
        conservative_arrays(coefficients), sampling_arrays(sampling), sampling_arrays(draft_sampling),
        LawRoom(*(np.empty((batch, drafted + 1, vocab_size), np.float32) for _ in range(3))),
        VerdictArrays(accepted.numpy(), next_tokens.numpy(), expected.numpy(), log_probs.numpy()),
    )  # fmt: skip
    return accepted, next_tokens, expected, log_probs


def submitted_arrays(
    table: Any,
    coefficients: Coefficients,
    block: Tensor,
    counts: Tensor,
    noise: NoiseKey,
    rule: AcceptanceRule,
) -> SubmittedArrays:
    """What is verified, for compiled functions: fields as there."""
    target_weights, draft_weights = arrays(coefficients, "target_weights", "draft_weights")
    seeds, rounds, positions = arrays(noise, "seeds", "rounds", "positions")
    return SubmittedArrays(
        table, target_weights, draft_weights, block.numpy(), counts.numpy(), seeds, rounds, positions,
        *verification_streams(), RULES.index(rule),
    )  # fmt: skip


def as_block(draft_tokens: Tensor) -> Tensor:
    """int64 [batch, drafted + 1], in which drafted tokens follow a column that is not read."""
    return torch.nn.functional.pad(draft_tokens, (1, 0))


@strictly_compiled("float32(float32, float32, float32, float32)")
def _difference(logit: Any, shift: Any, small: Any, small_shift: Any) -> Any:
    """Of two log-probabilities, which cold temperatures make small differences of large numbers."""
    return (logit - shift) - (small - small_shift)


@compiled(
    f"void(SubmittedArrays, ConservativeArrays, SamplingArrays, SamplingArrays, {MATRIX}, {MATRIX}, "
    f"{MATRIX}, {VECTOR}, {VECTOR}, {TABLE}, int64, int64)"
)
def _row_laws(
    submitted: Any,
    conservative: Any,
    sampling: Any,
    draft_sampling: Any,
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
    if row >= submitted.counts[sequence]:
        return
    logits, law, table = log_target[row], target[row], submitted.table
    size = logits.shape[0]
    if conservative.top_p.shape[0] > 0:
        mix_conservatively(table, conservative, sequence, row, logits, law)
    else:
        mix(table, submitted.target_weights[sequence], sequence, row, logits)
    if sampling.temperature[sequence] == FLOAT(0):
        winners[row] = argmax(logits)
        shifts[row] = softmax(logits, FLOAT(1), law)
        return
    shift = filtered_law(logits, law, sampling, sequence)
    if submitted.rule == _SHARED_SEED:
        for token in range(size):
            logits[token] -= shift
        shift = FLOAT(0)
        winners[row] = race_of_logits(
            logits, FLOAT(1), submitted.seeds[sequence], submitted.positions[sequence] + row, 0,
            submitted.shared_stream,
        )  # fmt: skip
    shifts[row] = shift
    if row < submitted.counts[sequence] - 1:
        small = np.empty(size, FLOAT)
        mix(table, submitted.draft_weights[sequence], sequence, row, small)
        small_shift = filtered_law(small, draft[row], draft_sampling, sequence)
        token = submitted.block[sequence, row + 1]
        log_ratio[row] = _difference(logits[token], shift, small[token], small_shift)


@in_parallel(
    f"void(int64, SubmittedArrays, ConservativeArrays, SamplingArrays, SamplingArrays, LawRoom, {MATRIX}, "
    f"{MATRIX}, {TABLES}, {TABLE})"
)
def _laws(
    share: int,
    submitted: Any,
    conservative: Any,
    sampling: Any,
    draft_sampling: Any,
    room: Any,
    shifts: Any,
    log_ratio: Any,
    winners: Any,
    wanted: Any,
) -> None:
    sequence, row = divmod(wanted[share], winners.shape[1])
    _row_laws(
        submitted, conservative, sampling, draft_sampling, room.log_target[sequence], room.target[sequence],
        room.draft[sequence], shifts[sequence], log_ratio[sequence], winners[sequence], sequence, row,
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
            # Without slack the prefix is surely kept, as the limit says; where neither law gives the token
            # there is no number that compares, and it is not.
            chance = FLOAT(1) if slack <= FLOAT(0) else excess / slack
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
    f"Tuple((int64, float32))(SubmittedArrays, SamplingArrays, {MATRIX}, {MATRIX}, {VECTOR}, {TABLE}, "
    f"{VECTOR}, int64)"
)
def _accept(
    submitted: Any,
    sampling: Any,
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
    length = submitted.counts[sequence] - 1
    greedy = sampling.temperature[sequence] == FLOAT(0)
    for row in range(expected.shape[0]):
        overlap = FLOAT(0)
        if row >= length:
            overlap = FLOAT(0)
        elif greedy:
            overlap = FLOAT(winners[row] == submitted.block[sequence, row + 1])
        else:
            law, small = target[row], draft[row]
            for token in range(law.shape[0]):
                overlap += min(law[token], small[token])
        expected[row] = overlap
    seed, counter = submitted.seeds[sequence], submitted.rounds[sequence]
    if greedy or submitted.rule == _SHARED_SEED:
        count = 0
        while count < length and winners[count] == submitted.block[sequence, count + 1]:
            count += 1
        return count, FLOAT(1)
    if submitted.rule == _TOKEN:
        return _accept_token(log_ratio, length, seed, counter, submitted.accept_stream), FLOAT(1)
    return _accept_block(target, draft, log_ratio, length, seed, counter, submitted.accept_stream)


@compiled(
    f"void(SubmittedArrays, SamplingArrays, {MATRIX}, {MATRIX}, {MATRIX}, {VECTOR}, {TABLE}, int64, float32, "
    "VerdictArrays, int64)"
)
def _follow(
    submitted: Any,
    sampling: Any,
    log_target: Any,
    target: Any,
    draft: Any,
    shifts: Any,
    winners: Any,
    count: int,
    scale: float,
    verdict: Any,
    sequence: int,
) -> None:
    """The token that follows `count` accepted ones, and the log-probabilities of all of them."""
    stay_a_function()
    if sampling.temperature[sequence] == FLOAT(0) or submitted.rule == _SHARED_SEED:
        following = winners[count]
    else:
        following = _replacement(
            target, draft, count, submitted.counts[sequence] - 1, scale, submitted.seeds[sequence],
            submitted.rounds[sequence], submitted.residual_stream,
        )  # fmt: skip
    verdict.accepted_lens[sequence], verdict.next_token[sequence] = count, following
    log_probs = verdict.log_probs[sequence]
    for row in range(count):
        log_probs[row] = log_target[row, submitted.block[sequence, row + 1]] - shifts[row]
    log_probs[count] = log_target[count, following] - shifts[count]


@compiled("void(VerdictArrays, int64)")
def _skip(verdict: Any, sequence: int) -> None:
    """The verdict on a sequence of which none is wanted."""
    verdict.accepted_lens[sequence] = verdict.next_token[sequence] = 0
    expected = verdict.expected_acceptance[sequence]
    for row in range(expected.shape[0]):
        expected[row] = FLOAT(0)


@in_parallel(
    f"void(int64, SubmittedArrays, SamplingArrays, LawRoom, {MATRIX}, {MATRIX}, {TABLES}, VerdictArrays)"
)
def _decide(
    sequence: int,
    submitted: Any,
    sampling: Any,
    room: Any,
    shifts: Any,
    log_ratio: Any,
    winners: Any,
    verdict: Any,
) -> None:
    if submitted.counts[sequence] == 0:
        _skip(verdict, sequence)
    else:
        target, draft = room.target[sequence], room.draft[sequence]
        count, scale = _accept(
            submitted, sampling, target, draft, log_ratio[sequence], winners[sequence],
            verdict.expected_acceptance[sequence], sequence,
        )  # fmt: skip
        _follow(
            submitted, sampling, room.log_target[sequence], target, draft, shifts[sequence],
            winners[sequence], count, scale, verdict, sequence,
        )  # fmt: skip


VERIFICATION = "SubmittedArrays, ConservativeArrays, SamplingArrays, SamplingArrays, LawRoom, VerdictArrays"
"""Types of what `verify_rows` takes."""


@compiled(f"void({VERIFICATION}, int64, int64)")
def verify_sequence(
    submitted: Any,
    conservative: Any,
    sampling: Any,
    draft_sampling: Any,
    room: Any,
    verdict: Any,
    share: int,
    sequence: int,
) -> None:
    """`verify_rows` for one sequence, in the room of a share of the sequences, which uses it again and again.

    So laws are read where they were written, in a core's own cache. The bonus token's is made only where all
    drafted tokens are accepted.
    """
    stay_a_function()
    if submitted.counts[sequence] == 0:
        _skip(verdict, sequence)
        return
    logits, law, small = room.log_target[share], room.target[share], room.draft[share]
    rows, length = logits.shape[0], submitted.counts[sequence] - 1
    shifts, log_ratio = np.empty(rows, FLOAT), np.empty(rows, FLOAT)
    winners = np.empty(rows, np.int64)
    for row in range(length):
        _row_laws(
            submitted, conservative, sampling, draft_sampling, logits, law, small, shifts, log_ratio, winners,
            sequence, row,
        )  # fmt: skip
    count, scale = _accept(
        submitted, sampling, law, small, log_ratio, winners, verdict.expected_acceptance[sequence], sequence
    )
    if count == length:
        _row_laws(
            submitted, conservative, sampling, draft_sampling, logits, law, small, shifts, log_ratio, winners,
            sequence, length,
        )  # fmt: skip
    _follow(
        submitted, sampling, logits, law, small, shifts, winners, count, scale, verdict, sequence
    )  # fmt: skip


@entry(f"void({VERIFICATION})")
def verify_rows(
    submitted: Any, conservative: Any, sampling: Any, draft_sampling: Any, room: Any, verdict: Any
) -> None:
    """`verify` of arrays, whose rows threads share."""
    batch, rows = submitted.block.shape
    shifts, log_ratio = np.empty((batch, rows), FLOAT), np.empty((batch, rows), FLOAT)
    winners = np.empty((batch, rows), np.int64)
    wanted, number = np.empty(batch * rows, np.int64), 0
    for sequence in range(batch):
        for row in range(submitted.counts[sequence]):
            wanted[number] = sequence * rows + row
            number += 1
    _laws(
        number, submitted, conservative, sampling, draft_sampling, room, shifts, log_ratio, winners, wanted
    )  # fmt: skip
    _decide(
        winners.shape[0], submitted, sampling, room, shifts, log_ratio, winners, verdict
    )  # fmt: skip
