"""Philox noise in Triton: the bits of `kernels/noise.py`, four neighbouring vocabulary ids a block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .specialisation import Specialisation
from .tile import Shape, launch_options, tile_shape

__all__ = ["exponential_noise", "exponential_tile", "specialisations", "uniform"]


@triton.jit
def _unit(word):
    """(word + 1/2) / 2^32 in float32, kept below 1."""
    return tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355224609375)


@triton.jit
def uniform(seed, counter, row, STREAM: tl.constexpr):
    """One uniform draw in (0, 1) at each address: float32 of the shape of `row`."""
    row_word = row.to(tl.uint32)
    zero = tl.zeros_like(row_word)
    word, _, _, _ = tl.philox(seed, zero, row_word, counter.to(tl.uint32), zero + STREAM)
    return _unit(word)


@triton.jit
def exponential_tile(seed, counter, row, STREAM: tl.constexpr, split, COLUMNS: tl.constexpr):
    """Unit exponential draws of a tile's vocabulary ids: float32 [sequences, COLUMNS].

    `seed`, `counter` and `row` are [sequences, 1]; the tile's first id is split * COLUMNS.
    """
    blocks = split * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)[None, :]
    block_word = (blocks + tl.zeros_like(row.to(tl.int32))).to(tl.uint32)
    zero = tl.zeros_like(block_word)
    words = tl.philox(seed, block_word, zero + row.to(tl.uint32), zero + counter.to(tl.uint32), zero + STREAM)
    word = tl.interleave(tl.interleave(words[0], words[2]), tl.interleave(words[1], words[3]))
    unit = _unit(word)
    # The rounding of 1 - unit is divided out again: full relative precision near 0.
    rest = 1.0 - unit
    lost = 1.0 - rest
    return tl.where(lost > 0.0, -tl.log(rest) * (unit / lost), unit)


@triton.jit(do_not_specialize=["counter_stride", "row_stride", "row_count", "batch"])
def _exponential_kernel(
    seeds,
    counters,
    rows,
    out,
    counter_stride,
    row_stride,
    vocab_size,
    row_count,
    batch,
    STREAM: tl.constexpr,
    SEQUENCES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0) // row_count
    position = tl.program_id(0) % row_count
    split = tl.program_id(1)
    sequence = tile.to(tl.int64) * SEQUENCES + tl.arange(0, SEQUENCES)[:, None]
    valid = sequence < batch
    seed = tl.load(seeds + sequence, mask=valid, other=0)
    counter = tl.load(counters + sequence * counter_stride + position, mask=valid, other=0)
    row = tl.load(rows + sequence * row_stride + position, mask=valid, other=0)
    draws = exponential_tile(seed, counter, row, STREAM, split, COLUMNS)
    ids = split * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    offsets = (sequence * row_count + position) * vocab_size + ids
    tl.store(out + offsets, draws, mask=valid & (ids < vocab_size))


def exponential_noise(seeds: Tensor, counters: Tensor, rows: Tensor, stream: int, vocab_size: int) -> Tensor:
    """`kernels.noise.exponential_noise` in one launch."""
    batch, row_count = counters.shape
    # The kernel steps through a sequence's counters, which may be one that is expanded.
    counters, rows = counters.contiguous(), rows.expand(batch, row_count)
    out = torch.empty(batch, row_count, vocab_size, device=seeds.device)
    shape: Shape = tile_shape(vocab_size)
    _exponential_kernel[(-(-batch // shape.sequences) * row_count, shape.splits)](
        seeds, counters, rows, out, counters.stride(0), rows.stride(0), vocab_size, row_count, batch,
        STREAM=stream, SEQUENCES=shape.sequences, COLUMNS=shape.columns, **launch_options(shape.warps),
    )  # fmt: skip
    return out


def specialisations() -> Iterator[Specialisation]:
    """The draws on their own."""
    integers = ("counter_stride", "row_stride", "vocab_size", "row_count", "batch")
    yield Specialisation(
        operation="noise",
        name="exponential",
        kernel=_exponential_kernel,
        signature={
            "seeds": "*i64", "counters": "*i64", "rows": "*i64", "out": "*fp32",
            **dict.fromkeys(integers, "i32"),
        },
        constants={"STREAM": 0, "SEQUENCES": 1, "COLUMNS": 4096},
        divisible=frozenset({"out", "vocab_size"}),
        num_warps=8,
    )  # fmt: skip
