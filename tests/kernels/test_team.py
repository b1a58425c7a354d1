"""Threads that go through stages together: each share is done once, after all of the stage before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

numba = pytest.importorskip("numba", reason="the extra [cpu] is not installed")

STAGES = 40


@pytest.fixture(scope="module")
def go_through() -> Callable[..., None]:
    from numba import prange

    from speculative_eft.kernels.cpu.jit import TABLE, TABLES, compiled, entry, in_parallel
    from speculative_eft.kernels.cpu.team import claim, finish, meetings, wait

    @compiled(f"void(int64, int64, {TABLE}, {TABLES}, {TABLES}, {TABLES})")
    def member(thread: int, threads: int, shares: Any, done: Any, missed: Any, rows: Any) -> None:
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

    @in_parallel(f"void(int64, {TABLE}, {TABLES}, {TABLES}, {TABLES})")
    def together(threads: int, shares: Any, done: Any, missed: Any, rows: Any) -> None:
        for thread in prange(threads):
            member(np.int64(thread), threads, shares, done, missed, rows)

    @entry(f"void(int64, {TABLE}, {TABLES}, {TABLES})")
    def call(threads: int, shares: Any, done: Any, missed: Any) -> None:
        together(threads, shares, done, missed, meetings(shares.shape[0], threads))

    function: Callable[..., None] = call
    return function


@pytest.fixture(params=[1, 2])
def running(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many threads a loop really has, which may be fewer than the team counts on."""
    before = numba.get_num_threads()
    if request.param > numba.config.NUMBA_NUM_THREADS:
        pytest.skip("one core")
    numba.set_num_threads(request.param)
    yield request.param
    numba.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_each_share_is_done_once_after_the_stage_before(running: int, threads: int, go_through: Any) -> None:
    for seed in range(20):
        shares = np.random.default_rng(seed).integers(0, 12, STAGES)
        done, missed = np.zeros((STAGES, 12), np.int64), np.zeros((STAGES, 12), np.int64)
        go_through(threads, shares, done, missed)
        assert (done == (np.arange(12) < shares[:, None])).all()
        assert not missed.any()
