"""One round: draft, score, verify, commit, as a function of device state without host synchronisation."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from speculative_eft.kernels import (
    AcceptanceRule,
    Coefficients,
    NoiseKey,
    Sampling,
    Stream,
    Verdict,
    committed_tokens,
    draft_step,
    verify,
)
from speculative_eft.models import EFTRunners

from .draft_length import DraftLengthPolicy

__all__ = [
    "SOURCE_BONUS",
    "SOURCE_DRAFT",
    "SOURCE_RESIDUAL",
    "PhaseTimer",
    "RoundPlan",
    "RoundState",
    "new_round_state",
    "speculative_round",
]

SOURCE_DRAFT, SOURCE_RESIDUAL, SOURCE_BONUS = 0, 1, 2


@dataclass(frozen=True)
class RoundPlan:
    """What stays the same from round to round.

    Attributes:
        drafts_as_pair: whether the small base steps along with the tuned models.
        vocab_size: the smallest of the models' vocabularies.
        eos_token_ids: int64 [count] on the device, possibly empty.
        policy: chooses the next draft length; None keeps `RoundState.draft_lens` as it is.
    """

    coefficients: Coefficients
    sampling: Sampling
    draft_sampling: Sampling
    acceptance: AcceptanceRule
    drafts_as_pair: bool
    vocab_size: int
    eos_token_ids: Tensor
    policy: DraftLengthPolicy | None


@dataclass
class TraceBuffers:
    """Per committed token: its source and its log-probabilities; [batch, capacity] each.

    The last column takes what is not committed.
    """

    source: Tensor
    large: Tensor
    tuned: list[Tensor]
    base: Tensor
    target: Tensor


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
        accepted_history, tested_history: float32 [batch], fading counts for the draft-length policy.
        drafted, tested, accepted: int64 [batch], totals; tested counts the drafted tokens up to and
            including the first one not accepted.
        expected: float32 [batch], total of sum min(p, q) over the tested tokens.
        tested_at, accepted_at: int64 [largest draft length], totals by position in the draft.
        trace: buffers for the per-token trace, or None.
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
    drafted: Tensor
    tested: Tensor
    accepted: Tensor
    expected: Tensor
    tested_at: Tensor
    accepted_at: Tensor
    trace: TraceBuffers | None


def new_round_state(
    last_token: Tensor,
    prompt_lengths: Tensor,
    seeds: Tensor,
    max_new_tokens: int,
    draft_lens: Tensor,
    longest_draft: int,
    pad_token_id: int,
    tuned_traced: int | None,
) -> RoundState:
    """State of a batch that has been prefilled up to its last prompt token.

    Args:
        last_token, prompt_lengths, seeds, draft_lens: int64 [batch].
        longest_draft: an upper bound on any draft length.
        tuned_traced: number of tuned models to trace, or None for no trace.
    """
    batch, device = last_token.shape[0], last_token.device
    shape = (batch, max_new_tokens + 1)

    def counts() -> Tensor:
        return torch.zeros(batch, dtype=torch.int64, device=device)

    def reals() -> Tensor:
        return torch.zeros(batch, dtype=torch.float32, device=device)

    def log_probs() -> Tensor:
        return torch.full(shape, torch.nan, dtype=torch.float32, device=device)

    trace = None
    if tuned_traced is not None:
        trace = TraceBuffers(
            source=torch.full(shape, -1, dtype=torch.int64, device=device),
            large=log_probs(),
            tuned=[log_probs() for _ in range(tuned_traced)],
            base=log_probs(),
            target=log_probs(),
        )
    return RoundState(
        last_token=last_token,
        seeds=seeds,
        rounds=counts(),
        positions=prompt_lengths.clone(),
        generated=counts(),
        limits=torch.full_like(last_token, max_new_tokens),
        done=torch.zeros(batch, dtype=torch.bool, device=device),
        draft_lens=draft_lens,
        output=torch.full(shape, pad_token_id, dtype=torch.int64, device=device),
        accepted_history=reals(),
        tested_history=reals(),
        drafted=counts(),
        tested=counts(),
        accepted=counts(),
        expected=reals(),
        tested_at=torch.zeros(longest_draft, dtype=torch.int64, device=device),
        accepted_at=torch.zeros(longest_draft, dtype=torch.int64, device=device),
        trace=trace,
    )


@dataclass
class PhaseTimer:
    """Wall-clock seconds by phase of the rounds timed so far; meaningful where calls are synchronous."""

    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def mark(self, phase: str) -> None:
        """Charge the time since the previous mark to `phase`."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def speculative_round(
    runners: EFTRunners, state: RoundState, plan: RoundPlan, drafted: int, span: int, timer: PhaseTimer
) -> Tensor:
    """Run one round and update `state` and the runners' lengths in place.

    Sequences that are done take part as padding and commit nothing. A sequence's result depends on its
    own state alone: `drafted` beyond its own draft length changes nothing for it.

    Args:
        drafted: tokens the batch drafts, at least every live sequence's `draft_lens`; 0 is one step of
            plain sampling from the target.
        span: upper bound, known to the host, on any cache's length after the round.

    Returns:
        int64 [batch, 2 + drafted + 1]: the count of tokens committed, the next draft length (-1 when
        done), and the tokens, of which the first are committed. This is all the host needs to read.
    """
    noise = NoiseKey(seeds=state.seeds, rounds=state.rounds, positions=state.positions)
    draft_tokens, tuned, paired_base = _draft(runners, state, plan, noise, drafted, span)
    timer.mark("draft")
    block = torch.cat([state.last_token[:, None], draft_tokens], dim=1)
    large = runners.large.forward(block, span)
    timer.mark("large")
    base = runners.base.forward(block, span) if paired_base is None else paired_base
    timer.mark("base")
    draft_lens = state.draft_lens.clone()
    verdict = verify(
        large,
        tuned,
        base,
        draft_tokens,
        draft_lens,
        plan.coefficients,
        plan.sampling,
        plan.draft_sampling,
        noise,
        plan.acceptance,
        plan.vocab_size,
    )
    timer.mark("verify")
    tokens, counts, done = committed_tokens(
        draft_tokens,
        verdict.accepted_lens,
        verdict.next_token,
        state.done,
        state.limits - state.generated,
        plan.eos_token_ids,
    )
    if state.trace is not None:
        _record_trace(state, plan, verdict, draft_lens, tokens, counts, large, tuned, base)
    _count(state, plan, verdict, draft_lens)
    _commit(runners, state, plan, tokens, counts, done, drafted)
    report = torch.cat(
        [counts[:, None], torch.where(state.done, -1, state.draft_lens)[:, None], tokens], dim=1
    )
    timer.mark("other")
    return report


def _draft(
    runners: EFTRunners, state: RoundState, plan: RoundPlan, noise: NoiseKey, drafted: int, span: int
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Draft tokens [batch, drafted], the tuned logits and, for a pair, the base's, with drafted + 1 rows."""
    device = state.last_token.device
    gumbel: Tensor | None = None
    if drafted and not plan.sampling.all_greedy:
        stream = Stream.SHARED if plan.acceptance == "shared_seed" else Stream.DRAFT
        gumbel = noise.gumbel(stream, torch.arange(drafted, device=device), plan.vocab_size)
    token = state.last_token
    tokens: list[Tensor] = []
    tuned_rows: list[list[Tensor]] = [[] for _ in runners.tuned]
    base_rows: list[Tensor] = []
    # One step more than tokens: its logits are the law of the bonus token.
    for step in range(drafted + 1):
        for runner, rows in zip(runners.tuned, tuned_rows, strict=True):
            rows.append(runner.forward(token[:, None], span)[:, 0])
            runner.lengths.add_(1)
        if plan.drafts_as_pair:
            base_rows.append(runners.base.forward(token[:, None], span)[:, 0])
            runners.base.lengths.add_(1)
        if step < drafted:
            token = draft_step(
                [rows[-1] for rows in tuned_rows],
                base_rows[-1] if base_rows else None,
                plan.coefficients,
                plan.draft_sampling,
                None if gumbel is None else gumbel[:, step],
                plan.vocab_size,
            )
            tokens.append(token)
    draft_tokens = torch.stack(tokens, dim=1) if tokens else state.last_token.new_empty(token.shape[0], 0)
    tuned = [torch.stack(rows, dim=1) for rows in tuned_rows]
    return draft_tokens, tuned, torch.stack(base_rows, dim=1) if base_rows else None


def _commit(
    runners: EFTRunners,
    state: RoundState,
    plan: RoundPlan,
    tokens: Tensor,
    counts: Tensor,
    done: Tensor,
    drafted: int,
) -> None:
    state.output.scatter_(1, _columns(state, tokens, counts), tokens)
    last = tokens.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
    state.last_token.copy_(torch.where(counts > 0, last, state.last_token))
    for runner in (runners.large, *runners.tuned, runners.base):
        stepped = runner in runners.tuned or (plan.drafts_as_pair and runner is runners.base)
        runner.lengths.add_(counts - (drafted + 1) if stepped else counts)
    state.generated.add_(counts)
    state.positions.add_(counts)
    state.rounds.add_((~state.done).to(torch.int64))
    state.done.copy_(done)
    # What is drafted beyond the length limit, or for a sequence that is done, could not be committed.
    useful = torch.where(done, 0, (state.limits - state.generated - 1).clamp(min=0))
    state.draft_lens.copy_(torch.minimum(state.draft_lens, useful))


def _columns(state: RoundState, tokens: Tensor, counts: Tensor) -> Tensor:
    """Output columns of a round's tokens; the last, spare column for those not committed."""
    column = torch.arange(tokens.shape[1], device=tokens.device)
    spare = state.output.shape[1] - 1
    return torch.where(column < counts[:, None], state.generated[:, None] + column, spare)


def _count(state: RoundState, plan: RoundPlan, verdict: Verdict, draft_lens: Tensor) -> None:
    drafted = verdict.expected_acceptance.shape[1]
    live = ~state.done
    accepted = torch.where(live, verdict.accepted_lens, 0)
    lens = torch.where(live, draft_lens, 0)
    tested = torch.minimum(accepted + 1, lens)
    column = torch.arange(drafted, device=tested.device)
    is_tested = column < tested[:, None]
    state.drafted.add_(lens)
    state.tested.add_(tested)
    state.accepted.add_(accepted)
    state.expected.add_((verdict.expected_acceptance * is_tested).sum(dim=1))
    state.tested_at[:drafted].add_(is_tested.sum(dim=0))
    state.accepted_at[:drafted].add_((column < accepted[:, None]).sum(dim=0))
    if plan.policy is not None:
        fade = torch.where(live, plan.policy.fading, 1.0)
        state.accepted_history.mul_(fade).add_(accepted)
        state.tested_history.mul_(fade).add_(tested)
        chosen = plan.policy.draft_lens(state.accepted_history, state.tested_history)
        state.draft_lens.copy_(torch.where(live, chosen, state.draft_lens))


def _record_trace(
    state: RoundState,
    plan: RoundPlan,
    verdict: Verdict,
    draft_lens: Tensor,
    tokens: Tensor,
    counts: Tensor,
    large: Tensor,
    tuned: list[Tensor],
    base: Tensor,
) -> None:
    assert state.trace is not None
    columns = _columns(state, tokens, counts)
    column = torch.arange(tokens.shape[1], device=tokens.device)
    replacement = torch.where(verdict.accepted_lens < draft_lens, SOURCE_RESIDUAL, SOURCE_BONUS)
    source = torch.where(column < verdict.accepted_lens[:, None], SOURCE_DRAFT, replacement[:, None])
    state.trace.source.scatter_(1, columns, source)
    logits = [large, base, verdict.target_log_law, *tuned]
    buffers = [state.trace.large, state.trace.base, state.trace.target, *state.trace.tuned]
    for rows, buffer in zip(logits, buffers, strict=True):
        law = rows[..., : plan.vocab_size].to(torch.float32)
        chosen = law.gather(-1, tokens[..., None])[..., 0]
        buffer.scatter_(1, columns, chosen - law.logsumexp(dim=-1))
