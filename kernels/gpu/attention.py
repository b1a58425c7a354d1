"""Ragged split-KV decoding attention in Triton, and the append of new keys and values.

The rows of all heads that share keys, `groups * new` of them, are packed into tiles of up to 64, so that a
key is read once for all of them. A program works on one tile of one sequence and on one split of its
positions, and goes where the sequence has none there. It leaves the largest score, the mass and the mixed
values of its rows, and programs that arrive last merge them in the order of the splits. Where one
split holds all that a tile sees, its program writes the result itself. Merging takes two steps, so that long
contexts do not end in one program that reads hundreds of parts: the last program of a bundle of splits to
arrive merges these, and the last of those that did merges the bundles.

How long a split is follows from the rows that share keys alone, and where the splits lie from nothing: so
neither the batch nor the span changes a bit of a sequence's result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention import HEAD_DIMS
from .specialisation import Specialisation
from .tile import (
    REGISTERS,
    arrive,
    begin_programmatic,
    launch_options,
    nearest,
    power_of_two,
    product_of_tiles,
    programmatic_options,
    scratch_kept,
    stage_options,
    wait_programmatic,
    zeros_kept,
)

__all__ = [
    "LOG2_E",
    "Tile",
    "add_columns",
    "append",
    "attention",
    "attention_tile",
    "finish_split",
    "is_seen",
    "load_vectors",
    "range_seen",
    "registers_of",
    "room_for_parts",
    "specialisations",
    "squeezed",
    "strides_of",
]

LOG2_E = tl.constexpr(1.4426950408889634)

_APPENDED_ROWS = 16
"""Vectors that a program appends."""

BUNDLE = 16
"""Splits that are merged by one program before what is left of all of them is."""

_NO_ALIBI, _ALIBI, _ROUNDED_ALIBI = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@dataclass(frozen=True)
class Tile:
    """How rows and positions are cut.

    Attributes:
        rows: of a tile, padding included; tiles: of the rows that share keys.
        columns: positions read at once; split: positions of a split.
        width: a head's size, padding included.
        results: of its rows, those that are not all padding.
        stages: of the loop over keys and values.
        at_once: numbers of parts that a program reads at once, as many as its registers hold.
    """

    rows: int
    tiles: int
    columns: int
    split: int
    width: int
    results: int
    warps: int
    stages: int
    at_once: int = 4096

    def memory(self, itemsize: int) -> tuple[int, int]:
        """Bytes of shared memory that a stage takes, and what is beside the stages."""
        return self.columns * self.width * 2 * itemsize, self.rows * self.width * itemsize

    @property
    def constants(self) -> dict[str, int]:
        """What a kernel is compiled with."""
        return {
            "WIDTH": self.width, "ROWS": self.rows, "RESULTS": self.results, "COLUMNS": self.columns,
            "SPLIT": self.split, "BUNDLE": BUNDLE,
            "PARTS": min(max(self.at_once // (self.results * self.width), 1), BUNDLE),
        }  # fmt: skip


def attention_tile(rows: int, dim: int, itemsize: int) -> Tile:
    """The tile for `rows` that share keys, heads of `dim` numbers of `itemsize` bytes.

    A split's own result is `rows * dim` float32 numbers, its keys and values 2 * split * dim of `itemsize`
    bytes. Few rows can afford short splits, with which one sequence fills the device; with many rows longer
    ones keep what is left for the merge below a quarter of what is read.
    """
    width = max(power_of_two(dim), 16)
    shared = max(power_of_two(rows), 16)
    # Tensor cores do not multiply float32, and registers hold few rows and columns then.
    padded = min(shared, 64 if itemsize == 2 else 16)
    wide = padded * width >= 8192 or (itemsize == 4 and width >= 128)
    return Tile(
        rows=padded,
        tiles=-(-rows // padded),
        columns=16 if itemsize == 4 else 64 if width <= 128 else 32,
        split=min(shared, 64) * 8,
        width=width,
        results=min(power_of_two(rows), padded),
        warps=8 if wide else 4,
        # More would leave room for fewer programs.
        stages=2,
    )


@triton.jit
def load_vectors(pointer, offsets, mask):
    """Neighbouring keys or values."""
    return tl.load(pointer + offsets, mask=mask, other=0.0)


@triton.jit
def range_seen(length, new, span, reach):
    """The first and the last of the positions that any of a sequence's rows sees."""
    last = (tl.minimum(length + new, span) - 1).to(tl.int32)
    return tl.maximum(tl.minimum(length, span - 1).to(tl.int32) - reach + 1, 0), last


@triton.jit
def is_seen(position, column, reach):
    """Whether rows at `position` see the positions `column`, [rows, columns]."""
    # As an unsigned number a distance into the future is beyond any window.
    return (position[:, None] - column[None, :]).to(tl.uint32) < reach


@triton.jit
def squeezed(scores, softcap):
    """softcap * tanh(scores / softcap)."""
    return softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2_E / softcap)) + 1.0))


@triton.jit
def _falcon_bias(slope, position):
    rounded = nearest(position.to(tl.float32), tl.bfloat16).to(tl.float32)
    return nearest(slope * rounded, tl.bfloat16).to(tl.float32)


@triton.jit
def _store_part(partials, records, index, is_row, number, highest, mass, mixed, DIM: tl.constexpr):
    """Keep what a split or a bundle of them gave each row."""
    mask = is_row[:, None] & (number < DIM)[None, :]
    tl.store(partials + index[:, None] * DIM + number[None, :], mixed, mask=mask)
    tl.store(records + 2 * index, highest, mask=is_row)
    tl.store(records + 2 * index + 1, mass, mask=is_row)


@triton.jit
def _merge_parts(
    partials,
    records,
    index,
    stride,
    is_row,
    number,
    begin,
    end,
    size,
    first_split,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    RESULTS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The parts from `begin` to before `end`, of `size` splits each, as one: largest score, mass, values.

    A part lies where its first split's results lay; one that the row does not see at all has a largest score
    of -inf. `PARTS` of them are read at once.
    """
    highest = tl.full((RESULTS,), float("-inf"), tl.float32)
    mass = tl.zeros((RESULTS,), tl.float32)
    mixed = tl.zeros((RESULTS, WIDTH), tl.float32)
    for base in range(begin, end, PARTS):
        part = base + tl.arange(0, PARTS)
        is_part = (part < end)[:, None] & is_row[None, :]
        place = index[None, :] + tl.maximum(part * size, first_split)[:, None] * stride
        part_highest = tl.load(records + 2 * place, mask=is_part, other=float("-inf"))
        part_mass = tl.load(records + 2 * place + 1, mask=is_part, other=0.0)
        part_mixed = tl.load(
            partials + place[:, :, None] * DIM + number[None, None, :],
            mask=is_part[:, :, None] & (number < DIM)[None, None, :],
            other=0.0,
        )
        seen = tl.maximum(highest, tl.max(part_highest, axis=0))
        shift = tl.where(seen == float("-inf"), 0.0, seen)
        own, other = tl.exp2(highest - shift), tl.exp2(part_highest - shift[None, :])
        mixed = mixed * own[:, None] + tl.sum(part_mixed * other[:, :, None], axis=0)
        mass = mass * own + tl.sum(part_mass * other, axis=0)
        highest = seen
    return highest, mass, mixed


@triton.jit
def add_columns(scores, value, highest, mass, mixed):
    """Add columns to a softmax under way: `scores` to the base of 2, -inf where unseen, and their values."""
    seen = tl.maximum(highest, tl.max(scores, axis=1))
    shift = tl.where(seen == float("-inf"), 0.0, seen)
    weights = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(highest - shift)
    mass = mass * fade + tl.sum(weights, axis=1)
    mixed = product_of_tiles(nearest(weights, value.dtype), value, mixed * fade[:, None])
    return seen, mass, mixed


@triton.jit
def _store_rows(out, strides, sequence, head, row, new, groups, number, mass, mixed, DIM: tl.constexpr):
    """Write the results of those of a head's rows that are no padding."""
    offsets = sequence * strides[0] + (row % new).to(tl.int64) * strides[1]
    offsets += (head * groups + row // new).to(tl.int64) * strides[2]
    places = out + offsets[:, None] + number[None, :]
    mask = (row < groups * new)[:, None] & (number < DIM)[None, :]
    tl.store(places, nearest(mixed / mass[:, None], out.dtype.element_ty), mask=mask)


@triton.jit
def finish_split(
    out,
    strides,
    partials,
    records,
    arrivals,
    sequence,
    head,
    heads,
    tile,
    tiles,
    new,
    groups,
    splits,
    split,
    first_split,
    last_split,
    highest,
    mass,
    mixed,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    RESULTS: tl.constexpr,
    BUNDLE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Write what a split gave a tile's rows to `out`, or have the last of the tile's splits merge them all.

    `head` is one of `heads` with keys. Of a tile's `ROWS` the first `RESULTS` are not all padding.
    """
    number = tl.arange(0, WIDTH)
    row = tile * ROWS + tl.arange(0, ROWS)
    stride = groups * new
    if first_split == last_split:
        _store_rows(out, strides, sequence, head, row, new, groups, number, mass, mixed, DIM)
    else:
        unit = sequence * heads + head
        # To where the rows' parts of split 0 lie.
        partials += unit * splits * stride * DIM
        records += unit * splits * stride * 2
        result = tile * ROWS + tl.arange(0, RESULTS)
        is_result = result < stride
        bundles = (splits + BUNDLE - 1) // BUNDLE
        counters = arrivals + (unit * tiles + tile) * (bundles + 1)
        bundle = split // BUNDLE
        first_bundle, last_bundle = first_split // BUNDLE, last_split // BUNDLE
        begin = tl.maximum(bundle * BUNDLE, first_split)
        end = tl.minimum(bundle * BUNDLE + BUNDLE, last_split + 1)
        _store_part(partials, records, row + split * stride, row < stride, number, highest, mass, mixed, DIM)
        if arrive(counters, bundle, end - begin):
            most, sum_of, all_mixed = _merge_parts(
                partials, records, result, stride, is_result, number, begin, end, 1, first_split, DIM,
                WIDTH, RESULTS, PARTS,
            )  # fmt: skip
            if first_bundle == last_bundle:
                _store_rows(out, strides, sequence, head, result, new, groups, number, sum_of, all_mixed, DIM)
            else:
                # All of the bundle has been read: its first part becomes its whole.
                tl.debug_barrier()
                _store_part(
                    partials, records, result + begin * stride, is_result, number, most, sum_of,
                    all_mixed, DIM,
                )  # fmt: skip
                if arrive(counters, bundles, last_bundle - first_bundle + 1):
                    most, sum_of, all_mixed = _merge_parts(
                        partials, records, result, stride, is_result, number, first_bundle,
                        last_bundle + 1, BUNDLE, first_split, DIM, WIDTH, RESULTS, PARTS,
                    )  # fmt: skip
                    _store_rows(
                        out, strides, sequence, head, result, new, groups, number, sum_of, all_mixed, DIM
                    )


@triton.jit(do_not_specialize=["new", "groups", "tiles", "span", "splits", "reach"])
def _attend(
    query,
    keys,
    values,
    lengths,
    slopes,
    out,
    partials,
    records,
    arrivals,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    scale,
    softcap,
    new,
    groups,
    tiles,
    span,
    splits,
    reach,
    SOFTCAPPED: tl.constexpr,
    ALIBI: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    RESULTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    BUNDLE: tl.constexpr,
    PARTS: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    begin_programmatic(PROGRAMMATIC)
    wait_programmatic(PROGRAMMATIC)
    split = tl.program_id(0)
    head = tl.program_id(1) // tiles
    tile = tl.program_id(1) % tiles
    sequence = tl.program_id(2).to(tl.int64)
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
    position = tl.minimum(length + step, span - 1).to(tl.int32)
    number = tl.arange(0, WIDTH)
    is_number = number < DIM
    is_inside = is_row[:, None] & is_number[None, :]
    offsets = sequence * query_strides[0] + step.to(tl.int64) * query_strides[1]
    offsets += query_head.to(tl.int64) * query_strides[2]
    rows = tl.load(query + offsets[:, None] + number[None, :], mask=is_inside, other=0.0)
    if ALIBI != _NO_ALIBI:
        slope = tl.load(slopes + query_head, mask=is_row, other=0.0).to(tl.float32)[:, None]

    key_offset = sequence * key_strides[0] + head.to(tl.int64) * key_strides[1]
    value_offset = sequence * value_strides[0] + head.to(tl.int64) * value_strides[1]
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    begin = tl.maximum(split * SPLIT, first // COLUMNS * COLUMNS)
    for start in range(begin, tl.minimum(split * SPLIT + SPLIT, last + 1), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        is_column = column <= last
        place = column.to(tl.int64)
        key = load_vectors(
            keys,
            key_offset + place[None, :] * key_strides[2] + number[:, None],
            is_column[None, :] & is_number[:, None],
        )
        scores = product_of_tiles(rows, key, tl.zeros((ROWS, COLUMNS), tl.float32))
        if ALIBI == _ALIBI:
            scores += slope * (column[None, :] - position[:, None]).to(tl.float32)
        if ALIBI == _ROUNDED_ALIBI:
            # Less that of the row's own position, which changes no weight and keeps the numbers small.
            scores += _falcon_bias(slope, column[None, :]) - _falcon_bias(slope, position[:, None])
        scores *= scale
        if SOFTCAPPED:
            scores = squeezed(scores, softcap)
        scores = tl.where(is_seen(position, column, reach), scores * LOG2_E, float("-inf"))
        value = load_vectors(
            values,
            value_offset + place[:, None] * value_strides[2] + number[None, :],
            is_column[:, None] & is_number[None, :],
        )
        highest, mass, mixed = add_columns(scores, value, highest, mass, mixed)

    finish_split(
        out, out_strides, partials, records, arrivals, sequence, head, tl.num_programs(1) // tiles, tile,
        tiles, new, groups, splits, split, first_split, last_split, highest, mass, mixed, DIM, WIDTH, ROWS,
        RESULTS, BUNDLE, PARTS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["new", "heads", "capacity"])
def _append(
    keys,
    values,
    cached_keys,
    cached_values,
    lengths,
    key_strides,
    value_strides,
    cached_key_strides,
    cached_value_strides,
    new,
    heads,
    capacity,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    vector = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    number = tl.arange(0, WIDTH)[None, :]
    mask = (vector < new * heads)[:, None] & (number < DIM)
    step = (vector // heads).to(tl.int64)[:, None]
    head = (vector % heads).to(tl.int64)[:, None]
    position = tl.minimum(tl.load(lengths + sequence) + step, capacity - 1)
    key = load_vectors(
        keys, sequence * key_strides[0] + step * key_strides[1] + head * key_strides[2] + number, mask
    )
    value = load_vectors(
        values, sequence * value_strides[0] + step * value_strides[1] + head * value_strides[2] + number, mask
    )
    place = sequence * cached_key_strides[0] + head * cached_key_strides[1] + position * cached_key_strides[2]
    tl.store(cached_keys + place + number, key, mask=mask)
    place = sequence * cached_value_strides[0] + head * cached_value_strides[1]
    tl.store(cached_values + place + position * cached_value_strides[2] + number, value, mask=mask)


def registers_of(tile: Tile) -> int:
    """The limit for a tile: left to itself the assembler spills a few at fewer than a thread can have."""
    return REGISTERS if tile.columns == 16 and tile.width == 128 else 255


def strides_of(tensor: Tensor) -> tuple[int, int, int]:
    """The strides of all dimensions but the last of four, in which `tensor` has to be contiguous."""
    if tensor.stride(3) != 1:
        raise ValueError("query, keys, values and out must be contiguous in their last dimension")
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


def room_for_parts(query: Tensor, kv_heads: int, splits: int, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    """The `partials`, `records` and `arrivals` of a launch for a query [batch, q, heads, dim]."""
    batch, new, heads, dim = query.shape
    results = batch * heads * new * splits if splits > 1 else 0
    scratch = scratch_kept("attention", query.device, results * (dim + 2))
    counters = batch * kv_heads * tile.tiles * (-(-splits // BUNDLE) + 1)
    return scratch, scratch[results * dim :], zeros_kept("arrivals", query.device, counters)


def append(keys: Tensor, values: Tensor, cached_keys: Tensor, cached_values: Tensor, lengths: Tensor) -> None:
    """`kernels.append`."""
    batch, new, heads, dim = keys.shape
    _append[(batch, -(-new * heads // _APPENDED_ROWS))](
        keys, values, cached_keys, cached_values, lengths,
        *map(strides_of, (keys, values, cached_keys, cached_values)), new, heads, cached_keys.shape[2],
        DIM=dim, WIDTH=power_of_two(dim), ROWS=_APPENDED_ROWS, num_warps=4,
    )  # fmt: skip


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """`kernels.attention`."""
    batch, new, heads, dim = query.shape
    kv_heads, span = keys.shape[1:3]
    groups = heads // kv_heads
    rows = groups * new
    tile = attention_tile(rows, dim, query.element_size())
    splits = -(-span // tile.split)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
    parts = room_for_parts(query, kv_heads, splits, tile)
    alibi, slopes = _NO_ALIBI, lengths
    if alibi_slopes is not None:
        slopes = alibi_slopes.contiguous()
        alibi = _ROUNDED_ALIBI if alibi_slopes.dtype == torch.bfloat16 else _ALIBI
    _attend[(splits, kv_heads * tile.tiles, batch)](
        query, keys, values, lengths, slopes, out, *parts,
        *map(strides_of, (query, keys, values, out)), scale, softcap or 1.0, new, groups, tile.tiles, span,
        splits, min(window or span, span), SOFTCAPPED=softcap is not None, ALIBI=alibi.value, DIM=dim,
        **tile.constants, **programmatic_options(query.device),
        **launch_options(tile.warps, registers_of(tile)),
        **stage_options(query.device, tile.stages, *tile.memory(query.element_size())),
    )  # fmt: skip
    return out


def specialisations() -> Iterator[Specialisation]:
    """Every size of head and dtype, few rows and many, and each option once."""
    types = {"bf16": 2, "fp16": 2, "fp32": 4}
    variants: list[tuple[str, int, int, dict[str, Any]]] = [
        *(("bf16", dim, rows, {}) for dim in HEAD_DIMS for rows in (4, 36)),
        ("bf16", 128, 20, {}),
        ("fp16", 128, 36, {}),
        *(("fp32", dim, 4, {}) for dim in HEAD_DIMS),
        ("bf16", 256, 18, {"SOFTCAPPED": True}),
        *(("bf16", 64, 16, {"ALIBI": kind}) for kind in (1, 2)),
    ]
    strides = dict.fromkeys(
        ("query_strides", "key_strides", "value_strides", "out_strides"), ("i32", "i32", "i32")
    )
    vectors = ("query", "keys", "values", "out")
    for dtype, dim, rows, options in variants:
        tile = attention_tile(rows, dim, types[dtype])
        slopes = {0: "*i64", 1: "*fp32", 2: "*bf16"}[options.get("ALIBI", 0)]
        named = "".join(
            f" {name.lower()}" + (" rounded" if value == 2 else "") for name, value in options.items()
        )
        yield Specialisation(
            operation="attention",
            name=f"{dtype} heads of {dim}, {rows} rows{named}",
            kernel=_attend,
            signature={
                **dict.fromkeys(vectors, f"*{dtype}"), "lengths": "*i64", "slopes": slopes,
                "partials": "*fp32", "records": "*fp32", "arrivals": "*i32", **strides,
                "scale": "fp32", "softcap": "fp32",
                **dict.fromkeys(("new", "groups", "tiles", "span", "splits", "reach"), "i32"),
            },
            constants={
                "SOFTCAPPED": False, "ALIBI": 0, "DIM": dim, **tile.constants, "PROGRAMMATIC": False,
                **options,
            },
            divisible=frozenset({*vectors, *strides, "partials", "records"}),
            num_warps=tile.warps,
            registers=registers_of(tile),
            num_stages=tile.stages,
            stage_bytes=tile.memory(types[dtype])[0],
            kept_bytes=tile.memory(types[dtype])[1],
            wide_loads=(load_vectors,),
            programmatic=True,
        )  # fmt: skip
    vectors = ("keys", "values", "cached_keys", "cached_values")
    strides = dict.fromkeys([f"{name.removesuffix('s')}_strides" for name in vectors], ("i32",) * 3)
    for dtype, dim in (("bf16", 128), ("bf16", 80), ("fp16", 128), ("fp32", 128)):
        yield Specialisation(
            operation="append",
            name=f"{dtype} heads of {dim}",
            kernel=_append,
            signature={
                **dict.fromkeys(vectors, f"*{dtype}"), "lengths": "*i64", **strides,
                **dict.fromkeys(("new", "heads", "capacity"), "i32"),
            },
            constants={"DIM": dim, "WIDTH": power_of_two(dim), "ROWS": _APPENDED_ROWS},
            divisible=frozenset({*vectors, *strides}),
            wide_loads=(load_vectors,),
        )  # fmt: skip
