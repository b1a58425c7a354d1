"""Parts of a decoder layer over few rows, in Triton: products with what surrounds them.

A step of one sequence reads each weight once, and its products are over before a device has started as many
programs as it can hold. So there are few launches, and they overlap: on a device that knows programmatic
dependent launch (from sm_90 on) a program may start while the launch before it still runs.

* `_slab` takes one row, or a few of float32. A program holds whole rows of a weight in registers, all of
  which it asks for before it waits.
* `_tile` takes up to 16 rows, of 16 bits, with tensor cores. Where a weight has too few rows to fill a
  device, programs share its columns, and the last of them to arrive adds their sums, in the order of the
  splits. More rows are cuBLAS's.
* `_norm` comes before products of more than one row, and after those that are normalised before they are
  added; `_gate` comes after those of weights with few rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layers import Gate, RMSNorm
from ..quantised import QuantisedWeight, Weight, product
from .specialisation import Specialisation
from .tile import (
    arrive,
    begin_programmatic,
    is_nvidia,
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

__all__ = ["normalised", "projections", "specialisations", "takes"]

_MOST_ROWS = 16
"""Of `_tile`."""
_SMALL = 2**22
"""Float32 numbers of weights whose products are over sooner than they are launched: more are cuBLAS's."""
_SLAB = 32_768
"""Bytes of weights that a program of `_slab` holds."""
_BYTES = 16_384
"""The same where weights have eight bits, which take more registers to write out."""
_TILE = 64
"""Rows of a weight that a program of `_tile` multiplies: the fewest of Hopper's tensor cores."""
_FULL = 128
"""Tiles that fill a device without being split."""
_COLUMNS = 1024
"""Numbers that a program of `_gate` makes."""


@triton.jit
def load_weights(pointer, offsets, mask):
    """Neighbouring weights, which are used once."""
    return tl.load(pointer + offsets, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _real(numbers, NVIDIA: tl.constexpr):
    """Weights in float32; of eight bits, on NVIDIA's, by way of floats from 2^23 on, whose last bits count.

    A step of Llama-3.2-1B takes 0.60 ms on an H200 so, 0.63 by their own conversion of integers.
    """
    if NVIDIA and numbers.dtype == tl.int8:
        return tl.inline_asm_elementwise(
            """{
                .reg .b32 bytes;
                xor.b32 bytes, $4, 0x80808080;
                prmt.b32 $0, bytes, 0x4B000000, 0x7650;
                prmt.b32 $1, bytes, 0x4B000000, 0x7651;
                prmt.b32 $2, bytes, 0x4B000000, 0x7652;
                prmt.b32 $3, bytes, 0x4B000000, 0x7653;
                add.f32 $0, $0, 0fCB000080;
                add.f32 $1, $1, 0fCB000080;
                add.f32 $2, $2, 0fCB000080;
                add.f32 $3, $3, 0fCB000080;
            }""",
            "=f,=f,=f,=f,r",
            [numbers],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    return numbers.to(tl.float32)


@triton.jit
def _activated(numbers, GELU: tl.constexpr):
    """The SiLU of numbers, or their GELU as made of a hyperbolic tangent."""
    rise = numbers
    if GELU:
        # x (1 + tanh(y)) / 2 = x / (1 + exp(-2 y)) with y = sqrt(2 / pi) (x + 0.044715 x^3).
        rise = numbers * (1.5957691216057308 + 0.07135481282052803 * numbers * numbers)
    return numbers / (1.0 + tl.exp(-rise))


@triton.jit
def _chosen(tile, weights, scales, biases, sizes, tiles, columns):
    """The weight that a tile is of with its scales and bias, its rows, its first column in the output, and
    the tile's place.
    """
    weight, scale, bias, size = weights[0], scales[0], biases[0], sizes[0] + tile * 0
    column, place = columns[0] + tile * 0, tile
    for part in tl.static_range(1, len(sizes)):
        if tile >= tiles[part]:
            weight = weights[part]
            scale = scales[part]
            bias = biases[part]
            size = sizes[part] + tile * 0
            column = columns[part] + tile * 0
            place = tile - tiles[part]
    return weight, scale, bias, size, column, place


@triton.jit(do_not_specialize=["rows", "width"])
def _slab(
    inputs,
    norm,
    weights,
    scales,
    biases,
    residual,
    out,
    sizes,
    tiles,
    columns,
    rows,
    width,
    eps,
    offset,
    factor,
    INSIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    SLAB: tl.constexpr,
    SINGLE: tl.constexpr,
    NORMED: tl.constexpr,
    BIASED: tl.constexpr,
    ADDED: tl.constexpr,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    NVIDIA: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    QUANTISED: tl.constexpr = weights[0].dtype.element_ty == tl.int8
    begin_programmatic(PROGRAMMATIC)
    weight, scale, bias, size, column, place = _chosen(
        tl.program_id(0), weights, scales, biases, sizes, tiles, columns
    )
    row = place * SLAB + tl.arange(0, SLAB)
    number = tl.arange(0, DEPTH)
    is_row, is_number = row < size, number < INSIDE
    offsets = row.to(tl.int64)[:, None] * INSIDE + number[None, :]
    inside = is_row[:, None] & is_number[None, :]
    slab = load_weights(weight, offsets, inside)
    if GATED:
        second = load_weights(weights[1], offsets, inside)
    if QUANTISED:
        unit = tl.load(scale + row, mask=is_row, other=0.0)
        if GATED:
            second_unit = tl.load(scales[1] + row, mask=is_row, other=0.0)
    if BIASED:
        shift = tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)
    if NORMED:
        gain = tl.load(norm + number, mask=is_number, other=0.0).to(tl.float32) + offset
    wait_programmatic(PROGRAMMATIC)
    # Of 8 and 16 bits a loop over rows would have the slab held in float32.
    for step in range(1 if SINGLE else rows):
        index = tl.program_id(1) + step
        vector = tl.load(inputs + index * INSIDE + number, mask=is_number, other=0.0).to(tl.float32)
        if NORMED:
            size_of = tl.rsqrt(tl.sum(vector * vector, axis=0) / INSIDE + eps)
            vector = nearest(vector * size_of * gain, out.dtype.element_ty).to(tl.float32)
        total = tl.sum(_real(slab, NVIDIA) * vector[None, :], axis=1)
        if QUANTISED:
            total *= unit
        if BIASED:
            total += shift
        if GATED:
            # As two products of the models' dtype would be.
            total = nearest(total, out.dtype.element_ty).to(tl.float32)
            other = tl.sum(_real(second, NVIDIA) * vector[None, :], axis=1)
            if QUANTISED:
                other *= second_unit
            total = _activated(total, GELU) * nearest(other, out.dtype.element_ty).to(tl.float32)
        places = index * width + column + row
        if ADDED:
            total = total * factor + tl.load(residual + places, mask=is_row, other=0.0).to(tl.float32)
        tl.store(out + places, nearest(total, out.dtype.element_ty), mask=is_row)


@triton.jit(do_not_specialize=["rows", "width"])
def _tile(
    inputs,
    weights,
    biases,
    residual,
    out,
    partials,
    arrivals,
    sizes,
    tiles,
    columns,
    rows,
    width,
    factor,
    INSIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
    SLAB: tl.constexpr,
    ROWS: tl.constexpr,
    BIASED: tl.constexpr,
    ADDED: tl.constexpr,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    begin_programmatic(PROGRAMMATIC)
    tile, split = tl.program_id(0), tl.program_id(1)
    weight, _, bias, size, column, place = _chosen(tile, weights, weights, biases, sizes, tiles, columns)
    row = place * SLAB + tl.arange(0, SLAB)
    step = tl.arange(0, ROWS)
    number = tl.arange(0, DEPTH)
    is_row, is_step = row < size, step < rows
    tl.static_assert(SPLITS == 1 or not GATED)
    SPAN: tl.constexpr = (INSIDE + SPLITS * DEPTH - 1) // (SPLITS * DEPTH) * DEPTH
    wait_programmatic(PROGRAMMATIC)
    total = tl.zeros((SLAB, ROWS), tl.float32)
    second = tl.zeros((SLAB, ROWS), tl.float32)
    for begin in range(split * SPAN, tl.minimum(split * SPAN + SPAN, INSIDE), DEPTH):
        at = begin + number
        is_number = at < INSIDE
        offsets = row.to(tl.int64)[:, None] * INSIDE + at[None, :]
        inside = is_row[:, None] & is_number[None, :]
        vectors = tl.load(
            inputs + step[None, :] * INSIDE + at[:, None],
            mask=is_step[None, :] & is_number[:, None],
            other=0.0,
        )
        total = product_of_tiles(load_weights(weight, offsets, inside), vectors, total)
        if GATED:
            second = product_of_tiles(load_weights(weights[1], offsets, inside), vectors, second)
    if SPLITS > 1:
        own = tl.arange(0, SLAB)[:, None] + tl.arange(0, ROWS)[None, :] * SLAB
        parts = partials + tile * (SPLITS * SLAB * ROWS) + own
        tl.store(parts + split * (SLAB * ROWS), total)
        if arrive(arrivals, tile, SPLITS):
            total = tl.zeros((SLAB, ROWS), tl.float32)
            for part in tl.static_range(SPLITS):
                total += tl.load(parts + part * (SLAB * ROWS))
            _finish(
                total, bias, residual, out, row, step, column, width, factor, is_row, is_step, BIASED, ADDED
            )
    else:
        if GATED:
            # As two products of the models' dtype would be.
            total = nearest(total, out.dtype.element_ty).to(tl.float32)
            total = _activated(total, GELU) * nearest(second, out.dtype.element_ty).to(tl.float32)
        _finish(total, bias, residual, out, row, step, column, width, factor, is_row, is_step, BIASED, ADDED)


@triton.jit
def _finish(
    total,
    bias,
    residual,
    out,
    row,
    step,
    column,
    width,
    factor,
    is_row,
    is_step,
    BIASED: tl.constexpr,
    ADDED: tl.constexpr,
):
    """Write a tile's products with what comes after them."""
    if BIASED:
        total += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
    places = step[None, :] * width + column + row[:, None]
    inside = is_row[:, None] & is_step[None, :]
    if ADDED:
        total = total * factor + tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + places, nearest(total, out.dtype.element_ty), mask=inside)


@triton.jit
def _norm(
    inputs,
    weight,
    residual,
    out,
    stride,
    eps,
    offset,
    INSIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    ADDED: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Of one part of one row, of which all parts lie together."""
    begin_programmatic(PROGRAMMATIC)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    number = tl.arange(0, DEPTH)
    inside = number < INSIDE
    scale = tl.load(weight + number, mask=inside, other=0.0).to(tl.float32) + offset
    places = (row * tl.num_programs(1) + part) * INSIDE + number
    wait_programmatic(PROGRAMMATIC)
    vector = tl.load(inputs + row * stride + part * INSIDE + number, mask=inside, other=0.0).to(tl.float32)
    size = tl.rsqrt(tl.sum(vector * vector, axis=0) / INSIDE + eps)
    total = nearest(vector * size * scale, out.dtype.element_ty)
    if ADDED:
        added = total.to(tl.float32) + tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
        total = nearest(added, out.dtype.element_ty)
    tl.store(out + places, total, mask=inside)


@triton.jit(do_not_specialize=["size"])
def _gate(
    first, second, out, stride, size, COLUMNS: tl.constexpr, GELU: tl.constexpr, PROGRAMMATIC: tl.constexpr
):
    begin_programmatic(PROGRAMMATIC)
    row = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = number < size
    wait_programmatic(PROGRAMMATIC)
    gate = tl.load(first + row * stride + number, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(second + row * stride + number, mask=inside, other=0.0).to(tl.float32)
    gated = nearest(_activated(gate, GELU) * other, out.dtype.element_ty)
    tl.store(out + row * size + number, gated, mask=inside)


def takes(inputs: Tensor, weights: Sequence[Weight]) -> bool:
    """Whether `projections` can take these."""
    return inputs.shape[0] > 0 and all(
        isinstance(weight, QuantisedWeight) or (weight.dtype == inputs.dtype and weight.is_contiguous())
        for weight in weights
    )


def projections(
    inputs: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    norm: RMSNorm | None,
    residual: Tensor | None,
    factor: float,
    gate: Gate | None,
) -> list[Tensor]:
    """`kernels.projections`."""
    rows, inside = inputs.shape
    inputs = inputs.contiguous()
    itemsize = _stored(weights)[0].element_size()
    is_small = itemsize == 4 and rows <= _MOST_ROWS and _numbers(weights) <= _SMALL
    # Registers hold no longer row.
    if (rows == 1 or is_small or itemsize == 1) and power_of_two(inside) <= _most(itemsize, gate is not None):
        return _whole(inputs, weights, biases, norm, residual, factor, gate)
    if norm is not None:
        inputs = normalised(inputs, norm, None)
    if rows <= _MOST_ROWS and itemsize == 2:
        fused = gate is not None and -(-weights[0].shape[0] // _TILE) >= _FULL
        parts = _tiled(inputs, _stored(weights), biases, residual, factor, gate if fused else None)
        if fused:
            return parts
    else:
        parts = [product(inputs, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        if residual is not None:
            parts = [torch.add(residual, parts[0], alpha=factor)]
    return parts if gate is None else [_gated(parts[0], parts[1], gate)]


def _numbers(weights: Sequence[Weight]) -> int:
    return sum(weight.shape.numel() for weight in weights)


def _stored(weights: Sequence[Weight]) -> tuple[Tensor, ...]:
    """What products read of weights."""
    return tuple(weight.numbers if isinstance(weight, QuantisedWeight) else weight for weight in weights)


def _scales(weights: Sequence[Weight]) -> tuple[Tensor, ...]:
    """Their scales, or anything where there are none."""
    return tuple(weight.scales if isinstance(weight, QuantisedWeight) else weight for weight in weights)


def _places(weights: Sequence[Weight], slab: int) -> tuple[list[tuple[int, ...]], int]:
    """Of each weight its rows, its first tile of `slab` rows, and its first column; the tiles of all."""
    sizes = [weight.shape[0] for weight in weights]
    counts = [-(-size // slab) for size in sizes]
    firsts, columns = (tuple(sum(part[:index]) for index in range(len(part))) for part in (counts, sizes))
    return [tuple(sizes), firsts, columns], sum(counts)


def _present(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Biases, or anything where there are none."""
    return tuple(weight if bias is None else bias for weight, bias in zip(weights, biases, strict=True))


def _whole(
    inputs: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    norm: RMSNorm | None,
    residual: Tensor | None,
    factor: float,
    gate: Gate | None,
) -> list[Tensor]:
    rows, inside = inputs.shape
    gated = gate is not None
    depth = power_of_two(inside)
    stored = _stored(weights)
    itemsize = stored[0].element_size()
    held = _held(itemsize, gated)
    slab = max(held // depth, 1)
    used = weights[:1] if gated else weights
    numbers, tiles = _places(used, slab)
    width = sum(weight.shape[0] for weight in used)
    out = torch.empty(rows, width, dtype=inputs.dtype, device=inputs.device)
    # Of float32 a program takes all rows, of eight bits one.
    _slab[(tiles, rows if itemsize == 1 else 1)](
        inputs, inputs if norm is None else norm.weight, stored, _scales(weights), _present(stored, biases),
        inputs if residual is None else residual.contiguous(), out, *numbers, rows, width,
        0.0 if norm is None else norm.eps, 0.0 if norm is None else norm.offset, factor, INSIDE=inside,
        DEPTH=depth, SLAB=slab, SINGLE=rows == 1 or itemsize == 1, NORMED=norm is not None,
        ADDED=residual is not None, BIASED=biases[0] is not None, GATED=gated, GELU=_is_gelu(gate),
        NVIDIA=is_nvidia(), **programmatic_options(inputs.device), **launch_options(_warps(depth, held)),
    )  # fmt: skip
    return list(out.split([weight.shape[0] for weight in used], dim=1))


def _tiled(
    inputs: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    residual: Tensor | None,
    factor: float,
    gate: Gate | None,
) -> list[Tensor]:
    rows, inside = inputs.shape
    gated = gate is not None
    used = weights[:1] if gated else weights
    numbers, tiles = _places(used, _TILE)
    sizes = [weight.shape[0] for weight in used]
    out = torch.empty(rows, sum(sizes), dtype=inputs.dtype, device=inputs.device)
    depth, splits, stages = _division(tiles)
    held = tiles * splits * _TILE * _MOST_ROWS if splits > 1 else 0
    _tile[(tiles, splits)](
        inputs, tuple(weights), _present(weights, biases),
        inputs if residual is None else residual.contiguous(), out,
        scratch_kept("products", inputs.device, held), zeros_kept("arrivals", inputs.device, tiles), *numbers,
        rows, sum(sizes), factor, INSIDE=inside, DEPTH=depth, SPLITS=splits, SLAB=_TILE, ROWS=_MOST_ROWS,
        ADDED=residual is not None, BIASED=biases[0] is not None, GATED=gated, GELU=_is_gelu(gate),
        **programmatic_options(inputs.device), **launch_options(4),
        **stage_options(inputs.device, stages, _stage_bytes(depth, gated)),
    )  # fmt: skip
    return list(out.split(sizes, dim=1))


def normalised(inputs: Tensor, norm: RMSNorm, residual: Tensor | None) -> Tensor:
    """`kernels.normalised`."""
    rows, inside = inputs.shape[0], inputs.shape[-1]
    parts = inputs.shape[1] if inputs.ndim == 3 else 1
    out = torch.empty(inputs.shape, dtype=inputs.dtype, device=inputs.device)
    _norm[(rows, parts)](
        inputs, norm.weight, inputs if residual is None else residual, out, inputs.stride(0), norm.eps,
        norm.offset, INSIDE=inside, DEPTH=power_of_two(inside), ADDED=residual is not None,
        **programmatic_options(inputs.device), **launch_options(8),
    )  # fmt: skip
    return out


def _gated(first: Tensor, second: Tensor, gate: Gate) -> Tensor:
    rows, size = first.shape
    out = torch.empty(rows, size, dtype=first.dtype, device=first.device)
    _gate[(rows, -(-size // _COLUMNS))](
        first, second, out, first.stride(0), size, COLUMNS=_COLUMNS, GELU=_is_gelu(gate),
        **programmatic_options(first.device), **launch_options(4),
    )  # fmt: skip
    return out


def _is_gelu(gate: Gate | None) -> bool:
    return gate == "gelu_pytorch_tanh"


def _held(itemsize: int, gated: bool) -> int:
    """Numbers that a program of `_slab` holds of a weight."""
    return (_SLAB // itemsize if itemsize > 1 else _BYTES) // (2 if gated else 1)


def _most(itemsize: int, gated: bool) -> int:
    """The longest row that a program of `_slab` holds: of eight bits one as long as two.

    What is longer is written out in the inputs' dtype, or has tiles if it is of 16 bits.
    """
    return _held(itemsize, gated) * (2 if itemsize == 1 else 1)


def _warps(depth: int, held: int) -> int:
    return 4 if depth <= held else 8


def _stage_bytes(depth: int, gated: bool) -> int:
    """Shared memory that a stage of `_tile` takes."""
    return 2 * depth * (_TILE * (2 if gated else 1) + _MOST_ROWS)


def _division(tiles: int) -> tuple[int, int, int]:
    """Columns read at once, programs that share a tile, and stages of the loop; timed on an H200."""
    if tiles >= _FULL:
        return 128, 1, 4
    if tiles > 64:
        return 64, 2, 6
    return (256, 2, 3) if tiles == 64 else (128, 4, 4)


def specialisations() -> Iterator[Specialisation]:
    """Products of layers like those of Llama-3.2-1B and Llama-3.1-8B, and of other dtypes."""
    cases: list[tuple[str, int, tuple[str, ...]]] = [
        ("three normed", 2048, ("NORMED",)), ("three normed, biased", 1536, ("NORMED", "BIASED")),
        ("added", 2048, ("ADDED",)), ("added", 8192, ("ADDED",)), ("added", 14_336, ("ADDED",)),
        ("gated", 2048, ("NORMED", "GATED")), ("gated", 4096, ("NORMED", "GATED")),
        ("gated by gelu", 2304, ("NORMED", "GATED", "GELU")), ("added", 18_944, ("ADDED",)),
    ]  # fmt: skip
    for dtype, stored, itemsize in (
        ("bf16", "bf16", 2), ("bf16", "i8", 1), ("fp16", "fp16", 2), ("fp32", "fp32", 4),
    ):  # fmt: skip
        for case, inside, flags in cases if dtype == "bf16" else cases[:1]:
            used = 3 if "three" in case else 1
            gated = "GATED" in flags
            signature: dict[str, Any] = {
                **dict.fromkeys(("inputs", "norm", "residual", "out"), f"*{dtype}"),
                "weights": (f"*{stored}",) * (2 if gated else used),
                "scales": ("*fp32" if stored == "i8" else f"*{dtype}",) * (2 if gated else used),
                "biases": (f"*{dtype}",) * (2 if gated else used),
                **dict.fromkeys(("sizes", "tiles", "columns"), ("i32",) * used),
                "partials": "*fp32", "arrivals": "*i32", "width": "i32", "rows": "i32",
                **dict.fromkeys(("eps", "offset", "factor"), "fp32"),
            }  # fmt: skip
            depth, held = power_of_two(inside), _held(itemsize, gated)
            own = {name: name in flags for name in ("BIASED", "ADDED", "GELU")} | {"INSIDE": inside}
            slab = {
                "DEPTH": depth,
                "SLAB": max(held // depth, 1),
                "GATED": gated,
                "SINGLE": itemsize < 4,
            }
            kernels: list[tuple[Any, str, dict[str, Any], int]] = []
            if depth <= _most(itemsize, gated):
                kernels.append((_slab, "", {**own, **slab, "NORMED": "NORMED" in flags}, 3))
            if itemsize == 2:
                # As for weights of many rows, and once of few.
                for tiles in (128, 96, 64, 32) if case == "added" and inside == 2048 else (128,):
                    columns, splits, stages = _division(tiles)
                    tile = {
                        "DEPTH": columns, "SPLITS": splits, "SLAB": _TILE, "ROWS": _MOST_ROWS, "GATED": gated,
                    }  # fmt: skip
                    kernels.append((_tile, f" of {tiles} tiles", {**own, **tile}, stages))
            for kernel, tiles_named, constants, stages in kernels:
                constants = constants | {"PROGRAMMATIC": False}
                if kernel is _slab:
                    constants["NVIDIA"] = False
                present = {
                    name: kind
                    for name, kind in signature.items()
                    if name in kernel.arg_names and name not in constants
                }
                yield Specialisation(
                    operation="layers",
                    name=f"{kernel.__name__[1:]} {case} {inside}{tiles_named} {stored}",
                    kernel=kernel,
                    signature=present,
                    constants=constants,
                    divisible=frozenset({*present} - {"eps", "offset", "factor", "rows", "width", "tiles"}),
                    num_warps=_warps(depth, held) if kernel is _slab else 4,
                    num_stages=stages,
                    stage_bytes=_stage_bytes(constants["DEPTH"], gated) if kernel is _tile else 0,
                    # Loads of a pipelined loop have another line to some compilers.
                    wide_loads=(load_weights,) if kernel is _slab else (),
                    programmatic=True,
                )
    whole = {"INSIDE": 4096, "DEPTH": 4096}
    for dtype in ("bf16", "fp32"):
        for kernel, case, named, constants in (
            (_norm, "", ("inputs", "weight", "residual", "out"), whole | {"ADDED": False}),
            (_norm, " added", ("inputs", "weight", "residual", "out"), whole | {"ADDED": True}),
            (_gate, "", ("first", "second", "out"), {"COLUMNS": _COLUMNS, "GELU": False}),
            (_gate, " by gelu", ("first", "second", "out"), {"COLUMNS": _COLUMNS, "GELU": True}),
        ):
            numbers = {"eps": "fp32", "offset": "fp32", "stride": "i32", "size": "i32"}
            yield Specialisation(
                operation="layers",
                name=f"{kernel.__name__[1:]}{case} {dtype}",
                kernel=kernel,
                signature={
                    **dict.fromkeys(named, f"*{dtype}"),
                    **{name: kind for name, kind in numbers.items() if name in kernel.arg_names},
                },
                constants={**constants, "PROGRAMMATIC": False},
                divisible=frozenset(named),
                num_warps=8 if kernel is _norm else 4,
                programmatic=True,
            )
