"""The filters of a law compiled for a CPU, a row at a time; `filters.py` and `mix.py` above specify them.

Which tokens stay is found in a histogram of the log-probabilities, of which only the bar that a threshold
falls into is sorted: two passes over the vocabulary instead of a sort of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .jit import FLOAT, MATRIX, TABLE, VECTOR, arrays, compiled, largest, log, record

if TYPE_CHECKING:
    from ..filters import Sampling
    from ..mix import Coefficients

__all__ = [
    "ConservativeArrays", "SamplingArrays", "conservative_arrays", "cut_top_p", "filter_law", "is_filtered",
    "sampling_arrays",
]  # fmt: skip


@record(VECTOR, TABLE, VECTOR, VECTOR)
class SamplingArrays(NamedTuple):
    """A `Sampling` as arrays [batch]; an empty one where a filter is not in use."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any


@record(VECTOR, MATRIX, MATRIX)
class ConservativeArrays(NamedTuple):
    """The conservative filter's mass [batch], and weights of the plain law and of the delta, or nothing."""

    top_p: Any
    plain_weights: Any
    delta_weights: Any


_NO_FILTER = {
    "top_k": np.empty(0, np.int64), "top_p": np.empty(0, np.float32), "min_p": np.empty(0, np.float32),
}  # fmt: skip
_NO_WEIGHTS = np.empty((0, 0), np.float32)

_BARS = 512
# A power of two, so that a bar is the same in whatever order it is computed.
_BARS_PER_NAT = 16


def sampling_arrays(sampling: Sampling) -> SamplingArrays:
    """Temperature and filters for compiled functions."""
    return SamplingArrays(
        *arrays(sampling, "temperature"),
        *(
            unused if getattr(sampling, name) is None else arrays(sampling, name)[0]
            for name, unused in _NO_FILTER.items()
        ),
    )


def conservative_arrays(coefficients: Coefficients) -> ConservativeArrays:
    """The conservative filter for compiled functions."""
    if coefficients.conservative_top_p is None:
        return ConservativeArrays(_NO_FILTER["top_p"], _NO_WEIGHTS, _NO_WEIGHTS)
    return ConservativeArrays(*arrays(coefficients, "conservative_top_p", "plain_weights", "delta_weights"))


@compiled(f"int32[::1]({VECTOR}, int64)")
def _bars(values: Any, count: int) -> Any:
    """The bar of each of the first log-probabilities, by how far below the highest it lies.

    The last bar takes all that is left.
    """
    bars, values = np.empty(count, np.int32), values[:count]
    highest = largest(values)
    for index in range(count):
        below = (highest - values[index]) * FLOAT(_BARS_PER_NAT)
        # Written so that what is no number has a bar too.
        bars[index] = np.int32(below) if FLOAT(0) <= below < FLOAT(_BARS - 1) else np.int32(_BARS - 1)
    return bars


@compiled(f"{TABLE}(int32[::1], int64, int64)")
def _places(bars: Any, bar: int, count: int) -> Any:
    """Where the `count` entries of a bar are, ascending."""
    places = np.empty(count, np.int64)
    found = 0
    for index in range(bars.shape[0]):
        if bars[index] == bar:
            places[found] = index
            found += 1
    return places


@compiled(f"int64({VECTOR}, {VECTOR}, {TABLE}, int64, int64)")
def _cut_top_k(values: Any, shares: Any, ids: Any, count: int, top_k: int) -> int:
    """Move to the front what is as probable as the `top_k`-th of the first `count`; how many that are."""
    if top_k >= count:
        return count
    bars, heights = _bars(values, count), np.zeros(_BARS, np.int64)
    for index in range(count):
        heights[bars[index]] += 1
    bar, wanted = 0, top_k
    while heights[bar] < wanted:
        wanted -= heights[bar]
        bar += 1
    equals = values[_places(bars, bar, heights[bar])]
    equals.sort()
    least = equals[equals.shape[0] - wanted]
    kept = 0
    for index in range(count):
        is_kept = values[index] >= least
        values[kept], shares[kept], ids[kept] = values[index], shares[index], ids[index]
        kept += is_kept
    return kept


@compiled(f"int64({VECTOR}, {VECTOR}, {TABLE}, int64, float32)")
def cut_top_p(values: Any, shares: Any, ids: Any, count: int, top_p: float) -> int:
    """Move the fewest most probable tokens whose share of the mass reaches `top_p` to the front.

    Args:
        values, shares: float32, log-probabilities but for a number, and probabilities, which need not add up
            to 1, of the tokens `ids`, int64, ascending: the first `count` of each. Of equal ones the higher
            ids stay.

    Returns:
        How many tokens stay, at least 1.
    """
    bars, heights, masses = _bars(values, count), np.zeros(_BARS, np.int64), np.zeros(_BARS, np.float64)
    for index in range(count):
        heights[bars[index]] += 1
        masses[bars[index]] += shares[index]
    most = 0.0
    for bar in range(_BARS):
        most += masses[bar]
    most *= np.float64(FLOAT(1) - top_p)
    dropped, last = 0.0, _BARS - 1
    while last > 0 and dropped + masses[last] <= most:
        dropped += masses[last]
        last -= 1
    places = _places(bars, last, heights[last])
    order = np.argsort(values[places], kind="mergesort")
    # Something stays, however little mass is wanted.
    for index in range(places.shape[0] - (last == 0)):
        place = places[order[index]]
        dropped += shares[place]
        if dropped > most:
            break
        bars[place] = _BARS
    kept = 0
    for index in range(count):
        is_kept = bars[index] <= last
        values[kept], shares[kept], ids[kept] = values[index], shares[index], ids[index]
        kept += is_kept
    return kept


@compiled("boolean(SamplingArrays, int64, int64)")
def is_filtered(sampling: Any, sequence: int, vocab_size: int) -> Any:
    """Whether a sequence's sampling leaves tokens out."""
    top_k, top_p, min_p = sampling.top_k, sampling.top_p, sampling.min_p
    return sampling.temperature[sequence] > FLOAT(0) and (
        (top_k.shape[0] > 0 and top_k[sequence] < vocab_size)
        or (top_p.shape[0] > 0 and top_p[sequence] < FLOAT(1))
        or (min_p.shape[0] > 0 and min_p[sequence] > FLOAT(0))
    )


@compiled(f"float32({VECTOR}, {VECTOR}, SamplingArrays, int64)")
def filter_law(logits: Any, law: Any, sampling: Any, sequence: int) -> Any:
    """Filter a row's logits, less their largest, and its probabilities, and normalise the latter again.

    The logits are not, since at a hot temperature log-probabilities are rounded by more than they differ:
    returns what the filters change in their normaliser.
    """
    size = logits.shape[0]
    if not is_filtered(sampling, sequence, size):
        return FLOAT(0)
    top_k, top_p, min_p = sampling.top_k, sampling.top_p, sampling.min_p
    ids, count, least = np.arange(size), size, FLOAT(-np.inf)
    if top_k.shape[0] > 0:
        count = _cut_top_k(logits, law, ids, count, top_k[sequence])
    if top_p.shape[0] > 0 and top_p[sequence] < FLOAT(1):
        count = cut_top_p(logits, law, ids, count, top_p[sequence])
    values, shares = logits[:count].copy(), law[:count].copy()
    if min_p.shape[0] > 0 and min_p[sequence] > FLOAT(0):
        least = log(min_p[sequence])
    total = 0.0
    for index in range(count):
        is_kept = values[index] >= least
        shares[index] = shares[index] if is_kept else FLOAT(0)
        values[index] = values[index] if is_kept else FLOAT(-np.inf)
        total += shares[index]
    scale = FLOAT(1) / FLOAT(total)
    for token in range(size):
        law[token], logits[token] = FLOAT(0), FLOAT(-np.inf)
    for index in range(count):
        law[ids[index]], logits[ids[index]] = shares[index] * scale, values[index]
    return log(FLOAT(total))
