"""Recalling and remembering log-ratios in Triton: one launch to recall, two to remember.

`_centre` sums every kept row's log-ratio, and the last program of a row to arrive leaves its mean. `_keep`
reads the rows again, a program all rows of its part of the vocabulary, so that it can bring their fading mean
up to date in registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..memory import LAST_WEIGHT, LAST_WEIGHT_AFTER_TWO, MEAN_FADING, MEAN_WEIGHT, DraftMemory
from .specialisation import Specialisation
from .tile import (
    INTERPRETED,
    LARGEST_FLOAT,
    LARGEST_SPLIT,
    REGISTERS,
    arrive,
    launch_options,
    load_logits,
    power_of_two,
    tile_shape,
    zeros_kept,
)

__all__ = ["recall", "remember", "specialisations"]

# Its programs loop over rows: narrow parts of the vocabulary let one sequence fill the device.
_KEPT_COLUMNS = LARGEST_SPLIT if INTERPRETED else 2048
_WEIGHTS = {
    "MEAN_WEIGHT": MEAN_WEIGHT, "LAST_WEIGHT": LAST_WEIGHT, "LAST_WEIGHT_AFTER_TWO": LAST_WEIGHT_AFTER_TWO,
}  # fmt: skip


@triton.jit(do_not_specialize=["slots", "batch"])
def _recall(
    ratios,
    tokens,
    mean,
    count,
    token,
    previous,
    beta,
    correction,
    vocab_size,
    slots,
    batch,
    BEGINS: tl.constexpr,
    MEAN_WEIGHT: tl.constexpr,
    LAST_WEIGHT: tl.constexpr,
    LAST_WEIGHT_AFTER_TWO: tl.constexpr,
    SEQUENCES: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    unclamped = tl.program_id(0).to(tl.int64) * SEQUENCES + tl.arange(0, SEQUENCES)[:, None]
    valid = unclamped < batch
    sequence = tl.minimum(unclamped, batch - 1)
    slot = tl.arange(0, SLOTS)[None, :]
    known = tl.load(tokens + sequence * slots + slot, mask=slot < slots, other=-1)
    before = tl.load(tokens + sequence * slots + (slot + slots - 1) % slots, mask=slot < slots, other=-1)
    newest = (tl.load(count + sequence).to(tl.int32) + slots - 1) % slots
    # The first token of a draft stands behind the last that was remembered.
    last_token = tl.load(tokens + sequence * slots + newest) if BEGINS else tl.load(previous + sequence)
    # How long ago each slot was written: the newest of those that match is wanted.
    age = (newest + slots - slot) % slots
    # What was before the oldest is forgotten.
    rank = tl.where((before == last_token) & (age < slots - 1), age, age + slots)
    matches = (slot < slots) & (known == tl.load(token + sequence))
    rank = tl.min(tl.where(matches, rank, 2 * slots), axis=1, keep_dims=True)
    best = (newest + 2 * slots - rank) % slots
    weight = tl.where(rank < slots, LAST_WEIGHT_AFTER_TWO, LAST_WEIGHT)
    ids = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = valid & (ids < vocab_size)
    own = MEAN_WEIGHT * load_logits(mean, sequence * vocab_size + ids, inside)
    last = load_logits(ratios, (sequence * slots + best) * vocab_size + ids, inside & (rank < 2 * slots))
    drawn = tl.where(rank < 2 * slots, own + weight * (last - own), own)
    tl.store(correction + sequence * vocab_size + ids, tl.load(beta + sequence) * drawn, mask=inside)


@triton.jit
def _ratio(large, base, large_offset, base_offset, ids, wanted):
    """A tile of log L - log B up to a constant, 0 where it is not finite, and where it is."""
    ratio = load_logits(large, large_offset + ids, wanted) - load_logits(base, base_offset + ids, wanted)
    usable = wanted & (tl.abs(ratio) <= LARGEST_FLOAT)
    return tl.where(usable, ratio, 0.0), usable


@triton.jit(do_not_specialize=["slots", "rows", "splits", "batch"])
def _centre(
    large,
    base,
    large_strides,
    base_strides,
    block,
    accepted_lens,
    done,
    tokens,
    count,
    partials,
    centres,
    arrived,
    vocab_size,
    slots,
    rows,
    splits,
    batch,
    SEQUENCES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    place = tl.program_id(0)
    row = (place % rows).to(tl.int64)
    split = tl.program_id(1)
    unclamped = (place // rows).to(tl.int64) * SEQUENCES + tl.arange(0, SEQUENCES)[:, None]
    sequence = tl.minimum(unclamped, batch - 1)
    live = (unclamped < batch) & (tl.load(done + sequence) == 0)
    kept_rows = tl.load(accepted_lens + sequence) + 1
    kept = live & (row < kept_rows)
    field = batch.to(tl.int64) * rows * splits
    partial = partials + (sequence * rows + row) * splits
    if tl.max(kept.to(tl.int32)) > 0:
        ids = split * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        ratio, usable = _ratio(
            large, base, sequence * large_strides[0] + row * large_strides[1],
            sequence * base_strides[0] + row * base_strides[1], ids, kept & (ids < vocab_size),
        )  # fmt: skip
        tl.store(partial + split, tl.sum(ratio, axis=1, keep_dims=True), mask=kept)
        finite = tl.sum(usable.to(tl.float32), axis=1, keep_dims=True)
        tl.store(partial + field + split, finite, mask=kept)
    if arrive(arrived, place, splits):
        all_splits = tl.arange(0, SPLITS)[None, :]
        wanted = kept & (all_splits < splits)
        total = tl.sum(tl.load(partial + all_splits, mask=wanted, other=0.0), axis=1, keep_dims=True)
        finite = tl.load(partial + field + all_splits, mask=wanted, other=0.0)
        finite = tl.maximum(tl.sum(finite, axis=1, keep_dims=True), 1.0)
        tl.store(centres + sequence * rows + row, total / finite, mask=kept)
        if row == 0:
            # No other program of this launch looks at what is counted.
            all_rows = tl.arange(0, ROWS)[None, :]
            written = live & (all_rows < kept_rows)
            seen = tl.load(count + sequence).to(tl.int32)
            before = tl.load(block + sequence * rows + all_rows, mask=written, other=0)
            tl.store(tokens + sequence * slots + (seen + all_rows) % slots, before, mask=written)
            tl.debug_barrier()
            tl.store(count + sequence, seen + kept_rows, mask=live)


@triton.jit(do_not_specialize=["slots", "rows", "batch"])
def _keep(
    large,
    base,
    large_strides,
    base_strides,
    accepted_lens,
    done,
    ratios,
    mean,
    count,
    centres,
    vocab_size,
    slots,
    rows,
    batch,
    FADING: tl.constexpr,
    SEQUENCES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    unclamped = tl.program_id(0).to(tl.int64) * SEQUENCES + tl.arange(0, SEQUENCES)[:, None]
    sequence = tl.minimum(unclamped, batch - 1)
    live = (unclamped < batch) & (tl.load(done + sequence) == 0)
    kept_rows = tl.where(live, tl.load(accepted_lens + sequence) + 1, 0)
    ids = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = live & (ids < vocab_size)
    own = load_logits(mean, sequence * vocab_size + ids, inside)
    # These rows are counted already.
    first = (tl.load(count + sequence) - kept_rows).to(tl.int32)
    for row in range(tl.max(kept_rows).to(tl.int32)):
        kept = inside & (row < kept_rows)
        ratio, usable = _ratio(
            large, base, sequence * large_strides[0] + row * large_strides[1],
            sequence * base_strides[0] + row * base_strides[1], ids, kept,
        )  # fmt: skip
        centre = tl.load(centres + sequence * rows + row, mask=row < kept_rows, other=0.0)
        ratio = tl.where(usable, ratio - centre, 0.0)
        slot = (first + row) % slots
        tl.store(ratios + (sequence * slots + slot) * vocab_size + ids, ratio, mask=kept)
        own = tl.where(kept, FADING * own + (1.0 - FADING) * ratio, own)
    tl.store(mean + sequence * vocab_size + ids, own, mask=inside)


def recall(memory: DraftMemory, token: Tensor, previous: Tensor | None, beta: Tensor) -> Tensor:
    """`kernels.recall` in one launch."""
    batch, slots, vocab_size = memory.ratios.shape
    shape = tile_shape(vocab_size)
    all_slots = power_of_two(slots)
    sequences = min(shape.sequences, tl.TRITON_MAX_TENSOR_NUMEL // all_slots)
    correction = torch.empty_like(memory.mean)
    before = token if previous is None else previous
    _recall[(-(-batch // sequences), shape.splits)](
        memory.ratios, memory.tokens, memory.mean, memory.count, token, before, beta.contiguous(), correction,
        vocab_size, slots, batch, BEGINS=previous is None, **_WEIGHTS, SEQUENCES=sequences,
        COLUMNS=shape.columns, SLOTS=all_slots, **launch_options(shape.warps),
    )  # fmt: skip
    return correction


def remember(
    memory: DraftMemory, large: Tensor, base: Tensor, block: Tensor, accepted_lens: Tensor, done: Tensor
) -> None:
    """`kernels.remember` in two launches."""
    batch, slots, vocab_size = memory.ratios.shape
    rows = block.shape[1]
    shape = tile_shape(vocab_size)
    tiles = -(-batch // shape.sequences)
    large, base = (part if part.stride(2) == 1 else part.contiguous() for part in (large, base))
    strides = tuple((part.stride(0), part.stride(1)) for part in (large, base))
    centres = torch.empty(batch, rows, device=large.device)
    partials = torch.empty(2 * batch * rows * shape.splits, device=large.device)
    # One byte a flag, as torch stores them.
    flags = done.view(torch.int8)
    _centre[(tiles * rows, shape.splits)](
        large, base, *strides, block.contiguous(), accepted_lens, flags, memory.tokens, memory.count,
        partials, centres, zeros_kept("arrivals", large.device, tiles * rows), vocab_size, slots, rows,
        shape.splits, batch,
        SEQUENCES=shape.sequences, COLUMNS=shape.columns, ROWS=power_of_two(rows),
        SPLITS=power_of_two(shape.splits), **launch_options(shape.warps, REGISTERS),
    )  # fmt: skip
    columns = min(shape.columns, _KEPT_COLUMNS)
    _keep[(tiles, -(-vocab_size // columns))](
        large, base, *strides, accepted_lens, flags, memory.ratios, memory.mean, memory.count, centres,
        vocab_size, slots, rows, batch, FADING=MEAN_FADING, SEQUENCES=shape.sequences, COLUMNS=columns,
        **launch_options(4, REGISTERS),
    )  # fmt: skip


def specialisations() -> Iterator[Specialisation]:
    """A large vocabulary, of every dtype and unaligned, and one of 100, for drafts of up to 15."""
    for name, vocab_size, aligned in (
        ("", 128_256, True),
        (" of 50,257", 50_257, False),
        (" of 100", 100, False),
    ):
        shape = tile_shape(vocab_size)
        tile = {"SEQUENCES": shape.sequences, "COLUMNS": shape.columns}
        own = {"ratios": "*fp32", "tokens": "*i64", "mean": "*fp32", "count": "*i64"}
        integers = dict.fromkeys(("vocab_size", "slots", "rows", "splits", "batch"), "i32")
        divisible = {"ratios", "mean", "correction", "centres", "partials"} | (
            {"vocab_size"} if aligned else set()
        )
        wide = (load_logits,) if aligned else ()
        recalled = own | dict.fromkeys(("token", "previous"), "*i64")
        recalled |= dict.fromkeys(("beta", "correction"), "*fp32") | integers
        variants: list[tuple[Any, str, dict[str, Any], dict[str, Any], int]] = [
            (
                _recall,
                "recall, begin" if begins else "recall",
                recalled,
                {**tile, **_WEIGHTS, "BEGINS": begins, "SLOTS": 32},
                shape.warps,
            )
            for begins in (True, False)
        ]
        for dtype in ("bf16", "fp16", "fp32") if aligned else ("bf16",):
            rows: dict[str, Any] = dict.fromkeys(("large", "base"), f"*{dtype}")
            rows |= {"large_strides": ("i32", "i32"), "base_strides": ("i32", "i32")}
            rows |= {"block": "*i64", "accepted_lens": "*i64", "done": "*i8", "centres": "*fp32"}
            sums = {"partials": "*fp32", "arrived": "*i32"}
            centre = {**tile, "ROWS": 16, "SPLITS": power_of_two(shape.splits)}
            keep = {**tile, "COLUMNS": min(shape.columns, _KEPT_COLUMNS), "FADING": MEAN_FADING}
            variants += [
                (_centre, f"remember, centre {dtype}", own | rows | sums | integers, centre, shape.warps),
                (_keep, f"remember, keep {dtype}", own | rows | integers, keep, 4),
            ]
        for kernel, variant, signature, constants, warps in variants:
            present = {argument: kind for argument, kind in signature.items() if argument in kernel.arg_names}
            rows_divisible = {"large", "base", "large_strides", "base_strides"} if aligned else set()
            yield Specialisation(
                operation=variant.partition(",")[0],
                name=f"{variant.partition(', ')[2]} vocabulary{name}".strip(),
                kernel=kernel,
                signature=present,
                constants=constants,
                divisible=frozenset((divisible | rows_divisible) & set(present)),
                num_warps=warps,
                registers=None if kernel is _recall else REGISTERS,
                launches=1 if kernel is _recall else 2,
                wide_loads=wide,
            )
