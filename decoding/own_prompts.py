"""The first round of sequences whose tuned models have prompts of their own, ending in another token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from speculative_eft.kernels import RoundState
from speculative_eft.models import EFTRunners, Runner, StepByStep

from .prompts import Prompts

__all__ = ["FirstRound", "first_round_of_own_prompts"]


@dataclass(frozen=True)
class _LastTokenOfItsOwn(StepByStep):
    """A tuned model's runner for one step on the last token of its own prompt, whatever token it is given."""

    runner: Runner
    token: Tensor

    @property
    def lengths(self) -> Tensor:
        return self.runner.lengths

    def forward(self, tokens: Tensor, span: int) -> Tensor:
        return self.runner.forward(self.token[:, None], span)


@dataclass(frozen=True)
class FirstRound:
    """A round that drafts nothing, after which all models have the same last token: the first generated.

    Attributes:
        runners: those of that round.
        draft_lens: int64 [batch], of the round after it.
    """

    runners: EFTRunners
    draft_lens: Tensor

    def finish(self, state: RoundState, drafted: int) -> int:
        """Set the next round's draft lengths; the longest of them, or `drafted` where that is -1."""
        if drafted < 0:
            return drafted
        useful = (state.limits - state.generated - 1).clamp(min=0)
        state.draft_lens.copy_(torch.where(state.done, 0, torch.minimum(self.draft_lens, useful)))
        if state.offered_lens is not None:
            # The host has chosen no length for the next round yet.
            state.offered_lens.copy_(state.draft_lens)
        return int(state.draft_lens.max())


def first_round_of_own_prompts(
    runners: EFTRunners, state: RoundState, prompts: Prompts, tuned_prompts: Prompts
) -> FirstRound | None:
    """The first round where the tuned models' prompts end otherwise than the bases', else None.

    Zeroes `state.draft_lens` for it.
    """
    last, tuned_last = (
        part.tokens.gather(1, (part.lengths - 1)[:, None])[:, 0].cpu() for part in (prompts, tuned_prompts)
    )
    if tuned_prompts is prompts or torch.equal(last, tuned_last):
        return None
    token = tuned_last.to(state.last_token.device)
    own = [cast(Runner, _LastTokenOfItsOwn(runner, token)) for runner in runners.tuned]
    draft_lens = state.draft_lens.clone()
    state.draft_lens.zero_()
    return FirstRound(EFTRunners(runners.large, own, runners.base), draft_lens)
