"""The commit of a round compiled for a CPU: one call instead of some fifty small operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..commit import StateArrays
from .jit import FLAGS, FLOAT, TABLE, TABLES, VECTOR, arrays, entry, integers_at, record
from .verify import VerdictArrays, as_block

if TYPE_CHECKING:
    from ..commit import DraftLengthRule, RoundState

__all__ = ["RuleArrays", "commit", "commit_rows", "rule_arrays", "state_arrays"]


record(*[TABLE] * 5, FLAGS, TABLE, TABLES, *[VECTOR] * 3, *[TABLE] * 3, VECTOR, TABLE, TABLE)(StateArrays)


@record("boolean", VECTOR, "float32", "float32")
class RuleArrays(NamedTuple):
    """A `DraftLengthRule`, if there is one."""

    is_used: bool
    thresholds: Any
    fading: Any
    prior_tested: Any


_NO_RULE = RuleArrays(False, np.empty(0, np.float32), *np.zeros(2, np.float32))


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
    verdict = VerdictArrays(
        accepted_lens.numpy(), next_token.numpy(), expected_acceptance.contiguous().numpy(),
        np.empty((0, 0), np.float32),
    )  # fmt: skip
    commit_rows(
        state_arrays(state), eos_token_ids.numpy(), rule_arrays(rule), as_block(draft_tokens).numpy(),
        verdict,
        np.array([(lengths.data_ptr(), stepped) for lengths, stepped in caches], np.int64).reshape(-1, 2),
        report.numpy(),
    )  # fmt: skip
    return report


def state_arrays(state: RoundState) -> StateArrays:
    """What a commit reads and writes of a state, for compiled functions."""
    return StateArrays(*arrays(state, *StateArrays._fields))


def rule_arrays(rule: DraftLengthRule | None) -> RuleArrays:
    """A rule for compiled functions, or that there is none."""
    if rule is None:
        return _NO_RULE
    numbers = np.array([rule.fading, rule.prior_tested], np.float32)
    return RuleArrays(True, *arrays(rule, "thresholds"), *numbers)


@entry(f"void(StateArrays, {TABLE}, RuleArrays, {TABLES}, VerdictArrays, {TABLES}, {TABLES})")
def commit_rows(
    state: Any, eos_token_ids: Any, rule: Any, block: Any, verdict: Any, caches: Any, report: Any
) -> None:
    """`commit` of arrays.

    Args:
        block: int64 [batch, drafted + 1], of which the first column is not read.
        caches: int64 [caches, 2], for each where its lengths begin and whether it has stepped.
    """
    batch, drafted = block.shape[0], block.shape[1] - 1
    draft_lens, done, limits, generated = state.draft_lens, state.done, state.limits, state.generated
    accepted_history, tested_history = state.accepted_history, state.tested_history
    for sequence in range(batch):
        tokens = report[sequence, 2:]
        accepted, following = verdict.accepted_lens[sequence], verdict.next_token[sequence]
        for column in range(drafted):
            tokens[column] = block[sequence, column + 1]
        tokens[drafted] = following
        tokens[accepted] = following
        if done[sequence]:
            report[sequence, 0], report[sequence, 1] = 0, -1
            draft_lens[sequence] = 0
            continue

        length = draft_lens[sequence]
        tested = min(accepted + 1, length)
        state.drafted[sequence] += length
        state.tested[sequence] += tested
        state.accepted[sequence] += accepted
        overlap = FLOAT(0)
        for column in range(tested):
            overlap += verdict.expected_acceptance[sequence, column]
            state.tested_at[column] += 1
        for column in range(accepted):
            state.accepted_at[column] += 1
        state.expected[sequence] += overlap
        if rule.is_used:
            accepted_history[sequence] = accepted_history[sequence] * rule.fading + FLOAT(accepted)
            tested_history[sequence] = tested_history[sequence] * rule.fading + FLOAT(tested)
            acceptance = (accepted_history[sequence] + state.prior_accepted[sequence]) / (
                tested_history[sequence] + rule.prior_tested
            )
            length = 0
            while length < rule.thresholds.shape[0] and acceptance >= rule.thresholds[length]:
                length += 1

        count = 0
        ended = False
        while count < min(accepted + 1, limits[sequence] - generated[sequence]) and not ended:
            token = tokens[count]
            state.output[sequence, generated[sequence] + count] = token
            state.last_token[sequence] = token
            for end in eos_token_ids:
                ended = ended or token == end
            count += 1
        generated[sequence] += count
        state.positions[sequence] += count
        state.rounds[sequence] += 1
        room = limits[sequence] - generated[sequence] - 1
        done[sequence] = ended or room < 0
        draft_lens[sequence] = 0 if done[sequence] else min(length, room)
        report[sequence, 0] = count
        report[sequence, 1] = -1 if done[sequence] else draft_lens[sequence]
    for cache in range(caches.shape[0]):
        lengths = integers_at(caches[cache, 0], (batch,))
        for sequence in range(batch):
            lengths[sequence] += report[sequence, 0] - caches[cache, 1] * (drafted + 1)
