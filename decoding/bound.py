"""Rounds on a CPU as calls that take no arguments: there what CUDA graphs are on a GPU.

Where each pass reads all of a model, the interpreter's own code and data leave the processor's caches in
between, and a conversion of a tensor or a look-up costs many times what it costs elsewhere. So tensors keep
their places, and what is called has found them before the first round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from speculative_eft.kernels import RoundState, Stream, Verdict, backend
from speculative_eft.models import DraftStart, EFTRunners, Runner

from .round import PhaseTimer, RoundPlan, TraceBuffers, caches_of, record_trace

__all__ = ["BoundRound", "Room", "bind_pass", "bind_round", "can_bind"]

Step = Callable[[int], object]
"""Part of a round; its argument is the round's span."""


@dataclass
class Room:
    """Memory that rounds of any draft length share, a piece a name."""

    longest: int
    _pieces: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, batch: int, rows: int, columns: int) -> Tensor:
        """Contiguous float32 [batch, rows, columns] in the piece of `name`; rows up to `longest + 1`."""
        most = batch * (self.longest + 1) * columns
        if name not in self._pieces or self._pieces[name].numel() < most:
            self._pieces[name] = torch.empty(most)
        return self._pieces[name][: batch * rows * columns].view(batch, rows, columns)


@dataclass(frozen=True)
class BoundRound:
    """A round of a fixed number of drafted tokens.

    Attributes:
        steps: the parts, in turn, and the phase each is charged to.
        counts: one more than each sequence drafted, 0 for one that was done; drafting writes it.
        verdict, report: what the last part writes.
        read: gives the report as lists.
        logits: the large base's, the small base's and the tuned models'.
        pays_for_done: whether some pass runs rows of sequences that are done.
    """

    steps: list[tuple[str, Step]]
    counts: Tensor
    verdict: Verdict
    report: Tensor
    read: Callable[[], list[list[int]]]
    logits: list[Tensor]
    pays_for_done: bool

    def run(
        self, state: RoundState, plan: RoundPlan, span: int, timer: PhaseTimer, trace: TraceBuffers | None
    ) -> None:
        """`speculative_round`; the report is overwritten by the next round."""
        for phase, step in self.steps:
            step(span)
            timer.mark(phase)
        if trace is not None:
            submitted = self.counts - 1
            record_trace(trace, state, self.report, self.verdict, submitted, self.logits, plan.vocab_size)
            timer.mark("other")


def can_bind(state: RoundState) -> bool:
    """Whether verification and commit can be bound: with Numba, and reports read at once."""
    return state.offered_lens is None and backend(state.output.device) == "numba"


def bind_pass(runner: Runner, block: Tensor, counts: Tensor, logits: Tensor) -> tuple[Step, bool]:
    """A pass of `runner` over the first `counts` tokens of each row of `block`, which writes `logits`.

    And whether it runs all the others too.
    """
    call = runner.bind(block, counts, logits)
    if call is None:
        return lambda span: logits.copy_(runner.forward(block, span)), True
    return lambda _: call(), False


def bind_round(
    runners: EFTRunners, state: RoundState, plan: RoundPlan, drafted: int, room: Room
) -> BoundRound | None:
    """The round of `drafted` tokens, good until rows or caches change; None where it must run as it is.

    That is where nothing can be bound, with more than one tuned model or with the small base among those
    that draft, and where the tuned model has no compiled steps.
    """
    if len(runners.tuned) != 1 or plan.drafts_as_pair or not can_bind(state):
        return None
    from speculative_eft.kernels.cpu.settle import bind_settle

    (tuned,), batch, vocab_size = runners.tuned, state.last_token.shape[0], plan.vocab_size
    # What a sequence does not draft is read, though it plays no part.
    block = torch.zeros(batch, drafted + 1, dtype=torch.int64)
    counts = torch.zeros(batch, dtype=torch.int64)
    large_logits, base_logits, by_step = (
        room.take(name, batch, drafted + 1, runner.vocab_size)
        for name, runner in (("large", runners.large), ("base", runners.base), ("tuned", tuned))
    )
    # The draft is made step by step, and each step's logits lie together.
    by_step = by_step.view(drafted + 1, batch, -1)
    tuned_logits = by_step.transpose(0, 1)
    corrected = 0 if state.memory is None else drafted
    correction = room.take("correction", batch, corrected, vocab_size)
    draft = tuned.bind_draft(
        DraftStart(state.last_token, state.draft_lens, state.done), block, counts, plan.coefficients,
        plan.draft_sampling, state.noise, Stream.SHARED if plan.acceptance == "shared_seed" else Stream.DRAFT,
        state.memory, state.early_stop, by_step, correction,
    )  # fmt: skip
    if draft is None:
        return None
    logits = [large_logits, tuned_logits, base_logits] + [correction] * (corrected > 0)
    laws = [room.take(name, batch, drafted + 1, vocab_size) for name in ("log target", "target", "draft")]
    verdict, report, settle = bind_settle(
        state, logits, block, counts, plan.coefficients, plan.sampling, plan.draft_sampling, plan.acceptance,
        plan.eos_token_ids, plan.draft_length_rule, caches_of(runners, plan), laws,
    )  # fmt: skip
    large, large_runs_all = bind_pass(runners.large, block, counts, large_logits)
    base, base_runs_all = bind_pass(runners.base, block, counts, base_logits)
    return BoundRound(
        steps=[
            ("draft", lambda _: draft()),
            ("large", large),
            ("base", base),
            ("verify", lambda _: settle()),
        ],
        counts=counts,
        verdict=verdict,
        report=report,
        read=report.numpy().tolist,
        logits=[large_logits, base_logits, tuned_logits],
        pays_for_done=large_runs_all or base_runs_all,
    )
