"""Decoders measured against each other in interleaved pairs, so that a machine's moods hit all of them.

Every decoder answers a batch of prompts before the next batch's turn comes: A B C, B C A, ... Where runs can
pause, they do so every few milliseconds for the others of the turn, and a decoder that is faster than the
reference answers again until the reference has, so that all meet the same moods. A pair is one decoder's time
and the reference's in the same turn, and ratios of speed are taken within pairs. How lucky the reference is
shows in every ratio, so it may run several times a turn, in places far from each other.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from speculative_eft.decoding import EFTStats

from .machine import peak_memory
from .prompts import PromptBatch
from .turns import Watch, take_turns

__all__ = [
    "PHASES", "Comparison", "Decoder", "Measurement", "Percentiles", "Spread", "compare", "sampling_options",
]  # fmt: skip

PHASES = ("draft", "large", "base", "verify", "other")
"""Phases of a round in `EFTStats.seconds`."""


class Decoder(Protocol):
    """What is compared: anything with `EFTDecoder`'s `generate`."""

    @property
    def generate(self) -> Callable[..., Any]:
        """Takes input_ids, attention_mask, a streamer (of several sequences a function) and options; for
        `return_dict_in_generate=True` it gives an `EFTOutput`.
        """


@dataclass(frozen=True)
class Spread:
    """A sample's median, quartiles and extremes."""

    median: float
    lower_quartile: float
    upper_quartile: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value; quartiles by linear interpolation."""
        lower, median, upper = (
            statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3
        )
        return cls(median, lower, upper, min(values), max(values))


@dataclass(frozen=True)
class Percentiles:
    """The 50th, 95th and 99th percentile of a sample, by linear interpolation."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        """The percentiles of at least one value."""
        return cls(*(float(value) for value in np.percentile(values, (50, 95, 99))))


@dataclass(frozen=True)
class Measurement:
    """One decoder's runs, one a turn; counts and shares are over all of them.

    Attributes:
        name: as given to `compare`.
        run_tokens: new tokens of each run, all sequences together, in the order of the runs.
        run_seconds: wall-clock seconds of each run, prefill included; the mean where a turn repeated it.
        same_output: runs whose tokens are those of the reference's run of the pair.
        tokens_per_second: over runs.
        ratio: this decoder's tokens a second over the reference's, over pairs.
        seconds_to_first_token: until a sequence's first tokens came, the mean of a batch, over runs.
        milliseconds_per_token: what a sequence waits for a token after its first, over tokens, those of one
            round sharing its time.
        rounds: rounds of the batch; plain decoding has one a token.
        tokens_per_round: new tokens a sequence gains a round.
        drafted_per_round: tokens drafted a sequence and round.
        tested_tokens: drafted tokens up to and including the first one not accepted in each round.
        acceptance_rate: share of the tested tokens that were accepted; None where nothing was tested.
        expected_acceptance: mean of sum min(p, q) over the tested tokens, which the token rule's rate
            estimates and the block rule's exceeds; None where nothing was tested.
        accepted_by_position: at each position of the draft, the share of tested tokens accepted.
        large_calls_per_token: rounds a sequence needs for one token; each has one call of the large model.
        milliseconds_per_round: of the batch, by phase, prefill left out.
        prefill_milliseconds: of the batch.
        peak_memory_bytes: most memory held in the warm-up run, what others had loaded included: on a GPU
            torch's allocations, on a CPU the process's; None where the system does not tell.
    """

    name: str
    run_tokens: tuple[int, ...]
    run_seconds: tuple[float, ...]
    same_output: int
    tokens_per_second: Spread
    ratio: Spread
    seconds_to_first_token: Spread
    milliseconds_per_token: Percentiles
    rounds: int
    tokens_per_round: float
    drafted_per_round: float
    tested_tokens: int
    acceptance_rate: float | None
    expected_acceptance: float | None
    accepted_by_position: tuple[float, ...]
    large_calls_per_token: float
    milliseconds_per_round: dict[str, float]
    prefill_milliseconds: float
    peak_memory_bytes: int | None

    @property
    def speeds(self) -> list[float]:
        """Tokens a second of each run."""
        return [tokens / seconds for tokens, seconds in zip(self.run_tokens, self.run_seconds, strict=True)]

    @property
    def phases_per_token(self) -> dict[str, float]:
        """Milliseconds by phase for one new token, of whatever sequence of the batch, prefill left out."""
        rounds_per_token = self.rounds / sum(self.run_tokens)
        return {phase: spent * rounds_per_token for phase, spent in self.milliseconds_per_round.items()}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Measurement:
        """The measurement that `asdict` made `saved` of, perhaps by way of JSON."""
        values = {field.name: saved[field.name] for field in fields(cls)}
        for name in ("tokens_per_second", "ratio", "seconds_to_first_token"):
            values[name] = Spread(**values[name])
        values["milliseconds_per_token"] = Percentiles(**values["milliseconds_per_token"])
        for name in ("run_tokens", "run_seconds", "accepted_by_position"):
            values[name] = tuple(values[name])
        return cls(**values)


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured.

    Attributes:
        reference: the decoder that ratios refer to.
        batch: sequences decoded together.
        runs: of each decoder.
        turn_seconds: after which a run gave way to the others'; None where runs were whole.
        seed: that of the first turn; turn i has seed + i.
        generation_options: as given to `generate`.
        measurements: in the order of the decoders.
    """

    reference: str
    batch: int
    runs: int
    turn_seconds: float | None
    seed: int
    generation_options: dict[str, Any]
    measurements: tuple[Measurement, ...]

    def __getitem__(self, name: str) -> Measurement:
        """The measurement of the decoder of that name; KeyError for another."""
        return {measurement.name: measurement for measurement in self.measurements}[name]

    def __contains__(self, name: str) -> bool:
        """Whether a decoder of that name was measured."""
        return any(measurement.name == name for measurement in self.measurements)

    def ratio(self, name: str, reference: str) -> Spread:
        """Tokens a second of one decoder over those of another, over pairs."""
        return _ratio(self[name].speeds, self[reference].speeds)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain containers and numbers, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Comparison:
        """The comparison that `to_dict` made `saved` of."""
        values = {field.name: saved[field.name] for field in fields(cls)}
        values["measurements"] = tuple(Measurement.from_dict(row) for row in values["measurements"])
        return cls(**values)


def sampling_options(temperature: float) -> dict[str, Any]:
    """transformers' options for a temperature, 0 being greedy decoding."""
    return {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}


class _Arrivals:
    """A streamer, for one sequence or several, that notes when tokens come, how many, and lets others run."""

    def __init__(self, watch: Watch, sequences: int) -> None:
        self._watch = watch
        self._prompt_is_next = True
        self.tokens: list[list[tuple[float, int]]] = [[] for _ in range(sequences)]
        """For each sequence, when tokens came, and how many."""

    def put(self, value: Tensor) -> None:
        if self._prompt_is_next:
            self._prompt_is_next = False
        else:
            self.note(0, value)

    def note(self, index: int, tokens: Tensor) -> None:
        self.tokens[index].append((self._watch.now(), tokens.numel()))
        self._watch.pause()

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class _Run:
    tokens: list[list[int]]
    seconds: float
    first_token: float
    token_milliseconds: list[float]
    stats: EFTStats


@dataclass(frozen=True)
class _Job:
    """A decoder that takes turns; the reference's copies have its name."""

    name: str
    decoder: Decoder
    watch: Watch = field(default_factory=Watch)


def compare(
    decoders: Mapping[str, Decoder],
    batches: Sequence[PromptBatch],
    *,
    reference: str,
    copies: Sequence[Decoder] = (),
    seed: int = 0,
    turn_seconds: float | None = None,
    device: torch.device | None = None,
    on_run: Callable[[], None] = lambda: None,
    give_way: Callable[[], None] = lambda: None,
    **generation_kwargs: Any,
) -> Comparison:
    """Run the decoders in turn, batch by batch, after one warm-up each; a turn starts with another decoder.

    Args:
        decoders: by name.
        batches: of one size; one turn each.
        reference: the decoder that ratios refer to.
        copies: more decoders like the reference, whose runs count as its own.
        seed: turn i has seed + i, so that every run of a decoder draws anew and a pair shares a seed.
        turn_seconds: after which a run gives way to the others', which takes greenlet and decoders with
            caches of their own; longer for decoders that take longer than the reference. None for whole runs.
        device: where the decoders run and memory is looked at; the CPU unless given.
        on_run: called after a decoder's warm-up and its first run of each turn.
        give_way: called where nobody's clock runs, for another process to have its turn.
        **generation_kwargs: options of `generate`.

    Raises:
        ValueError: for an unknown reference, no batches, or batches of several sizes.
    """
    if reference not in decoders:
        raise ValueError(f"reference must be one of {', '.join(decoders)}, got {reference!r}")
    sizes = {batch.input_ids.shape[0] for batch in batches}
    if len(sizes) != 1:
        raise ValueError("batches must hold at least one batch, and all the same number of prompts")
    jobs = [_Job(name, decoder) for name, decoder in decoders.items()]
    everybody = len(decoders) + len(copies)
    for index, copy in enumerate(copies):
        jobs.insert((index + 1) * everybody // (len(copies) + 1), _Job(reference, copy))
    turns: dict[str, list[list[_Run]]] = {name: [] for name in decoders}
    memory: dict[str, int | None] = {}
    latest: dict[str, float] = {}

    def run(job: _Job, turn: int, done: list[_Run]) -> None:
        done.append(_run(job.decoder, batches[turn], seed + turn, job.watch, generation_kwargs))
        if len(done) == 1:
            on_run()

    def warm_up(job: _Job) -> None:
        if job.name in latest:
            _run(job.decoder, batches[0], seed, job.watch, generation_kwargs)
        else:
            done: list[_Run] = []
            memory[job.name] = peak_memory(device or torch.device("cpu"), lambda: run(job, 0, done))
            latest[job.name] = done[0].seconds
        give_way()

    def repeated(job: _Job, turn: int, done: dict[str, list[_Run]]) -> Iterator[None]:
        job.watch.begin()
        run(job, turn, done[job.name])
        yield
        while latest[job.name] < latest[reference] and len(done[reference]) <= len(copies):
            run(job, turn, done[job.name])
            yield

    # Whether gradients are wanted is the thread's own state, and jobs that take turns leave it in any order.
    with torch.inference_mode():
        for job in jobs:
            warm_up(job)
        for turn in range(len(batches)):
            if turn_seconds is not None:
                # Who takes longer than the reference has longer turns, so that all end together.
                for job in jobs:
                    slower = latest[job.name] / max(latest[reference], turn_seconds)
                    job.watch.turn = turn_seconds * max(1.0, slower)
            first = turn % len(jobs)
            done: dict[str, list[_Run]] = {name: [] for name in decoders}
            work = [repeated(job, turn, done) for job in jobs[first:] + jobs[:first]]
            take_turns(work, turn_seconds is not None, give_way)
            for name, own in done.items():
                turns[name].append(own)
                latest[name] = _seconds(own)
    return Comparison(
        reference=reference,
        batch=sizes.pop(),
        runs=len(batches),
        turn_seconds=turn_seconds,
        seed=seed,
        generation_options=generation_kwargs,
        measurements=tuple(
            _measurement(name, own, turns[reference], memory[name]) for name, own in turns.items()
        ),
    )


def _run(
    decoder: Decoder, batch: PromptBatch, seed: int, watch: Watch, generation_kwargs: dict[str, Any]
) -> _Run:
    sequences, width = batch.input_ids.shape
    arrivals = _Arrivals(watch, sequences)
    start, away = watch.now(), watch.away
    output = decoder.generate(
        batch.input_ids,
        batch.attention_mask,
        seed=seed,
        return_dict_in_generate=True,
        trace=False,
        streamer=arrivals if sequences == 1 else arrivals.note,
        **generation_kwargs,
    )
    tokens = output.sequences[:, width:].tolist()
    end = watch.now()
    for came, row in zip(arrivals.tokens, tokens, strict=True):
        if not came:
            # Of what a decoder does not stream, all comes at the end.
            came.append((end, len(row)))
    stats: EFTStats = output.stats
    # Tokens are handed out in the phase "other".
    spent = stats.seconds | {"other": stats.seconds.get("other", 0.0) - (watch.away - away)}
    waits = [
        1000 * (then - before) / count
        for own in arrivals.tokens
        for (before, _), (then, count) in pairwise(own)
        for _ in range(count)
    ]
    first = statistics.fmean(own[0][0] for own in arrivals.tokens) - start
    return _Run(
        tokens, end - start, first, waits or [1000 * first], dataclasses.replace(stats, seconds=spent)
    )


def _measurement(
    name: str, turns: list[list[_Run]], reference: list[list[_Run]], memory: int | None
) -> Measurement:
    # What a turn repeats is the same work: it is counted once, and every time is looked at.
    runs, every = [own[0] for own in turns], [run for own in turns for run in own]
    counted, timed = [run.stats for run in runs], [run.stats for run in every]
    emitted = sum(stats.emitted_tokens for stats in counted)
    sequence_rounds = sum(stats.sequence_rounds for stats in counted)
    tested = sum(stats.tested_tokens for stats in counted)
    accepted = sum(stats.accepted_tokens for stats in counted)
    expected = sum(stats.expected_acceptance * stats.tested_tokens for stats in counted)
    own, other = _speeds(turns), _speeds(reference)
    return Measurement(
        name=name,
        run_tokens=tuple(stats.emitted_tokens for stats in counted),
        run_seconds=tuple(_seconds(turn) for turn in turns),
        same_output=sum(run.tokens == other[0].tokens for run, other in zip(runs, reference, strict=True)),
        tokens_per_second=Spread.of(own),
        ratio=_ratio(own, other),
        seconds_to_first_token=Spread.of([run.first_token for run in every]),
        milliseconds_per_token=Percentiles.of([wait for run in every for wait in run.token_milliseconds]),
        rounds=sum(stats.rounds for stats in counted),
        tokens_per_round=emitted / sequence_rounds,
        drafted_per_round=sum(stats.drafted_tokens for stats in counted) / sequence_rounds,
        tested_tokens=tested,
        acceptance_rate=accepted / tested if tested else None,
        expected_acceptance=expected / tested if tested else None,
        accepted_by_position=_by_position(counted),
        large_calls_per_token=sequence_rounds / emitted,
        milliseconds_per_round={
            phase: 1000
            * sum(stats.seconds.get(phase, 0.0) for stats in timed)
            / sum(stats.rounds for stats in timed)
            for phase in PHASES
        },
        prefill_milliseconds=1000 * statistics.fmean(stats.seconds.get("prefill", 0.0) for stats in timed),
        peak_memory_bytes=memory,
    )


def _seconds(turn: list[_Run]) -> float:
    return statistics.fmean(run.seconds for run in turn)


def _speeds(turns: list[list[_Run]]) -> list[float]:
    return [turn[0].stats.emitted_tokens / _seconds(turn) for turn in turns]


def _by_position(all_stats: Sequence[EFTStats]) -> tuple[float, ...]:
    """The shares of several calls put together, each weighted by the tokens tested at that position.

    A position is tested where all before it were accepted, so the shares give the counts, but for drafts
    that end earlier.
    """
    longest = max(len(stats.accepted_by_position) for stats in all_stats)
    tested, accepted = [0.0] * longest, [0.0] * longest
    for stats in all_stats:
        reached = float(stats.sequence_rounds)
        for position, share in enumerate(stats.accepted_by_position):
            tested[position] += reached
            reached *= share
            accepted[position] += reached
    return tuple(some / count for some, count in zip(accepted, tested, strict=True) if count)


def _ratio(own: Sequence[float], reference: Sequence[float]) -> Spread:
    return Spread.of([speed / other for speed, other in zip(own, reference, strict=True)])
