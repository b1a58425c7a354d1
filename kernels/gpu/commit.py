"""The commit of a round in Triton: one launch instead of some fifty small operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..commit import StateArrays
from .specialisation import Specialisation
from .tile import INTERPRETED, MORE_REGISTERS, launch_options, power_of_two

if TYPE_CHECKING:
    from ..commit import DraftLengthRule, RoundState

__all__ = ["commit", "specialisations"]

_SEQUENCES = 8_192 if INTERPRETED else 32


class Verified(NamedTuple):
    """What was verified: draft_tokens [batch, drafted], accepted_lens, next_token [batch], expected."""

    draft_tokens: Any
    accepted_lens: Any
    next_token: Any
    expected: Any
    eos_token_ids: Any
    report: Any


class Rule(NamedTuple):
    """A `DraftLengthRule`."""

    thresholds: Any
    fading: Any
    prior_tested: Any


@triton.jit(do_not_specialize=["batch", "capacity", "drafted", "ends", "lengths"])
def _commit(
    state,
    verified,
    rule,
    caches,
    batch,
    capacity,
    drafted,
    ends,
    lengths,
    STEPPED: tl.constexpr,
    ADAPTS: tl.constexpr,
    COUNTS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    COLUMNS: tl.constexpr,
    LENGTHS: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64) * SEQUENCES + tl.arange(0, SEQUENCES)
    valid = sequence < batch
    row, is_row = sequence[:, None], valid[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    was_done = tl.load(state.done + sequence, mask=valid, other=1).to(tl.int32)
    live = valid & (was_done == 0)
    generated = tl.load(state.generated + sequence, mask=valid, other=0)
    limits = tl.load(state.limits + sequence, mask=valid, other=0)
    accepted = tl.load(verified.accepted_lens + sequence, mask=valid, other=0)
    following = tl.load(verified.next_token + sequence, mask=valid, other=0)
    tokens = tl.load(
        verified.draft_tokens + row * drafted + column, mask=is_row & (column < drafted), other=0
    )
    tokens = tl.where(column == accepted[:, None], following[:, None], tokens)
    tokens = tl.where(column == drafted, following[:, None], tokens)
    available = tl.minimum(accepted + 1, limits - generated)
    offered = column < available[:, None]
    is_end = tokens < 0
    for index in range(ends):
        is_end = is_end | (tokens == tl.load(verified.eos_token_ids + index))
    is_end = is_end & offered & is_row
    first_end = tl.min(tl.where(is_end, column, COLUMNS), axis=1)
    count = tl.minimum(available, first_end + 1)
    done = (was_done != 0) | (first_end < COLUMNS) | (tl.where(live, count, 0) >= limits - generated)
    count = tl.where(live, count, 0)

    lens = tl.where(live, tl.load(state.draft_lens + sequence, mask=valid, other=0), 0)
    accepted = tl.where(live, accepted, 0)
    tested = tl.minimum(accepted + 1, lens)
    is_tested = column < tested[:, None]
    tl.store(state.drafted + sequence, tl.load(state.drafted + sequence, mask=valid) + lens, mask=valid)
    tl.store(state.tested + sequence, tl.load(state.tested + sequence, mask=valid) + tested, mask=valid)
    tl.store(state.accepted + sequence, tl.load(state.accepted + sequence, mask=valid) + accepted, mask=valid)
    if COUNTS:
        overlap = tl.load(
            verified.expected + row * drafted + column, mask=is_tested & (column < drafted), other=0.0
        )
        total = tl.load(state.expected + sequence, mask=valid) + tl.sum(overlap, axis=1)
        tl.store(state.expected + sequence, total, mask=valid)
    place = tl.arange(0, COLUMNS)
    tested_here = tl.sum((is_tested & is_row).to(tl.int64), axis=0)
    tl.atomic_add(
        state.tested_at + place, tested_here, mask=(place < drafted) & (tested_here > 0), sem="relaxed"
    )
    accepted_here = tl.sum(((column < accepted[:, None]) & is_row).to(tl.int64), axis=0)
    tl.atomic_add(
        state.accepted_at + place, accepted_here, mask=(place < drafted) & (accepted_here > 0), sem="relaxed"
    )
    next_lens = tl.load(state.draft_lens + sequence, mask=valid, other=0)
    if ADAPTS:
        fade = tl.where(live, rule.fading, 1.0)
        accepted_history = tl.load(state.accepted_history + sequence, mask=valid, other=0.0) * fade + accepted
        tested_history = tl.load(state.tested_history + sequence, mask=valid, other=0.0) * fade + tested
        # Threads that hold the same sequence load for themselves.
        tl.debug_barrier()
        tl.store(state.accepted_history + sequence, accepted_history, mask=valid)
        tl.store(state.tested_history + sequence, tested_history, mask=valid)
        prior_accepted = tl.load(state.prior_accepted + sequence, mask=valid, other=0.0)
        acceptance = (accepted_history + prior_accepted) / (tested_history + rule.prior_tested)
        step = tl.arange(0, LENGTHS)[None, :]
        thresholds = tl.load(rule.thresholds + step, mask=step < lengths, other=float("inf"))
        reached = (acceptance[:, None] >= thresholds) & (step < lengths)
        next_lens = tl.where(live, tl.sum(reached.to(tl.int64), axis=1), next_lens)

    is_committed = (column < count[:, None]) & is_row
    tl.store(state.output + row * capacity + generated[:, None] + column, tokens, mask=is_committed)
    last = tl.sum(tl.where(column == (count - 1)[:, None], tokens, 0), axis=1)
    tl.store(state.last_token + sequence, last, mask=valid & (count > 0))
    for cache in tl.static_range(len(caches)):
        length = tl.load(caches[cache] + sequence, mask=valid, other=0) + count
        if STEPPED[cache]:
            length -= drafted + 1
        tl.store(caches[cache] + sequence, length, mask=valid)
    generated += count
    tl.store(state.generated + sequence, generated, mask=valid)
    positions = tl.load(state.positions + sequence, mask=valid, other=0) + count
    tl.store(state.positions + sequence, positions, mask=valid)
    rounds = tl.load(state.rounds + sequence, mask=valid, other=0)
    tl.store(state.rounds + sequence, rounds + live.to(tl.int64), mask=valid)
    tl.store(state.done + sequence, done.to(tl.int8), mask=valid)
    # What is drafted beyond the length limit, or for a sequence that is done, could not be committed.
    useful = tl.where(done, 0, tl.maximum(limits - generated - 1, 0))
    next_lens = tl.minimum(next_lens, useful)
    tl.store(state.draft_lens + sequence, next_lens, mask=valid)
    width = 2 + drafted + 1
    tl.store(verified.report + sequence * width, count, mask=valid)
    tl.store(verified.report + sequence * width + 1, tl.where(done, -1, next_lens), mask=valid)
    tl.store(verified.report + row * width + 2 + column, tokens, mask=is_row & (column <= drafted))


def commit(
    state: RoundState,
    draft_tokens: Tensor,
    accepted_lens: Tensor,
    next_token: Tensor,
    expected_acceptance: Tensor | None,
    eos_token_ids: Tensor,
    rule: DraftLengthRule | None,
    caches: Sequence[tuple[Tensor, bool]],
) -> Tensor:
    """`kernels.commit` in one launch."""
    batch, drafted = draft_tokens.shape
    report = torch.empty(batch, 2 + drafted + 1, dtype=torch.int64, device=draft_tokens.device)
    tensors = {name: getattr(state, name) for name in StateArrays._fields}
    # One byte a flag, as torch stores them.
    tensors["done"] = state.done.view(torch.int8)
    expected = state.expected if expected_acceptance is None else expected_acceptance
    verified = Verified(
        draft_tokens.contiguous(), accepted_lens, next_token, expected.contiguous(), eos_token_ids, report
    )
    lengths = 0 if rule is None else rule.thresholds.shape[0]
    numbers = (
        Rule(state.expected, 1.0, 0.0)
        if rule is None
        else Rule(rule.thresholds, rule.fading, rule.prior_tested)
    )
    _commit[(-(-batch // _SEQUENCES),)](
        StateArrays(**tensors), verified, numbers, tuple(cache for cache, _ in caches), batch,
        state.output.shape[1], drafted, eos_token_ids.shape[0], lengths,
        STEPPED=tuple(stepped for _, stepped in caches), ADAPTS=rule is not None,
        COUNTS=expected_acceptance is not None, SEQUENCES=_SEQUENCES, COLUMNS=power_of_two(drafted + 1),
        LENGTHS=power_of_two(lengths), **launch_options(4, MORE_REGISTERS),
    )  # fmt: skip
    return report


def specialisations() -> Iterator[Specialisation]:
    """Three caches, of which the tuned model's has stepped along."""
    state = StateArrays._make(
        [*["*i64"] * 5, "*i8", *["*i64"] * 2, *["*fp32"] * 3, *["*i64"] * 3, "*fp32", *["*i64"] * 2]
    )
    verified = Verified("*i64", "*i64", "*i64", "*fp32", "*i64", "*i64")
    integers = ("batch", "capacity", "drafted", "ends", "lengths")
    for adapts in (False, True):
        yield Specialisation(
            operation="commit",
            name="adaptive draft lengths" if adapts else "fixed draft lengths",
            kernel=_commit,
            signature={
                "state": state, "verified": verified, "rule": Rule("*fp32", "fp32", "fp32"),
                "caches": ("*i64",) * 3, **dict.fromkeys(integers, "i32"),
            },
            constants={
                "STEPPED": (False, True, False), "ADAPTS": adapts, "COUNTS": True, "SEQUENCES": 32,
                "COLUMNS": 16, "LENGTHS": 16,
            },
            num_warps=4,
            registers=MORE_REGISTERS,
        )  # fmt: skip
