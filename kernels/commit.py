"""Commit: what a verified round changes in each sequence's state, all of it in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import backend
from .early_stop import EarlyStop
from .memory import DraftMemory
from .noise import NoiseKey

__all__ = ["DraftLengthRule", "RoundState", "StateArrays", "commit", "committed_tokens"]


@dataclass
class RoundState:
    """Everything a round reads and writes, in place: the same storage from round to round.

    Attributes:
        last_token: int64 [batch], the last committed token, in no cache yet.
        seeds: int64 [batch].
        rounds: int64 [batch], rounds begun.
        positions: int64 [batch], tokens of prompt and output committed so far.
        generated: int64 [batch], tokens of output committed so far.
        limits: int64 [batch], most tokens of output.
        done: bool [batch].
        draft_lens: int64 [batch], tokens the next round drafts.
        output: int64 [batch, capacity]; the last column takes what is not committed.
        accepted_history, tested_history: float32 [batch], fading counts for the draft-length rule.
        prior_accepted: float32 [batch], of the rule's `prior_tested` tokens those that are taken to have been
            accepted before the first round; minus infinity where nothing is ever to be drafted.
        drafted, tested, accepted: int64 [batch], totals; tested counts the drafted tokens up to and
            including the first one not accepted.
        expected: float32 [batch], total of sum min(p, q) over the tested tokens.
        tested_at, accepted_at: int64 [largest draft length], totals by position in the draft.
        memory: what drafts are corrected by, or None.
        offered_lens: int64 [batch], the draft lengths that the host knew of when it started the next round,
            which then drafts no more; None where it has read every report by then.
        early_stop: ends drafts before they have `draft_lens` tokens, or None.
    """

    last_token: Tensor
    seeds: Tensor
    rounds: Tensor
    positions: Tensor
    generated: Tensor
    limits: Tensor
    done: Tensor
    draft_lens: Tensor
    output: Tensor
    accepted_history: Tensor
    tested_history: Tensor
    prior_accepted: Tensor
    drafted: Tensor
    tested: Tensor
    accepted: Tensor
    expected: Tensor
    tested_at: Tensor
    accepted_at: Tensor
    memory: DraftMemory | None = None
    offered_lens: Tensor | None = None
    early_stop: EarlyStop | None = None

    @cached_property
    def noise(self) -> NoiseKey:
        """Where the noise of the round that is due lies."""
        return NoiseKey(seeds=self.seeds, rounds=self.rounds, positions=self.positions)


class StateArrays(NamedTuple):
    """What a commit reads and writes of a `RoundState`, for compiled kernels, as arrays or tensors."""

    last_token: Any
    rounds: Any
    positions: Any
    generated: Any
    limits: Any
    done: Any
    draft_lens: Any
    output: Any
    accepted_history: Any
    tested_history: Any
    prior_accepted: Any
    drafted: Any
    tested: Any
    accepted: Any
    expected: Any
    tested_at: Any
    accepted_at: Any


@dataclass(frozen=True)
class DraftLengthRule:
    """How a sequence's next draft length follows from its fading counts of accepted and tested tokens.

    With a = (accepted + prior_accepted) / (tested + prior_tested) it is the number of `thresholds`
    that a reaches; `prior_accepted` is the sequence's own.

    Attributes:
        thresholds: float32 [longest], ascending.
        fading: weight a past round keeps with each new one.
        prior_tested: tokens that are taken to have been tested before the first round.
    """

    thresholds: Tensor
    fading: float
    prior_tested: float

    def draft_lens(self, accepted: Tensor, tested: Tensor, prior_accepted: Tensor) -> Tensor:
        """Draft lengths int64 [batch] from counts float32 [batch]."""
        acceptance = (accepted + prior_accepted) / (tested + self.prior_tested)
        return (acceptance[:, None] >= self.thresholds).sum(dim=1)


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
    """Commit a round's tokens, count them, choose the next draft lengths, and roll the caches back.

    Args:
        draft_tokens: int64 [batch, drafted].
        accepted_lens, next_token: int64 [batch], the verdict on them.
        expected_acceptance: float32 [batch, drafted]; None counts nothing.
        eos_token_ids: int64 [count], possibly empty; the first to be committed ends its sequence.
        rule: chooses `state.draft_lens`; None keeps them.
        caches: for each model its lengths, int64 [batch], and whether it has stepped `drafted + 1` tokens
            already, which are then taken back but for the committed ones.

    Returns:
        int64 [batch, 2 + drafted + 1]: the count of tokens committed, the next draft length (-1 when
        done), and the tokens, of which the first are committed.
    """
    kind = backend(state.output.device)
    if kind != "torch":
        if kind == "numba":
            from .cpu.commit import commit as compiled
        else:
            from .gpu.commit import commit as compiled
        return compiled(
            state, draft_tokens, accepted_lens, next_token, expected_acceptance, eos_token_ids, rule, caches
        )
    live = ~state.done
    tokens, counts, done = committed_tokens(
        draft_tokens,
        accepted_lens,
        next_token,
        state.done,
        state.limits - state.generated,
        eos_token_ids,
    )
    drafted = draft_tokens.shape[1]
    column = torch.arange(drafted + 1, device=tokens.device)
    accepted = torch.where(live, accepted_lens, 0)
    lens = torch.where(live, state.draft_lens, 0)
    tested = torch.minimum(accepted + 1, lens)
    is_tested = column[:drafted] < tested[:, None]
    state.drafted.add_(lens)
    state.tested.add_(tested)
    state.accepted.add_(accepted)
    if expected_acceptance is not None:
        state.expected.add_(torch.where(is_tested, expected_acceptance, 0.0).sum(dim=1))
    state.tested_at[:drafted].add_(is_tested.sum(dim=0))
    state.accepted_at[:drafted].add_((column[:drafted] < accepted[:, None]).sum(dim=0))
    if rule is not None:
        fade = torch.where(live, rule.fading, 1.0)
        state.accepted_history.mul_(fade).add_(accepted)
        state.tested_history.mul_(fade).add_(tested)
        chosen = rule.draft_lens(state.accepted_history, state.tested_history, state.prior_accepted)
        state.draft_lens.copy_(torch.where(live, chosen, state.draft_lens))

    spare = state.output.shape[1] - 1
    columns = torch.where(column < counts[:, None], state.generated[:, None] + column, spare)
    state.output.scatter_(1, columns, tokens)
    last = tokens.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
    state.last_token.copy_(torch.where(counts > 0, last, state.last_token))
    for lengths, stepped in caches:
        lengths.add_(counts - (drafted + 1) if stepped else counts)
    state.generated.add_(counts)
    state.positions.add_(counts)
    state.rounds.add_(live)
    state.done.copy_(done)
    # What is drafted beyond the length limit, or for a sequence that is done, could not be committed.
    useful = torch.where(done, 0, (state.limits - state.generated - 1).clamp(min=0))
    state.draft_lens.copy_(torch.minimum(state.draft_lens, useful))
    return torch.cat([counts[:, None], torch.where(done, -1, state.draft_lens)[:, None], tokens], dim=1)


def committed_tokens(
    draft_tokens: Tensor,
    accepted_lens: Tensor,
    next_token: Tensor,
    done: Tensor,
    remaining: Tensor,
    eos_token_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens a round commits, and which sequences end with them.

    Args:
        draft_tokens: int64 [batch, drafted].
        accepted_lens: int64 [batch], in 0..drafted.
        next_token: int64 [batch], follows the accepted tokens.
        done: bool [batch], sequences that had ended before: they commit nothing.
        remaining: int64 [batch], tokens a sequence may still commit, at least 1 unless done.
        eos_token_ids: int64 [count], possibly empty; the first to be committed ends its sequence.

    Returns:
        tokens int64 [batch, drafted + 1], of which the first `counts` are committed;
        counts int64 [batch], 0..drafted + 1; done bool [batch].
    """
    tokens = torch.cat([draft_tokens, next_token[:, None]], dim=1)
    tokens.scatter_(1, accepted_lens[:, None], next_token[:, None])
    column = torch.arange(tokens.shape[1], device=tokens.device)
    available = torch.minimum(accepted_lens + 1, remaining)[:, None]
    is_end = (tokens[..., None] == eos_token_ids).any(dim=-1) & (column < available)
    before_end = is_end.cumsum(dim=1) - is_end.to(torch.int64) == 0
    counts = (before_end & (column < available)).sum(dim=1)
    counts = torch.where(done, 0, counts)
    return tokens, counts, done | is_end.any(dim=1) | (counts >= remaining)
