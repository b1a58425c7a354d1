"""Mixes of logits and their laws, compiled for a CPU: `kernels/mix.py` is the specification."""

from __future__ import annotations

from typing import Any

import numpy as np

from .filters import cut_top_p, filter_law
from .jit import FLOAT, LARGEST_FLOAT, TABLES, VECTOR, array_at, compiled, exp, largest, log

__all__ = ["filtered_law", "mix", "mix_conservatively", "normalise", "softmax"]

_PIECE = 4096


@compiled(f"void({TABLES}, {VECTOR}, int64, int64, {VECTOR})")
def mix(table: Any, weights: Any, sequence: int, row: int, out: Any) -> None:
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
def softmax(logits: Any, temperature: float, law: Any) -> Any:
    """Divide `logits`, less their largest, by the temperature, write their probabilities to `law`, and return
    their normaliser.

    Less the largest, since a cold temperature would have large ones rounded by more than they differ. A row
    of only -inf, which is no law, becomes the point mass on id 0.
    """
    size = logits.shape[0]
    highest = largest(logits)
    if highest == FLOAT(-np.inf):
        logits[0] = highest = FLOAT(0)
    if temperature != FLOAT(1):
        for token in range(size):
            logits[token] = (logits[token] - highest) / temperature
        highest = FLOAT(0)
    # In pieces, since the terms of a large vocabulary added up in float32 are digits short.
    whole = 0.0
    for first in range(0, size, _PIECE):
        piece, shares = logits[first : first + _PIECE], law[first : first + _PIECE]
        part = FLOAT(0)
        for token in range(piece.shape[0]):
            piece[token] -= highest
            shares[token] = exp(piece[token])
            part += shares[token]
        whole += np.float64(part)
    total = FLOAT(whole)
    scale = FLOAT(1) / total
    for token in range(size):
        law[token] *= scale
    return log(total)


@compiled(f"float32({VECTOR}, float32, {VECTOR})")
def normalise(logits: Any, temperature: float, law: Any) -> Any:
    """`softmax`, of which the normaliser is subtracted: `logits` become log-probabilities."""
    shift = softmax(logits, temperature, law)
    for token in range(logits.shape[0]):
        logits[token] -= shift
    return shift


@compiled(f"float32({VECTOR}, {VECTOR}, SamplingArrays, int64)")
def filtered_law(logits: Any, law: Any, sampling: Any, sequence: int) -> Any:
    """Write to `law` the law of `logits` after temperature and filters.

    Returns what `logits`, which are overwritten, then exceed its log-probabilities by: few of these are read,
    so they are not computed for all ids.
    """
    shift = softmax(logits, sampling.temperature[sequence], law)
    return shift + filter_law(logits, law, sampling, sequence)


@compiled(f"void({TABLES}, ConservativeArrays, int64, int64, {VECTOR}, {VECTOR})")
def mix_conservatively(table: Any, conservative: Any, sequence: int, row: int, out: Any, room: Any) -> None:
    """Log-probabilities of the small pair, to which the large model's delta is added inside their top-p set.

    `room` is overwritten.
    """
    size, delta_weights = out.shape[0], conservative.delta_weights[sequence]
    mix(table, conservative.plain_weights[sequence], sequence, row, out)
    normalise(out, FLOAT(1), room)
    ids = np.arange(size)
    count = cut_top_p(out.copy(), room, ids, size, conservative.top_p[sequence])
    mix(table, delta_weights, sequence, row, room)
    # The delta is one of log-probabilities: of raw logits but for their normalisers.
    shift, alone = FLOAT(0), np.zeros_like(delta_weights)
    law, scratch = np.empty(size, FLOAT), np.empty(size, FLOAT)
    for model in range(alone.shape[0]):
        if delta_weights[model] != FLOAT(0):
            alone[model] = FLOAT(1)
            mix(table, alone, sequence, row, scratch)
            highest = largest(scratch)
            own = normalise(scratch, FLOAT(1), law)
            shift += delta_weights[model] * (own + (highest if highest > FLOAT(-np.inf) else FLOAT(0)))
            alone[model] = FLOAT(0)
    for token in ids[:count]:
        out[token] += room[token] - shift
