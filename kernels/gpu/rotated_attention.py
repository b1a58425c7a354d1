"""Attention of new rows in Triton, with the rotation before it and the append to the cache, in one launch.

As `attention.py` cuts rows and positions, so does this; a program mixes the cache's positions of its split,
and the one whose split holds a sequence's last position also the new rows' own keys and values. It rotates
these itself, as every program rotates its queries, and writes them to the cache.

Vectors are loaded by halves, since a rotation mixes a number with the one half a head further: their products
with keys are then sums of two.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention import HEAD_DIMS, MOST_ROWS
from .attention import (
    LOG2_E,
    Tile,
    add_columns,
    finish_split,
    is_seen,
    load_vectors,
    range_seen,
    registers_of,
    room_for_parts,
    squeezed,
    strides_of,
)
from .specialisation import Specialisation
from .tile import (
    begin_programmatic,
    launch_options,
    nearest,
    power_of_two,
    product_of_tiles,
    programmatic_options,
    stage_options,
    wait_programmatic,
)

__all__ = ["rotated_attention", "rotated_tile", "specialisations"]

_WAVES = 4
"""Warps on AMD's: more of them leave each too few registers."""


def rotated_tile(rows: int, dim: int, itemsize: int) -> Tile:
    """The tile for `rows` that share keys, heads of `dim` numbers of `itemsize` bytes; timed on an H200.

    With few rows of 16 bits a program takes less than 48 KiB of shared memory. More would have a
    multiprocessor divide its memory anew between it and the products before and after, which live on the
    first-level cache: then launches no longer overlap, and a layer takes 14 microseconds longer.
    """
    width = max(power_of_two(dim), 16)
    shared = max(power_of_two(rows), 16)
    # Tensor cores do not multiply float32, and registers hold few rows and columns then.
    padded = min(shared, (64 if width <= 128 else 32) if itemsize == 2 else 16)
    columns = 64 if itemsize == 2 else 32
    results = min(power_of_two(rows), padded)
    return Tile(
        rows=padded,
        tiles=-(-rows // padded),
        columns=columns if width <= 128 else columns // 2,
        split=max(128, padded * 4),
        width=width,
        results=results,
        warps=8 if width > 128 or padded * width > 4096 or (itemsize == 4 and width == 128) else 4,
        stages=3 if padded == 64 else 2,
        # All parts of a bundle in one trip: a layer of Qwen2.5-1.5B takes 10 to 20 microseconds less.
        at_once=16_384 if padded == 16 and results >= 8 and itemsize == 2 else 4096,
    )


@triton.jit
def _load_cached(
    keys,
    values,
    key_stride,
    value_stride,
    column,
    end,
    half,
    number,
    DIM: tl.constexpr,
):
    """Keys, both halves [numbers, columns], and values [columns, numbers] of columns before `end`."""
    place = column.to(tl.int64)
    is_column = column < end
    offsets = place[None, :] * key_stride + half[:, None]
    is_half = is_column[None, :] & (half < DIM // 2)[:, None]
    first, second = load_vectors(keys, offsets, is_half), load_vectors(keys, offsets + DIM // 2, is_half)
    is_number = is_column[:, None] & (number < DIM)[None, :]
    return (first, second), load_vectors(values, place[:, None] * value_stride + number[None, :], is_number)


@triton.jit
def _rotated(vectors, offsets, rotations, turns, mask, DIM: tl.constexpr):
    """Both halves of vectors, rotated in float32 and rounded, by what lies at `turns`."""
    first = tl.load(vectors + offsets, mask=mask, other=0.0)
    second = tl.load(vectors + offsets + DIM // 2, mask=mask, other=0.0)
    cosine = tl.load(rotations + turns, mask=mask, other=0.0).to(tl.float32)
    other_cosine = tl.load(rotations + turns + DIM // 2, mask=mask, other=0.0).to(tl.float32)
    sine = tl.load(rotations + turns + DIM, mask=mask, other=0.0).to(tl.float32)
    other_sine = tl.load(rotations + turns + (DIM + DIM // 2), mask=mask, other=0.0).to(tl.float32)
    plain, crossed = first.to(tl.float32), second.to(tl.float32)
    return (
        nearest(plain * cosine + crossed * sine, first.dtype),
        nearest(crossed * other_cosine + plain * other_sine, first.dtype),
    )


@triton.jit
def _is_visible(position, column, end, reach):
    """Whether a row at its position sees a column, which is none from `end` on."""
    return is_seen(position, column, reach) & (column < end)[None, :]


@triton.jit
def _scores(rows, keys, is_visible, scale, softcap, SOFTCAPPED: tl.constexpr):
    """Scores to the base of 2 of rows and keys that are given by halves; -inf where unseen."""
    scores = product_of_tiles(rows[0], keys[0], tl.zeros(is_visible.shape, tl.float32))
    scores = product_of_tiles(rows[1], keys[1], scores)
    if SOFTCAPPED:
        scores = squeezed(scores * scale, softcap) * LOG2_E
    else:
        scores *= scale * LOG2_E
    return tl.where(is_visible, scores, float("-inf"))


@triton.jit(do_not_specialize=["new", "groups", "tiles", "span", "splits", "reach", "capacity"])
def _attend_rotated(
    query,
    key,
    value,
    rotations,
    cached_keys,
    cached_values,
    lengths,
    out,
    partials,
    records,
    arrivals,
    query_strides,
    key_strides,
    value_strides,
    cached_key_strides,
    cached_value_strides,
    out_strides,
    scale,
    softcap,
    new,
    groups,
    tiles,
    span,
    splits,
    reach,
    capacity,
    SOFTCAPPED: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    RESULTS: tl.constexpr,
    NEW: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    BUNDLE: tl.constexpr,
    PARTS: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    begin_programmatic(PROGRAMMATIC)
    split = tl.program_id(0)
    head = tl.program_id(1) // tiles
    tile = tl.program_id(1) % tiles
    sequence = tl.program_id(2).to(tl.int64)
    # Lengths are written between passes, and a pass begins with launches that do not overlap.
    length = tl.load(lengths + sequence)
    first, last = range_seen(length, new, span, reach)
    first_split = first // SPLIT
    last_split = last // SPLIT
    if (split < first_split) | (split > last_split):
        return

    row = tile * ROWS + tl.arange(0, ROWS)
    is_row = row < groups * new
    query_head = head * groups + row // new
    step = row % new
    number = tl.arange(0, WIDTH)
    half = tl.arange(0, HALF)
    is_number, is_half = number < DIM, half < DIM // 2
    position = tl.minimum(length + step, capacity - 1).to(tl.int32)
    own_keys = cached_keys + sequence * cached_key_strides[0] + head.to(tl.int64) * cached_key_strides[1]
    own_values = (
        cached_values + sequence * cached_value_strides[0] + head.to(tl.int64) * cached_value_strides[1]
    )

    # Of the cache's positions.
    begin = tl.maximum(split * SPLIT, first // COLUMNS * COLUMNS)
    end = tl.minimum(split * SPLIT + SPLIT, tl.minimum(length, span).to(tl.int32))
    wait_programmatic(PROGRAMMATIC)

    offsets = sequence * query_strides[0] + step.to(tl.int64) * query_strides[1]
    offsets += query_head.to(tl.int64) * query_strides[2]
    turns = position.to(tl.int64) * (2 * DIM)
    rows = _rotated(
        query, offsets[:, None] + half[None, :], rotations, turns[:, None] + half[None, :],
        is_row[:, None] & is_half[None, :], DIM,
    )  # fmt: skip
    # The rows' own keys and values are asked for along with their queries.
    is_last = split == last_split
    ahead = tl.arange(0, NEW)
    # A comparison of two scalars is no mask in the interpreter.
    is_ahead = (ahead < new) & (tl.full((NEW,), split, tl.int32) == last_split)
    room = tl.minimum(length + ahead, capacity - 1)
    is_key = is_ahead[None, :] & is_half[:, None]
    offsets = sequence * key_strides[0] + ahead.to(tl.int64) * key_strides[1]
    offsets += head.to(tl.int64) * key_strides[2]
    new_key = _rotated(
        key,
        offsets[None, :] + half[:, None],
        rotations,
        room[None, :] * (2 * DIM) + half[:, None],
        is_key,
        DIM,
    )
    is_value = is_ahead[:, None] & is_number[None, :]
    offsets = sequence * value_strides[0] + ahead.to(tl.int64) * value_strides[1]
    offsets += head.to(tl.int64) * value_strides[2]
    new_value = tl.load(value + offsets[:, None] + number[None, :], mask=is_value, other=0.0)

    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    if is_last:
        if tile == 0:
            key_room = own_keys + room[None, :] * cached_key_strides[2] + half[:, None]
            tl.store(key_room, new_key[0], mask=is_key)
            tl.store(key_room + DIM // 2, new_key[1], mask=is_key)
            value_room = own_values + room[:, None] * cached_value_strides[2] + number[None, :]
            tl.store(value_room, new_value, mask=is_value)
        is_visible = _is_visible(step, ahead, new, reach)
        new_scores = _scores(rows, new_key, is_visible, scale, softcap, SOFTCAPPED)
        highest, mass, mixed = add_columns(new_scores, new_value, highest, mass, mixed)
    for start in range(begin, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        cached_key, cached_value = _load_cached(
            own_keys, own_values, cached_key_strides[2], cached_value_strides[2], column, end, half, number,
            DIM,
        )  # fmt: skip
        is_visible = _is_visible(position, column, end, reach)
        scores = _scores(rows, cached_key, is_visible, scale, softcap, SOFTCAPPED)
        highest, mass, mixed = add_columns(scores, cached_value, highest, mass, mixed)

    finish_split(
        out, out_strides, partials, records, arrivals, sequence, head, tl.num_programs(1) // tiles, tile,
        tiles, new, groups, splits, split, first_split, last_split, highest, mass, mixed, DIM, WIDTH, ROWS,
        RESULTS, BUNDLE, PARTS,
    )  # fmt: skip


def _registers(tile: Tile) -> int | None:
    """The limit for a tile: few rows have the assembler choose how many programs share a multiprocessor."""
    return None if tile.rows == 16 and tile.columns == 64 else registers_of(tile)


def _half(dim: int) -> int:
    """Half a head's size, padding included."""
    return max(power_of_two(dim // 2), 16)


def rotated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotations: Tensor,
    cached_keys: Tensor,
    cached_values: Tensor,
    lengths: Tensor,
    span: int,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """`kernels.rotated_attention`."""
    batch, new, heads, dim = query.shape
    kv_heads = key.shape[2]
    groups = heads // kv_heads
    rows = groups * new
    tile = rotated_tile(rows, dim, query.element_size())
    splits = -(-span // tile.split)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _attend_rotated[(splits, kv_heads * tile.tiles, batch)](
        query, key, value, rotations, cached_keys, cached_values, lengths, out,
        *room_for_parts(query, kv_heads, splits, tile),
        *map(strides_of, (query, key, value, cached_keys, cached_values, out)), scale, softcap or 1.0, new,
        groups, tile.tiles, span, splits, min(window or span, span), cached_keys.shape[2],
        SOFTCAPPED=softcap is not None, DIM=dim, HALF=_half(dim), NEW=MOST_ROWS, **tile.constants,
        **programmatic_options(query.device),
        **launch_options(tile.warps, _registers(tile), _WAVES),
        **stage_options(query.device, tile.stages, *tile.memory(query.element_size())),
    )  # fmt: skip
    return out


def specialisations() -> Iterator[Specialisation]:
    """Every size of head and dtype, few rows and many, and soft caps for Gemma-2's heads."""
    vectors = ("query", "key", "value", "rotations", "cached_keys", "cached_values", "out")
    strides = dict.fromkeys(
        (f"{name}_strides" for name in ("query", "key", "value", "cached_key", "cached_value", "out")),
        ("i32", "i32", "i32"),
    )
    numbers = ("new", "groups", "tiles", "span", "splits", "reach", "capacity")
    variants = [
        *(("bf16", 2, dim, rows, False) for dim in HEAD_DIMS for rows in (4, 36)),
        *(("bf16", 2, 128, rows, False) for rows in (1, 6, 12, 20)),
        ("bf16", 2, 64, 20, False),
        ("fp16", 2, 128, 36, False),
        *(("fp32", 4, dim, 4, False) for dim in HEAD_DIMS),
        *(("bf16", 2, dim, rows, True) for dim in (128, 256) for rows in (2, 18)),
    ]
    for dtype, itemsize, dim, rows, is_softcapped in variants:
        tile = rotated_tile(rows, dim, itemsize)
        yield Specialisation(
            operation="rotated_attention",
            name=f"{dtype} heads of {dim}, {rows} rows{', softcapped' if is_softcapped else ''}",
            kernel=_attend_rotated,
            signature={
                **dict.fromkeys(vectors, f"*{dtype}"), "lengths": "*i64", "partials": "*fp32",
                "records": "*fp32", "arrivals": "*i32", **strides, "scale": "fp32",
                "softcap": "fp32", **dict.fromkeys(numbers, "i32"),
            },
            constants={
                "SOFTCAPPED": is_softcapped, "DIM": dim, "HALF": _half(dim), "NEW": MOST_ROWS,
                **tile.constants, "PROGRAMMATIC": False,
            },
            divisible=frozenset({*vectors, *strides, "partials", "records"}),
            num_warps=tile.warps,
            registers=_registers(tile),
            waves=_WAVES,
            num_stages=tile.stages,
            stage_bytes=tile.memory(itemsize)[0],
            kept_bytes=tile.memory(itemsize)[1],
            wide_loads=(load_vectors,),
            programmatic=True,
        )  # fmt: skip
