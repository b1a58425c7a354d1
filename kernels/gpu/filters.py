"""Top-k, top-p and min-p in Triton: where a law is cut, exactly and without a sort.

A vocabulary of one split is cut in registers, by bisection on the bits of float32, whose order is that of
integers (`_cut`). A larger one is read twice, a program a split:

* `_survey` counts a row's tokens by level, in steps of an eighth before temperature. From the counts alone
  the last program to arrive bounds all masses, and so knows in which few levels the cuts lie.
* `_gather` sums the masses of what lies around those levels and writes their tokens to a pool, from which the
  last program selects: a token's rank, and the mass below it, by comparison with every other.

Masses are integers, multiples of 2^-40 of the largest, so that no sum depends on the order of programs. A row
with more tokens in those levels than a pool holds, such as one of equal logits, is left to `_cut`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..filters import Sampling
from .specialisation import Specialisation, models_signature
from .tile import (
    LARGEST_FLOAT,
    MORE_REGISTERS,
    NO_ID,
    RECORD,
    REGISTERS,
    Models,
    arrive,
    boundary,
    divided,
    launch_options,
    load_logits,
    mix,
    mix_target,
    power_of_two,
    store_record,
    tile_shape,
    zeros_kept,
)

__all__ = ["conservative_sets", "draft_records", "law_records", "specialisations"]

_TARGET, _DRAFT, _PLAIN = 0, 1, 2
_LOWEST = tl.constexpr(-2139095041)
"""The ordered bits of -inf."""
_LEVELS = tl.constexpr(2048)
_POOL = tl.constexpr(2048)
"""Tokens of a row that are compared one with another."""
_UNIT = tl.constexpr(2.0**40)
_BEYOND = tl.constexpr(2**63 - 1)
_OVERFLOWN = tl.constexpr(6)
"""Place in a record: whether its row's pool was too small."""
_REREAD_COLUMNS, _REREAD_WARPS = 2048, 4


class Rows(NamedTuple):
    """Which rows are cut and how; an argument of kernels.

    Attributes:
        lens: int64 [batch], rows of each sequence that are wanted, less `lens_offset`.
        temperature: float32 [batch]; 0 is greedy, which nothing cuts.
        top_k: int64 [batch]; top_p, min_p: float32 [batch]. What is not in use is anything.
        records: float32 [batch, count, RECORD], written.
        vocab_size, splits: integers.
        batch, count: integers, None but inside kernels, where `_sized` puts them.
    """

    lens: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    records: Any
    vocab_size: Any
    splits: Any
    batch: Any = None
    count: Any = None


class Search(NamedTuple):
    """What programs leave each other; an argument of kernels.

    Attributes:
        partials: float32 [4 + 2 models, batch * count, splits]: the largest logit and its id, and for
            each model the largest and the sum of the exponentials less it.
        counts: int32 [batch * count, LEVELS], 0 before and after.
        brackets: int64 [batch * count, 8]: the level of the k-th token, -1 where all are kept; the first and
            the last level of the top-p cut; the tokens above the first of these; the masses above the last
            level, between the first two, and of what min-p keeps; and the tokens in the pool.
        pool: int64 [batch * count, POOL], the ordered scaled logit times 2^32 plus the id.
        arrivals: int32 counters of programs, 0 before and after.
    """

    partials: Any
    counts: Any
    brackets: Any
    pool: Any
    arrivals: Any


@triton.jit
def _sized(rows, batch, count):
    """The rows with their number, which inside an argument would have Triton compile anew for some."""
    return Rows(
        rows.lens, rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.records, rows.vocab_size,
        rows.splits, batch, count,
    )  # fmt: skip


@triton.jit
def _ordered(value):
    """Float32 as integers of the same order, int64."""
    # Plus 0 makes one zero of the two, which are equal.
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _float(ordered):
    """The inverse of `_ordered`."""
    bits = ordered.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _mixed(
    models, rows, sequence, row, split, valid, LAW: tl.constexpr,
    CONSERVATIVE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One split of a law's logits before temperature, and its ids."""
    ids = split * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = valid & (ids < rows.vocab_size)
    if LAW == 0:
        mixed = mix_target(models, sequence, row, ids, inside, rows.count, False, CONSERVATIVE)
    elif LAW == 1:
        mixed = mix(models, models.draft_weights, sequence, row, ids, inside, False)
    else:
        mixed = mix(models, models.plain_weights, sequence, row, ids, inside, False)
    return mixed, ids


@triton.jit
def _level(scaled, temperature):
    """Which of the levels a scaled logit lies in: int32, monotone."""
    steps = tl.floor(scaled * (8.0 * temperature))
    half: tl.constexpr = _LEVELS // 2
    return tl.minimum(tl.maximum(steps, -1.0 * half), half - 1.0).to(tl.int32) + half


@triton.jit
def _mass(scaled, highest, wanted):
    """Masses of tokens in units of 2^-40 of the largest one's: int64."""
    return tl.where(wanted, (tl.exp(scaled - highest) * _UNIT).to(tl.int64), 0)


@triton.jit
def _finite_logits(models, model, sequence, row, ids, inside):
    """One model's logits, -inf outside the vocabulary and where they are not finite."""
    offsets = sequence * models.strides[model][0] + row * models.strides[model][1] + ids
    logits = load_logits(models.logits[model], offsets, inside)
    return tl.where(inside & (tl.abs(logits) <= LARGEST_FLOAT), logits, float("-inf"))


@triton.jit
def _mass_of_model(models, search, rows, model, sequence, row, index, split, ids):
    """Leave the largest logit of one model in a split, and the sum of the exponentials less it."""
    logits = _finite_logits(models, model, sequence, row, ids, ids < rows.vocab_size)
    top = tl.max(logits)
    mass = tl.sum(tl.exp(logits - tl.where(top == float("-inf"), 0.0, top)))
    field = rows.batch.to(tl.int64) * rows.count * rows.splits
    place = search.partials + (2 + 2 * model) * field + index * rows.splits + split
    tl.store(place, top)
    tl.store(place + field, mass)


@triton.jit
def _shift_of_model(weight, top, mass):
    """What the normaliser of one model adds, by its largest logit and the exponentials less that."""
    normaliser = tl.where(top == float("-inf"), float("inf"), top + tl.log(mass))
    normaliser = tl.where(weight == 0.0, 0.0, tl.abs(weight) * normaliser)
    return tl.where(weight > 0.0, -normaliser, normaliser)


@triton.jit
def _finite_shift(shift):
    """-inf where a model has no finite logit: then there is no delta."""
    return tl.where(tl.abs(shift) <= LARGEST_FLOAT, shift, float("-inf"))


@triton.jit
def _shift(models, search, rows, sequence, index, SPLITS: tl.constexpr):
    """What the normalisers add to the large model's delta, which is one of normalised laws."""
    splits = tl.arange(0, SPLITS)
    field = rows.batch.to(tl.int64) * rows.count * rows.splits
    shift = 0.0
    for model in tl.static_range(len(models.logits)):
        weight = tl.load(models.delta_weights + sequence * models.weight_stride + model)
        consulted = splits < tl.where(weight != 0.0, rows.splits, 0)
        place = search.partials + (2 + 2 * model) * field + index * rows.splits + splits
        tops = tl.load(place, mask=consulted, other=float("-inf"))
        masses = tl.load(place + field, mask=consulted, other=0.0)
        top = tl.max(tops)
        mass = tl.sum(masses * tl.exp(tops - tl.where(top == float("-inf"), 0.0, top)))
        shift += _shift_of_model(weight, top, mass)
    return _finite_shift(shift)


@triton.jit
def _bracket(
    models, rows, search, sequence, index, temperature, greedy,
    LAW: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Leave a row's largest logit and the levels in which its cuts lie."""
    levels = tl.arange(0, _LEVELS)
    place = search.counts + index * _LEVELS + levels
    counts = tl.load(place)
    tl.store(place, 0)
    splits = tl.arange(0, SPLITS)[None, :]
    field = rows.batch.to(tl.int64) * rows.count * rows.splits
    place = search.partials + index * rows.splits + splits
    bests = tl.load(place, mask=splits < rows.splits, other=float("-inf"))
    winners = tl.load(place + field, mask=splits < rows.splits, other=NO_ID).to(tl.int64)
    best = tl.max(bests)
    highest = divided(best, temperature)
    record = rows.records + index * RECORD
    tl.store(record, highest)
    tl.store(record + 4, tl.min(tl.where(bests == best, winners, NO_ID)).to(tl.float32))
    if LAW == 2:
        tl.store(record + 5, _shift(models, search, rows, sequence, index, SPLITS))

    above = rows.vocab_size - tl.cumsum(counts)
    kth = tl.min(counts) * 0 - 1
    beyond = kth * 0
    if TOP_K:
        k = tl.load(rows.top_k + sequence)
        k = tl.where(greedy, rows.vocab_size, k)
        reached = (counts > 0) & (above + counts >= k)
        kth = tl.where(k < rows.vocab_size, tl.max(tl.where(reached, levels, -1)), -1)
        beyond = tl.sum(tl.where(levels == kth, above, 0))
    first = kth
    last = kth
    if TOP_P:
        # Each mass lies between those of its level's ends; a thousandth more allows for rounding.
        safe = tl.where(highest == float("-inf"), 0.0, highest)
        lower_end = (levels - _LEVELS // 2).to(tl.float32) / (8.0 * temperature)
        upper_end = tl.minimum((levels + (1 - _LEVELS // 2)).to(tl.float32) / (8.0 * temperature), safe)
        upper_end = tl.where(levels == _LEVELS - 1, safe, upper_end)
        number = counts.to(tl.float32)
        lower = 0.999 * number * tl.exp(tl.minimum(lower_end, safe) - safe)
        lower = tl.where((levels > kth) & (levels > 0), lower, 0.0)
        upper = tl.where(levels >= kth, 1.001 * number * tl.exp(upper_end - safe), 0.0)
        share = 1.0 - tl.where(greedy, 1.0, tl.load(rows.top_p + sequence))
        least = 0.999 * share * tl.maximum(tl.sum(lower), 0.999)
        most = 1.001 * share * tl.sum(upper)
        occupied = (counts > 0) & (levels >= kth)
        top = tl.max(tl.where(occupied, levels, 0))
        first = tl.min(tl.where(occupied & (tl.cumsum(upper) > least), levels, top))
        last = tl.max(tl.where(occupied & (tl.cumsum(lower) - lower <= most), levels, first))
        first = tl.where(share > 0.0, first, kth)
        last = tl.where(share > 0.0, last, kth)
    bracket = search.brackets + index * 8
    tl.store(bracket, kth.to(tl.int64))
    tl.store(bracket + 1, first.to(tl.int64))
    tl.store(bracket + 2, last.to(tl.int64))
    tl.store(bracket + 3, beyond.to(tl.int64))
    tl.store(bracket + 4 + tl.arange(0, 4), tl.zeros((4,), tl.int64))


@triton.jit(do_not_specialize=["batch", "count", "lens_offset"])
def _survey(
    models,
    rows,
    search,
    batch,
    count,
    lens_offset,
    LAW: tl.constexpr,
    CONSERVATIVE: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    rows = _sized(rows, batch, count)
    index = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    sequence = (tl.program_id(0) // rows.count).to(tl.int64)
    row = (tl.program_id(0) % rows.count).to(tl.int64)
    if row < tl.load(rows.lens + sequence) + lens_offset:
        temperature = tl.load(rows.temperature + sequence)
        greedy = temperature == 0.0
        temperature = tl.where(greedy, 1.0, temperature)
        tile = sequence + tl.zeros((1, 1), tl.int64)
        mixed, ids = _mixed(models, rows, tile, row, split, tile >= 0, LAW, CONSERVATIVE, COLUMNS)
        best = tl.max(mixed)
        place = search.partials + index * rows.splits + split
        tl.store(place, best)
        winner = tl.min(tl.where(mixed == best, ids, NO_ID))
        tl.store(place + rows.batch.to(tl.int64) * rows.count * rows.splits, winner.to(tl.float32))
        if LAW == 2:
            for model in tl.static_range(len(models.logits)):
                if tl.load(models.delta_weights + sequence * models.weight_stride + model) != 0.0:
                    _mass_of_model(models, search, rows, model, sequence, row, index, split, ids)
        if TOP_K or TOP_P:
            level = tl.reshape(_level(divided(mixed, temperature), temperature), (COLUMNS,))
            inside = tl.reshape(ids < rows.vocab_size, (COLUMNS,))
            counts = tl.histogram(level, _LEVELS, mask=inside)
            levels = index * _LEVELS + tl.arange(0, _LEVELS)
            tl.atomic_add(search.counts + levels, counts, mask=counts > 0, sem="relaxed")
        if arrive(search.arrivals, tl.program_id(0), rows.splits):
            _bracket(
                models, rows, search, sequence, index, temperature, greedy, LAW, TOP_K, TOP_P, SPLITS
            )  # fmt: skip


@triton.jit
def _pooled(search, index, start, count, WIDTH: tl.constexpr):
    """Tokens of a row's pool, and which of them there are."""
    places = start + tl.arange(0, WIDTH)
    return tl.load(search.pool + index * _POOL + places, mask=places < count, other=0), places < count


@triton.jit
def _kth_key(search, index, count, level, wanted, temperature, WIDTH: tl.constexpr):
    """The least key of the tokens of a level that fewer than `wanted` others of it exceed."""
    least = index * 0 + _BEYOND
    for start in range(0, count, WIDTH):
        own, is_own = _pooled(search, index, start, count, WIDTH)
        own = own >> 32
        exceeding = tl.zeros((WIDTH,), tl.int32)
        for other_start in range(0, count, WIDTH):
            other, is_other = _pooled(search, index, other_start, count, WIDTH)
            other = other >> 32
            is_other = is_other & (_level(_float(other), temperature) == level)
            exceeding += tl.sum((is_other[None, :] & (other[None, :] > own[:, None])).to(tl.int32), axis=1)
        kept = is_own & (_level(_float(own), temperature) == level) & (exceeding < wanted)
        least = tl.minimum(least, tl.min(tl.where(kept, own, _BEYOND)))
    return least


@triton.jit
def _first_kept(
    search, index, count, first, below, droppable, floor, highest, temperature, WIDTH: tl.constexpr
):
    """The least token of the pool that top-p keeps; `below` is the mass under the pool's first level."""
    least = index * 0 + _BEYOND
    for start in range(0, count, WIDTH // 2):
        own, is_own = _pooled(search, index, start, count, WIDTH // 2)
        own_value = _float(own >> 32)
        is_own = is_own & ((own >> 32) >= floor) & (_level(own_value, temperature) >= first)
        dropped = tl.zeros((WIDTH // 2,), tl.int64) + below
        for other_start in range(0, count, WIDTH):
            other, is_other = _pooled(search, index, other_start, count, WIDTH)
            value = _float(other >> 32)
            is_other = is_other & ((other >> 32) >= floor) & (_level(value, temperature) >= first)
            mass = _mass(value, highest, is_other)
            dropped += tl.sum(tl.where(other[None, :] <= own[:, None], mass[None, :], 0), axis=1)
        kept = is_own & (dropped > droppable)
        least = tl.minimum(least, tl.min(tl.where(kept, own, _BEYOND)))
    return least


@triton.jit
def _pooled_mass(search, index, count, bound, first, last, highest, temperature, WIDTH: tl.constexpr):
    """The mass of the pool's tokens from `bound` on, of the levels first <= level <= last."""
    total = index * 0
    for start in range(0, count, WIDTH):
        packed, is_there = _pooled(search, index, start, count, WIDTH)
        value = _float(packed >> 32)
        level = _level(value, temperature)
        wanted = is_there & (packed >= bound) & (level >= first) & (level <= last)
        total += tl.sum(_mass(value, highest, wanted))
    return total


@triton.jit
def _select(
    rows, search, sequence, index, highest, temperature, greedy, least,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
):  # fmt: skip
    """Leave a row's cut and the mass that it keeps."""
    width: tl.constexpr = 64
    bracket = search.brackets + index * 8
    kth = tl.load(bracket).to(tl.int32)
    first = tl.load(bracket + 1).to(tl.int32)
    above = tl.load(bracket + 4)
    between = tl.load(bracket + 5)
    count = tl.load(bracket + 7).to(tl.int32)
    record = rows.records + index * RECORD
    tl.store(record + _OVERFLOWN, (count > _POOL).to(tl.float32))
    if count <= _POOL:
        floor = index * 0 + _LOWEST
        if TOP_K:  # noqa: SIM102 (known when the kernel is compiled, unlike the next)
            if kth >= 0:
                wanted = tl.load(rows.top_k + sequence).to(tl.int32) - tl.load(bracket + 3).to(tl.int32)
                floor = _kth_key(search, index, count, kth, wanted, temperature, width)
        bound = floor << 32
        if TOP_P:
            share = 1.0 - tl.where(greedy, 1.0, tl.load(rows.top_p + sequence))
            if share > 0.0:
                # Of the k-th token's level what is kept lies below the first level, where the two differ.
                below = between + _pooled_mass(
                    search, index, count, bound, 0, first - 1, highest, temperature, width
                )
                whole = (
                    above
                    + below
                    + _pooled_mass(search, index, count, bound, first, _LEVELS, highest, temperature, width)
                )
                droppable = (whole.to(tl.float64) * share.to(tl.float64)).to(tl.int64)
                # One token always stays.
                droppable = tl.minimum(droppable, whole - 1)
                bound = _first_kept(
                    search, index, count, first, below, droppable, floor, highest, temperature, width
                )
        cut = _float(bound >> 32)
        cut_id = bound & 0xFFFFFFFF
        mass = above + _pooled_mass(search, index, count, bound, 0, _LEVELS, highest, temperature, width)
        if MIN_P:
            raised = least > cut
            cut = tl.where(raised, least, cut)
            cut_id = tl.where(raised, 0, cut_id)
            mass = tl.where(raised, tl.load(bracket + 6), mass)
        tl.store(record + 1, tl.log(mass.to(tl.float32) / _UNIT))
        tl.store(record + 2, cut)
        tl.store(record + 3, cut_id.to(tl.float32))


@triton.jit(do_not_specialize=["batch", "count", "lens_offset"])
def _gather(
    models,
    rows,
    search,
    batch,
    count,
    lens_offset,
    LAW: tl.constexpr,
    CONSERVATIVE: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = _sized(rows, batch, count)
    index = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    sequence = (tl.program_id(0) // rows.count).to(tl.int64)
    row = (tl.program_id(0) % rows.count).to(tl.int64)
    if row < tl.load(rows.lens + sequence) + lens_offset:
        temperature = tl.load(rows.temperature + sequence)
        greedy = temperature == 0.0
        temperature = tl.where(greedy, 1.0, temperature)
        highest = tl.load(rows.records + index * RECORD)
        # A row of only -inf has no law, and no difference below may be of infinities.
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        tile = sequence + tl.zeros((1, 1), tl.int64)
        mixed, ids = _mixed(models, rows, tile, row, split, tile >= 0, LAW, CONSERVATIVE, COLUMNS)
        scaled = divided(mixed, temperature)
        inside = ids < rows.vocab_size
        mass = _mass(scaled, highest, inside)
        bracket = search.brackets + index * 8
        kth = tl.load(bracket).to(tl.int32)
        first = tl.load(bracket + 1).to(tl.int32)
        last = tl.load(bracket + 2).to(tl.int32)
        level = _level(scaled, temperature)
        tl.atomic_add(bracket + 4, tl.sum(tl.where(level > last, mass, 0)), sem="relaxed")
        least = highest
        if MIN_P:
            least += tl.log(tl.where(greedy, 0.0, tl.load(rows.min_p + sequence)))
            tl.atomic_add(bracket + 6, tl.sum(tl.where(scaled >= least, mass, 0)), sem="relaxed")
        if TOP_K or TOP_P:
            is_between = (level > kth) & (level < first)
            tl.atomic_add(bracket + 5, tl.sum(tl.where(is_between, mass, 0)), sem="relaxed")
            pooled = inside & ((level == kth) | ((level >= first) & (level <= last)))
            flags = tl.reshape(pooled.to(tl.int32), (COLUMNS,))
            found = tl.sum(flags)
            if found > 0:
                place = tl.atomic_add(bracket + 7, found.to(tl.int64), sem="relaxed")
                place += tl.cumsum(flags) - flags
                packed = tl.reshape((_ordered(scaled) << 32) + ids, (COLUMNS,))
                tl.store(search.pool + index * _POOL + place, packed, mask=(flags > 0) & (place < _POOL))
        if arrive(search.arrivals, tl.program_id(0), rows.splits):
            _select(
                rows, search, sequence, index, highest, temperature, greedy, least, TOP_K, TOP_P, MIN_P
            )  # fmt: skip


@triton.jit
def _beyond(
    models, rows, sequence, row, valid, temperature, held, highest,
    lower, upper, LAW: tl.constexpr, CONSERVATIVE: tl.constexpr, COLUMNS: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
):  # fmt: skip
    """Count and mass of the tokens with lower <= ordered scaled logit < upper: int64 each."""
    lower = _float(lower)
    upper = _float(upper)
    if ONE_SPLIT:
        ids = tl.arange(0, COLUMNS)[None, :]
        wanted = (held >= lower) & (held < upper) & (ids < rows.vocab_size)
        count = tl.sum(wanted.to(tl.int64), axis=1, keep_dims=True)
        mass = tl.sum(_mass(held, highest, wanted), axis=1, keep_dims=True)
    else:
        count = tl.zeros(lower.shape, tl.int64)
        mass = tl.zeros(lower.shape, tl.int64)
        for split in range(rows.splits):
            mixed, ids = _mixed(models, rows, sequence, row, split, valid, LAW, CONSERVATIVE, COLUMNS)
            scaled = divided(mixed, temperature)
            wanted = (scaled >= lower) & (scaled < upper) & (ids < rows.vocab_size)
            count += tl.sum(wanted.to(tl.int64), axis=1, keep_dims=True)
            mass += tl.sum(_mass(scaled, highest, wanted), axis=1, keep_dims=True)
    return count, mass


@triton.jit
def _ties_below(
    models, rows, sequence, row, valid, temperature, held, cut,
    bound, LAW: tl.constexpr, CONSERVATIVE: tl.constexpr, COLUMNS: tl.constexpr, ONE_SPLIT: tl.constexpr,
):  # fmt: skip
    """How many ids below `bound` have the scaled logit `cut`: int64."""
    if ONE_SPLIT:
        ids = tl.arange(0, COLUMNS)[None, :]
        equal = (held == cut) & (ids < bound) & (ids < rows.vocab_size)
        count = tl.sum(equal.to(tl.int64), axis=1, keep_dims=True)
    else:
        count = bound * 0
        for split in range(rows.splits):
            mixed, ids = _mixed(models, rows, sequence, row, split, valid, LAW, CONSERVATIVE, COLUMNS)
            equal = (divided(mixed, temperature) == cut) & (ids < bound) & (ids < rows.vocab_size)
            count += tl.sum(equal.to(tl.int64), axis=1, keep_dims=True)
    return count


@triton.jit(do_not_specialize=["batch", "count", "lens_offset"])
def _cut(
    models,
    rows,
    batch,
    count,
    lens_offset,
    LAW: tl.constexpr,
    CONSERVATIVE: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    SEQUENCES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
):
    rows = _sized(rows, batch, count)
    tile = tl.program_id(0) // rows.count
    row = (tl.program_id(0) % rows.count).to(tl.int64)
    unclamped = tile.to(tl.int64) * SEQUENCES + tl.arange(0, SEQUENCES)[:, None]
    sequence = tl.minimum(unclamped, rows.batch - 1)
    valid = (unclamped < rows.batch) & (row < tl.load(rows.lens + sequence) + lens_offset)
    if not ONE_SPLIT:
        record = rows.records + (sequence * rows.count + row) * RECORD
        valid = valid & (tl.load(record + _OVERFLOWN, mask=valid, other=0.0) != 0.0)
    if tl.max(valid.to(tl.int32)) > 0:
        raw_temperature = tl.load(rows.temperature + sequence)
        greedy = raw_temperature == 0.0
        temperature = tl.where(greedy, 1.0, raw_temperature)
        best = tl.full((SEQUENCES, 1), float("-inf"), tl.float32)
        winner = tl.zeros((SEQUENCES, 1), tl.int32)
        held = tl.full((SEQUENCES, COLUMNS if ONE_SPLIT else 1), float("-inf"), tl.float32)
        for split in range(rows.splits):
            mixed, ids = _mixed(models, rows, sequence, row, split, valid, LAW, CONSERVATIVE, COLUMNS)
            top = tl.max(mixed, axis=1, keep_dims=True)
            first = tl.min(tl.where(mixed == top, ids, NO_ID), axis=1, keep_dims=True)
            winner = tl.where(top > best, first, winner)
            best = tl.maximum(best, top)
            if ONE_SPLIT:
                held = divided(mixed, temperature)
        highest = divided(best, temperature)
        # A row of only -inf has no law, and no difference below may be of infinities.
        safe = tl.where(highest == float("-inf"), 0.0, highest)
        first_key = tl.full((SEQUENCES, 1), _LOWEST, tl.int64)
        last_key = _ordered(safe)
        low = first_key
        if TOP_K:
            # The largest key that at least k tokens reach.
            k = tl.where(greedy, rows.vocab_size, tl.load(rows.top_k + sequence))
            high = last_key
            for _ in range(32):
                middle = low + (high - low + 1) // 2
                reaching, _rest = _beyond(
                    models, rows, sequence, row, valid, temperature, held, safe, middle, last_key + 1, LAW,
                    CONSERVATIVE, COLUMNS, ONE_SPLIT,
                )  # fmt: skip
                enough = reaching >= k
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle - 1)
        cut_id = tl.zeros((SEQUENCES, 1), tl.int64)
        if TOP_P:
            # The largest key below which no more mass lies than may be dropped.
            _count, whole = _beyond(
                models, rows, sequence, row, valid, temperature, held, safe, low, last_key + 1, LAW,
                CONSERVATIVE, COLUMNS, ONE_SPLIT,
            )  # fmt: skip
            share = 1.0 - tl.where(greedy, 1.0, tl.load(rows.top_p + sequence))
            droppable = (whole.to(tl.float64) * share.to(tl.float64)).to(tl.int64)
            # One token always stays.
            droppable = tl.minimum(droppable, whole - 1)
            # Where nothing may be dropped, what weighs nothing stays too.
            drops = share > 0.0
            floor = low
            high = last_key
            for _ in range(32):
                middle = low + (high - low + 1) // 2
                _count, below = _beyond(
                    models, rows, sequence, row, valid, temperature, held, safe, floor, middle, LAW,
                    CONSERVATIVE, COLUMNS, ONE_SPLIT,
                )  # fmt: skip
                dropped = drops & (below <= droppable)
                low = tl.where(dropped, middle, low)
                high = tl.where(dropped, high, middle - 1)
            _count, below = _beyond(
                models, rows, sequence, row, valid, temperature, held, safe, floor, low, LAW, CONSERVATIVE,
                COLUMNS, ONE_SPLIT,
            )  # fmt: skip
            # Of tokens equal to the cut those with the lowest ids are dropped, as far as the mass allows.
            spare = tl.where(drops, tl.maximum(droppable - below, 0), 0)
            cut = _float(low)
            each = _mass(cut, safe, cut > float("-inf"))
            if tl.max(((spare >= each) & (each > 0)).to(tl.int32)) > 0:
                high_id = cut_id + rows.vocab_size
                for _ in range(24):
                    middle = cut_id + (high_id - cut_id + 1) // 2
                    ties = _ties_below(
                        models, rows, sequence, row, valid, temperature, held, cut, middle, LAW, CONSERVATIVE,
                        COLUMNS, ONE_SPLIT,
                    )  # fmt: skip
                    few = ties * each <= spare
                    cut_id = tl.where(few, middle, cut_id)
                    high_id = tl.where(few, high_id, middle - 1)
                cut_id = tl.where((spare >= each) & (each > 0), cut_id, 0)
        cut = _float(low)
        if MIN_P:
            least = safe + tl.log(tl.where(greedy, 0.0, tl.load(rows.min_p + sequence)))
            cut_id = tl.where(least > cut, 0, cut_id)
            cut = tl.maximum(cut, least)
        cut_id = cut_id.to(tl.int32)
        mass = low * 0
        for split in range(rows.splits):
            mixed, ids = _mixed(models, rows, sequence, row, split, valid, LAW, CONSERVATIVE, COLUMNS)
            scaled = divided(mixed, temperature)
            kept = boundary(scaled, ids, cut, cut_id) & (ids < rows.vocab_size)
            mass += tl.sum(_mass(scaled, safe, kept), axis=1, keep_dims=True)
        index = sequence * rows.count + row
        log_mass = tl.log(mass.to(tl.float32) / _UNIT)
        store_record(rows.records, index, highest, log_mass, cut, cut_id, winner, valid)
        if ONE_SPLIT and LAW == 2:
            # Inside the set counts beta (log L - log B), of normalised laws: the normalisers shift it.
            shift = safe * 0.0
            for model in tl.static_range(len(models.logits)):
                weight = tl.load(models.delta_weights + sequence * models.weight_stride + model)
                if tl.max(tl.where(valid, tl.abs(weight), 0.0)) > 0.0:
                    ids = tl.arange(0, COLUMNS)[None, :]
                    inside = valid & (ids < rows.vocab_size)
                    logits = _finite_logits(models, model, sequence, row, ids, inside)
                    top = tl.max(logits, axis=1, keep_dims=True)
                    top_safe = tl.where(top == float("-inf"), 0.0, top)
                    total = tl.sum(tl.exp(logits - top_safe), axis=1, keep_dims=True)
                    shift += _shift_of_model(weight, top, total)
            shift = _finite_shift(shift)
            tl.store(rows.records + index * RECORD + 5, shift, mask=valid)


def _describe(
    models: Models, lens: Tensor, lens_offset: int, sampling: Sampling, records: Tensor, vocab_size: int,
    law: int, conservative: bool,
) -> None:  # fmt: skip
    batch, count, _ = records.shape
    shape = tile_shape(vocab_size)
    temperature = sampling.temperature
    filters = (sampling.top_k, sampling.top_p, sampling.min_p)
    top_k, top_p, min_p = (part is not None for part in filters)
    used = {"TOP_K": top_k, "TOP_P": top_p}
    k, p, least = (temperature if part is None else part for part in filters)
    rows = Rows(lens, temperature, k, p, least, records, vocab_size, shape.splits)
    launch = {"LAW": law, "CONSERVATIVE": conservative}
    if shape.splits == 1:
        _cut[(-(-batch // shape.sequences) * count,)](
            models, rows, batch, count, lens_offset, **used, MIN_P=min_p, SEQUENCES=shape.sequences,
            COLUMNS=shape.columns, ONE_SPLIT=True, **launch,
            **launch_options(shape.warps, REGISTERS),
        )  # fmt: skip
        return
    every, device = batch * count, records.device
    numbers = (2 + 2 * len(models.logits)) * every * shape.splits
    search = Search(
        partials=torch.empty(numbers, device=device),
        counts=zeros_kept("levels", device, every * _LEVELS.value),
        brackets=torch.empty(every, 8, dtype=torch.int64, device=device),
        pool=torch.empty(every, _POOL.value if top_k or top_p else 0, dtype=torch.int64, device=device),
        arrivals=zeros_kept("arrivals", device, every),
    )
    grid = (every, shape.splits)
    _survey[grid](
        models, rows, search, batch, count, lens_offset, **used, COLUMNS=shape.columns,
        SPLITS=power_of_two(shape.splits), **launch, **launch_options(shape.warps),
    )  # fmt: skip
    _gather[grid](
        models, rows, search, batch, count, lens_offset, **used, MIN_P=min_p, COLUMNS=shape.columns,
        **launch, **launch_options(shape.warps, MORE_REGISTERS),
    )  # fmt: skip
    if top_k or top_p:
        rows = rows._replace(splits=-(-vocab_size // _REREAD_COLUMNS))
        _cut[(every,)](
            models, rows, batch, count, lens_offset, **used, MIN_P=min_p, SEQUENCES=1,
            COLUMNS=_REREAD_COLUMNS, ONE_SPLIT=False, **launch, **launch_options(_REREAD_WARPS, REGISTERS),
        )  # fmt: skip


def law_records(
    models: Models,
    draft_lens: Tensor,
    sampling: Sampling,
    draft_sampling: Sampling,
    drafted: int,
    vocab_size: int,
    conservative: bool,
) -> Tensor:
    """Records of the target's rows up to draft_lens and of the draft's: [2, batch, drafted + 1, RECORD]."""
    records = torch.empty(2, draft_lens.shape[0], drafted + 1, RECORD.value, device=draft_lens.device)
    _describe(models, draft_lens, 1, sampling, records[0], vocab_size, _TARGET, conservative)
    if drafted:
        _describe(models, draft_lens, 0, draft_sampling, records[1], vocab_size, _DRAFT, False)
    return records


def draft_records(models: Models, sampling: Sampling, vocab_size: int) -> Tensor:
    """Records of a draft law for logits of one row: float32 [batch, 1, RECORD]."""
    batch = sampling.temperature.shape[0]
    device = sampling.temperature.device
    records = torch.empty(batch, 1, RECORD.value, device=device)
    nothing = zeros_kept("lengths of no draft", device, 2 * batch).view(torch.int64)[:batch]
    _describe(models, nothing, 1, sampling, records, vocab_size, _DRAFT, False)
    return records


def conservative_sets(
    models: Models, draft_lens: Tensor, top_p: Tensor, drafted: int, vocab_size: int
) -> Tensor:
    """The sets inside which the large model's delta applies: records float32 [batch, drafted + 1, RECORD].

    Each is the top-p set of the law without that delta; its record's sixth number is what the delta's logits
    inside it are shifted by, since it is a difference of normalised laws.
    """
    records = torch.empty(draft_lens.shape[0], drafted + 1, RECORD.value, device=draft_lens.device)
    sampling = Sampling(torch.ones_like(top_p), top_p=top_p)
    _describe(models, draft_lens, 1, sampling, records, vocab_size, _PLAIN, False)
    return records


def specialisations() -> Iterator[Specialisation]:
    """The target's, the draft's and the conservative filter's cuts, for three models."""
    rows = Rows("*i64", "*fp32", "*i64", "*fp32", "*fp32", "*fp32", "i32", "i32")
    search = Search("*fp32", "*i32", "*i64", "*i64", "*i32")
    every = (True, True, True)
    for dtype, law, conservative, used in (
        ("bf16", _TARGET, False, (True, False, False)),
        ("bf16", _TARGET, False, (False, True, False)),
        ("bf16", _TARGET, False, (False, False, True)),
        ("bf16", _TARGET, False, every),
        ("fp16", _TARGET, False, every),
        ("fp32", _TARGET, False, every),
        ("bf16", _TARGET, True, every),
        ("bf16", _DRAFT, False, every),
        ("bf16", _PLAIN, False, (False, True, False)),
    ):
        names = [name for name, is_used in zip(("top-k", "top-p", "min-p"), used, strict=True) if is_used]
        name = f"{dtype} {('target', 'draft', 'set')[law]} {'conservative ' if conservative else ''}"
        name += " ".join(names)
        filters = {"TOP_K": used[0], "TOP_P": used[1]}
        minimum = {"MIN_P": used[2]}
        one = {"SEQUENCES": 1, "COLUMNS": 4096, "ONE_SPLIT": True}
        again = {"SEQUENCES": 1, "COLUMNS": _REREAD_COLUMNS, "ONE_SPLIT": False}
        small = {"SEQUENCES": 4, "COLUMNS": 32, "ONE_SPLIT": True}
        launches = 2 + (used[0] or used[1])
        limits = {
            _survey: None,
            _gather: MORE_REGISTERS if used[0] or used[1] else REGISTERS,
            _cut: REGISTERS,
        }
        for kernel, title, tile, own in (
            (_survey, "survey", {"COLUMNS": 4096}, {"SPLITS": 32}),
            (_gather, "gather", {"COLUMNS": 4096}, minimum),
            (_cut, "cut again", again, minimum),
            (_cut, "cut 4,096", one, minimum),
            (_cut, "cut 30", small, minimum),
        ):
            if kernel is _cut and (dtype != "bf16" or (title == "cut again" and names == ["min-p"])):
                continue
            yield Specialisation(
                operation="filters",
                name=f"{title} {name}",
                kernel=kernel,
                signature={
                    "models": models_signature(dtype, 3, False), "rows": rows,
                    **dict.fromkeys(("batch", "count", "lens_offset"), "i32"),
                    **({} if kernel is _cut else {"search": search}),
                },
                constants={"LAW": law, "CONSERVATIVE": conservative, **filters, **tile, **own},
                divisible=frozenset({
                    "models.logits", "models.strides", *(() if tile is small else ("rows.vocab_size",)),
                }),
                num_warps=_REREAD_WARPS if tile is again else 8,
                registers=limits[kernel],
                launches=1 if tile in (one, small) else launches,
                wide_loads=() if tile is small else (load_logits,),
            )  # fmt: skip
