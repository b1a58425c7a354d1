"""Threads that share calls and go through stages: each share is done once, after all of the stage before."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import sleep

import numpy as np
import pytest
import torch

pytest.importorskip("numba", reason="the extra [cpu] is not installed")

STAGES = 40


@pytest.fixture(params=[1, 2, 5])
def running(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many threads there really are, which may be fewer than a team counts on."""
    from speculative_eft.kernels.cpu.threads import use_threads

    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    use_threads()
    yield request.param
    torch.set_num_threads(before)
    use_threads()


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_each_share_is_done_once_after_the_stage_before(running: int, threads: int) -> None:
    from .sharing import go_through

    for seed in range(20):
        shares = np.random.default_rng(seed).integers(0, 12, STAGES)
        done, missed = np.zeros((STAGES, 12), np.int64), np.zeros((STAGES, 12), np.int64)
        go_through(threads, shares, done, missed)
        assert (done == (np.arange(12) < shares[:, None])).all()
        assert not missed.any()


def test_each_share_of_a_call_is_done_once(running: int) -> None:
    """Also right after threads have fallen asleep, and where a share makes a shared call itself."""
    from .sharing import count_shares

    choose = np.random.default_rng(0)
    for turn in range(600):
        counts = np.zeros(choose.integers(0, 20), np.int64)
        nested = np.zeros((counts.shape[0], 3), np.int64)
        count_shares(counts, 2.0, choose.integers(0, 3000, 7), nested)
        assert (counts == 2).all() and (nested == 2).all()
        if turn % 100 == 0:
            sleep(0.01)


def test_a_share_that_fails_holds_nobody_up(running: int) -> None:
    from .sharing import fail_in_a_stage

    for threads in (1, 2, 3):
        for stage in (0, 17, 39):
            with pytest.raises(MemoryError, match="not enough memory"):
                fail_in_a_stage(threads, stage)
            fail_in_a_stage(threads, -1)


def test_a_forked_process_has_threads_of_its_own() -> None:
    if not hasattr(os, "fork"):
        pytest.skip("nothing forks here")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "import os, torch, numpy as np; torch.set_num_threads(2)\n"
        "from speculative_eft.kernels.cpu.threads import use_threads\n"
        "from tests.kernels.sharing import count_shares\n"
        "def count():\n"
        "    use_threads()\n"
        "    for _ in range(50):\n"
        "        counts, nested = np.zeros(9, np.int64), np.zeros((9, 3), np.int64)\n"
        "        count_shares(counts, 1.0, np.full(3, 2000), nested)\n"
        "        assert (counts == 1).all() and (nested == 1).all()\n"
        "count()\n"
        "child = os.fork()\n"
        "count()\n"
        "if child == 0: os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
