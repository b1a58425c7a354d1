"""The first round where tuned models have prompts of their own, some of which end in another token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from speculative_eft.kernels import RoundState
from speculative_eft.models import EFTRunners, Runner, StepByStep

from .prompts import Prompts

__all__ = ["FirstRound", "first_round_of_own_prompts"]


@dataclass(frozen=True)
class _EndingInOwnTokens(StepByStep):
    """A tuned model's runner that reads the last tokens of its own prompts where it is given the bases'."""

    runner: Runner
    tokens: Tensor
    filled: Tensor

    @property
    def lengths(self) -> Tensor:
        return self.runner.lengths

    def forward(self, tokens: Tensor, span: int) -> Tensor:
        first = torch.where(self.lengths == self.filled, self.tokens, tokens[:, 0])
        return self.runner.forward(torch.cat([first[:, None], tokens[:, 1:]], dim=1), span)


@dataclass(frozen=True)
class FirstRound:
    """A round after which all models have the same last token in each sequence: the last one generated.

    Sequences whose prompts end in different tokens draft nothing in it, the others what they would alone.

    Attributes:
        runners: those of that round.
        is_deferred: bool [batch], the sequences that draft from the round after it on.
        draft_lens: int64 [batch], of these in the round after it.
    """

    runners: EFTRunners
    is_deferred: Tensor
    draft_lens: Tensor

    def finish(self, state: RoundState, drafted: int) -> int:
        """Set the next round's draft lengths; the longest of them, or `drafted` where that is -1."""
        if drafted < 0:
            return drafted
        useful = (state.limits - state.generated - 1).clamp(min=0)
        deferred = torch.where(state.done, 0, torch.minimum(self.draft_lens, useful))
        state.draft_lens.copy_(torch.where(self.is_deferred, deferred, state.draft_lens))
        if state.offered_lens is not None:
            # The host has chosen no length for their next round yet.
            state.offered_lens.copy_(torch.where(self.is_deferred, deferred, state.offered_lens))
        return int(state.draft_lens.max())


def first_round_of_own_prompts(
    runners: EFTRunners, state: RoundState, prompts: Prompts, tuned_prompts: Prompts
) -> FirstRound | None:
    """The first round where some tuned models' prompts end otherwise than the bases', else None.

    Zeroes `state.draft_lens` of these sequences for it.
    """
    last, tuned_last = (
        part.tokens.gather(1, (part.lengths - 1)[:, None])[:, 0].cpu() for part in (prompts, tuned_prompts)
    )
    if tuned_prompts is prompts or torch.equal(last, tuned_last):
        return None
    device = state.last_token.device
    tokens, filled = tuned_last.to(device), (tuned_prompts.lengths - 1).to(device)
    own = [cast(Runner, _EndingInOwnTokens(runner, tokens, filled)) for runner in runners.tuned]
    is_deferred = (last != tuned_last).to(device)
    draft_lens = state.draft_lens.clone()
    state.draft_lens.masked_fill_(is_deferred, 0)
    return FirstRound(replace(runners, tuned=own), is_deferred, draft_lens)
