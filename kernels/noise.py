"""Counter-based noise: Philox-4x32-10 (Salmon et al., SC 2011), so that draws never depend on order.

A draw is addressed by (sequence seed, stream, counter, row, vocabulary id) and has no other state: the
same address gives the same bits on every backend, in every batch and in every slot. The 64-bit seed is
the Philox key; the Philox counter words are (vocabulary id // 4, row, counter, stream), and the four
words of one Philox block serve four neighbouring vocabulary ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .backend import backend

__all__ = [
    "NoiseKey", "Stream", "derive_seeds", "exponential_noise", "gumbel_noise", "philox_rounds",
    "uniform_noise",
]  # fmt: skip

_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_WORD = 0xFFFFFFFF
_LARGEST_BELOW_ONE = 1.0 - 2.0**-24

# Up to this many Philox blocks, Python's integers are faster than an array's operations.
_FEW_BLOCKS = 24

Words = TypeVar("Words", Tensor, "np.ndarray[Any, Any]", int)


class Stream(IntEnum):
    """Independent families of draws. Two uses of noise never share a stream."""

    DRAFT = 0
    ACCEPT = 1
    RESIDUAL = 2
    SHARED = 3
    SEED = 4


def philox_rounds(
    key: tuple[Words, Words], counter: tuple[Words, Words, Words, Words]
) -> tuple[Words, Words, Words, Words]:
    """Ten rounds of Philox-4x32 over broadcastable integer arrays.

    Args:
        key: two arrays of values in [0, 2^32): torch int64, numpy uint64, or plain integers.
        counter: four such arrays, broadcastable with each other and with the key.

    Returns:
        Four arrays of the broadcast shape with values in [0, 2^32).
    """
    key_0, key_1 = key
    word_0, word_1, word_2, word_3 = counter
    for _ in range(10):
        # Words 1 and 3 keep the whole 64-bit product and the keys their carries: what lies above bit 31
        # meets the other words only under the mask. A wrapped product has the bits of the unsigned one.
        product_0 = word_0 * _MULTIPLIER_0
        product_1 = word_2 * _MULTIPLIER_1
        word_0 = ((product_1 >> 32) ^ (word_1 ^ key_0)) & _WORD
        word_2 = ((product_0 >> 32) ^ (word_3 ^ key_1)) & _WORD
        word_1, word_3 = product_1, product_0
        key_0 = key_0 + _WEYL_0
        key_1 = key_1 + _WEYL_1
    return word_0, word_1 & _WORD, word_2, word_3 & _WORD


def _in_host_memory(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _philox_blocks(
    seeds: Tensor, counters: Tensor, rows: Tensor, stream: Stream, blocks: int
) -> tuple[Tensor, ...]:
    """The four words of Philox blocks 0..blocks-1 at each (sequence, row): int64 [batch, rows, blocks]."""
    key = (seeds[:, None, None] & _WORD, (seeds[:, None, None] >> 32) & _WORD)
    block = torch.arange(blocks, device=seeds.device)
    stream_word = torch.full((1,), int(stream), device=seeds.device)
    counter = (block, rows[..., None], counters[..., None] & _WORD, stream_word)
    if not _in_host_memory(seeds):
        return philox_rounds(key, counter)
    if blocks == 1 and counters.numel() <= _FEW_BLOCKS:
        return _few_philox_blocks(seeds, counters, rows, stream)
    # numpy spends half of torch's time on a hundred tiny integer operations.
    key_0, key_1, *words = (word.numpy().view(np.uint64) for word in (*key, *counter))
    drawn = philox_rounds((key_0, key_1), (words[0], words[1], words[2], words[3]))
    return tuple(torch.from_numpy(word.view(np.int64)) for word in drawn)


def _few_philox_blocks(seeds: Tensor, counters: Tensor, rows: Tensor, stream: Stream) -> tuple[Tensor, ...]:
    blocks = [
        philox_rounds((seed & _WORD, seed >> 32 & _WORD), (0, row, counter & _WORD, int(stream)))
        for seed, own_counters, own_rows in zip(
            seeds.tolist(), counters.tolist(), rows.expand_as(counters).tolist(), strict=True
        )
        for counter, row in zip(own_counters, own_rows, strict=True)
    ]
    return torch.tensor(blocks).view(*counters.shape, 1, 4).unbind(-1)


def _minus_uniform(words: Tensor) -> Tensor:
    """Minus (word + 1/2) / 2^32, kept above -1; overwrites its argument, float32."""
    return words.add_(0.5).mul_(-(2.0**-32)).clamp_(min=-_LARGEST_BELOW_ONE)


def uniform_noise(seeds: Tensor, counters: Tensor, rows: Tensor, stream: Stream) -> Tensor:
    """One uniform draw a row, never exactly 0 or 1.

    Args:
        seeds: int64 [batch], one seed a sequence.
        counters: int64 [batch, rows], the round or the absolute position, in [0, 2^32).
        rows: int64 [batch, rows] or [rows], the row of the round.
        stream: the family of draws.

    Returns:
        float32 [batch, rows] in (0, 1), with full relative precision near 0.
    """
    word, *_ = _philox_blocks(seeds, counters, rows, stream, 1)
    return _minus_uniform(word[..., 0].to(torch.float32)).neg_()


def exponential_noise(
    seeds: Tensor, counters: Tensor, rows: Tensor, stream: Stream, vocab_size: int
) -> Tensor:
    """A unit exponential draw for every vocabulary id, for races: argmax(weight / noise) ~ weight.

    Arguments as in `uniform_noise`. Returns float32 [batch, rows, vocab_size], positive and finite,
    with full relative precision near 0, where races over large vocabularies are decided.
    """
    if backend(seeds.device) == "triton":
        from .gpu.noise import exponential_noise as compiled

        return compiled(seeds, counters, rows, stream, vocab_size)
    words = _philox_blocks(seeds, counters, rows, stream, -(-vocab_size // 4))
    lanes = torch.stack([word.to(torch.float32) for word in words], dim=-1).flatten(-2)
    return _minus_uniform(lanes[..., :vocab_size]).log1p_().neg_()


def gumbel_noise(seeds: Tensor, counters: Tensor, rows: Tensor, stream: Stream, vocab_size: int) -> Tensor:
    """A standard Gumbel draw for every vocabulary id, for races: argmax(log weight + noise) ~ weight.

    Minus the logarithm of `exponential_noise` at the same address; shapes as there.
    """
    return exponential_noise(seeds, counters, rows, stream, vocab_size).log_().neg_()


def derive_seeds(seed: int, count: int) -> Tensor:
    """Independent seeds for the rows of a batch from one seed of 64 bits: int64 [count], on the CPU.

    Seed i depends on `seed` and i alone, so a larger batch keeps the seeds of a smaller one.
    """
    index = torch.arange(count)
    zeros = torch.zeros_like(index)
    high, low, *_ = _philox_blocks(torch.tensor([seed]), index[None], zeros, Stream.SEED, 1)
    return ((high << 32) | low)[0, :, 0]


@dataclass(frozen=True)
class NoiseKey:
    """Where a round's noise lies.

    Attributes:
        seeds: int64 [batch].
        rounds: int64 [batch], rounds this sequence has begun: the counter of every stream but `SHARED`.
            Keying by position instead would let a row that is examined again meet the noise that
            rejected it, which biases the law.
        positions: int64 [batch], absolute position of the first token this round may emit: the counter
            of `SHARED`.
    """

    seeds: Tensor
    rounds: Tensor
    positions: Tensor

    def gumbel(self, stream: Stream, rows: Tensor, vocab_size: int) -> Tensor:
        """Gumbel draws of rows [rows] int64 of this round: float32 [batch, rows, vocab_size]."""
        counters = self.rounds[:, None].expand(-1, rows.shape[0])
        if stream is Stream.SHARED:
            counters, rows = self.positions[:, None] + rows, torch.zeros_like(rows)
        return gumbel_noise(self.seeds, counters, rows, stream, vocab_size)
