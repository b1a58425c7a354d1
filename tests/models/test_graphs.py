"""What graphs do when one cannot be captured, with torch's own replaced: it takes no GPU to fail."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from speculative_eft.models import CapturedFunctions, ModelRunner, graphs, protocol
from tests.models.families import tiny_model


class FakeGraph:
    """Counts its replays; `pool` is as good as any."""

    def __init__(self) -> None:
        self.replays = 0

    def pool(self) -> str:
        return "pool"

    def replay(self) -> None:
        self.replays += 1


@dataclass
class Captures:
    """The captures that were begun, each with the pool it was given, and whether one is under way."""

    made: list[tuple[FakeGraph, Any]] = field(default_factory=list)
    is_under_way: bool = False

    @contextmanager
    def capture(self, graph: FakeGraph, device: torch.device, pool: Any = None) -> Iterator[None]:
        self.made.append((graph, pool))
        self.is_under_way = True
        try:
            yield
        finally:
            self.is_under_way = False


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    captures = Captures()
    cuda = SimpleNamespace(
        CUDAGraph=FakeGraph, synchronize=lambda _: None, empty_cache=lambda: None,
        mem_get_info=lambda _: (2**30, 2**31),
    )  # fmt: skip
    fake = SimpleNamespace(cuda=cuda, OutOfMemoryError=torch.OutOfMemoryError)
    monkeypatch.setattr(graphs, "capture", captures.capture)
    monkeypatch.setattr(graphs, "torch", fake)
    return captures


def test_a_key_is_run_captured_and_replayed(captures: Captures) -> None:
    functions = CapturedFunctions(torch.device("cpu"), 1)
    calls = []

    def first() -> int:
        calls.append("first")
        return 3

    def second(of_first: int) -> int:
        calls.append("second")
        return of_first + 1

    for time in range(4):
        assert functions.run("key", first, second) == 4
        assert len(calls) == min(2 * (time + 1), 4)
    (one, _), (two, pool) = captures.made
    assert one.replays == two.replays == 3 and pool == "pool"


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (torch.OutOfMemoryError("no more"), "a graph did not fit in the 1.0 GiB left"),
        (RuntimeError("not permitted\nhow"), r"could not be captured (not permitted)"),
    ],
)
def test_what_cannot_be_captured_runs_as_it_is(
    captures: Captures, error: Exception, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    functions = CapturedFunctions(torch.device("cpu"), 1)

    def fails_in_captures() -> int:
        if captures.is_under_way:
            raise error
        return 1

    with caplog.at_level(logging.WARNING):
        for key in ("key", "key", "key", "another", "another"):
            assert functions.run(key, fails_in_captures) == 1
    assert why in caplog.text and len(caplog.records) == 1
    assert len(captures.made) == 1 and functions.used == functions.budget
    # Once what it read is gone, it is tried again, and not with a pool that was left in mid-capture.
    functions.clear()
    for _ in range(2):
        assert functions.run("key", lambda: 2) == 2
    assert [pool for _, pool in captures.made] == [None, None]


def test_memory_that_is_not_given_back_is_no_reason_to_fail(
    captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch's allocator does once a capture has failed."""

    def refuse() -> None:
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(graphs.torch.cuda, "empty_cache", refuse)
    functions = CapturedFunctions(torch.device("cpu"), 1)
    for _ in range(3):
        assert functions.run("key", lambda: 1) == 1
    assert not captures.made


def test_a_first_run_that_fails_is_not_the_first_run(captures: Captures) -> None:
    functions = CapturedFunctions(torch.device("cpu"), 1)

    def fails() -> None:
        raise torch.OutOfMemoryError("no more")

    with pytest.raises(torch.OutOfMemoryError):
        functions.run("key", fails)
    assert functions.run("key", lambda: 1) == 1
    assert not captures.made


def test_models_whose_weights_move_as_they_run_have_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    runner = ModelRunner(model)
    runner.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 2**31))
    functions = graphs.captured_functions([runner])
    assert functions is not None and functions.budget == 2**27
    monkeypatch.setattr(model.model.layers[0], "_hf_hook", object(), raising=False)
    assert graphs.captured_functions([runner]) is None


class _Stream:
    """What there is of a stream without a GPU."""

    def __init__(self) -> None:
        self.waited: list[_Stream] = []

    def wait_stream(self, other: _Stream) -> None:
        self.waited.append(other)


def test_a_stream_waits_for_what_was_begun_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters and scratch memory are a device's, and a round may be under way when its call has returned."""
    device, (first, second) = torch.device("cuda", 7), (_Stream(), _Stream())
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(protocol, "_last_streams", {})
    for stream in (first, first, second, second, first):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda own=stream: own)
        with protocol.on_device(device):
            pass
    assert second.waited == [first]
    assert first.waited == [second]
