"""What a round commits: where sequences end, and the compiled kernels against their references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from speculative_eft.kernels import DraftLengthRule, RoundState, commit, committed_tokens

from .cases import COMPILED, tensors_of


@pytest.mark.usefixtures("each_backend")
def test_commit_cuts_at_the_first_end_and_at_the_limit() -> None:
    draft = torch.tensor([[1, 9, 3], [1, 2, 3], [1, 2, 3], [9, 2, 3], [1, 2, 3]])
    tokens, counts, done = committed_tokens(
        draft_tokens=draft,
        accepted_lens=torch.tensor([3, 3, 1, 0, 2]),
        next_token=torch.tensor([4, 4, 9, 5, 6]),
        done=torch.tensor([False, False, False, False, True]),
        remaining=torch.tensor([10, 2, 10, 10, 10]),
        eos_token_ids=torch.tensor([9, 8]),
    )
    assert counts.tolist() == [2, 2, 2, 1, 0]
    assert done.tolist() == [True, True, True, False, True]
    assert tokens[2, :2].tolist() == [1, 9]
    assert tokens[3, 0] == 5


def random_state(batch: int, longest: int, generator: torch.Generator) -> RoundState:
    def counts(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape or (batch,), generator=generator)

    generated = counts(0, 20)
    return RoundState(
        last_token=counts(0, 50),
        seeds=counts(0, 50),
        rounds=counts(0, 9),
        positions=generated + 7,
        generated=generated,
        limits=generated + counts(1, 12),
        done=counts(0, 4) == 0,
        draft_lens=counts(0, longest + 1),
        output=counts(0, 50, batch, 40),
        accepted_history=torch.rand(batch, generator=generator) * 5,
        tested_history=torch.rand(batch, generator=generator) * 5 + 5,
        prior_accepted=torch.where(counts(0, 5) == 0, -torch.inf, 3 * torch.rand(batch, generator=generator)),
        drafted=counts(0, 9),
        tested=counts(0, 9),
        accepted=counts(0, 9),
        expected=torch.rand(batch, generator=generator),
        tested_at=counts(0, 9, longest),
        accepted_at=counts(0, 9, longest),
    )


@COMPILED
@pytest.mark.parametrize(("adaptive", "models"), [(True, 2), (False, 2), (False, 0)])
def test_commit(adaptive: bool, models: int, compiled: str, both: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    batch, longest = 200, 6
    rule = DraftLengthRule(torch.tensor([0.3, 0.5, 0.6, 0.8, float("inf")]), 0.9, 4.0)
    state = random_state(batch, longest, generator)
    drafted = torch.randint(0, 50, (batch, longest), generator=generator)
    accepted = (torch.rand(batch, generator=generator) * (state.draft_lens + 1)).long()
    following = torch.randint(0, 50, (batch,), generator=generator)
    overlap = torch.rand(batch, longest, generator=generator)
    lengths = [torch.full((batch,), 30), torch.full((batch,), 40)]

    def run() -> list[Tensor]:
        own = RoundState(**{name: value.clone() for name, value in tensors_of(state).items()})
        caches = [(lengths[0].clone(), False), (lengths[1].clone(), True)][:models]
        report = commit(
            own,
            drafted,
            accepted,
            following,
            overlap,
            torch.tensor([4, 9]),
            rule if adaptive else None,
            caches,
        )
        own.output[:, -1] = 0
        # Of what is not committed the report says nothing.
        report[:, 2:].masked_fill_(torch.arange(longest + 1) >= report[:, :1], 0)
        return [report, *(cache for cache, _ in caches), *tensors_of(own).values()]

    for expected, result in zip(*both(run, compiled), strict=True):
        torch.testing.assert_close(result, expected)
