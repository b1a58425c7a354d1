"""What a process that was forked after decoding began decodes itself, as servers' workers do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from speculative_eft.decoding import EFTConfig, EFTDecoder

from ..tiny_models import tiny_trio

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here"),
    # Python's own, of a fork beside threads, which is what is tested.
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

_SECONDS = 60


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _decode(decoder: EFTDecoder, streamer: Any = None) -> Tensor:
    # Large enough for torch to share it out to threads.
    assert torch.ones(1 << 20).sum() == 1 << 20
    tokens = decoder.generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=12, do_sample=True, seed=1, streamer=streamer
    )
    assert isinstance(tokens, Tensor)
    return tokens


def _forked(check: Callable[[], bool]) -> bool:
    """Whether `check` holds in a forked process, which may take so many seconds."""
    child = os.fork()
    if child == 0:
        holds = False
        try:
            holds = check()
        finally:
            os._exit(0 if holds else 1)
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_forked_process_decodes(family: str) -> None:
    decoder = EFTDecoder(tiny_trio(family), EFTConfig(draft_tokens=3))
    expected = _decode(decoder)
    assert _forked(lambda: torch.equal(_decode(decoder), expected) and torch.get_num_threads() == 2)
    assert torch.equal(_decode(decoder), expected) and torch.get_num_threads() == 2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_models_that_another_thread_decodes_with_are_free_in_a_forked_process(family: str) -> None:
    decoder = EFTDecoder(tiny_trio(family), EFTConfig(draft_tokens=3))
    expected = _decode(decoder)
    decoded: list[bool] = []

    def fork_beside(*_: object) -> None:
        if not decoded:
            thread = Thread(
                target=lambda: decoded.append(_forked(lambda: torch.equal(_decode(decoder), expected)))
            )
            thread.start()
            thread.join()

    assert torch.equal(_decode(decoder, fork_beside), expected)
    assert decoded == [True]


def test_who_forks_in_the_middle_of_a_call_is_in_the_middle_of_it_in_both_processes() -> None:
    decoder = EFTDecoder(tiny_trio("llama"), EFTConfig(draft_tokens=3))
    refused: list[bool] = []

    def is_refused() -> bool:
        with pytest.raises(RuntimeError, match="in the middle of a call"):
            _decode(decoder)
        return True

    def fork(*_: object) -> None:
        refused.append(_forked(is_refused))

    assert torch.equal(_decode(decoder, fork), _decode(decoder))
    assert refused and all(refused)
