"""Rounds on a CPU as calls that take no arguments: there what CUDA graphs are on a GPU.

Where each pass reads all of a model, the interpreter's own code and data leave the processor's caches in
between, and a conversion of a tensor or a look-up costs many times what it costs elsewhere. So tensors keep
their places, and what is called has found them before the first round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from speculative_eft.kernels import DraftLoop, RoundState, Stream, Verdict, backend
from speculative_eft.models import EFTRunners, Runner, bind_passes, steps_together

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
        most: gives the largest of them.
        verdict, report: what the last part writes.
        read: gives the report as lists.
        logits: the large base's, the small base's and the tuned models'.
        pays_for_done: whether some pass runs rows of sequences that are done.
    """

    steps: list[tuple[str, Step]]
    counts: Tensor
    most: Callable[[], int]
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
            rows = max(int(self.most()), 1)
            assert self.verdict.log_probs is not None
            verdict = replace(self.verdict, log_probs=self.verdict.log_probs[:, :rows])
            logits = [model[:, :rows] for model in self.logits]
            report, submitted = self.report[:, : rows + 2], self.counts - 1
            record_trace(trace, state, report, verdict, submitted, logits, plan.vocab_size)
            timer.mark("other")


def can_bind(state: RoundState) -> bool:
    """Whether verification and commit can be bound: with Numba, and reports read at once."""
    return state.offered_lens is None and backend(state.output.device) == "numba"


def bind_pass(runner: Runner, block: Tensor, counts: Tensor, logits: Tensor) -> tuple[Step, bool]:
    """A pass of `runner` over the first `counts` tokens of each row of `block`, which writes `logits`.

    Returns it, and whether it runs the tokens after those too, as it does where `runner` binds no call.
    """
    call = runner.bind(block, counts, logits)
    if call is None:
        return lambda span: logits.copy_(runner.forward(block, span)), True
    return lambda _: call(), False


def _bind_draft(
    runners: Sequence[Runner],
    by_step: Sequence[Tensor],
    state: RoundState,
    plan: RoundPlan,
    block: Tensor,
    counts: Tensor,
    correction: Tensor,
    keeps_logits: bool,
) -> Callable[[], None] | None:
    """A draft by `runners`, whose logits go to `by_step`, float32 [drafted + 1, batch, vocab_size] each.

    `block` and what follows is as in `DraftLoop`. None where a model has no such steps.
    """
    draft = DraftLoop(
        last_token=state.last_token,
        draft_lens=state.draft_lens,
        done=state.done,
        block=block,
        counts=counts,
        coefficients=plan.coefficients,
        sampling=plan.draft_sampling,
        noise=state.noise,
        stream=Stream.SHARED if plan.acceptance == "shared_seed" else Stream.DRAFT,
        memory=state.memory,
        early_stop=state.early_stop,
        correction=correction,
        keeps_logits=keeps_logits,
    )
    if len(runners) == 1:
        return runners[0].bind_draft(draft, by_step[0])
    from speculative_eft.kernels.cpu.draft_loop import begin_arguments, begin_draft, draw, draw_arguments

    batch, steps = block.shape
    drawn, takes_part = (torch.zeros(batch, dtype=torch.int64) for _ in range(2))
    passes: list[list[Callable[[], None]]] = []
    for step in range(steps):
        calls = bind_passes(
            runners, drawn[:, None], takes_part, [logits[step][:, None] for logits in by_step]
        )
        if calls is None:
            return None
        passes.append(calls)
    rows = [tensor.numpy() for tensor in (block, counts, drawn, takes_part)]
    first = (*begin_arguments(draft), *rows[2:])
    logits = [None, *by_step] if plan.drafts_as_pair else [None, *by_step, None]
    draws = draw_arguments(draft, logits)
    lengths = [runner.lengths.numpy() for runner in runners]

    def run() -> None:
        longest, step = begin_draft(*first), 0
        while step < longest - keeps_logits:
            for call in passes[step]:
                call()
            for own in lengths:
                own += 1
            if step < steps - 1:
                longest = draw(step, *rows, *draws)
            step += 1
        for own in lengths:
            own += (0 if keeps_logits else steps) - step

    return run


def bind_round(
    runners: EFTRunners, state: RoundState, plan: RoundPlan, drafted: int, room: Room
) -> BoundRound | None:
    """The round of `drafted` tokens, good until rows or caches change; None where it must run as it is.

    That is where nothing can be bound, and where a model that drafts has no compiled steps for so many
    sequences.
    """
    if not can_bind(state):
        return None
    from speculative_eft.kernels.cpu.round_end import bind_round_end

    batch, vocab_size = state.last_token.shape[0], plan.vocab_size
    is_given = bool(runners.drafters)
    if drafted == 0 and not is_given and steps_together(runners, batch):
        plan = replace(plan, drafts_as_pair=True)
    # What a sequence does not draft is read, though it plays no part.
    block = torch.zeros(batch, drafted + 1, dtype=torch.int64)
    counts = torch.zeros(batch, dtype=torch.int64)

    def logits_of(name: str, runner: Runner) -> Tensor:
        return room.take(name, batch, drafted + 1, runner.vocab_size)

    models = runners.small
    drafting = runners.drafters or (models if plan.drafts_as_pair else runners.tuned)
    # A draft is made step by step, and each step's logits lie together.
    by_step = [
        logits_of(f"draft {index}", runner).view(drafted + 1, batch, -1)
        for index, runner in enumerate(drafting)
    ]
    corrected = drafted if is_given or state.memory is not None else 0
    correction = room.take("correction", batch, corrected, vocab_size)
    draft = _bind_draft(drafting, by_step, state, plan, block, counts, correction, is_given)
    if draft is None:
        return None
    large = logits_of("large", runners.large)
    small = [] if is_given else [logits.transpose(0, 1) for logits in by_step]
    scoring = models[len(small) :]
    scores = [logits_of(f"small {index}", runner) for index, runner in enumerate(scoring)]
    small += scores
    logits = [large, *small] + [correction] * (corrected > 0)
    laws = [room.take(name, batch, drafted + 1, vocab_size) for name in ("log target", "target", "draft")]
    verdict, report, end_round = bind_round_end(
        state, logits, block, counts, plan.coefficients.of_given_draft if is_given else plan.coefficients,
        plan.sampling, plan.draft_sampling, plan.acceptance, plan.eos_token_ids, plan.draft_length_rule,
        caches_of(runners, plan), laws,
    )  # fmt: skip
    scored, runs_all = bind_pass(runners.large, block, counts, large)
    steps: list[tuple[str, Step]] = [("draft", lambda _: draft()), ("large", scored)]
    for runner, rows in zip(scoring, scores, strict=True):
        scored, small_runs_all = bind_pass(runner, block, counts, rows)
        steps.append(("base", scored))
        runs_all |= small_runs_all
    steps.append(("verify", lambda _: end_round()))
    return BoundRound(
        steps=steps,
        counts=counts,
        most=counts.numpy().max,
        verdict=verdict,
        report=report,
        read=report.numpy().tolist,
        logits=[large, small[-1], *small[:-1]],
        pays_for_done=runs_all,
    )
