"""Times the commit of a round: `python -P -m speculative_eft.bench.kernels.commit --json FILE`.

The cache is cold: a round reads gigabytes of weights between two commits. It moves a few numbers a sequence,
so that its floor is that of a launch, which the JSON has beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from speculative_eft.kernels import DraftLengthRule, RoundState, commit

from ..script import Script, run
from ..timing import reference_kernels

__all__ = ["measure"]


def _operation(batch: int, drafted: int, adaptive: bool, device: torch.device) -> Callable[[], object]:
    """A commit that can be repeated: no sequence ends, and all columns of the output stay within it."""
    torch.manual_seed(0)

    def integers(value: int) -> Tensor:
        return torch.full((batch,), value, device=device)

    def zeros() -> Tensor:
        return torch.zeros(batch, device=device)

    many = 2**40
    state = RoundState(
        last_token=integers(1), seeds=integers(1), rounds=integers(0), positions=integers(7),
        generated=integers(0), limits=integers(many), done=integers(0).bool(), draft_lens=integers(drafted),
        output=torch.zeros(batch, 2**14, dtype=torch.int64, device=device), accepted_history=zeros(),
        tested_history=zeros(), prior_accepted=zeros() + 3, drafted=integers(0), tested=integers(0),
        accepted=integers(0), expected=zeros(),
        tested_at=torch.zeros(drafted, dtype=torch.int64, device=device),
        accepted_at=torch.zeros(drafted, dtype=torch.int64, device=device),
    )  # fmt: skip
    thresholds = torch.linspace(0.3, 0.9, drafted - 1, device=device)
    rule = DraftLengthRule(thresholds, 0.9, 4.0) if adaptive else None
    tokens = torch.randint(3, 1000, (batch, drafted), device=device)
    accepted, following = torch.randint(0, drafted + 1, (batch,), device=device), integers(5)
    expected = torch.rand(batch, drafted, device=device)
    ends = torch.tensor([1, 2], device=device)
    caches = [(integers(2**20), stepped) for stepped in (False, True, False)]

    def once() -> None:
        commit(state, tokens, accepted, following, expected, ends, rule, caches)
        # Repeated commits would leave the output.
        state.generated.zero_()

    return once


def measure(script: Script) -> None:
    """Time one commit against the torch reference."""
    script.note("Each repetition includes one more small kernel, which sets the output back.")
    batches, _ = script.sizes()
    for batch in batches:
        for drafted in (8,) if script.quick or not script.on_gpu else (4, 8, 16):
            for adaptive in (False, True):
                labels = {"batch": batch, "drafted": drafted, "adaptive": adaptive}
                once = _operation(batch, drafted, adaptive, script.device)
                script.measure(script.ours, once, labels, cold=True)
                with reference_kernels():
                    script.measure("torch reference", once, labels, cold=True)


def main() -> None:
    """See `measure`."""
    run("commit", measure)


if __name__ == "__main__":
    main()
