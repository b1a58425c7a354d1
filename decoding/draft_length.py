"""Adaptive draft length: each sequence's own choice from its running acceptance and a fixed cost ratio."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from speculative_eft.kernels import DraftLengthRule

__all__ = ["DraftLengthPolicy", "tokens_per_round"]

_LONGEST_DRAFT = 16
_PRIOR_TESTED = 32.0
_PRIOR_ACCEPTANCE = 0.75
_FADING = 0.98
_HIGHEST_ACCEPTANCE = 0.99


def tokens_per_round(acceptance: Tensor, draft_lens: Tensor) -> Tensor:
    """Expected tokens of a round: 1 + a + ... + a^K = (1 - a^(K+1)) / (1 - a), broadcasting.

    Args:
        acceptance: chance that one drafted token is accepted, below 1.
        draft_lens: tokens drafted.
    """
    return (1 - acceptance ** (draft_lens + 1)) / (1 - acceptance)


@dataclass(frozen=True)
class DraftLengthPolicy:
    """Chooses the draft length with the most expected tokens per unit of cost.

    A round of K drafted tokens costs (K + 1) c + 1 + K r + c large steps, c being `cost_ratio` and r
    `row_cost`; K = 0 is a step of plain decoding. The choice is made before the tokens are drawn and depends
    on the sequence's own past alone, so it is lossless and a seed reproduces its output in any batch. What is
    known of acceptance fades to the prior, so that drafting is tried again after a while without.

    Attributes:
        cost_ratio: one step of the models that draft over one large step.
        row_cost: what one more drafted token adds beyond that, over one large step.
        longest: the longest draft considered.
    """

    cost_ratio: float
    row_cost: float = 0.0
    longest: int = _LONGEST_DRAFT

    def rule(self, device: torch.device) -> DraftLengthRule:
        """The choice as thresholds on a sequence's running acceptance, on `device`.

        More acceptance never makes the best draft shorter, so a threshold a length says it all.
        """
        return DraftLengthRule(
            thresholds=_thresholds(self).to(device),
            fading=_FADING,
            prior_accepted=_PRIOR_TESTED * _PRIOR_ACCEPTANCE,
            prior_tested=_PRIOR_TESTED,
        )


@cache
def _thresholds(policy: DraftLengthPolicy) -> Tensor:
    """The least acceptance at which each length from 1 on is the best: float32 [longest]."""
    acceptance = torch.linspace(0, _HIGHEST_ACCEPTANCE, 10_000, dtype=torch.float64)
    lens = torch.arange(policy.longest + 1)
    cost = (lens + 2) * policy.cost_ratio + lens * policy.row_cost + 1
    best = (tokens_per_round(acceptance[:, None], lens) / cost).argmax(dim=1)
    first = torch.searchsorted(best, lens[1:])
    reached = first < len(acceptance)
    thresholds = torch.where(reached, acceptance[first.clamp(max=len(acceptance) - 1)], torch.inf)
    return thresholds.to(torch.float32)
