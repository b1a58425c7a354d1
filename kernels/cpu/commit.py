"""The commit of a round compiled for a CPU: one call instead of some fifty small operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .jit import FLAGS, FLOAT, MATRIX, TABLE, TABLES, VECTOR, arrays, entry, integers_at

if TYPE_CHECKING:
    from speculative_eft.kernels.commit import DraftLengthRule, RoundState

__all__ = ["COMMIT", "commit", "commit_arrays", "commit_rows", "rule_arguments"]

_STATE = (
    "last_token", "rounds", "positions", "generated", "limits", "done", "draft_lens", "output",
    "accepted_history", "tested_history", "drafted", "tested", "accepted", "expected", "tested_at",
    "accepted_at",
)  # fmt: skip
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
    commit_rows(
        *commit_arrays(state), eos_token_ids.numpy(), *rule_arguments(rule),
        draft_tokens.contiguous().numpy(), accepted_lens.numpy(), next_token.numpy(),
        expected_acceptance.contiguous().numpy(),
        np.array([(lengths.data_ptr(), stepped) for lengths, stepped in caches]).reshape(-1, 2),
        report.numpy(),
    )  # fmt: skip
    return report


def commit_arrays(state: RoundState) -> tuple[Any, ...]:
    """What a commit reads and writes of a state."""
    return arrays(state, *_STATE)


def rule_arguments(rule: DraftLengthRule | None) -> tuple[Any, ...]:
    """A rule as arguments: whether there is one, its thresholds, and its numbers."""
    if rule is None:
        return (False, _NO_THRESHOLDS, 1.0, 0.0, 0.0)
    return (True, *arrays(rule, "thresholds"), rule.fading, rule.prior_accepted, rule.prior_tested)


COMMIT = (
    f"{TABLE}, {TABLE}, {TABLE}, {TABLE}, {TABLE}, {FLAGS}, {TABLE}, {TABLES}, {VECTOR}, {VECTOR}, {TABLE}, "
    f"{TABLE}, {TABLE}, {VECTOR}, {TABLE}, {TABLE}, {TABLE}, boolean, {VECTOR}, float32, float32, float32"
)
"""Types of `commit_arrays`, ids that end a sequence, and `rule_arguments`."""


@entry(f"void({COMMIT}, {TABLES}, {TABLE}, {TABLE}, {MATRIX}, {TABLES}, {TABLES})")
def commit_rows(
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
    eos_token_ids: Any,
    adaptive: bool,
    thresholds: Any,
    fading: float,
    prior_accepted: float,
    prior_tested: float,
    draft_tokens: Any,
    accepted_lens: Any,
    next_token: Any,
    expected: Any,
    caches: Any,
    report: Any,
) -> None:
    """`commit` of arrays; `caches` has for each where its lengths begin and whether it has stepped."""
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
    for cache in range(caches.shape[0]):
        lengths = integers_at(caches[cache, 0], (batch,))
        for sequence in range(batch):
            lengths[sequence] += report[sequence, 0] - caches[cache, 1] * (drafted + 1)
