"""Philox noise compiled for a CPU: the bits of `kernels/noise.py`."""

from __future__ import annotations

from typing import Any

import numpy as np

from .compile import FLOAT, VECTOR, WORDS, compiled, log, strictly_compiled

__all__ = ["exponentials", "uniform"]

_WORD = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
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
            product_0, product_1 = word_0 * _MULTIPLIER_0, word_2 * _MULTIPLIER_1
            word_0 = (product_1 >> _SHIFT) ^ word_1 ^ key_0
            word_2 = (product_0 >> _SHIFT) ^ word_3 ^ key_1
            word_1, word_3 = product_1 & _WORD, product_0 & _WORD
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


@compiled(f"void(int64, int64, int64, int64, {VECTOR})")
def exponentials(seed: int, counter: int, row: int, stream: int, out: Any) -> None:
    """A unit exponential draw for every vocabulary id, in float32 `out` [vocab]."""
    size = out.shape[0]
    words = np.empty((4, (size + 3) // 4), np.uint32)
    _words(seed, counter, row, stream, words)
    for lane in range(4):
        lane_words = words[lane]
        for block in range((size - lane + 3) // 4):
            out[4 * block + lane] = _exponential(_unit(lane_words[block]))
