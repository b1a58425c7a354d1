"""Philox noise compiled for a CPU: the bits of `kernels/noise.py`."""

from __future__ import annotations

from typing import Any

import numpy as np

from .jit import (
    FLOAT,
    LARGEST_FLOAT,
    VECTOR,
    WORDS,
    argmax,
    bits_of_float,
    compiled,
    largest,
    log,
    strictly_compiled,
)

__all__ = ["race_of_logits", "race_of_weights", "uniform"]

_WORD = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_BITS_OF_ONE = np.int32(0x3F800000)
_PIECE = 64
_WEYL_0, _WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


@compiled(f"void(int64, int64, int64, int64, {WORDS})")
def _words(seed: int, counter: int, row: int, stream: int, out: Any) -> None:
    """Philox-4x32-10 blocks 0, 1, ...: the four words of each, in uint32 `out` [4, blocks].

    Written out in the loop over blocks, which is then taken in vectors.
    """
    first, second, third, fourth = out[0], out[1], out[2], out[3]
    seed_0, seed_1 = np.uint64(seed) & _WORD, np.uint64(seed) >> _SHIFT
    own_row, own_counter, own_stream = np.uint64(row), np.uint64(counter) & _WORD, np.uint64(stream)
    for block in range(first.shape[0]):
        key_0, key_1 = seed_0, seed_1
        word_0, word_1, word_2, word_3 = np.uint64(block), own_row, own_counter, own_stream
        for _ in range(10):
            # A multiplication of vectors' lower halves cuts the rest off by itself; elsewhere it may stay.
            product_0, product_1 = (word_0 & _WORD) * _MULTIPLIER_0, (word_2 & _WORD) * _MULTIPLIER_1
            word_0 = (product_1 >> _SHIFT) ^ word_1 ^ key_0
            word_2 = (product_0 >> _SHIFT) ^ word_3 ^ key_1
            word_1, word_3 = product_1, product_0
            key_0, key_1 = (key_0 + _WEYL_0) & _WORD, (key_1 + _WEYL_1) & _WORD
        first[block], second[block] = np.uint32(word_0), np.uint32(word_1)
        third[block], fourth[block] = np.uint32(word_2), np.uint32(word_3)


@strictly_compiled("float32(uint32)")
def _unit(word: Any) -> Any:
    """(word + 1/2) / 2^32 in float32, kept below 1."""
    value = (FLOAT(word) + FLOAT(0.5)) * FLOAT(2.0**-32)
    return min(value, FLOAT(1.0 - 2.0**-24))


@compiled("float32(int64, int64, int64, int64)")
def uniform(seed: int, counter: int, row: int, stream: int) -> Any:
    """One uniform draw, never exactly 0 or 1."""
    words = np.empty((4, 1), np.uint32)
    _words(seed, counter, row, stream, words)
    return _unit(words[0, 0])


@strictly_compiled("float32(float32)")
def _exponential(unit: Any) -> Any:
    """-log(1 - unit) with full relative precision near 0: the rounding of 1 - unit is divided out again."""
    rest = FLOAT(1) - unit
    lost = FLOAT(1) - rest
    return -log(rest) * (unit / lost) if lost > FLOAT(0) else unit


@compiled(f"{VECTOR}(int64, int64, int64, int64, int64)")
def _uniforms(size: int, seed: int, counter: int, row: int, stream: int) -> Any:
    """The uniform draws of ids 0, 1, ..., `size` - 1: the words of each block one after the other."""
    whole = size // 4
    words = np.empty((4, (size + 3) // 4), np.uint32)
    _words(seed, counter, row, stream, words)
    first, second, third, fourth = words[0], words[1], words[2], words[3]
    units = np.empty(size, FLOAT)
    for block in range(whole):
        units[4 * block] = _unit(first[block])
        units[4 * block + 1] = _unit(second[block])
        units[4 * block + 2] = _unit(third[block])
        units[4 * block + 3] = _unit(fourth[block])
    for lane in range(size - 4 * whole):
        units[4 * whole + lane] = _unit(words[lane, whole])
    return units


@compiled(f"boolean({VECTOR}, float32)")
def _any_reaches(bounds: Any, least: Any) -> Any:
    # By index: what is iterated over counts as scattered.
    count = np.int32(0)
    for k in range(bounds.shape[0]):
        count = np.int32(count + np.int32(bounds[k] >= least))
    return count > 0


@strictly_compiled("float32(float32, float32, float32)")
def _less(logit: Any, top: Any, noise: Any) -> Any:
    """`logit` less the largest, then less the noise, which would be lost if it were added to that first."""
    return (logit - top) - noise


@compiled(f"int64({VECTOR}, float32, int64, int64, int64, int64)")
def race_of_logits(logits: Any, scale: float, seed: int, counter: int, row: int, stream: int) -> Any:
    """The first id of the largest logits[id] - scale log(E[id]), E being unit exponential draws; `scale` > 0.

    Logits are taken less their largest, beside which the noise of a small `scale` would be rounded away.
    Without two logarithms for every id: E = -log(1 - u) is at least its uniform draw u = (1 + m) 2^e, and
    log2(u) at least e + m, which are u's bits. So much an id can reach at most, and few could reach what the
    one that could reach most does reach.
    """
    size = logits.shape[0]
    units = _uniforms(size, seed, counter, row, stream)
    bounds = np.empty(size, FLOAT)
    slope = scale * FLOAT(np.log(2) * 2.0**-23)
    top = max(largest(logits), -LARGEST_FLOAT)
    for token in range(size):
        reach = slope * FLOAT(np.int32(bits_of_float(units[token]) - _BITS_OF_ONE))
        bounds[token] = _less(logits[token], top, reach)
    winner = argmax(bounds)
    highest = _less(logits[winner], top, scale * log(_exponential(units[winner])))
    # Bounds are rounded, the more the larger the logits.
    least = highest - FLOAT(0.01) * scale - FLOAT(1e-5) * abs(highest)
    for first in range(0, size, _PIECE):
        if _any_reaches(bounds[first : first + _PIECE], least):
            for token in range(first, min(first + _PIECE, size)):
                if bounds[token] >= least:
                    score = _less(logits[token], top, scale * log(_exponential(units[token])))
                    if score > highest or (score == highest and token < winner):
                        highest, winner = score, token
    return winner


@compiled(f"int64({VECTOR}, int64, int64, int64, int64)")
def race_of_weights(weights: Any, seed: int, counter: int, row: int, stream: int) -> Any:
    """The first id of the largest weights[id] / E[id], as `race_of_logits`; no weight is negative."""
    size = weights.shape[0]
    units = _uniforms(size, seed, counter, row, stream)
    bounds = np.empty(size, FLOAT)
    for token in range(size):
        bounds[token] = weights[token] / units[token]
    winner = argmax(bounds)
    highest = weights[winner] / _exponential(units[winner])
    least = highest * FLOAT(1 - 1e-5)
    for first in range(0, size, _PIECE):
        if _any_reaches(bounds[first : first + _PIECE], least):
            for token in range(first, min(first + _PIECE, size)):
                if bounds[token] >= least:
                    score = weights[token] / _exponential(units[token])
                    if score > highest or (score == highest and token < winner):
                        highest, winner = score, token
    return winner
