"""Compiled calls that threads share, for the tests; importing it needs Numba."""

from __future__ import annotations

from typing import Any

from speculative_eft.kernels.cpu.jit import TABLE, TABLES, entry
from speculative_eft.kernels.cpu.team import claim, finish, meetings, wait
from speculative_eft.kernels.cpu.threads import in_parallel

__all__ = ["count_shares", "fail_in_a_stage", "go_through"]


@in_parallel(f"void(int64, int64, {TABLE}, {TABLES}, {TABLES}, {TABLES})")
def _members(thread: int, threads: int, shares: Any, done: Any, missed: Any, rows: Any) -> None:
    for stage in range(shares.shape[0]):
        share = claim(rows[stage], thread, threads, shares[stage])
        while share >= 0:
            for before in range(shares[stage - 1] if stage > 0 else 0):
                missed[stage, share] += done[stage - 1, before] != 1
            # Some take longer than others.
            total = 0
            for k in range((stage * 7 + share * 13) % 50 * 200):
                total ^= k * share
            done[stage, share] += 1 + (total < 0)
            finish(rows[stage])
            share = claim(rows[stage], thread, threads, shares[stage])
        wait(rows[stage], shares[stage])


@entry(f"void(int64, {TABLE}, {TABLES}, {TABLES})")
def go_through(threads: int, shares: Any, done: Any, missed: Any) -> None:
    """Stages of so many `shares`: `done` counts each, and `missed` what was not done of the stage before."""
    _members(threads, threads, shares, done, missed, meetings(shares.shape[0], threads))


@in_parallel(f"void(int64, int64, int64, {TABLES})")
def _failing_members(thread: int, threads: int, failing: int, rows: Any) -> None:
    for stage in range(rows.shape[0]):
        share = claim(rows[stage], thread, threads, threads)
        while share >= 0:
            if stage == failing and share == threads - 1:
                raise MemoryError
            finish(rows[stage])
            share = claim(rows[stage], thread, threads, threads)
        wait(rows[stage], threads)


@entry("void(int64, int64)")
def fail_in_a_stage(threads: int, failing: int) -> None:
    """Forty stages, of which a share of the one that is `failing` raises MemoryError."""
    _failing_members(threads, threads, failing, meetings(40, threads))


@in_parallel(f"void(int64, {TABLE}, float64)")
def _count_again(share: int, counts: Any, weight: float) -> None:
    counts[share] += int(weight)


@in_parallel(f"void(int64, {TABLE}, float64, {TABLE}, {TABLES})")
def _count(share: int, counts: Any, weight: float, work: Any, nested: Any) -> None:
    total = 0
    for k in range(work[share % work.shape[0]]):
        total ^= k * share
    counts[share] += int(weight) + (total < 0)
    # One call within another.
    _count_again(nested.shape[1], nested[share], weight)


@entry(f"void({TABLE}, float64, {TABLE}, {TABLES})")
def count_shares(counts: Any, weight: float, work: Any, nested: Any) -> None:
    """Add `weight` to each of `counts`, and in a shared call of each share to each of its row of `nested`."""
    _count(counts.shape[0], counts, weight, work, nested)
