"""What the Triton kernels share: how sequences and the vocabulary become tiles, and a tile's logits and law.

A program works on a tile of `sequences` x `columns`: one row (the same in all of them) of a few sequences,
and one split of the vocabulary. Vocabularies of up to 4,096 ids have one split and several sequences a
program; larger ones have a sequence a program, so that a single one fills the device. Neither depends on the
batch, so neither do a sequence's sums: its result is the same whoever shares the batch.

Rows are described by records of `RECORD` float32 numbers, in this order: the largest scaled logit, the
logarithm of the sum of the exponentials less that, and the cut: the smallest scaled logit that is kept, and
the smallest id kept among those equal to it; then the id of the largest logit. Ids are exact in float32. A
record of the conservative filter's set has as its sixth number what the delta of a token inside it is
shifted by.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda
from triton.runtime import driver

__all__ = [
    "INTERPRETED",
    "LARGEST_FLOAT",
    "LARGEST_SPLIT",
    "MORE_REGISTERS",
    "NO_ID",
    "RECORD",
    "REGISTERS",
    "Models",
    "Shape",
    "apart",
    "arrive",
    "begin_programmatic",
    "best_split",
    "boundary",
    "cut_law",
    "divided",
    "gather_logits",
    "is_nvidia",
    "launch_options",
    "load_logits",
    "load_record",
    "mix",
    "mix_both",
    "mix_laws",
    "mix_target",
    "nearest",
    "pack",
    "power_of_two",
    "product_of_tiles",
    "programmatic_options",
    "scratch_kept",
    "stage_options",
    "stages_within",
    "store_record",
    "tile_shape",
    "wait_programmatic",
    "zeros_kept",
]  # fmt: skip

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on a CPU; as Triton itself reads it."""

LARGEST_SPLIT = 4096
"""Ids of a split, and of the largest vocabulary that has one."""
REGISTERS, MORE_REGISTERS = 128, 200
"""What a thread may have, where NVIDIA's assembler, left to itself, spills a few at far fewer."""
RECORD = tl.constexpr(8)
LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
"""The largest finite float32."""
NO_ID = tl.constexpr(2147483647)
"""Larger than every id: what a smallest id is sought among has it where there is none."""
_INTERPRETED = tl.constexpr(INTERPRETED)

# The interpreter takes milliseconds a program, however large its tile is.
_MOST_SEQUENCES = 8_192 if INTERPRETED else 32

_kept: dict[tuple[str, bool, torch.dtype, torch.device], list[Tensor]] = {}


class _Launches(threading.local):
    """How those of a thread are made; see `apart`."""

    are_apart = False


_launches = _Launches()


class Models(NamedTuple):
    """The models' logits and how they are mixed; an argument of kernels.

    Attributes:
        logits: tensors [batch, rows, >= vocab], of which the last may be a correction of the draft.
        strides: for each its batch stride and its row stride, in elements.
        target_weights, draft_weights: float32 [batch, weight_stride], the models' weights in either law.
        weight_stride: numbers from one sequence's weights to the next one's.
        plain_weights, delta_weights: with the conservative filter the weights of the law without the scale
            delta and those of that delta, else as `target_weights`.
        sets: with the conservative filter the records [batch, rows, RECORD] of its sets, else anything.
    """

    logits: Any
    strides: Any
    target_weights: Any
    draft_weights: Any
    weight_stride: Any
    plain_weights: Any
    delta_weights: Any
    sets: Any


@dataclass(frozen=True)
class Shape:
    """How a vocabulary is cut: `splits` of `columns` ids, and `sequences` that share a program."""

    sequences: int
    columns: int
    splits: int
    warps: int


def launch_options(warps: int, registers: int | None = None, waves: int | None = None) -> dict[str, int]:
    """What a launch passes to the compiler; AMD's knows no limit of registers, and has `waves` for warps."""
    if torch.version.hip:
        return {"num_warps": waves or warps}
    return {"num_warps": warps} | ({} if registers is None else {"maxnreg": registers})


def is_nvidia() -> bool:
    """Whether kernels are compiled for NVIDIA's devices."""
    return not INTERPRETED and not torch.version.hip


@cache
def _is_programmatic(device: torch.device) -> bool:
    """Whether launches on `device` may overlap by programmatic dependent launch."""
    if not is_nvidia() or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def programmatic_options(device: torch.device) -> dict[str, Any]:
    """What a launch passes for it."""
    usable = _is_programmatic(device)
    return {"PROGRAMMATIC": usable} | ({"launch_pdl": True} if usable else {})


def stages_within(limit: int, holds_all: bool, most: int, stage: int, kept: int = 0) -> int:
    """How many of `most` stages of a loop fit `limit` bytes, with `stage` bytes each beside `kept`.

    `holds_all` says whether memory holds all stages at once; before sm_90, and on AMD's, it is one less.
    """
    return min(max((limit - kept) // stage + (not holds_all), 1), most)


@cache
def _shared_memory(device: torch.device) -> tuple[int, bool]:
    """Bytes that a program may have on `device`, and whether they hold all stages of a loop."""
    properties = driver.active.utils.get_device_properties(device.index)
    holds_all = not torch.version.hip and torch.cuda.get_device_capability(device) >= (9, 0)
    return int(properties["max_shared_mem"]), holds_all


def stage_options(device: torch.device, most: int, stage: int, kept: int = 0) -> dict[str, int]:
    """What a launch passes for as many stages as fit `device`."""
    if device.type != "cuda":
        return {"num_stages": most}
    return {"num_stages": stages_within(*_shared_memory(device), most, stage, kept)}


def power_of_two(count: int) -> int:
    """The next power of two, at least 1."""
    return 1 << max(count - 1, 0).bit_length()


def tile_shape(vocab_size: int) -> Shape:
    """The tiles for a vocabulary."""
    columns = min(max(power_of_two(vocab_size), 4), LARGEST_SPLIT)
    sequences = min(max(_MOST_SEQUENCES * 4 // columns, 1), _MOST_SEQUENCES) if columns < LARGEST_SPLIT else 1
    return Shape(sequences, columns, -(-vocab_size // columns), 8)


def pack(logits: Sequence[Tensor], target_weights: Tensor, draft_weights: Tensor) -> Models:
    """The argument of kernels for `logits`, each [batch, rows, >= vocab] of any strides, without the filter.

    Weights are float32 [batch, >= models].
    """
    rows = [part if part.stride(2) == 1 else part.contiguous() for part in logits]
    return Models(
        logits=tuple(rows),
        strides=tuple((part.stride(0), part.stride(1)) for part in rows),
        target_weights=target_weights,
        draft_weights=draft_weights,
        weight_stride=draft_weights.stride(0),
        plain_weights=target_weights,
        delta_weights=target_weights,
        sets=target_weights,
    )


@contextmanager
def apart() -> Iterator[None]:
    """Launches within share no kept storage with those outside, so that the two may run side by side."""
    before, _launches.are_apart = _launches.are_apart, True
    try:
        yield
    finally:
        _launches.are_apart = before


def zeros_kept(purpose: str, device: torch.device, count: int) -> Tensor:
    """Zeros, int32, at least `count`, which kernels leave as zeros: always the same for a purpose.

    All launches on a device that are not to run side by side may share them, see `apart`; a captured launch
    runs on the stream that replays it, whatever the stream of its capture was.
    """
    return _storage_kept(purpose, torch.int32, device, count)


def scratch_kept(purpose: str, device: torch.device, count: int) -> Tensor:
    """Float32 numbers, at least `count`, for a kernel to write and read again; shared as `zeros_kept` are."""
    return _storage_kept(purpose, torch.float32, device, count)


def _storage_kept(purpose: str, dtype: torch.dtype, device: torch.device, count: int) -> Tensor:
    kept = _kept.setdefault((purpose, _launches.are_apart, dtype, device), [])
    if not kept or kept[-1].shape[0] < count:
        # Smaller ones stay: a captured graph may have their address.
        kept.append(torch.zeros(max(power_of_two(count), 1024), dtype=dtype, device=device))
    return kept[-1]


@triton.jit
def arrive(counters, tile, programs):
    """Whether this program is the last of its tile's `programs`; what they stored may then be read."""
    tl.debug_barrier()
    last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counters + tile, 0)
    tl.debug_barrier()
    return last


@triton.jit
def begin_programmatic(PROGRAMMATIC: tl.constexpr):
    """Let the next launch start."""
    if PROGRAMMATIC:
        cuda.gdc_launch_dependents()


@triton.jit
def wait_programmatic(PROGRAMMATIC: tl.constexpr):
    """Wait until the launch before is over and what it wrote can be read."""
    if PROGRAMMATIC:
        cuda.gdc_wait()


@triton.jit
def nearest(numbers, dtype: tl.constexpr):
    """Float32 rounded to the nearest of `dtype`."""
    if _INTERPRETED and dtype == tl.bfloat16:
        # The interpreter would cut off.
        bits = numbers.to(tl.uint32, bitcast=True)
        numbers = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return numbers.to(dtype)


@triton.jit
def product_of_tiles(left, right, total):
    """`total` and the product of two tiles, in float32."""
    if _INTERPRETED:
        # The interpreter would multiply the bits of bfloat16.
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def divided(logits, temperature):
    """Logits over temperatures, which broadcast, rounded to the nearest as torch does.

    What compilers make of a division is off by two units in the last place, a thousandth at logits of 10,000.
    """
    quotient = logits / temperature
    if _INTERPRETED:
        return quotient
    inverse, _ = tl.broadcast(1.0 / temperature, quotient)
    temperature, _ = tl.broadcast(temperature, quotient)
    rest = tl.fma(-quotient, temperature, logits)
    return tl.where(tl.abs(quotient) <= LARGEST_FLOAT, tl.fma(rest, inverse, quotient), quotient)


@triton.jit
def load_logits(pointer, offsets, mask):
    """A tile of neighbouring logits in float32."""
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def gather_logits(pointer, offsets, mask):
    """Single logits in float32."""
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _finite(mixed, inside):
    """-inf outside the vocabulary, and where a model that is consulted has no finite logit."""
    return tl.where(inside & (tl.abs(mixed) <= LARGEST_FLOAT), mixed, float("-inf"))


@triton.jit
def mix(models, weights, sequence, row, ids, inside, GATHERED: tl.constexpr):
    """A weighted sum of the models' logits of one row: float32 of the shape of `inside`, and -inf outside.

    Args:
        models: `Models`.
        weights: float32 pointer [batch, models.weight_stride]. A model of weight 0 is not consulted.
        sequence: int64 [sequences, 1]; row and ids broadcast with it to the shape of `inside`.
        GATHERED: whether ids are single tokens, not neighbours.
    """
    total = tl.zeros(inside.shape, tl.float32)
    for model in tl.static_range(len(models.logits)):
        weight = tl.load(weights + sequence * models.weight_stride + model)
        consulted = inside & (weight != 0.0)
        offsets = sequence * models.strides[model][0] + row * models.strides[model][1] + ids
        if GATHERED:
            values = gather_logits(models.logits[model], offsets, consulted)
        else:
            values = load_logits(models.logits[model], offsets, consulted)
        total = tl.where(consulted, tl.fma(values, weight + tl.zeros_like(values), total), total)
    return _finite(total, inside)


@triton.jit
def mix_both(
    models,
    first_weights,
    second_weights,
    sequence,
    row,
    ids,
    first_inside,
    second_inside,
    GATHERED: tl.constexpr,
):
    """Two sums as in `mix`, for which the logits are read once."""
    first = tl.zeros(first_inside.shape, tl.float32)
    second = tl.zeros(first_inside.shape, tl.float32)
    for model in tl.static_range(len(models.logits)):
        first_weight = tl.load(first_weights + sequence * models.weight_stride + model)
        second_weight = tl.load(second_weights + sequence * models.weight_stride + model)
        in_first = first_inside & (first_weight != 0.0)
        in_second = second_inside & (second_weight != 0.0)
        offsets = sequence * models.strides[model][0] + row * models.strides[model][1] + ids
        if GATHERED:
            values = gather_logits(models.logits[model], offsets, in_first | in_second)
        else:
            values = load_logits(models.logits[model], offsets, in_first | in_second)
        first = tl.where(in_first, tl.fma(values, first_weight + tl.zeros_like(values), first), first)
        second = tl.where(in_second, tl.fma(values, second_weight + tl.zeros_like(values), second), second)
    return _finite(first, first_inside), _finite(second, second_inside)


@triton.jit
def mix_target(
    models,
    sequence,
    row,
    ids,
    inside,
    rows,
    GATHERED: tl.constexpr,
    CONSERVATIVE: tl.constexpr,
):
    """The target's logits before temperature, of one of a sequence's `rows`; arguments as in `mix`.

    With the conservative filter they are the logits of the law without the scale delta and, inside the set
    that `models.sets` describes, that delta.
    """
    if CONSERVATIVE:
        plain, delta = mix_both(
            models, models.plain_weights, models.delta_weights, sequence, row, ids, inside, inside, GATHERED
        )
        # Rows of a tile may go beyond a sequence's, and the last sequence's sets are the last of all.
        record = models.sets + (sequence * rows + tl.minimum(row, rows - 1)) * RECORD
        cut = tl.load(record + 2)
        cut_id = tl.load(record + 3).to(tl.int32)
        shift = tl.load(record + 5)
        return tl.where(boundary(plain, ids, cut, cut_id), _finite(plain + (delta + shift), inside), plain)
    return mix(models, models.target_weights, sequence, row, ids, inside, GATHERED)


@triton.jit
def mix_laws(
    models,
    sequence,
    row,
    ids,
    target_inside,
    draft_inside,
    rows,
    GATHERED: tl.constexpr,
    CONSERVATIVE: tl.constexpr,
):
    """The target's and the draft's logits before temperature; arguments as in `mix_target`."""
    if CONSERVATIVE:
        target = mix_target(models, sequence, row, ids, target_inside, rows, GATHERED, CONSERVATIVE)
        draft = mix(models, models.draft_weights, sequence, row, ids, draft_inside, GATHERED)
    else:
        target, draft = mix_both(
            models, models.target_weights, models.draft_weights, sequence, row, ids, target_inside,
            draft_inside, GATHERED,
        )  # fmt: skip
    return target, draft


@triton.jit
def boundary(scaled, ids, cut, cut_id):
    """Which tokens a cut keeps: those above it, and of those equal to it the ids from `cut_id` on."""
    return (scaled > cut) | ((scaled == cut) & (ids >= cut_id))


@triton.jit
def load_record(records, index, mask):
    """Largest scaled logit, log of the mass less it, and the cut of the rows at `index`, of its shape."""
    record = records + index * RECORD
    return (
        tl.load(record, mask=mask, other=0.0),
        tl.load(record + 1, mask=mask, other=0.0),
        tl.load(record + 2, mask=mask, other=float("-inf")),
        tl.load(record + 3, mask=mask, other=0.0).to(tl.int32),
    )


@triton.jit
def store_record(records, index, highest, log_mass, cut, cut_id, winner, mask):
    """Write the records of the rows at `index`; `winner` is the id of the largest logit."""
    record = records + index * RECORD
    tl.store(record, highest, mask=mask)
    tl.store(record + 1, log_mass, mask=mask)
    tl.store(record + 2, cut, mask=mask)
    tl.store(record + 3, cut_id, mask=mask)
    tl.store(record + 4, winner.to(tl.float32), mask=mask)


@triton.jit
def cut_law(scaled, ids, record, FILTERED: tl.constexpr):
    """Log-probabilities of scaled logits; a row of only -inf is the point mass on id 0."""
    highest, log_mass, cut, cut_id = record
    law = scaled - highest - log_mass
    if FILTERED:
        law = tl.where(boundary(scaled, ids, cut, cut_id), law, float("-inf"))
    return tl.where(highest == float("-inf"), tl.where(ids == 0, 0.0, float("-inf")), law)


@triton.jit
def best_split(values, ids, axis: tl.constexpr):
    """The largest of `values` along `axis`, which is kept, and the smallest of the `ids` that have it."""
    best = tl.max(values, axis=axis, keep_dims=True)
    return best, tl.min(tl.where(values == best, ids, NO_ID), axis=axis, keep_dims=True)
