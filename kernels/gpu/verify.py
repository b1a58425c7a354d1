"""Verification in Triton: log-ratio, acceptance and replacement from the models' logits as they are.

Three kernels, each of which splits the vocabulary; the last program of a sequence to arrive sums up:

* `_score` reads every row once, leaves the record of its laws, and accepts: by the token rule, greedily, or
  by `shared_seed`, where the winners of the race are all there is to know. With filters the records are there
  already, from `kernels/gpu/filters.py`, and it reads rows for the race alone.
* `_overlap` reads the drafted rows again, now that their laws are known, for the block rule's residual
  masses and for the statistics.
* `_replace` reads the committed row and races the residual, or the target where all was accepted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..filters import Sampling
from ..mix import Coefficients
from ..noise import NoiseKey
from ..verify import RULES, AcceptanceRule
from .filters import conservative_sets, law_records
from .noise import exponential_tile, uniform
from .specialisation import Specialisation, models_signature
from .tile import (
    MORE_REGISTERS,
    NO_ID,
    RECORD,
    REGISTERS,
    arrive,
    best_split,
    cut_law,
    divided,
    launch_options,
    load_logits,
    load_record,
    mix_laws,
    mix_target,
    pack,
    power_of_two,
    store_record,
    tile_shape,
    zeros_kept,
)

__all__ = ["specialisations", "verify"]

_BLOCK, _SHARED_SEED = tl.constexpr(RULES.index("block")), tl.constexpr(RULES.index("shared_seed"))

_FIELDS = 6
"""Partial results of a split: best score, its id, and the largest logit and the mass of target and draft."""


class Draft(NamedTuple):
    """What is verified and how; an argument of kernels.

    Attributes:
        tokens: int64 [batch, drafted]; lens: int64 [batch].
        temperature, draft_temperature: float32 [batch]; 0 is greedy.
        seeds, rounds, positions: int64 [batch].
        records: float32 [2, batch, rows, RECORD], of the target and of the draft.
        vocab_size, batch, drafted: integers, the last two only in kernels (`_sized`); rows is drafted + 1.
    """

    tokens: Any
    lens: Any
    temperature: Any
    draft_temperature: Any
    seeds: Any
    rounds: Any
    positions: Any
    records: Any
    vocab_size: Any
    batch: Any = None
    drafted: Any = None


class Outcome(NamedTuple):
    """Where kernels write.

    Attributes:
        accepted, next_token: int64 [batch].
        log_probs: float32 [batch, rows].
        expected: float32 [batch, drafted].
        prefixes: float32 [batch, drafted], the block rule's probabilities p_i of the drafted prefixes.
        partials: float32, a number for each field, sequence, row and split.
        arrivals: int32 counters of programs, 0 before and after.
    """

    accepted: Any
    next_token: Any
    log_probs: Any
    expected: Any
    prefixes: Any
    partials: Any
    arrivals: Any


@triton.jit
def _sized(draft, batch, drafted):
    """The draft with its sizes, which inside an argument would have Triton compile anew for some of them."""
    return Draft(
        draft.tokens, draft.lens, draft.temperature, draft.draft_temperature, draft.seeds, draft.rounds,
        draft.positions, draft.records, draft.vocab_size, batch, drafted,
    )  # fmt: skip


@triton.jit
def _temperature(pointer, sequence):
    """Temperatures, 1 for greedy sequences, and which sequences are greedy and which are not."""
    temperature = tl.load(pointer + sequence)
    greedy = temperature == 0.0
    return tl.where(greedy, 1.0, temperature), greedy, temperature != 0.0


@triton.jit
def _pick(values, row, wanted):
    """Of each sequence's `values` [sequences, rows] the one of the row that is wanted: [sequences, 1]."""
    return tl.sum(tl.where(row == wanted, values, 0), axis=1, keep_dims=True)


@triton.jit
def _chosen_log_laws(
    models,
    draft,
    sequence,
    row,
    token,
    inside,
    draft_inside,
    FILTERED: tl.constexpr,
    CONSERVATIVE: tl.constexpr,
):
    """Log-probabilities of one token a row in the target and in the draft, from records that are stored."""
    temperature, _, _ = _temperature(draft.temperature, sequence)
    draft_temperature, _, _ = _temperature(draft.draft_temperature, sequence)
    rows = draft.drafted + 1
    target, drafted = mix_laws(models, sequence, row, token, inside, draft_inside, rows, True, CONSERVATIVE)
    index = sequence * rows + row
    log_target = cut_law(
        divided(target, temperature), token, load_record(draft.records, index, inside), FILTERED
    )
    records = draft.records + draft.batch.to(tl.int64) * rows * RECORD
    log_draft = cut_law(
        divided(drafted, draft_temperature), token, load_record(records, index, draft_inside), FILTERED
    )
    return log_target, log_draft


@triton.jit
def _chosen_log_target(
    models,
    draft,
    sequence,
    row,
    token,
    inside,
    FILTERED: tl.constexpr,
    CONSERVATIVE: tl.constexpr,
):
    """As `_chosen_log_laws`, of the target alone."""
    temperature, _, _ = _temperature(draft.temperature, sequence)
    rows = draft.drafted + 1
    target = mix_target(models, sequence, row, token, inside, rows, True, CONSERVATIVE)
    record = load_record(draft.records, sequence * rows + row, inside)
    return cut_law(divided(target, temperature), token, record, FILTERED)


@triton.jit
def _accept(
    models,
    draft,
    outcome,
    sequence,
    valid,
    row,
    winners,
    RULE: tl.constexpr,
    ACCEPT: tl.constexpr,
    FILTERED: tl.constexpr,
    CONSERVATIVE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Accept a prefix of each draft of a tile, or by the block rule leave the probabilities of its prefixes.

    `sequence` is int64 [sequences, 1], `row` [1, rows]; `winners` [sequences, rows] are those of the race,
    or the largest logits', by which greedy sequences decide.
    """
    rows = draft.drafted + 1
    lens = tl.load(draft.lens + sequence)
    _, greedy, _ = _temperature(draft.temperature, sequence)
    submitted = valid & (row < lens)
    token = tl.load(draft.tokens + sequence * draft.drafted + row, mask=submitted, other=0).to(tl.int32)
    log_target, log_draft = _chosen_log_laws(
        models, draft, sequence, row, token, submitted, submitted, FILTERED, CONSERVATIVE
    )
    tl.store(outcome.log_probs + sequence * rows + row, log_target, mask=submitted)

    equal = winners == token
    if RULE == _SHARED_SEED:
        decided = valid
        kept = equal
    else:
        decided = valid & greedy
        log_ratio = tl.where(submitted, log_target - log_draft, 0.0)
        counter = tl.load(draft.rounds + sequence)
        seed = tl.load(draft.seeds + sequence)
        drawn = uniform(
            seed + tl.zeros_like(token), counter + tl.zeros_like(token), row + tl.zeros_like(token), ACCEPT
        )
        kept = tl.where(greedy, equal, drawn < tl.exp(log_ratio))
        if RULE == _BLOCK:
            walk = tl.cumsum(log_ratio, axis=1)
            peak = tl.zeros_like(walk)
            highest = tl.zeros_like(tl.sum(walk, axis=1, keep_dims=True))
            for step in range(ROWS):
                highest = tl.maximum(highest, _pick(walk, row, step))
                peak = tl.where(row == step, highest, peak)
            tl.store(outcome.prefixes + sequence * draft.drafted + row, tl.exp(walk - peak), mask=submitted)
    first_failure = tl.min(tl.where(submitted & kept, rows, row), axis=1, keep_dims=True)
    accepted = tl.minimum(first_failure, lens)
    if RULE == _BLOCK:
        # Where nothing is drafted there are no masses to wait for.
        tl.store(outcome.accepted + sequence, accepted.to(tl.int64), mask=decided | (valid & (lens == 0)))
    else:
        tl.store(outcome.accepted + sequence, accepted.to(tl.int64), mask=valid)
    tl.store(outcome.expected + sequence * draft.drafted + row, equal.to(tl.float32), mask=submitted & greedy)
    winner = _pick(winners, row, accepted).to(tl.int32)
    tl.store(outcome.next_token + sequence, winner.to(tl.int64), mask=decided)
    log_target = _chosen_log_target(
        models, draft, sequence, accepted, winner, decided, FILTERED, CONSERVATIVE
    )
    # Another thread may have stored the drafted token's there.
    tl.debug_barrier()
    tl.store(outcome.log_probs + sequence * rows + accepted, log_target, mask=decided)


@triton.jit
def _conclude(
    models,
    draft,
    outcome,
    splits,
    sequence,
    valid,
    lens,
    RULE: tl.constexpr,
    ACCEPT: tl.constexpr,
    FILTERED: tl.constexpr,
    CONSERVATIVE: tl.constexpr,
    SEQUENCES: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Leave the records of a tile's rows, or read them, and accept."""
    rows = draft.drafted + 1
    field = draft.batch.to(tl.int64) * rows * splits
    all_rows = tl.arange(0, ROWS)[None, :].to(tl.int64)
    is_used = valid & (all_rows < rows) & (all_rows <= lens)
    place = (sequence * rows + all_rows) * splits
    if FILTERED and RULE != _SHARED_SEED:
        record = draft.records + (sequence * rows + all_rows) * RECORD
        winners = tl.load(record + 4, mask=is_used, other=0.0).to(tl.int32)
    else:
        all_splits = tl.arange(0, SPLITS)[None, None, :]
        wanted = is_used[:, :, None] & (all_splits < splits)
        places = outcome.partials + place[:, :, None] + all_splits
        best = tl.load(places, mask=wanted, other=float("-inf"))
        winner = tl.load(places + field, mask=wanted, other=0.0).to(tl.int32)
        _, winners = best_split(best, tl.where(wanted, winner, NO_ID), 2)
        winners = tl.reshape(winners, (SEQUENCES, ROWS))
        if not FILTERED:
            index = sequence * rows + all_rows
            for law in range(2):
                highest = tl.load(places + (2 + 2 * law) * field, mask=wanted, other=float("-inf"))
                mass = tl.load(places + (3 + 2 * law) * field, mask=wanted, other=0.0)
                top = tl.max(highest, axis=2)
                weight = tl.where(mass > 0.0, tl.exp(highest - top[:, :, None]), 0.0)
                log_mass = tl.log(tl.sum(mass * weight, axis=2))
                records = draft.records + law * draft.batch.to(tl.int64) * rows * RECORD
                store_record(records, index, top, log_mass, float("-inf"), 0, winners, is_used)
            tl.debug_barrier()
    _accept(
        models,
        draft,
        outcome,
        sequence,
        valid,
        all_rows,
        winners,
        RULE,
        ACCEPT,
        FILTERED,
        CONSERVATIVE,
        ROWS,
    )


@triton.jit(do_not_specialize=["batch", "drafted", "splits"])
def _score(
    models,
    draft,
    outcome,
    batch,
    drafted,
    splits,
    RULE: tl.constexpr,
    ACCEPT: tl.constexpr,
    SHARED: tl.constexpr,
    FILTERED: tl.constexpr,
    CONSERVATIVE: tl.constexpr,
    SEQUENCES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    draft = _sized(draft, batch, drafted)
    rows = draft.drafted + 1
    READS: tl.constexpr = not FILTERED or RULE == _SHARED_SEED
    read_rows = rows if READS else 1
    tile = tl.program_id(0) // read_rows
    row = (tl.program_id(0) % read_rows).to(tl.int64)
    split = tl.program_id(1)
    unclamped = tile.to(tl.int64) * SEQUENCES + tl.arange(0, SEQUENCES)[:, None]
    valid = unclamped < draft.batch
    sequence = tl.minimum(unclamped, draft.batch - 1)
    lens = tl.load(draft.lens + sequence)
    is_used = valid & (row <= lens)
    field = draft.batch.to(tl.int64) * rows * splits
    place = outcome.partials + (sequence * rows + row) * splits + split
    if READS and tl.max(is_used.to(tl.int32)) > 0:
        ids = split * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        inside = is_used & (ids < draft.vocab_size)
        target, draft_logits = mix_laws(
            models, sequence, row, ids, inside, inside & (row < lens) & (not FILTERED), rows, False,
            CONSERVATIVE,
        )  # fmt: skip
        temperature, greedy, _ = _temperature(draft.temperature, sequence)
        scaled = divided(target, temperature)
        score = target
        if FILTERED:
            record = load_record(draft.records, sequence * rows + row, valid)
            score = tl.where(greedy, score, temperature * cut_law(scaled, ids, record, FILTERED))
        if RULE == _SHARED_SEED:
            seed = tl.load(draft.seeds + sequence)
            counter = tl.load(draft.positions + sequence) + row
            noise = exponential_tile(seed, counter, tl.zeros_like(seed), SHARED, split, COLUMNS)
            # Noise that is scaled instead of logits makes temperature 0 the argmax.
            score -= tl.where(greedy, 0.0, temperature) * tl.log(noise)
        best, winner = best_split(score, ids, 1)
        tl.store(place, best, mask=is_used)
        tl.store(place + field, winner.to(tl.float32), mask=is_used)
        if not FILTERED:
            highest = tl.max(scaled, axis=1, keep_dims=True)
            tl.store(place + 2 * field, highest, mask=is_used)
            tl.store(place + 3 * field, _mass(scaled, highest), mask=is_used)
            draft_temperature, _, _ = _temperature(draft.draft_temperature, sequence)
            scaled = divided(draft_logits, draft_temperature)
            highest = tl.max(scaled, axis=1, keep_dims=True)
            tl.store(place + 4 * field, highest, mask=is_used)
            tl.store(place + 5 * field, _mass(scaled, highest), mask=is_used)

    if arrive(outcome.arrivals, tile, read_rows * splits):
        _conclude(
            models,
            draft,
            outcome,
            splits,
            sequence,
            valid,
            lens,
            RULE,
            ACCEPT,
            FILTERED,
            CONSERVATIVE,
            SEQUENCES,
            ROWS,
            SPLITS,
        )


@triton.jit
def _mass(scaled, highest):
    """Sum of the exponentials less the largest, 0 where all are -inf: [sequences, 1]."""
    return tl.sum(tl.where(scaled > float("-inf"), tl.exp(scaled - highest), 0.0), axis=1, keep_dims=True)


@triton.jit
def _weigh(
    draft,
    outcome,
    splits,
    sequence,
    drawn,
    lens,
    BLOCK: tl.constexpr,
    ACCEPT: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Add up the splits of a tile's drafted rows, and accept by the block rule."""
    field = draft.batch.to(tl.int64) * draft.drafted * splits
    rows = tl.arange(0, ROWS)[None, :]
    is_used = drawn & (rows < lens)
    all_splits = tl.arange(0, SPLITS)[None, None, :]
    wanted = is_used[:, :, None] & (all_splits < splits)
    places = outcome.partials + ((sequence * draft.drafted + rows) * splits)[:, :, None] + all_splits
    expected = tl.sum(tl.load(places, mask=wanted, other=0.0), axis=2)
    tl.store(outcome.expected + sequence * draft.drafted + rows, expected, mask=is_used)
    if BLOCK:
        wanted = wanted & (rows + 1 < lens)[:, :, None]
        excess = tl.sum(tl.load(places + field + splits, mask=wanted, other=0.0), axis=2)
        prefix = tl.load(outcome.prefixes + sequence * draft.drafted + rows, mask=is_used, other=0.0)
        slack = excess + 1.0 - prefix
        # Without slack p_i = 1 and the laws after it are equal: the prefix is surely kept. What neither law
        # gives has no prefix, nor a slack that compares: it is not.
        chance = tl.where(slack <= 0.0, 1.0, excess / tl.where(slack <= 0.0, 1.0, slack))
        chance = tl.where(rows + 1 == lens, prefix, chance)
        like = (rows + sequence * 0).to(tl.int32)
        seed = tl.load(draft.seeds + sequence) + tl.zeros_like(like)
        counter = tl.load(draft.rounds + sequence) + tl.zeros_like(like)
        kept = is_used & (uniform(seed, counter, like, ACCEPT) < chance)
        accepted = tl.max(tl.where(kept, rows + 1, 0), axis=1, keep_dims=True)
        tl.store(outcome.accepted + sequence, accepted.to(tl.int64), mask=drawn)


@triton.jit(do_not_specialize=["batch", "drafted", "splits"])
def _overlap(
    models,
    draft,
    outcome,
    batch,
    drafted,
    splits,
    BLOCK: tl.constexpr,
    ACCEPT: tl.constexpr,
    FILTERED: tl.constexpr,
    CONSERVATIVE: tl.constexpr,
    SEQUENCES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    draft = _sized(draft, batch, drafted)
    tile = tl.program_id(0) // draft.drafted
    row = (tl.program_id(0) % draft.drafted).to(tl.int64)
    split = tl.program_id(1)
    unclamped = tile.to(tl.int64) * SEQUENCES + tl.arange(0, SEQUENCES)[:, None]
    sequence = tl.minimum(unclamped, draft.batch - 1)
    lens = tl.load(draft.lens + sequence)
    temperature, _, drawn = _temperature(draft.temperature, sequence)
    drawn = drawn & (unclamped < draft.batch)
    is_used = drawn & (row < lens)
    field = draft.batch.to(tl.int64) * draft.drafted * splits
    place = outcome.partials + (sequence * draft.drafted + row) * splits + split
    if tl.max(is_used.to(tl.int32)) > 0:
        ids = split * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        inside = is_used & (ids < draft.vocab_size)
        target, draft_law = _laws(
            models, draft, sequence, row, ids, inside, inside, temperature, FILTERED, CONSERVATIVE
        )
        tl.store(place, tl.sum(tl.minimum(target, draft_law), axis=1, keep_dims=True), mask=is_used)
        if BLOCK:
            # The mass that is left over at the row after a prefix.
            prefix = tl.load(
                outcome.prefixes + sequence * draft.drafted + row - 1,
                mask=is_used & (row + sequence * 0 > 0),
                other=0.0,
            )
            excess = tl.maximum(prefix * target - draft_law, 0.0)
            tl.store(place + field, tl.sum(excess, axis=1, keep_dims=True), mask=is_used)

    if arrive(outcome.arrivals, tile, draft.drafted * splits):
        _weigh(draft, outcome, splits, sequence, drawn, lens, BLOCK, ACCEPT, ROWS, SPLITS)


@triton.jit
def _laws(
    models,
    draft,
    sequence,
    row,
    ids,
    inside,
    draft_inside,
    temperature,
    FILTERED: tl.constexpr,
    CONSERVATIVE: tl.constexpr,
):
    """Probabilities of a tile in the target and in the draft."""
    draft_temperature, _, _ = _temperature(draft.draft_temperature, sequence)
    rows = draft.drafted + 1
    target, drafted = mix_laws(models, sequence, row, ids, inside, draft_inside, rows, False, CONSERVATIVE)
    index = sequence * rows + row
    everywhere = sequence >= 0
    log_target = cut_law(
        divided(target, temperature), ids, load_record(draft.records, index, everywhere), FILTERED
    )
    records = draft.records + draft.batch.to(tl.int64) * rows * RECORD
    log_draft = cut_law(
        divided(drafted, draft_temperature), ids, load_record(records, index, everywhere), FILTERED
    )
    return (
        tl.where(inside, tl.exp(log_target), 0.0),
        tl.where(draft_inside, tl.exp(log_draft), 0.0),
    )


@triton.jit
def _choose(
    models,
    draft,
    outcome,
    splits,
    sequence,
    drawn,
    row,
    rejected,
    FILTERED: tl.constexpr,
    CONSERVATIVE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The best of the splits: the token that follows."""
    field = draft.batch.to(tl.int64) * splits
    all_splits = tl.arange(0, SPLITS)[None, :]
    wanted = drawn & (all_splits < splits)
    places = outcome.partials + sequence * splits + all_splits
    best, winner = _merge(places, field, wanted)
    _, winner_whole = _merge(places + 2 * field, field, wanted)
    # Rounding can empty the residual of two laws that are equal but for rounding: draw from the target.
    token = tl.where(rejected & (best > 0.0), winner, winner_whole)
    tl.store(outcome.next_token + sequence, token.to(tl.int64), mask=drawn)
    log_target = _chosen_log_target(models, draft, sequence, row, token, drawn, FILTERED, CONSERVATIVE)
    tl.store(outcome.log_probs + sequence * (draft.drafted + 1) + row, log_target, mask=drawn)


@triton.jit(do_not_specialize=["batch", "drafted", "splits"])
def _replace(
    models,
    draft,
    outcome,
    batch,
    drafted,
    splits,
    BLOCK: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FILTERED: tl.constexpr,
    CONSERVATIVE: tl.constexpr,
    SEQUENCES: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    draft = _sized(draft, batch, drafted)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    unclamped = tile.to(tl.int64) * SEQUENCES + tl.arange(0, SEQUENCES)[:, None]
    sequence = tl.minimum(unclamped, draft.batch - 1)
    temperature, _, drawn = _temperature(draft.temperature, sequence)
    drawn = drawn & (unclamped < draft.batch)
    row = tl.load(outcome.accepted + sequence)
    rejected = row < tl.load(draft.lens + sequence)
    field = draft.batch.to(tl.int64) * splits
    place = outcome.partials + sequence * splits + split
    if tl.max(drawn.to(tl.int32)) > 0:
        ids = split * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        inside = drawn & (ids < draft.vocab_size)
        target, draft_law = _laws(
            models, draft, sequence, row, ids, inside, inside & rejected, temperature, FILTERED, CONSERVATIVE
        )
        seed = tl.load(draft.seeds + sequence)
        counter = tl.load(draft.rounds + sequence)
        noise = exponential_tile(seed, counter, row, RESIDUAL, split, COLUMNS)
        scale = 1.0
        if BLOCK:
            prefixes = outcome.prefixes + sequence * draft.drafted + row - 1
            scale = tl.load(prefixes, mask=rejected & (row > 0), other=1.0)
        residual = tl.where(inside, tl.maximum(scale * target - draft_law, 0.0) / noise, -1.0)
        best, winner = best_split(residual, ids, 1)
        tl.store(place, best, mask=drawn)
        tl.store(place + field, winner.to(tl.float32), mask=drawn)
        best, winner = best_split(tl.where(inside, target / noise, -1.0), ids, 1)
        tl.store(place + 2 * field, best, mask=drawn)
        tl.store(place + 3 * field, winner.to(tl.float32), mask=drawn)

    if arrive(outcome.arrivals, tile, splits):
        _choose(
            models, draft, outcome, splits, sequence, drawn, row, rejected, FILTERED, CONSERVATIVE, SPLITS
        )


@triton.jit
def _merge(places, field, wanted):
    """The best of the splits' bests and its id: [sequences, 1] each."""
    best = tl.load(places, mask=wanted, other=float("-inf"))
    winner = tl.load(places + field, mask=wanted, other=0.0).to(tl.int32)
    return best_split(best, tl.where(wanted, winner, NO_ID), 1)


def verify(
    logits: Sequence[Tensor],
    draft_tokens: Tensor,
    draft_lens: Tensor,
    coefficients: Coefficients,
    sampling: Sampling,
    draft_sampling: Sampling,
    noise: NoiseKey,
    streams: tuple[int, int, int],
    rule: AcceptanceRule,
    vocab_size: int,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The fields of a `Verdict` for `logits`, each [batch, drafted + 1, >= vocab_size].

    A correction of the draft, with a row less, comes last. `streams` are those of acceptance, of replacement
    and of shared noise. Other arguments as in `kernels.verify`.
    """
    batch, drafted = draft_tokens.shape
    rows, device = drafted + 1, draft_tokens.device
    shape = tile_shape(vocab_size)
    tiles = -(-batch // shape.sequences)
    accept, residual, shared = map(int, streams)
    conservative = coefficients.filtered
    filtered = sampling.filtered or draft_sampling.filtered or conservative
    weights = coefficients.target_weights
    models = pack(logits, weights, coefficients.draft_weights)
    if coefficients.conservative_top_p is not None:
        models = models._replace(
            plain_weights=coefficients.plain_weights, delta_weights=coefficients.delta_weights
        )
        sets = conservative_sets(models, draft_lens, coefficients.conservative_top_p, drafted, vocab_size)
        models = models._replace(sets=sets)
    if filtered:
        records = law_records(models, draft_lens, sampling, draft_sampling, drafted, vocab_size, conservative)
    else:
        records = torch.empty(2, batch, rows, RECORD.value, device=device)
    draft = Draft(
        draft_tokens.contiguous(), draft_lens, sampling.temperature, draft_sampling.temperature, noise.seeds,
        noise.rounds, noise.positions, records, vocab_size,
    )  # fmt: skip
    outcome = Outcome(
        accepted=torch.empty(batch, dtype=torch.int64, device=device),
        next_token=torch.empty(batch, dtype=torch.int64, device=device),
        log_probs=torch.empty(batch, rows, device=device),
        expected=torch.empty(batch, drafted, device=device),
        prefixes=torch.empty(batch, drafted, device=device),
        partials=torch.empty(_FIELDS * batch * rows * shape.splits, device=device),
        arrivals=zeros_kept("arrivals", device, tiles),
    )
    common = {
        "FILTERED": filtered,
        "CONSERVATIVE": conservative,
        "SEQUENCES": shape.sequences,
        "COLUMNS": shape.columns,
        "SPLITS": power_of_two(shape.splits),
    }
    accepting = {"ACCEPT": accept, "ROWS": power_of_two(rows)}
    races, block = rule == "shared_seed", rule == "block"
    splits = shape.splits if races or not filtered else 1
    # As the assembler likes, but where it would spill.
    limit = MORE_REGISTERS if races else REGISTERS if shape.splits == 1 else None
    _score[(tiles * rows if races or not filtered else tiles, splits)](
        models, draft, outcome, batch, drafted, splits, RULE=RULES.index(rule), SHARED=shared, **accepting,
        **common, **launch_options(shape.warps, limit),
    )  # fmt: skip
    draws = not sampling.all_greedy
    if drafted and draws and (statistics or block):
        _overlap[(tiles * drafted, shape.splits)](
            models, draft, outcome, batch, drafted, shape.splits, BLOCK=block, **accepting, **common,
            **launch_options(shape.warps, REGISTERS),
        )  # fmt: skip
    if draws and not races:
        _replace[(tiles, shape.splits)](
            models, draft, outcome, batch, drafted, shape.splits, BLOCK=block, RESIDUAL=residual, **common,
            **launch_options(shape.warps, REGISTERS),
        )  # fmt: skip
    if not statistics:
        return outcome.accepted, outcome.next_token, None, None
    return outcome.accepted, outcome.next_token, outcome.expected, outcome.log_probs


def specialisations() -> Iterator[Specialisation]:
    """The variants for drafts of 8 to 15, three models of one dtype, and the options in use."""
    draft = Draft._make([*["*i64"] * 2, *["*fp32"] * 2, *["*i64"] * 3, "*fp32", "i32", None, None])
    outcome = Outcome._make([*["*i64"] * 2, *["*fp32"] * 4, "*i32"])
    integers = dict.fromkeys(("batch", "drafted", "splits"), "i32")
    accepting = {"ACCEPT": 1, "ROWS": 16}
    # Of each the launches without statistics, which are one more but for the block rule.
    kernels: list[tuple[Any, str, dict[str, Any], int]] = [
        (_score, "token", {"RULE": RULES.index("token"), "SHARED": 3, **accepting}, 2),
        (_score, "block", {"RULE": RULES.index("block"), "SHARED": 3, **accepting}, 3),
        (_score, "shared_seed", {"RULE": RULES.index("shared_seed"), "SHARED": 3, **accepting}, 1),
        (_overlap, "statistics", {"BLOCK": False, **accepting}, 3),
        (_overlap, "block", {"BLOCK": True, **accepting}, 3),
        (_replace, "token", {"BLOCK": False, "RESIDUAL": 2}, 2),
        (_replace, "block", {"BLOCK": True, "RESIDUAL": 2}, 3),
    ]
    options: dict[str, dict[str, Any]] = {
        "bf16": {}, "fp16": {}, "fp32": {}, "bf16 filtered": {"FILTERED": True},
        "bf16 two experts, corrected": {}, "bf16 conservative": {"FILTERED": True, "CONSERVATIVE": True},
        "bf16 vocabulary of 30": {"COLUMNS": 32, "SEQUENCES": 4, "SPLITS": 1},
    }  # fmt: skip
    for name, changes in options.items():
        dtype, *rest = name.split()
        models = models_signature(dtype, 4 if "two" in rest else 3, "corrected" in rest)
        base = {"FILTERED": False, "CONSERVATIVE": False, "SEQUENCES": 1, "COLUMNS": 4096, "SPLITS": 32}
        # Three for the cuts of each law that has any: target, draft, the conservative filter's set.
        cuts = {"filtered": 6, "conservative": 9}.get(rest[0] if rest else "", 0)
        for kernel, case, own, launches in kernels:
            if dtype != "bf16" and case != "block":
                continue
            constants = base | own | changes
            # With filters only the race reads rows there.
            reads = kernel is not _score or not constants["FILTERED"] or case == "shared_seed"
            limit: int | None = REGISTERS
            if kernel is _score and case == "shared_seed":
                limit = MORE_REGISTERS
            elif kernel is _score and constants["SPLITS"] > 1:
                limit = None
            yield Specialisation(
                operation="verify",
                name=f"{kernel.__name__[1:]} {case} {name}",
                kernel=kernel,
                signature={"models": models, "draft": draft, "outcome": outcome, **integers},
                constants=constants,
                divisible=frozenset({
                    "models.logits", "models.strides", "draft.tokens", "draft.records", "draft.vocab_size",
                    "outcome",
                }),
                num_warps=8,
                registers=limit,
                launches=launches + cuts,
                wide_loads=(load_logits,) if reads and "vocabulary" not in rest else (),
            )  # fmt: skip
