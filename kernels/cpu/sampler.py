"""Drafting and verification compiled for a CPU.

A row's logits are read once and stay in a core's cache until its law is known. The formulas are those of
`kernels/draft.py` and `kernels/verify.py`, which are the specification; rows are shared among threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from .compile import (
    CUBE,
    FLOAT,
    LARGEST_FLOAT,
    MATRIX,
    TABLE,
    TABLES,
    VECTOR,
    argmax,
    array_at,
    arrays,
    compiled,
    entry,
    exp,
    in_parallel,
    largest,
    log,
    logits_table,
    stay_a_function,
    use_threads,
)
from .filters import (
    CONSERVATIVE,
    SAMPLING,
    conservative_arrays,
    cut_top_p,
    filter_law,
    is_filtered,
    sampling_arrays,
)
from .noise import race_of_logits, race_of_weights, uniform

if TYPE_CHECKING:
    from ..filters import Sampling
    from ..mix import Coefficients
    from ..noise import NoiseKey

__all__ = [
    "RULES", "VERIFICATION", "draft", "draft_rows", "draft_share", "verify", "verify_rows",
    "verify_sequence",
]  # fmt: skip

RULES = {"token": 0, "block": 1, "shared_seed": 2}
_TOKEN, _BLOCK, _SHARED_SEED = range(3)
_PIECE = 4096
_NOT_WANTED = np.empty(0, np.float32)


def draft(
    logits: Sequence[Tensor],
    weights: Tensor,
    sampling: Sampling,
    seeds: Tensor,
    counters: Tensor,
    row: int,
    stream: int,
    vocab_size: int,
) -> Tensor:
    """One token a sequence from the law of the weighted `logits`, each [batch, 1, >= vocab_size].

    `weights` is float32 [batch, models]; the draw is that of `exponential_noise` at (seeds, counters, row).
    Returns int64 [batch].
    """
    batch = weights.shape[0]
    _kept, table = logits_table(logits)
    tokens = torch.empty(batch, dtype=torch.int64)
    use_threads()
    draft_rows(
        table, weights.contiguous().numpy(), *sampling_arrays(sampling), seeds.contiguous().numpy(),
        counters.contiguous().numpy(), row, stream, vocab_size, np.ones(batch, np.int64), tokens.numpy(),
        _NOT_WANTED,
    )  # fmt: skip
    return tokens


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


@compiled(f"void({TABLES}, {VECTOR}, int64, int64, {VECTOR})")
def _mix(table: Any, weights: Any, sequence: int, row: int, out: Any) -> None:
    """Sum of weight times logits of one row; -inf where a model that is consulted has no finite logit."""
    size = out.shape[0]
    last = -1
    for model in range(table.shape[0]):
        last = model if weights[model] != FLOAT(0) else last
    is_first = True
    for model in range(last + 1):
        weight = weights[model]
        if weight != FLOAT(0):
            offset = sequence * table[model, 1] + row * table[model, 2]
            logits = array_at(table[model, 0] + 4 * offset, (size,))
            if is_first and model < last:
                for token in range(size):
                    out[token] = weight * logits[token]
            elif model < last:
                for token in range(size):
                    out[token] += weight * logits[token]
            elif is_first:
                for token in range(size):
                    total = weight * logits[token]
                    out[token] = total if abs(total) <= LARGEST_FLOAT else FLOAT(-np.inf)
            else:
                # In a loop of its own the choice would take longer than all the sums.
                for token in range(size):
                    total = out[token] + weight * logits[token]
                    out[token] = total if abs(total) <= LARGEST_FLOAT else FLOAT(-np.inf)
            is_first = False
    if is_first:
        for token in range(size):
            out[token] = FLOAT(0)


@compiled(f"float32({VECTOR}, float32, {VECTOR})")
def _softmax(logits: Any, temperature: float, law: Any) -> Any:
    """Divide `logits` by the temperature, write their probabilities to `law`, and return their normaliser.

    A row of only -inf, which is no law, becomes the point mass on id 0.
    """
    size = logits.shape[0]
    if temperature != FLOAT(1):
        for token in range(size):
            logits[token] /= temperature
    highest = largest(logits)
    if highest == FLOAT(-np.inf):
        logits[0] = highest = FLOAT(0)
    # In pieces, since the terms of a large vocabulary added up in float32 are digits short.
    whole = 0.0
    for first in range(0, size, _PIECE):
        piece, shares = logits[first : first + _PIECE], law[first : first + _PIECE]
        part = FLOAT(0)
        for token in range(piece.shape[0]):
            shares[token] = exp(piece[token] - highest)
            part += shares[token]
        whole += np.float64(part)
    total = FLOAT(whole)
    scale = FLOAT(1) / total
    for token in range(size):
        law[token] *= scale
    return highest + log(total)


@compiled(f"float32({VECTOR}, float32, {VECTOR})")
def _normalise(logits: Any, temperature: float, law: Any) -> Any:
    """`_softmax`, of which the normaliser is subtracted: `logits` become log-probabilities."""
    shift = _softmax(logits, temperature, law)
    for token in range(logits.shape[0]):
        logits[token] -= shift
    return shift


@compiled(f"float32({VECTOR}, {VECTOR}, {SAMPLING}, int64)")
def _filtered_law(
    logits: Any, law: Any, temperature: Any, top_k: Any, top_p: Any, min_p: Any, sequence: int
) -> Any:
    """Write to `law` the law of `logits` after temperature and filters.

    Returns what `logits`, which are overwritten, then exceed its log-probabilities by: few of these are read,
    so none is computed for all ids unless a filter needs them.
    """
    if not is_filtered(temperature, top_k, top_p, min_p, sequence, logits.shape[0]):
        return _softmax(logits, temperature[sequence], law)
    _normalise(logits, temperature[sequence], law)
    filter_law(logits, law, temperature, top_k, top_p, min_p, sequence)
    return FLOAT(0)


@compiled(f"void({TABLES}, {VECTOR}, {VECTOR}, float32, int64, int64, {VECTOR}, {VECTOR})")
def _mix_conservatively(
    table: Any,
    plain_weights: Any,
    delta_weights: Any,
    top_p: Any,
    sequence: int,
    row: int,
    out: Any,
    room: Any,
) -> None:
    """Log-probabilities of the small pair, to which the large model's delta is added inside their top-p set.

    `room` is overwritten.
    """
    size = out.shape[0]
    _mix(table, plain_weights, sequence, row, out)
    _normalise(out, FLOAT(1), room)
    ids = np.arange(size)
    count = cut_top_p(out.copy(), room, ids, size, top_p)
    _mix(table, delta_weights, sequence, row, room)
    # The delta is one of log-probabilities: of raw logits but for their normalisers.
    shift, alone = FLOAT(0), np.zeros_like(delta_weights)
    law, scratch = np.empty(size, FLOAT), np.empty(size, FLOAT)
    for model in range(alone.shape[0]):
        if delta_weights[model] != FLOAT(0):
            alone[model] = FLOAT(1)
            _mix(table, alone, sequence, row, scratch)
            shift += delta_weights[model] * _normalise(scratch, FLOAT(1), law)
            alone[model] = FLOAT(0)
    for token in ids[:count]:
        out[token] += room[token] - shift


@compiled(
    f"void({TABLES}, {MATRIX}, {SAMPLING}, {TABLE}, {TABLE}, int64, int64, int64, {TABLE}, {TABLE}, "
    f"{VECTOR}, {VECTOR}, int64)"
)
def draft_share(
    table: Any,
    weights: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
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
    """One sequence's draw, and, where there is room for them, the logits that it was drawn from in `kept`."""
    stay_a_function()
    if takes_part[sequence] == 0:
        return
    values = np.empty(vocab_size, FLOAT)
    _mix(table, weights[sequence], sequence, 0, values)
    for token in range(kept.shape[0]):
        kept[token] = values[token]
    scale = temperature[sequence]
    filtered = is_filtered(temperature, top_k, top_p, min_p, sequence, vocab_size)
    law = np.empty(vocab_size if filtered or chances.shape[0] > 0 else 0, FLOAT)
    if filtered:
        _normalise(values, scale, law)
        filter_law(values, law, temperature, top_k, top_p, min_p, sequence)
        scale = FLOAT(1)
    elif chances.shape[0] > 0:
        _normalise(values.copy(), scale if scale > FLOAT(0) else FLOAT(1), law)
    if scale > FLOAT(0):
        tokens[sequence] = race_of_logits(values, scale, seeds[sequence], counters[sequence], row, stream)
    else:
        tokens[sequence] = argmax(values)
    if chances.shape[0] > 0:
        chances[sequence] = law[tokens[sequence]]


@in_parallel(
    f"void({TABLES}, {MATRIX}, {SAMPLING}, {TABLE}, {TABLE}, int64, int64, int64, {TABLE}, {TABLE}, {VECTOR})"
)
def _draft_together(
    table: Any,
    weights: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    seeds: Any,
    counters: Any,
    row: int,
    stream: int,
    vocab_size: int,
    takes_part: Any,
    tokens: Any,
    chances: Any,
) -> None:
    for share in prange(tokens.shape[0]):
        draft_share(
            table, weights, temperature, top_k, top_p, min_p, seeds, counters, row, stream, vocab_size,
            takes_part, tokens, chances, chances[:0], np.int64(share),
        )  # fmt: skip


@entry(
    f"void({TABLES}, {MATRIX}, {SAMPLING}, {TABLE}, {TABLE}, int64, int64, int64, {TABLE}, {TABLE}, {VECTOR})"
)
def draft_rows(
    table: Any,
    weights: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    seeds: Any,
    counters: Any,
    row: int,
    stream: int,
    vocab_size: int,
    takes_part: Any,
    tokens: Any,
    chances: Any,
) -> None:
    """Draw one token for each sequence that takes part, into int64 `tokens` [batch].

    `table` is as `logits_table` makes it, `takes_part` is int64 [batch], 0 or 1. Into `chances`, float32
    [batch] or empty where they are not wanted, go the tokens' probabilities in the draft law, of a greedy
    sequence those before temperature and filters.
    """
    if tokens.shape[0] > 1:
        _draft_together(
            table, weights, temperature, top_k, top_p, min_p, seeds, counters, row, stream, vocab_size,
            takes_part, tokens, chances,
        )  # fmt: skip
    else:
        draft_share(
            table, weights, temperature, top_k, top_p, min_p, seeds, counters, row, stream, vocab_size,
            takes_part, tokens, chances, chances[:0], 0,
        )  # fmt: skip


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
        _mix_conservatively(
            table, plain_weights[sequence], delta_weights[sequence], conservative[sequence], sequence, row,
            logits, law,
        )  # fmt: skip
    else:
        _mix(table, target_weights[sequence], sequence, row, logits)
    if temperature[sequence] == FLOAT(0):
        winners[row] = argmax(logits)
        shifts[row] = _softmax(logits, FLOAT(1), law)
        return
    shift = _filtered_law(logits, law, temperature, top_k, top_p, min_p, sequence)
    if rule == _SHARED_SEED:
        for token in range(size):
            logits[token] -= shift
        shift = FLOAT(0)
        winners[row] = race_of_logits(
            logits, FLOAT(1), seeds[sequence], positions[sequence] + row, 0, shared_stream
        )
    shifts[row] = shift
    if row < log_target.shape[0] - 1:
        small = np.empty(size, FLOAT)
        _mix(table, draft_weights[sequence], sequence, row, small)
        small_shift = _filtered_law(
            small, draft[row], draft_temperature, draft_top_k, draft_top_p, draft_min_p, sequence
        )
        token = draft_tokens[sequence, row]
        log_ratio[row] = (logits[token] - shift) - (small[token] - small_shift)


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
