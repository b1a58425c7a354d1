"""The general path: rounds whose logits pass through any logits processor, written out and run eagerly.

Slower than the fused rounds of `round`, and exact by the same argument: the target is the mix after the
processors, the draft law the small models' mix after them, and verification compares these two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from speculative_eft.kernels import (
    Coefficients,
    RoundState,
    Sampling,
    Stream,
    draft_logits,
    draft_step,
    end_drafts,
    log_probabilities,
    recall,
    target_logits,
    verify,
)
from speculative_eft.models import EFTRunners

from .processors import Processing, process_rows
from .round import PhaseTimer, RoundPlan, TraceBuffers, commit_phase

__all__ = ["ScoreBuffers", "general_round", "new_score_buffers"]


@dataclass
class ScoreBuffers:
    """What transformers calls scores and logits, float32 [batch, capacity, vocab]; None where not wanted.

    The last column takes what is not committed.
    """

    scores: Tensor | None
    logits: Tensor | None


def new_score_buffers(state: RoundState, vocab_size: int, scores: bool, logits: bool) -> ScoreBuffers:
    """Buffers of zeros for every token that may be generated."""
    shape = (*state.output.shape, vocab_size)
    device = state.output.device
    return ScoreBuffers(
        torch.zeros(shape, device=device) if scores else None,
        torch.zeros(shape, device=device) if logits else None,
    )


def general_round(
    runners: EFTRunners,
    state: RoundState,
    plan: RoundPlan,
    processing: Processing,
    generated: Sequence[int],
    drafted: int,
    span: int,
    timer: PhaseTimer,
    trace: TraceBuffers | None,
    buffers: ScoreBuffers,
) -> Tensor:
    """`speculative_round` with processors; arguments and result as there.

    Args:
        generated: tokens of output committed so far, for each sequence.
        buffers: receive the committed tokens' scores and logits.
    """
    width = processing.prompts.shape[1]
    starts = [width + count for count in generated]
    lens = _live_draft_lens(state)
    history = torch.cat([processing.prompts, state.output, state.output[:, :drafted]], dim=1)
    first = torch.tensor(starts, device=history.device)

    batch = state.last_token.shape[0]
    law, draft_law = _selecting(batch, history.device), _plain(plan.draft_sampling)
    stream = Stream.SHARED if plan.acceptance == "shared_seed" else Stream.DRAFT
    token = state.last_token
    previous: Tensor | None = None
    tuned_rows: list[list[Tensor]] = [[] for _ in runners.tuned]
    base_rows: list[Tensor] = []
    draft_rows: list[Tensor] = []
    tokens: list[Tensor] = []
    chances = None if state.early_stop is None else torch.empty(batch, device=history.device)
    # One step more than tokens: its logits are part of the law of the bonus token.
    for step in range(drafted + 1):
        for runner, rows in zip(runners.tuned, tuned_rows, strict=True):
            rows.append(runner.forward(token[:, None], span))
            runner.lengths.add_(1)
        if plan.drafts_as_pair:
            base_rows.append(runners.base.forward(token[:, None], span))
            runners.base.lengths.add_(1)
        if step == max(0, *lens):
            break
        correction = None
        if state.memory is not None:
            correction = recall(state.memory, token, previous, plan.coefficients.beta)[:, None]
        mixed = draft_logits(
            [rows[-1] for rows in tuned_rows],
            base_rows[-1] if base_rows else None,
            plan.coefficients,
            plan.vocab_size,
            correction,
        )
        if plan.coefficients.filtered:
            mixed = log_probabilities(mixed)
        wanted = [int(step < length) for length in lens]
        draft_rows.append(
            process_rows(processing.draft, history, [start + step for start in starts], wanted, mixed)
        )
        drawn = draft_step(
            [draft_rows[-1][:, 0]], None, law, draft_law, state.noise, stream, step, plan.vocab_size, None,
            chances,
        )  # fmt: skip
        token, previous = drawn, token
        if state.early_stop is not None and chances is not None:
            end_drafts(state.early_stop, state.draft_lens, step, chances)
            lens = _live_draft_lens(state)
        tokens.append(token)
        history.scatter_(1, (first + step)[:, None], token[:, None])
    draft_tokens = torch.stack(tokens, dim=1) if tokens else state.last_token.new_empty(batch, 0)
    tuned = [torch.cat(rows, dim=1) for rows in tuned_rows]
    timer.mark("draft")

    block = torch.cat([state.last_token[:, None], draft_tokens], dim=1)
    large = runners.large.forward(block, span)
    timer.mark("large")
    base = torch.cat(base_rows, dim=1) if base_rows else runners.base.forward(block, span)
    timer.mark("base")
    logits = target_logits(large, tuned, base, plan.coefficients, plan.vocab_size)
    if plan.coefficients.filtered:
        # What adds up to it then is no mix of logits: processors, to some of which signs matter, get a law.
        logits = log_probabilities(logits)
    scores = process_rows(processing.target, history, starts, [length + 1 for length in lens], logits)
    # The row after the last drafted token has no draft law, and none is read there.
    draft = torch.cat([*draft_rows, torch.zeros_like(scores[:, :1])], dim=1)
    verdict = verify(
        scores,
        [draft],
        scores,
        draft_tokens,
        state.draft_lens,
        law,
        _plain(plan.sampling),
        draft_law,
        state.noise,
        plan.acceptance,
        plan.vocab_size,
        None,
        plan.statistics,
    )
    logits_of_all = [large, base, *tuned]
    report = commit_phase(runners, state, plan, block, draft_tokens, verdict, logits_of_all, timer, trace)
    for buffer, rows_of_all in ((buffers.scores, scores), (buffers.logits, logits)):
        if buffer is not None:
            _keep(buffer, rows_of_all, report, state.generated)
    timer.mark("other")
    return report


def _live_draft_lens(state: RoundState) -> list[int]:
    """Each sequence's draft length, -1 for one that is done."""
    lens: list[int] = torch.where(state.done, -1, state.draft_lens).tolist()
    return lens


def _selecting(batch: int, device: torch.device) -> Coefficients:
    """Weights under which what stands for the large model is the target and what stands for F the draft."""
    none, whole = torch.zeros(batch, 1, device=device), torch.ones(batch, 1, device=device)
    return Coefficients(alpha=none, beta=whole[:, 0], draft_alpha=whole, draft_base=None)


def _plain(sampling: Sampling) -> Sampling:
    """The draw alone: temperature and filters were among the processors."""
    if sampling.all_greedy:
        return replace(sampling, top_k=None, top_p=None, min_p=None)
    return Sampling(torch.ones_like(sampling.temperature))


def _keep(buffer: Tensor, rows: Tensor, report: Tensor, generated: Tensor) -> None:
    counts = report[:, :1]
    row = torch.arange(rows.shape[1], device=rows.device)
    spare = buffer.shape[1] - 1
    columns = torch.where(row < counts, generated[:, None] - counts + row, spare)
    buffer.scatter_(1, columns[..., None].expand_as(rows), rows)
