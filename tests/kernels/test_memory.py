"""What is recalled of past log-ratios, against a search written out, and which tokens a round asks for."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from speculative_eft.decoding import EFTConfig, EFTDecoder
from speculative_eft.decoding import round as round_module
from speculative_eft.kernels import DraftMemory, new_draft_memory, recall, remember
from speculative_eft.kernels.memory import LAST_WEIGHT, LAST_WEIGHT_AFTER_TWO, MEAN_WEIGHT

from ..device import test_device
from ..tiny_models import ragged_prompts, tiny_trio
from .cases import COMPILED, tensors_of

VOCAB, SLOTS = 5, 6


def correction(rows: list[tuple[int, Tensor]], mean: Tensor, token: int, previous: int) -> Tensor:
    """The correction after `previous` and `token`, of the token before each row and the row's log-ratio."""
    best, weight = None, LAST_WEIGHT
    for index, (before, ratio) in enumerate(rows):
        if before == token and weight == LAST_WEIGHT:
            best = ratio
        if index and before == token and rows[index - 1][0] == previous:
            best, weight = ratio, LAST_WEIGHT_AFTER_TWO
    half = MEAN_WEIGHT * mean
    return half if best is None else half + weight * (best - half)


@cache
def compiled_recall() -> Callable[..., None]:
    """The `recall` that loops compiled for a CPU call, of one sequence."""
    numba = pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    from speculative_eft.kernels.cpu.memory import recall

    @numba.njit
    def call(memory: Any, token: int, previous: int, beta: float, out: Any) -> None:
        recall(memory, 0, token, previous, beta, out)

    return call  # type: ignore[no-any-return]


def recall_in_loops(memory: DraftMemory, token: Tensor, previous: Tensor | None, beta: Tensor) -> Tensor:
    if test_device().type != "cpu":
        pytest.skip("loops in the host's memory")
    compiled = compiled_recall()
    from speculative_eft.kernels.cpu.memory import memory_arrays

    out = torch.empty(1, VOCAB)
    before = -1 if previous is None else int(previous)
    compiled(memory_arrays(memory), int(token), before, float(beta), out[0].numpy())
    return out


@pytest.mark.parametrize("recall", [recall, recall_in_loops])
def test_the_newest_after_both_tokens_counts_most(recall: Callable[..., Tensor]) -> None:
    random.seed(1)
    memory = new_draft_memory(1, SLOTS, VOCAB, test_device())
    rows: list[tuple[int, Tensor]] = []
    after_two = 0
    for _ in range(20):
        count = random.randint(1, 3)
        block = torch.tensor([[random.randrange(3) for _ in range(count + 1)]])
        large, base = torch.randn(2, 1, count + 1, VOCAB)
        remember(memory, large, base, block, torch.tensor([count - 1]), torch.tensor([False]))
        ratios = (large - base)[0, :count]
        rows += zip(block[0, :count].tolist(), ratios - ratios.mean(dim=1, keepdim=True), strict=True)
        rows = rows[-SLOTS:]
        after_two += len({(left[0], right[0]) for left, right in pairwise(rows)})
        for token in range(4):
            for previous in (None, 0, 1, 2, 3):
                before = rows[-1][0] if previous is None else previous
                asked = None if previous is None else torch.tensor([previous])
                recalled = recall(memory, torch.tensor([token]), asked, torch.tensor([2.0]))
                torch.testing.assert_close(recalled[0], 2 * correction(rows, memory.mean[0], token, before))
    assert after_two > 20


@pytest.mark.parametrize("processed", [False, True])
def test_a_draft_asks_for_the_tokens_that_it_follows(
    processed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "torch")
    asked: list[tuple[int | None, int]] = []
    first: list[tuple[int, int]] = []

    def recorded(memory: DraftMemory, token: Tensor, previous: Tensor | None, beta: Tensor) -> Tensor:
        before = None if previous is None else int(previous[0])
        if before is None and memory.count[0]:
            newest = (memory.count[0] - 1) % memory.tokens.shape[1]
            first.append((int(memory.tokens[0, newest]), int(token[0])))
        asked.append((before, int(token[0])))
        return recall(memory, token, previous, beta)

    monkeypatch.setattr(round_module, "recall", recorded)
    monkeypatch.setattr("speculative_eft.decoding.general.recall", recorded)
    decoder = EFTDecoder(tiny_trio("llama"), EFTConfig(draft_tokens=3, draft_weights="own"))
    options = {"repetition_penalty": 1.0001} if processed else {}
    output = decoder.generate(**ragged_prompts(1), max_new_tokens=40, eos_token_id=[], **options)
    assert isinstance(output, Tensor)
    text = output[0].tolist()
    # The first token of a draft stands behind the last that is remembered, each other behind the one drafted.
    assert len(first) > 5
    assert set(first) <= set(pairwise(text))
    for (_, token), (before, _) in pairwise(asked):
        assert before in (None, token)
    assert sum(before is not None for before, _ in asked) > len(asked) / 2


@COMPILED
@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(30, torch.float32), (100, torch.float16), (4_100, torch.bfloat16)]
)
def test_memory(vocab_size: int, dtype: torch.dtype, compiled: str, both: Any) -> None:
    batch, slots, rows = 5, 7, 4

    def run() -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        memory = new_draft_memory(batch, slots, vocab_size, test_device())
        seen = []
        for turn in range(4):
            # Every other row of a larger tensor: rows are not contiguous.
            large, base = (
                torch.randn(batch, 2 * rows, vocab_size + 2, generator=generator).to(dtype)[:, ::2]
                for _ in range(2)
            )
            large[0, :, 3] = -float("inf")
            base[1, 2] = torch.nan
            block = torch.randint(0, 4, (batch, rows), generator=generator)
            accepted = torch.randint(0, rows, (batch,), generator=generator)
            done = torch.arange(batch) == turn
            remember(memory, large, base, block, accepted, done)
            for token in range(4):
                tokens = torch.full((batch,), token)
                # One number for all sequences stands in memory once.
                for beta in (torch.linspace(0.5, 2, batch), torch.tensor(0.7).expand(batch)):
                    for previous in (None, tokens, (tokens + 1) % 4):
                        seen.append(recall(memory, tokens, previous, beta))
        return [*seen, *tensors_of(memory).values()]

    for expected, result in zip(*both(run, compiled), strict=True):
        assert result.isfinite().all()
        torch.testing.assert_close(result, expected)
