"""Ending a draft early: by what became of tokens that the draft law gave like chances.

A token that the draft law is unsure of is seldom accepted, and what is drafted after it is then lost. So the
chance that all tokens drafted so far are accepted is estimated along the draft, and it ends where one more
would cost more than it is worth. Each drawn token is submitted, and whether another follows depends on
drawn tokens alone, so the target's law is unchanged (docs/math.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "GRADES", "PRIOR_ACCEPTED", "PRIOR_TESTED", "EarlyStop", "end_drafts", "learn", "new_early_stop",
]  # fmt: skip

GRADES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Chances at which a drafted token's grade goes up by one."""

PRIOR_TESTED = 8.0
PRIOR_ACCEPTED = tuple(
    PRIOR_TESTED * (0.55 + 0.43 * (low + high) / 2)
    for low, high in zip((0.0, *GRADES), (*GRADES, 1.0), strict=True)
)
"""Tokens of each grade that are taken to have been tested before the first, and accepted of them.

That surer tokens are accepted more often holds for any pair of laws that resemble each other; how much more
is soon learned.
"""


@dataclass
class EarlyStop:
    """What each sequence has learned of its drafts, in place.

    Attributes:
        accepted, tested: float32 [batch, grades], fading counts of drafted tokens by grade.
        least: float32 [batch], the chance that all drafted tokens are accepted below which no more follow.
        reach: float32 [batch], that chance in the present draft.
        grades: int64 [batch, longest draft], of the tokens of the present draft.
        least_chances: float32 [points], `least` by the running acceptance, in equal steps from 0 to 1.
        fading: weight a past round keeps with each new one.
        prior_accepted, prior_tested: of the running acceptance.
    """

    accepted: Tensor
    tested: Tensor
    least: Tensor
    reach: Tensor
    grades: Tensor
    least_chances: Tensor
    fading: float
    prior_accepted: float
    prior_tested: float


def new_early_stop(
    batch: int,
    longest: int,
    least_chances: Tensor,
    fading: float,
    prior_accepted: float,
    prior_tested: float,
) -> EarlyStop:
    """Of sequences that have drafted nothing yet; `longest` is the most tokens of a draft."""
    device, grades = least_chances.device, len(GRADES) + 1
    early = EarlyStop(
        accepted=torch.zeros(batch, grades, device=device),
        tested=torch.zeros(batch, grades, device=device),
        least=torch.zeros(batch, device=device),
        reach=torch.ones(batch, device=device),
        grades=torch.zeros(batch, longest, dtype=torch.int64, device=device),
        least_chances=least_chances,
        fading=fading,
        prior_accepted=prior_accepted,
        prior_tested=prior_tested,
    )
    _choose_least(early)
    return early


def end_drafts(early: EarlyStop, draft_lens: Tensor, step: int, chance: Tensor) -> None:
    """End drafts with token `step`, the first being 0, where no more are worth their cost.

    Args:
        draft_lens: int64 [batch], lowered to `step + 1` where a draft ends.
        chance: float32 [batch], of the drawn token in the draft law.
    """
    bounds = torch.tensor(GRADES, device=chance.device)
    grade = (chance[:, None] >= bounds).sum(dim=1)
    early.grades[:, step] = grade
    prior = torch.tensor(PRIOR_ACCEPTED, device=chance.device)
    expected = (early.accepted + prior) / (early.tested + PRIOR_TESTED)
    reach = expected.gather(1, grade[:, None])[:, 0]
    if step:
        reach = reach * early.reach
    early.reach.copy_(reach)
    ended = reach < early.least
    draft_lens.copy_(torch.where(ended, draft_lens.clamp(max=step + 1), draft_lens))


def learn(early: EarlyStop, draft_lens: Tensor, accepted_lens: Tensor, done: Tensor) -> None:
    """Count what became of a round's drafted tokens, before it is committed.

    Args:
        draft_lens, accepted_lens: int64 [batch], of that round.
        done: bool [batch], sequences that had ended before the round: they learn nothing.
    """
    tested = torch.minimum(accepted_lens + 1, draft_lens)
    column = torch.arange(early.grades.shape[1], device=draft_lens.device)
    fade = torch.where(done, 1.0, early.fading)[:, None]
    for counts, lens in ((early.accepted, accepted_lens), (early.tested, tested)):
        is_counted = (column < lens[:, None]) & ~done[:, None]
        counts.mul_(fade).scatter_add_(1, early.grades, is_counted.to(torch.float32))
    _choose_least(early)


def _choose_least(early: EarlyStop) -> None:
    accepted = early.accepted.sum(dim=1) + early.prior_accepted
    acceptance = accepted / (early.tested.sum(dim=1) + early.prior_tested)
    points = early.least_chances.shape[0]
    early.least.copy_(early.least_chances[(acceptance * (points - 1)).to(torch.int64)])
