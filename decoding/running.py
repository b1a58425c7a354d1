"""Sequences that run together: rounds ahead of the host, and rows that follow who is still running."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeAlias

import torch
from torch import Tensor

from speculative_eft.kernels import RoundState
from speculative_eft.models import CapturedFunctions, EFTRunners, Runner

from .bound import BoundRound, Room, bind_round
from .round import PhaseTimer, RoundPlan, TraceBuffers, draft_phase, speculative_round, verify_phase
from .sequences import end_rows, narrowed, rearrange, refill

__all__ = ["CapturedBatch", "Report", "RunningBatch"]

Report: TypeAlias = dict[int, list[int]]
"""For each sequence of a round: tokens committed, the next draft length (-1 when done), and the tokens."""

_ROUNDS_AHEAD = 1
"""Rounds that a host starts before it reads the first one's report, so that a GPU never waits for it."""

_SPAN_STEP = 1024

_MOST_KINDS = 4
"""Kinds of calls whose graphs are kept, such as sampled and greedy ones; each has a memory of drafts."""


Parts: TypeAlias = tuple[RoundState, RoundPlan, "TraceBuffers | None"]


def rounded_span(span: int) -> int:
    """For few spans, so that few graphs are captured: what lies beyond a sequence's length is not read."""
    return -(-span // _SPAN_STEP) * _SPAN_STEP


@dataclass(eq=False)
class _Kind:
    """Calls whose parts differ only in what their tensors hold, so that the same graphs serve them all.

    Attributes:
        parts: the state, plan and trace of all rows.
        narrowed: the same of fewer rows, by their number.
    """

    parts: Parts
    narrowed: dict[int, Parts] = field(default_factory=dict)


@dataclass
class CapturedBatch:
    """What the graphs of a batch's rounds read and write: kept from call to call, since they know addresses.

    Attributes:
        graphs: captures the rounds.
        kinds: the last few kinds of calls, the present one last.
        addresses: of the runners' weights and caches, which tell whether these are still the same.
        lengths: of those caches, kept so that no others are found at their addresses.
    """

    graphs: CapturedFunctions
    kinds: list[_Kind] = field(default_factory=list)
    addresses: list[float] = field(default_factory=list)
    lengths: list[Tensor] = field(default_factory=list)

    @property
    def narrowed(self) -> dict[int, Parts]:
        """The parts of the present kind, by the number of their rows."""
        return self.kinds[-1].narrowed

    def take(self, parts: Parts, runners: EFTRunners) -> Parts:
        """`parts`, or those of an earlier call of their kind, which now hold the same and graphs know."""
        if not self.kinds or parts[0] is not self.kinds[-1].parts[0]:
            # To look everywhere takes a millisecond or more; a batch that goes on has been looked at.
            self._forget_useless(runners)
        kind = next((kind for kind in self.kinds if refill(list(kind.parts), list(parts))), None)
        if kind is None:
            kind = _Kind(parts)
        else:
            self.kinds.remove(kind)
        self.kinds.append(kind)
        return kind.parts

    def _forget_useless(self, runners: EFTRunners) -> None:
        addresses: list[float] = []
        for runner in runners.every:
            addresses += (runner.lengths.data_ptr(), *runner.addresses)
        if addresses != self.addresses or len(self.kinds) > _MOST_KINDS:
            self.forget()
            self.addresses, self.lengths = addresses, [runner.lengths for runner in runners.every]

    def forget(self) -> None:
        """Let go of all graphs and of what they read and write."""
        self.graphs.clear()
        self.kinds.clear()

    def run(self, key: Hashable, *functions: Callable[..., Any]) -> Any:
        """`CapturedFunctions.run` for rounds of the present kind."""
        return self.graphs.run((id(self.kinds[-1]), key), *functions)


@dataclass
class _Sent:
    """A report on its way to the host, and what its round may add to any sequence."""

    report: Tensor
    arrived: torch.cuda.Event | None
    sequences: list[int | None]
    most: int


class RunningBatch:
    """Runs rounds of sequences, each of which has a row of the state and the slot of that number.

    A sequence that is done is masked, and leaves its row to another as soon as fewer rows hold the rest.
    Where the state has `offered_lens`, each report is read one round late.

    Attributes:
        order: the sequence in each row of the state, None where there was none yet.
        rows: how many rows, the first ones, take part in the rounds to come.
        rounds: that were started.
        waited: seconds for which the host had nothing to do until a GPU's report arrived.
    """

    def __init__(
        self,
        runners: EFTRunners,
        state: RoundState,
        plan: RoundPlan,
        trace: TraceBuffers | None,
        lengths: Sequence[int],
        limits: Sequence[int],
        captured: CapturedBatch | None = None,
    ) -> None:
        """Take sequences 0, 1, ... that are filled, in the rows of these numbers.

        Args:
            lengths, limits: of each the length in the longest of its caches, and the most it can become.
            captured: has graphs of the rounds, and has taken these parts; None runs them as they are.
        """
        self._captured = captured
        self.waited, self.rounds = 0.0, 0
        self.runners, self.state, self.plan, self.trace = runners, state, plan, trace
        self.order: list[int | None] = list(range(len(lengths)))
        self.rows = len(lengths)
        self._ended: set[int] = set()
        self._lengths, self._limits = dict(enumerate(lengths)), dict(enumerate(limits))
        self._sent: deque[_Sent] = deque()
        self._bound: dict[int, BoundRound | None] = {}
        self._room = Room(state.tested_at.shape[0])
        self._narrow()

    def _use_rows(self) -> None:
        for runner in self._runners():
            runner.use(self.rows)

    def _narrow(self) -> None:
        """Let rounds be of `rows` rows."""
        self._use_rows()
        self._bound.clear()
        if self.rows == 0:
            # There are no rounds, and before anyone has joined no kind of calls whose graphs these would be.
            return
        kept = {} if self._captured is None else self._captured.narrowed
        if self.rows not in kept:
            trace = None if self.trace is None else narrowed(self.trace, self.rows)
            kept[self.rows] = narrowed(self.state, self.rows), narrowed(self.plan, self.rows), trace
        self._parts = kept[self.rows]

    def _runners(self) -> list[Runner]:
        """Those whose caches hold the sequences."""
        return self.runners.every

    @property
    def pays_for_done(self) -> bool:
        """Whether a sequence that is done costs time while it has a row; in most bound rounds it does not."""
        return any(bound is None or bound.pays_for_done for bound in self._bound.values()) or not self._bound

    def advance(self, drafted: int, timer: PhaseTimer, first: bool = False) -> Report | None:
        """Start a round that drafts `drafted` tokens; the oldest report that is due, or None.

        `drafted` is the longest draft length of the last report that was read. A `first` round, of runners
        that are this call's own, has its report due at once, and no graph of it would serve another round.
        None is started where those whose reports are due may have ended all sequences: to wait for one report
        takes less time than a round in vain.
        """
        if self._sent and self._may_be_over():
            return self._read(self._sent.popleft())
        self.rounds += 1
        sequences = self.order[: self.rows]
        if self._captured is not None and not first and self.plan.draft_length_rule is None:
            # One graph for all rounds of a fixed length, also where the last tokens leave less to draft.
            drafted = self.state.tested_at.shape[0]
        bound = None if self._captured is not None or first else self._bound_round(drafted)
        # Passes that are bound look up lengths themselves.
        span = self._span(sequences, drafted) if bound is None or bound.pays_for_done else 0
        if bound is not None:
            state, plan, trace = self._parts
            bound.run(state, plan, span, timer, trace)
            return self._noted(sequences, bound.read())
        report = self._round(drafted, span, timer, first)
        self._sent.append(self._send(report, sequences, drafted + 1))
        due = first or self.state.offered_lens is None or len(self._sent) > _ROUNDS_AHEAD
        return self._read(self._sent.popleft()) if due else None

    def _live(self) -> list[int]:
        """The sequences that are not known to have ended."""
        return [index for index in self.order[: self.rows] if index is not None and index not in self._ended]

    def _ahead(self) -> int:
        """Tokens that rounds which were started may add to what is known of a sequence."""
        return sum(sent.most for sent in self._sent)

    def _may_be_over(self) -> bool:
        ahead = self._ahead()
        return all(self._lengths[index] + ahead >= self._limits[index] for index in self._live())

    def _span(self, sequences: Sequence[int | None], drafted: int) -> int:
        ahead = self._ahead()
        reached = [
            min(self._lengths[index] + ahead, self._limits[index]) for index in sequences if index is not None
        ]
        return max(reached, default=0) + drafted + 1

    def _round(self, drafted: int, span: int, timer: PhaseTimer, first: bool) -> Tensor:
        state, plan, trace = self._parts
        if self._captured is None or first:
            return speculative_round(self.runners, state, plan, drafted, span, timer, trace)
        span = rounded_span(span)
        report: Tensor = self._captured.run(
            (self.rows, drafted, span),
            lambda: draft_phase(self.runners, state, plan, drafted, span),
            lambda draft: verify_phase(self.runners, state, plan, draft, span, PhaseTimer(), trace),
        )
        return report

    def _bound_round(self, drafted: int) -> BoundRound | None:
        if self.rows == 1 and drafted > 0:
            # Of one sequence a round of the longest draft takes no more time for a shorter one.
            drafted = self.state.tested_at.shape[0]
        if drafted not in self._bound:
            self._bound[drafted] = self._bind(drafted)
        return self._bound[drafted]

    def _bind(self, drafted: int) -> BoundRound | None:
        state, plan, _ = self._parts
        return bind_round(self.runners, state, plan, drafted, self._room)

    def _send(self, report: Tensor, sequences: list[int | None], most: int) -> _Sent:
        if report.device.type != "cuda":
            return _Sent(report, None, sequences, most)
        # Torch keeps pinned memory that was let go, and gives it again once its copy has ended.
        pinned = torch.empty_like(report, device="cpu", pin_memory=True)
        pinned.copy_(report, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return _Sent(pinned, arrived, sequences, most)

    def _read(self, sent: _Sent) -> Report:
        if sent.arrived is not None:
            begun = perf_counter()
            sent.arrived.synchronize()
            self.waited += perf_counter() - begun
        return self._noted(sent.sequences, sent.report.tolist())

    def _noted(self, sequences: Sequence[int | None], rows: list[list[int]]) -> Report:
        """The report of a round of these sequences, by which their lengths have grown or they have ended."""
        report = {index: row for index, row in zip(sequences, rows, strict=True) if index is not None}
        for index, (count, following, *_) in report.items():
            # Not of a sequence that has since left its row to another.
            if index in self._lengths:
                self._lengths[index] += count
                if following < 0:
                    self._ended.add(index)
        return report

    def join(self, sequence: int, length: int, limit: int) -> int:
        """Put a new sequence into a free row, of which there must be one; returns the row.

        Rounds go on once the row is filled and there is a plan for it, see `plan_anew`.
        """
        live = set(self._live())
        row = next((row for row in range(self.rows) if self.order[row] not in live), self.rows)
        if row == self.rows:
            # Rows that nobody has yet are masked, as those are that have ended.
            self.rows = min(self._rows_for(row + 1), self.state.done.shape[0])
            self.order += [None] * (self.rows - len(self.order))
        left = self.order[row]
        if left is not None:
            del self._lengths[left], self._limits[left]
            self._ended.discard(left)
        self.order[row] = sequence
        self._lengths[sequence], self._limits[sequence] = length, limit
        self._use_rows()
        return row

    def _rows_for(self, live: int) -> int:
        """Rows for rounds of so many sequences: with graphs a power of two, so that few are captured."""
        return live if self._captured is None or live == 0 else 1 << (live - 1).bit_length()

    def plan_anew(self, plan: RoundPlan) -> None:
        """Go on with another plan, whose rows are in the present order."""
        self.plan = plan
        if self._captured is not None:
            taken = self._captured.take((self.state, plan, self.trace), self.runners)
            self.state, self.plan, self.trace = taken
        self._narrow()

    def end(self, sequences: Sequence[int]) -> None:
        """Mark sequences that the host ended."""
        self._ended.update(sequences)
        end_rows(self.state, [row for row, index in enumerate(self.order) if index in sequences])

    def compact(self) -> None:
        """Give the rows of the sequences that have ended to others, where fewer rows then hold the rest."""
        live = set(self._live())
        rows = self._rows_for(len(live))
        if rows >= self.rows:
            return
        beyond = [row for row in range(rows, self.rows) if self.order[row] in live]
        free = [row for row in range(rows) if self.order[row] not in live][: len(beyond)]
        self._rearrange(free + beyond, beyond + free)
        self.rows = rows
        if rows == 0:
            # Rounds ahead of the host did nothing.
            self._sent.clear()
        self._narrow()

    def _rearrange(self, rows: Sequence[int], sources: Sequence[int]) -> None:
        """Let each of `rows` hold what its source, another of them, holds."""
        if not rows:
            return
        span = self._span([self.order[row] for row in rows], 0)
        for runner in self._runners():
            runner.rearrange(rows, sources, span)
        for part in (self.state, self.trace):
            if part is not None:
                rearrange(part, rows, sources)
        moved = [self.order[source] for source in sources]
        for row, index in zip(rows, moved, strict=True):
            self.order[row] = index

    def restore(self) -> None:
        """Give every sequence the row of its number again."""
        places = {index: row for row, index in enumerate(self.order) if index is not None}
        rows = [row for row, index in enumerate(self.order) if index != row]
        self._rearrange(rows, [places[row] for row in rows])
        self.rows = len(self.order)
        self._use_rows()
