"""Jobs that take turns, and the clocks that stand meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from speculative_eft.bench import turns
from speculative_eft.bench.turns import Watch, take_turns


def test_jobs_that_cannot_pause_take_turns_run_by_run() -> None:
    log: list[str] = []

    def job(name: str, runs: int) -> Iterator[None]:
        for run in range(runs):
            log.append(f"{name}{run}")
            yield

    take_turns([job("a", 1), job("b", 3), job("c", 2)], pausing=False)
    assert log == ["a0", "b0", "c0", "b1", "c1", "b2"]


def test_a_watch_stands_while_others_have_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("greenlet", reason="the extra [bench] is not installed")
    now = 0.0
    monkeypatch.setattr(turns, "perf_counter", lambda: now)
    log: list[str] = []
    spent: dict[str, float] = {}

    def job(name: str, steps: list[float], turn: float) -> Iterator[None]:
        nonlocal now
        watch = Watch(turn)
        watch.begin()
        start = watch.now()
        for step in steps:
            now += step
            log.append(name)
            watch.pause()
        spent[name] = watch.now() - start
        yield

    take_turns([job("a", [1, 1, 1, 1], 2), job("b", [3, 3], 2), job("c", [1, 1, 1], 9)], pausing=True)
    # Two steps make a turn of a, one makes one of b, and c is done before its turn is over.
    assert log == ["a", "a", "b", "c", "c", "c", "a", "a", "b"]
    assert spent == {"a": 4, "b": 6, "c": 3}


def test_what_goes_wrong_in_a_job_is_raised_and_ends_the_others() -> None:
    pytest.importorskip("greenlet", reason="the extra [bench] is not installed")
    ended: list[str] = []

    def wrong() -> Iterator[None]:
        raise RuntimeError("in a job")
        yield

    def other() -> Iterator[None]:
        try:
            with torch.inference_mode():
                Watch(0.0).pause()
                yield
        finally:
            ended.append("other")

    with pytest.raises(RuntimeError, match="in a job"):
        take_turns([wrong()], pausing=False)
    with pytest.raises(RuntimeError, match="in a job") as raised:
        take_turns([other(), wrong()], pausing=True)
    # Also while somebody looks at what was raised.
    assert raised.value.__traceback__ is not None
    assert ended == ["other"]
    assert not torch.is_inference_mode_enabled()
