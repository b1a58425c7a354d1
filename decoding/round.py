"""One round: draft, score, verify, commit, as a function of device state without host synchronisation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from speculative_eft.kernels import (
    AcceptanceRule,
    Coefficients,
    DraftLengthRule,
    DraftMemory,
    EarlyStop,
    RoundState,
    Sampling,
    Stream,
    Verdict,
    commit,
    draft_logits,
    draft_step,
    end_drafts,
    learn,
    recall,
    remember,
    side_by_side,
    verify,
)
from speculative_eft.models import EFTRunners, forward_each

__all__ = [
    "SOURCES",
    "Drafted",
    "PhaseTimer",
    "RoundPlan",
    "TraceBuffers",
    "caches_of",
    "commit_phase",
    "draft_phase",
    "new_round_state",
    "new_trace_buffers",
    "record_trace",
    "score_by_small",
    "speculative_round",
    "verify_phase",
]

SOURCES = ("draft", "residual", "bonus")
"""Where a committed token may come from; a trace has places in this."""
_DRAFT, _RESIDUAL, _BONUS = range(len(SOURCES))

_OUTPUT_STEP = 256


@dataclass(frozen=True)
class RoundPlan:
    """What stays the same from round to round.

    Attributes:
        drafts_as_pair: whether the small base steps along with the tuned models.
        vocab_size: the smallest of the models' vocabularies.
        eos_token_ids: int64 [count] on the device, possibly empty.
        draft_length_rule: chooses the next draft length; None keeps `RoundState.draft_lens` as it is.
        statistics: whether `RoundState.expected` and a trace are wanted.
    """

    coefficients: Coefficients
    sampling: Sampling
    draft_sampling: Sampling
    acceptance: AcceptanceRule
    drafts_as_pair: bool
    vocab_size: int
    eos_token_ids: Tensor
    draft_length_rule: DraftLengthRule | None
    statistics: bool


@dataclass
class TraceBuffers:
    """Per committed token: its source (of `SOURCES`) and its log-probabilities; [batch, capacity] each.

    The last column takes what is not committed.
    """

    source: Tensor
    large: Tensor
    tuned: list[Tensor]
    base: Tensor
    target: Tensor


def new_round_state(
    last_token: Tensor,
    prompt_lengths: Tensor,
    seeds: Tensor,
    max_new_tokens: int,
    draft_lens: Tensor,
    longest_draft: int,
    pad_token_id: int,
    memory: DraftMemory | None,
    prior_accepted: float = 0.0,
    early_stop: EarlyStop | None = None,
    lagging: bool = False,
) -> RoundState:
    """State of a batch that has been prefilled up to its last prompt token.

    Args:
        last_token, prompt_lengths, seeds, draft_lens: int64 [batch].
        longest_draft: an upper bound on any draft length.
        prior_accepted: of every sequence, as in `RoundState`; where a rule chooses draft lengths.
        lagging: whether the host starts a round before it has read the last one's report.
    """
    batch, device = last_token.shape[0], last_token.device

    def counts() -> Tensor:
        return torch.zeros(batch, dtype=torch.int64, device=device)

    # Few shapes, so that what was captured for one serves many.
    capacity = -(-max_new_tokens // _OUTPUT_STEP) * _OUTPUT_STEP if lagging else max_new_tokens

    def reals() -> Tensor:
        return torch.zeros(batch, dtype=torch.float32, device=device)

    return RoundState(
        last_token=last_token,
        seeds=seeds,
        rounds=counts(),
        positions=prompt_lengths.clone(),
        generated=counts(),
        limits=torch.full_like(last_token, max_new_tokens),
        done=torch.zeros(batch, dtype=torch.bool, device=device),
        draft_lens=draft_lens,
        output=torch.full((batch, capacity + 1), pad_token_id, dtype=torch.int64, device=device),
        accepted_history=reals(),
        tested_history=reals(),
        prior_accepted=reals() + prior_accepted,
        drafted=counts(),
        tested=counts(),
        accepted=counts(),
        expected=reals(),
        tested_at=torch.zeros(longest_draft, dtype=torch.int64, device=device),
        accepted_at=torch.zeros(longest_draft, dtype=torch.int64, device=device),
        memory=memory,
        early_stop=early_stop,
        offered_lens=draft_lens.clone() if lagging else None,
    )


def new_trace_buffers(state: RoundState, tuned: int) -> TraceBuffers:
    """Empty buffers for the trace of a batch, with log-probabilities of `tuned` tuned models."""

    def log_probs() -> Tensor:
        return torch.full_like(state.output, torch.nan, dtype=torch.float32)

    return TraceBuffers(
        source=torch.full_like(state.output, -1),
        large=log_probs(),
        tuned=[log_probs() for _ in range(tuned)],
        base=log_probs(),
        target=log_probs(),
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


@dataclass(frozen=True)
class Drafted:
    """What drafting leaves to verification.

    Attributes:
        tokens: int64 [batch, drafted].
        rows: for each model that drafted, first the tuned ones, its logits at every drafted token, [batch, >=
            vocab] each; empty where `EFTRunners.drafters` did so in their place.
        correction: float32 [batch, drafted, vocab], added to the logits that the tokens were drawn from, or,
            where there are `EFTRunners.drafters`, all of these; None without either.
    """

    tokens: Tensor
    rows: list[list[Tensor]]
    correction: Tensor | None


def speculative_round(
    runners: EFTRunners,
    state: RoundState,
    plan: RoundPlan,
    drafted: int,
    span: int,
    timer: PhaseTimer,
    trace: TraceBuffers | None = None,
) -> Tensor:
    """Run one round and update `state`, `trace` and the runners' lengths in place.

    Sequences that are done take part as padding and commit nothing. A sequence's result depends on its
    own state alone: `drafted` beyond its own draft length changes nothing for it.

    Args:
        drafted: tokens the batch drafts, at least every live sequence's `draft_lens`, or where there are
            `offered_lens` at least those; 0 is one step of plain sampling from the target.
        span: upper bound, known to the host, on any cache's length after the round.

    Returns:
        The report of `commit`, which is all the host needs to read.
    """
    draft = draft_phase(runners, state, plan, drafted, span)
    timer.mark("draft")
    return verify_phase(runners, state, plan, draft, span, timer, trace)


def draft_phase(runners: EFTRunners, state: RoundState, plan: RoundPlan, drafted: int, span: int) -> Drafted:
    """The first half of a round: `drafted` steps of the models that draft, or of others in their place."""
    if state.offered_lens is not None:
        # The host chose `drafted` before it knew the lengths that the last round asked for.
        offered = torch.minimum(state.draft_lens, state.offered_lens)
        state.offered_lens.copy_(state.draft_lens)
        state.draft_lens.copy_(offered)
    return _draft(runners, state, plan, drafted, span)


def verify_phase(
    runners: EFTRunners,
    state: RoundState,
    plan: RoundPlan,
    draft: Drafted,
    span: int,
    timer: PhaseTimer,
    trace: TraceBuffers | None = None,
) -> Tensor:
    """The second half of a round: scoring, verification and commit; returns the report of `commit`."""
    block = torch.cat([state.last_token[:, None], draft.tokens], dim=1)

    def score_by_large() -> Tensor:
        logits = runners.large.forward(block, span)
        timer.mark("large")
        return logits

    large, (*tuned, base) = side_by_side(
        block.device, score_by_large, lambda: score_by_small(runners, draft, block, span, timer)
    )
    logits = [large, base, *tuned]
    verdict = verify(
        large,
        tuned,
        base,
        draft.tokens,
        state.draft_lens,
        plan.coefficients.of_given_draft if runners.drafters else plan.coefficients,
        plan.sampling,
        plan.draft_sampling,
        state.noise,
        plan.acceptance,
        plan.vocab_size,
        draft.correction,
        plan.statistics,
    )
    return commit_phase(runners, state, plan, block, draft.tokens, verdict, logits, timer, trace)


def score_by_small(
    runners: EFTRunners, draft: Drafted, block: Tensor, span: int, timer: PhaseTimer
) -> list[Tensor]:
    """The tuned models' logits and the small base's, [batch, drafted + 1, >= vocab] each.

    Those that drafted take one step more, after the last drafted token, for the law of the bonus token.
    """
    models, stepping = runners.small, len(draft.rows)
    # Where nothing is drafted, all take the same step.
    stepped = forward_each(models if block.shape[1] == 1 else models[:stepping], block[:, -1:], span)
    for runner in models[:stepping]:
        runner.lengths.add_(1)
    logits = [
        torch.stack([*rows, last[:, 0]], dim=1) for rows, last in zip(draft.rows, stepped, strict=False)
    ]
    timer.mark("draft")
    rest = stepped[stepping:]
    logits += rest or [runner.forward(block, span) for runner in models[stepping:]]
    timer.mark("base")
    return logits


def commit_phase(
    runners: EFTRunners,
    state: RoundState,
    plan: RoundPlan,
    block: Tensor,
    draft_tokens: Tensor,
    verdict: Verdict,
    logits: Sequence[Tensor],
    timer: PhaseTimer,
    trace: TraceBuffers | None,
) -> Tensor:
    """The end of a round: what is remembered, committed and traced; returns the report of `commit`.

    `block` is the last committed token and `draft_tokens`, int64 [batch, drafted + 1]; `logits` are the large
    base's, the small base's and the tuned models' after each of these, [batch, drafted + 1, >= vocab].
    """
    if state.memory is not None:
        remember(state.memory, logits[0], logits[1], block, verdict.accepted_lens, state.done)
    if state.early_stop is not None:
        learn(state.early_stop, state.draft_lens, verdict.accepted_lens, state.done)
    timer.mark("verify")
    submitted = state.draft_lens if trace is None else state.draft_lens.clone()
    report = commit(
        state,
        draft_tokens,
        verdict.accepted_lens,
        verdict.next_token,
        verdict.expected_acceptance,
        plan.eos_token_ids,
        plan.draft_length_rule,
        caches_of(runners, plan),
    )
    if trace is not None:
        record_trace(trace, state, report, verdict, submitted, logits, plan.vocab_size)
    timer.mark("other")
    return report


def caches_of(runners: EFTRunners, plan: RoundPlan) -> list[tuple[Tensor, bool]]:
    """Each model's lengths, and whether it has stepped through the draft already."""
    is_stepped = not runners.drafters
    stepped = [is_stepped] * len(runners.tuned) + [is_stepped and plan.drafts_as_pair]
    lengths = [runner.lengths for runner in (*runners.tuned, runners.base)]
    return [(runners.large.lengths, False), *zip(lengths, stepped, strict=True)]


def _draft(runners: EFTRunners, state: RoundState, plan: RoundPlan, drafted: int, span: int) -> Drafted:
    stream = Stream.SHARED if plan.acceptance == "shared_seed" else Stream.DRAFT
    drafting = runners.small if plan.drafts_as_pair else runners.tuned
    stepping = runners.drafters or drafting
    token = state.last_token
    previous: Tensor | None = None
    tokens: list[Tensor] = []
    rows: list[list[Tensor]] = [[] for _ in drafting]
    corrections: list[Tensor] = []
    early, chances = state.early_stop, None
    if early is not None:
        chances = torch.empty(token.shape[0], device=token.device)
    for step in range(drafted):
        logits = forward_each(stepping, token[:, None], span)
        for runner, own, all_rows in zip(stepping, rows, logits, strict=True):
            own.append(all_rows[:, 0])
            runner.lengths.add_(1)
        if state.memory is not None:
            corrections.append(recall(state.memory, token, previous, plan.coefficients.beta))
        tuned, base = _by_role([own[-1] for own in rows], plan)
        drawn = draft_step(
            tuned,
            base,
            plan.coefficients,
            plan.draft_sampling,
            state.noise,
            stream,
            step,
            plan.vocab_size,
            corrections[-1] if corrections else None,
            chances,
        )
        token, previous = drawn, token
        if early is not None and chances is not None:
            end_drafts(early, state.draft_lens, step, chances)
        tokens.append(token)
    draft_tokens = torch.stack(tokens, dim=1) if tokens else state.last_token.new_empty(token.shape[0], 0)
    correction = torch.stack(corrections, dim=1) if corrections else None
    if not runners.drafters:
        return Drafted(draft_tokens, rows, correction)
    for runner in drafting:
        runner.lengths.sub_(drafted)
    if drafted:
        tuned, base = _by_role([torch.stack(own, dim=1) for own in rows], plan)
        correction = draft_logits(tuned, base, plan.coefficients, plan.vocab_size, correction)
    return Drafted(draft_tokens, [], correction)


def _by_role(logits: list[Tensor], plan: RoundPlan) -> tuple[list[Tensor], Tensor | None]:
    """Of the models that draft: the tuned ones', and the small base's where it drafts along."""
    return (logits[:-1], logits[-1]) if plan.drafts_as_pair else (logits, None)


def record_trace(
    trace: TraceBuffers,
    state: RoundState,
    report: Tensor,
    verdict: Verdict,
    submitted: Tensor,
    logits: Sequence[Tensor],
    vocab_size: int,
) -> None:
    """Note the tokens of a round that has been committed.

    `submitted` are the draft lengths that it verified; `logits` are the models', in the buffers' order.
    """
    if verdict.log_probs is None:
        return
    accepted_lens = verdict.accepted_lens
    counts, tokens = report[:, :1], report[:, 2:]
    column = torch.arange(tokens.shape[1], device=tokens.device)
    start = state.generated[:, None] - counts
    columns = torch.where(column < counts, start + column, trace.source.shape[1] - 1)
    replacement = torch.where(accepted_lens < submitted, _RESIDUAL, _BONUS)
    source = torch.where(column < accepted_lens[:, None], _DRAFT, replacement[:, None])
    trace.source.scatter_(1, columns, source)
    trace.target.scatter_(1, columns, verdict.log_probs)
    buffers = [trace.large, trace.base, *trace.tuned]
    for rows, buffer in zip(logits, buffers, strict=True):
        law = rows[..., :vocab_size].to(torch.float32)
        chosen = law.gather(-1, tokens[..., None])[..., 0]
        buffer.scatter_(1, columns, chosen - law.logsumexp(dim=-1))
