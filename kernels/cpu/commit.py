"""The commit of a round compiled for a CPU: one call instead of some fifty small operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .compile import FLAGS, FLOAT, MATRIX, TABLE, TABLES, VECTOR, entry

if TYPE_CHECKING:
    from speculative_eft.kernels.commit import DraftLengthRule, RoundState

__all__ = ["commit"]

_NO_THRESHOLDS = np.empty(0, dtype=np.float32)


def commit(
    state: RoundState,
    draft_tokens: Tensor,
    accepted_lens: Tensor,
    next_token: Tensor,
    expected_acceptance: Tensor | None,
    eos_token_ids: Tensor,
    rule: DraftLengthRule | None,
    caches: Sequence[tuple[Tensor, bool]],
) -> Tensor:
    """`kernels.commit` of tensors in the host's memory."""
    batch, drafted = draft_tokens.shape
    if expected_acceptance is None:
        expected_acceptance = torch.zeros(batch, drafted)
    report = torch.empty(batch, 2 + drafted + 1, dtype=torch.int64)
    _commit(
        state.last_token.numpy(), state.rounds.numpy(), state.positions.numpy(), state.generated.numpy(),
        state.limits.numpy(), state.done.numpy(), state.draft_lens.numpy(), state.output.numpy(),
        state.accepted_history.numpy(), state.tested_history.numpy(), state.drafted.numpy(),
        state.tested.numpy(), state.accepted.numpy(), state.expected.numpy(), state.tested_at.numpy(),
        state.accepted_at.numpy(), draft_tokens.contiguous().numpy(), accepted_lens.numpy(),
        next_token.numpy(), expected_acceptance.contiguous().numpy(), eos_token_ids.numpy(),
        rule is not None,
        _NO_THRESHOLDS if rule is None else rule.thresholds.numpy(),
        1.0 if rule is None else rule.fading,
        0.0 if rule is None else rule.prior_accepted,
        0.0 if rule is None else rule.prior_tested,
        report.numpy(),
    )  # fmt: skip
    counts = report[:, 0]
    for lengths, stepped in caches:
        lengths.add_(counts)
        if stepped:
            lengths.sub_(drafted + 1)
    return report


@entry(
    f"void({TABLE}, {TABLE}, {TABLE}, {TABLE}, {TABLE}, {FLAGS}, {TABLE}, {TABLES}, {VECTOR}, {VECTOR}, "
    f"{TABLE}, {TABLE}, {TABLE}, {VECTOR}, {TABLE}, {TABLE}, {TABLES}, {TABLE}, {TABLE}, {MATRIX}, {TABLE}, "
    f"boolean, {VECTOR}, float32, float32, float32, {TABLES})"
)
def _commit(
    last_token: Any,
    rounds: Any,
    positions: Any,
    generated: Any,
    limits: Any,
    done: Any,
    draft_lens: Any,
    output: Any,
    accepted_history: Any,
    tested_history: Any,
    drafted_total: Any,
    tested_total: Any,
    accepted_total: Any,
    expected_total: Any,
    tested_at: Any,
    accepted_at: Any,
    draft_tokens: Any,
    accepted_lens: Any,
    next_token: Any,
    expected: Any,
    eos_token_ids: Any,
    adaptive: bool,
    thresholds: Any,
    fading: float,
    prior_accepted: float,
    prior_tested: float,
    report: Any,
) -> None:
    batch, drafted = draft_tokens.shape
    for sequence in range(batch):
        tokens = report[sequence, 2:]
        accepted = accepted_lens[sequence]
        for column in range(drafted):
            tokens[column] = draft_tokens[sequence, column]
        tokens[drafted] = next_token[sequence]
        tokens[accepted] = next_token[sequence]
        if done[sequence]:
            report[sequence, 0], report[sequence, 1] = 0, -1
            draft_lens[sequence] = 0
            continue

        length = draft_lens[sequence]
        tested = min(accepted + 1, length)
        drafted_total[sequence] += length
        tested_total[sequence] += tested
        accepted_total[sequence] += accepted
        overlap = FLOAT(0)
        for column in range(tested):
            overlap += expected[sequence, column]
            tested_at[column] += 1
        for column in range(accepted):
            accepted_at[column] += 1
        expected_total[sequence] += overlap
        if adaptive:
            accepted_history[sequence] = accepted_history[sequence] * fading + FLOAT(accepted)
            tested_history[sequence] = tested_history[sequence] * fading + FLOAT(tested)
            acceptance = (accepted_history[sequence] + prior_accepted) / (
                tested_history[sequence] + prior_tested
            )
            length = 0
            while length < thresholds.shape[0] and acceptance >= thresholds[length]:
                length += 1

        count = 0
        ended = False
        while count < min(accepted + 1, limits[sequence] - generated[sequence]) and not ended:
            token = tokens[count]
            output[sequence, generated[sequence] + count] = token
            last_token[sequence] = token
            for end in eos_token_ids:
                ended = ended or token == end
            count += 1
        generated[sequence] += count
        positions[sequence] += count
        rounds[sequence] += 1
        room = limits[sequence] - generated[sequence] - 1
        done[sequence] = ended or room < 0
        draft_lens[sequence] = 0 if done[sequence] else min(length, room)
        report[sequence, 0] = count
        report[sequence, 1] = -1 if done[sequence] else draft_lens[sequence]
