"""Adaptive draft length: each sequence's own choice from its running acceptance and a fixed cost ratio."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from speculative_eft.kernels import DraftLengthRule, EarlyStop, new_early_stop

__all__ = ["LONGEST_DRAFT", "DraftLengthPolicy", "tokens_per_round"]

LONGEST_DRAFT = 15
"""The longest draft considered: with the last committed token 16 rows, the most attention's kernel takes."""
_PRIOR_ACCEPTANCE, _PRIOR_ACCEPTANCE_OF_GREEDY = 0.75, 0.85
"""Greedy drafts are accepted more often than sampled ones: with T5 by .11 to .18, for each of three small
models and two tasks (Leviathan et al., ICML 2023)."""
_PRIOR_TESTED, _FADING = 8.0, 0.98
"""Tested tokens that the prior weighs as much as. By simulation with a GPU's costs, over 64 and 256 tokens, 8
give within 1% of what 32 give at chances of 0.5 to 0.85, and 2 to 7% more beyond; with the acceptance of the
demo trio 6, 1 and 1% more (T = 1, 0.7, 0)."""
_PRIOR_TESTED_OF_EARLY_STOPS = 32.0
_PRIOR_TESTED_IN_A_BATCH, _FADING_IN_A_BATCH = 512.0, 0.9995
"""In the long run a sequence's own acceptance weighs as much as alone, but it takes longer."""
_HIGHEST_ACCEPTANCE = 0.99
_POINTS = 512
_WAITING_PER_TOKEN = 0.055
"""By how much a drafted token a sequence makes the rounds of a batch more than those of its average
sequence: it ends with its slowest, and sequences that draft get ahead of each other. Measured are 0.04, 0.08
and 0.12 for drafts of one, two and three tokens in a batch of 4, 0.07, 0.12 to 0.14 and 0.16 to 0.18 in one
of 16, with 96 new tokens of the demo trio."""


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

    In a batch steps are shared and all wait for the slowest, the longer they draft the longer, so there
    sequences had better draft alike: the prior weighs more, and drafts have to promise more than shorter ones
    and plain steps give. Those that have ended cost their share of what all share, but no rows. Sequences
    that draft wait for each other already, so for these the first token costs no more than alone.

    What is taken to be accepted before anything is known is more of greedy sequences than of sampled ones.

    Attributes:
        cost_ratio: one step of the models that draft over one large step.
        row_cost: what one more drafted token adds beyond that, over one large step.
        is_batched: whether several sequences are decoded together.
    """

    cost_ratio: float
    row_cost: float = 0.0
    is_batched: bool = False

    def rule(self, device: torch.device, ends_early: bool = False) -> DraftLengthRule:
        """The choice as thresholds on the running acceptance of sequences, on `device`.

        More acceptance never makes the best draft shorter, so a threshold a length says it all. A draft that
        `ends_early` by itself is either none or the longest.
        """
        return _rule(self, device, ends_early)

    def prior_accepted(self, ends_early: bool, greedy: bool) -> float:
        """What `RoundState.prior_accepted` is for sequences that are `greedy` or not.

        Minus infinity where drafts do not pay at the prior acceptance: where nothing is drafted nothing is
        learnt, so such sequences take plain steps whatever their neighbours do.
        """
        return _prior_accepted(self, ends_early, greedy)

    def first(self, ends_early: bool, greedy: bool) -> int:
        """The draft length with which sequences begin, of which nothing is known."""
        return _first(self, ends_early, greedy)

    def _prior_tested(self, ends_early: bool) -> float:
        if self.is_batched:
            return _PRIOR_TESTED_IN_A_BATCH
        return _PRIOR_TESTED_OF_EARLY_STOPS if ends_early else _PRIOR_TESTED

    def early_stop(self, batch: int, device: torch.device) -> EarlyStop:
        """What ends drafts of `batch` new sequences where one more token is not worth its cost.

        Further tokens are taken to be accepted as often as the running acceptance says; time is worth the
        tokens that the best fixed draft length gives in it.
        """
        return new_early_stop(
            batch,
            LONGEST_DRAFT,
            _least_chances(self).to(device),
            _FADING,
            _PRIOR_TESTED_OF_EARLY_STOPS * _PRIOR_ACCEPTANCE,
            _PRIOR_TESTED_OF_EARLY_STOPS,
        )

    def _cost(self, lens: Tensor, waits_already: bool = True) -> Tensor:
        """Of rounds of drafts of these lengths, in large steps; whether all draft one token already."""
        costs = (lens + 2) * self.cost_ratio + lens * self.row_cost + 1
        if not self.is_batched:
            return costs
        shared = costs - (lens + 1) * min(self.row_cost, 1.0)
        return costs + (lens - int(waits_already)).clamp(min=0) * _WAITING_PER_TOKEN * shared

    def _pays(self, acceptance: float) -> bool:
        """Whether some draft gives more than plain steps, at this acceptance."""
        lens = torch.arange(LONGEST_DRAFT + 1)
        costs = self._cost(lens, waits_already=False)
        return bool((tokens_per_round(torch.tensor(acceptance), lens) / costs).argmax() > 0)


@cache
def _rule(policy: DraftLengthPolicy, device: torch.device, ends_early: bool) -> DraftLengthRule:
    thresholds = _thresholds(policy)
    if ends_early:
        thresholds = thresholds[:1].expand(LONGEST_DRAFT).contiguous()
    return DraftLengthRule(
        thresholds=thresholds.to(device),
        fading=_FADING_IN_A_BATCH if policy.is_batched else _FADING,
        prior_tested=policy._prior_tested(ends_early),
    )


@cache
def _prior_accepted(policy: DraftLengthPolicy, ends_early: bool, greedy: bool) -> float:
    acceptance = _PRIOR_ACCEPTANCE_OF_GREEDY if greedy else _PRIOR_ACCEPTANCE
    return policy._prior_tested(ends_early) * acceptance if policy._pays(acceptance) else -torch.inf


@cache
def _first(policy: DraftLengthPolicy, ends_early: bool, greedy: bool) -> int:
    nothing, prior = torch.zeros(1), torch.tensor([policy.prior_accepted(ends_early, greedy)])
    return int(_rule(policy, torch.device("cpu"), ends_early).draft_lens(nothing, nothing, prior))


@cache
def _least_chances(policy: DraftLengthPolicy) -> Tensor:
    """By running acceptance, the chance below which no further token is worth its cost: float32 [points]."""
    acceptance = torch.linspace(0, 1, _POINTS, dtype=torch.float64).clamp(0.01, _HIGHEST_ACCEPTANCE)
    lens = torch.arange(LONGEST_DRAFT + 1)
    rate = (tokens_per_round(acceptance[:, None], lens) / policy._cost(lens)).amax(dim=1)
    return (rate * (policy.cost_ratio + policy.row_cost) / acceptance).to(torch.float32)


@cache
def _thresholds(policy: DraftLengthPolicy) -> Tensor:
    """The least acceptance at which each length from 1 on is the best: float32 [LONGEST_DRAFT]."""
    lens = torch.arange(LONGEST_DRAFT + 1)
    acceptance = torch.linspace(0, _HIGHEST_ACCEPTANCE, 10_000, dtype=torch.float64)
    best = (tokens_per_round(acceptance[:, None], lens) / policy._cost(lens)).argmax(dim=1)
    first = torch.searchsorted(best, lens[1:])
    reached = first < len(acceptance)
    thresholds = torch.where(reached, acceptance[first.clamp(max=len(acceptance) - 1)], torch.inf)
    return thresholds.to(torch.float32)
