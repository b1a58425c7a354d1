"""One draft step in Triton, in one launch: mix, temperature and filters, noise, and the race."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..filters import Sampling
from .filters import draft_records
from .noise import exponential_tile
from .specialisation import Specialisation, models_signature
from .tile import (
    LARGEST_FLOAT,
    MORE_REGISTERS,
    NO_ID,
    arrive,
    best_split,
    boundary,
    divided,
    launch_options,
    load_logits,
    load_record,
    mix,
    pack,
    power_of_two,
    tile_shape,
    zeros_kept,
)

__all__ = ["draft", "specialisations"]

_FIELDS = 3
"""Partial results of a split: its largest logit, the best score less that, and its id."""


class Step(NamedTuple):
    """What is drawn; an argument of kernels.

    Attributes:
        temperature: float32 [batch], 0 for greedy.
        seeds, counters: int64 [batch].
        records: float32 [batch, 1, RECORD], the laws after filters; anything without.
        vocab_size: an integer.
        row, batch: integers, None but inside kernels, where `_sized` puts them; row is the address's.
    """

    temperature: Any
    seeds: Any
    counters: Any
    records: Any
    vocab_size: Any
    row: Any = None
    batch: Any = None


class Drawn(NamedTuple):
    """Where the kernel writes.

    Attributes:
        tokens: int64 [batch].
        partials: float32, a number for each field, sequence and split.
        arrivals: int32 counters of programs, 0 before and after.
    """

    tokens: Any
    partials: Any
    arrivals: Any


@triton.jit
def _sized(step, row, batch):
    """The step with its integers, which inside an argument would have Triton compile anew for some."""
    return Step(step.temperature, step.seeds, step.counters, step.records, step.vocab_size, row, batch)


@triton.jit
def _choose(step, drawn, splits, sequence, valid, SPLITS: tl.constexpr):
    """The best of the splits."""
    field = step.batch.to(tl.int64) * splits
    all_splits = tl.arange(0, SPLITS)[None, :]
    wanted = valid & (all_splits < splits)
    places = drawn.partials + sequence * splits + all_splits
    largest = tl.load(places, mask=wanted, other=-LARGEST_FLOAT)
    scores = tl.load(places + field, mask=wanted, other=float("-inf"))
    winners = tl.load(places + 2 * field, mask=wanted, other=0.0).to(tl.int32)
    scores += largest - tl.max(largest, axis=1, keep_dims=True)
    _, token = best_split(scores, tl.where(wanted, winners, NO_ID), 1)
    tl.store(drawn.tokens + sequence, token.to(tl.int64), mask=valid)


@triton.jit(do_not_specialize=["row", "batch", "splits"])
def _draft(
    models,
    step,
    drawn,
    row,
    batch,
    splits,
    STREAM: tl.constexpr,
    FILTERED: tl.constexpr,
    SEQUENCES: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    step = _sized(step, row, batch)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    unclamped = tile.to(tl.int64) * SEQUENCES + tl.arange(0, SEQUENCES)[:, None]
    valid = unclamped < step.batch
    sequence = tl.minimum(unclamped, step.batch - 1)
    ids = split * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = valid & (ids < step.vocab_size)
    mixed = mix(models, models.draft_weights, sequence, 0, ids, inside, False)
    temperature = tl.load(step.temperature + sequence)
    score = mixed
    if FILTERED:
        scaled = divided(mixed, tl.where(temperature == 0.0, 1.0, temperature))
        _, _, cut, cut_id = load_record(step.records, sequence, valid)
        score = tl.where(boundary(scaled, ids, cut, cut_id), score, float("-inf"))
    seed = tl.load(step.seeds + sequence)
    counter = tl.load(step.counters + sequence)
    noise = exponential_tile(seed, counter, tl.zeros_like(seed) + step.row, STREAM, split, COLUMNS)
    # Noise that is scaled instead of logits makes temperature 0 the argmax. That of a cold one would be lost
    # beside large logits, of which differences alone matter.
    largest = tl.maximum(tl.max(score, axis=1, keep_dims=True), -LARGEST_FLOAT)
    score = score - largest - temperature * tl.log(noise)
    best, winner = best_split(score, ids, 1)
    field = step.batch.to(tl.int64) * splits
    place = drawn.partials + sequence * splits + split
    tl.store(place, largest, mask=valid)
    tl.store(place + field, best, mask=valid)
    tl.store(place + 2 * field, winner.to(tl.float32), mask=valid)

    if arrive(drawn.arrivals, tile, splits):
        _choose(step, drawn, splits, sequence, valid, SPLITS)


def draft(
    logits: Sequence[Tensor],
    weights: Tensor,
    sampling: Sampling,
    seeds: Tensor,
    counters: Tensor,
    row: int,
    stream: int,
    vocab_size: int,
) -> Tensor:
    """One token a sequence from the law of the weighted `logits`, each [batch, 1, >= vocab_size].

    `weights` is float32 [batch, models]; the draw is that of `exponential_noise` at (seeds, counters, row).
    Returns int64 [batch].
    """
    temperature = sampling.temperature
    batch, device = temperature.shape[0], temperature.device
    shape = tile_shape(vocab_size)
    tiles = -(-batch // shape.sequences)
    models = pack(logits, weights, weights)
    records = draft_records(models, sampling, vocab_size) if sampling.filtered else None
    tokens = torch.empty(batch, dtype=torch.int64, device=device)
    partials = torch.empty(_FIELDS * batch * shape.splits, device=device)
    step = Step(temperature, seeds, counters, partials if records is None else records, vocab_size)
    drawn = Drawn(tokens, partials, zeros_kept("arrivals", device, tiles))
    _draft[(tiles, shape.splits)](
        models, step, drawn, row, batch, shape.splits, STREAM=stream, FILTERED=records is not None,
        SEQUENCES=shape.sequences, COLUMNS=shape.columns, SPLITS=power_of_two(shape.splits),
        **launch_options(shape.warps, MORE_REGISTERS),
    )  # fmt: skip
    return tokens


def specialisations() -> Iterator[Specialisation]:
    """One or two models with and without a correction and filters; other dtypes with all."""
    step = Step("*fp32", "*i64", "*i64", "*fp32", "i32")
    for dtype in ("bf16", "fp16", "fp32"):
        for models, corrected, filtered in (
            (1, False, False), (2, False, False), (2, True, False), (2, True, True),
        ):  # fmt: skip
            if dtype != "bf16" and not filtered:
                continue
            options = {"corrected": corrected, "filtered": filtered}
            yield Specialisation(
                operation="draft",
                name=" ".join([f"{dtype} {models} models", *(key for key, used in options.items() if used)]),
                kernel=_draft,
                signature={
                    "models": models_signature(dtype, models, corrected), "step": step,
                    "drawn": Drawn("*i64", "*fp32", "*i32"),
                    **dict.fromkeys(("row", "batch", "splits"), "i32"),
                },
                constants={
                    "STREAM": 0, "FILTERED": filtered, "SEQUENCES": 1, "COLUMNS": 4096, "SPLITS": 32,
                },
                divisible=frozenset({"models.logits", "models.strides", "step.vocab_size"}),
                num_warps=8,
                registers=MORE_REGISTERS,
                launches=4 if filtered else 1,
                wide_loads=(load_logits,),
            )  # fmt: skip
