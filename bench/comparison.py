"""Decoders measured against each other in interleaved pairs, so that a machine's moods hit all of them.

Every decoder answers a batch of prompts before the next batch's turn comes: A B C, B C A, ... Within a turn
they may do so several times, A B C A B C, of which the one of median time counts: the work is the same each
time. The reference then also runs in between, since its noise is that of every ratio. A pair is one decoder's
run and the reference's run of the same turn, and ratios of speed are taken within pairs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from speculative_eft.decoding import EFTStats

from .machine import peak_memory
from .prompts import PromptBatch

__all__ = ["PHASES", "Comparison", "Decoder", "Measurement", "Percentiles", "Spread", "compare"]

_LONGEST_TO_REPEAT = 0.5
"""Seconds of a decoder in a turn beyond which it does not run again: one long run has little noise."""

_REFERENCE_EVERY = 4
"""Decoders between two runs of the reference."""

_LONGEST_OF_REFERENCE = 5.0
"""Seconds of the reference in a turn beyond which it does not run again."""

PHASES = ("draft", "large", "base", "verify", "other")
"""Phases of a round in `EFTStats.seconds`."""


class Decoder(Protocol):
    """What is compared: anything with `EFTDecoder`'s `generate`."""

    @property
    def generate(self) -> Callable[..., Any]:
        """Takes input_ids, attention_mask and options; for `return_dict_in_generate=True` it gives an
        `EFTOutput`.
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
    """One decoder's runs; counts and shares are over all of them.

    Attributes:
        name: as given to `compare`.
        run_tokens: new tokens of each run, all sequences together, in the order of the runs.
        run_seconds: wall-clock seconds of each run, prefill included.
        same_output: runs whose tokens are those of the reference's run of the pair.
        tokens_per_second: over runs.
        ratio: this decoder's tokens a second over the reference's, over pairs.
        seconds_to_first_token: over runs. For one sequence, when its first tokens came; for a batch, its
            prefill and one mean round.
        milliseconds_per_token: what a sequence waits for a token after its first. For one sequence over
            tokens, those of one round sharing its time; for a batch over runs, one mean a run.
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
        tries: how often each run was made, the median counting; fewer of decoders that took half a second.
        seed: that of the first turn; turn i has seed + i.
        generation_options: as given to `generate`.
        measurements: in the order of the decoders.
    """

    reference: str
    batch: int
    runs: int
    tries: int
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


class _Arrivals:
    """A streamer that notes when tokens come and how many."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.counts: list[int] = []
        self._prompt_is_next = True

    def put(self, value: Tensor) -> None:
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self.times.append(perf_counter())
        self.counts.append(value.numel())

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class _Run:
    tokens: list[list[int]]
    seconds: float
    first_token: float
    token_milliseconds: list[float]
    stats: EFTStats


def compare(
    decoders: Mapping[str, Decoder],
    batches: Sequence[PromptBatch],
    *,
    reference: str,
    seed: int = 0,
    tries: int = 1,
    device: torch.device | None = None,
    on_run: Callable[[str], None] | None = None,
    **generation_kwargs: Any,
) -> Comparison:
    """Run the decoders in turn, batch by batch, after one warm-up each; a turn starts with another decoder.

    Args:
        decoders: by name.
        batches: of one size; one turn each.
        reference: the decoder that ratios refer to.
        seed: turn i has seed + i, so that every run of a decoder draws anew and a pair shares a seed.
        tries: how often each run is made, of which the one of median time counts; the reference's more often.
        device: where the decoders run and memory is looked at; the CPU unless given.
        on_run: called with the decoder's name after each run and its first try, warm-ups included.
        **generation_kwargs: options of `generate`.

    Raises:
        ValueError: for an unknown reference, no batches, or batches of several sizes.
    """
    if reference not in decoders:
        raise ValueError(f"reference must be one of {', '.join(decoders)}, got {reference!r}")
    sizes = {batch.input_ids.shape[0] for batch in batches}
    if len(sizes) != 1:
        raise ValueError("batches must hold at least one batch, and all the same number of prompts")
    names = list(decoders)
    runs: dict[str, list[_Run]] = {name: [] for name in names}
    memory: dict[str, int | None] = {}

    def run(name: str, batch: PromptBatch, turn: int, is_first: bool) -> _Run:
        done = _run(decoders[name], batch, seed + turn, generation_kwargs)
        if on_run is not None and is_first:
            on_run(name)
        return done

    def spent(done: list[_Run]) -> float:
        return sum(one.seconds for one in done)

    for name in names:

        def warm_up(name: str = name) -> object:
            return run(name, batches[0], 0, True)

        memory[name] = peak_memory(device or torch.device("cpu"), warm_up)
    for turn, batch in enumerate(batches):
        first = turn % len(names)
        order = names[first:] + names[:first]
        tried: dict[str, list[_Run]] = {name: [] for name in order}
        for attempt in range(tries):
            for place, name in enumerate(order):
                # All ratios rest on the reference, so it has its share of every part of the turn.
                if (
                    tries > 1
                    and place % _REFERENCE_EVERY == 0
                    and spent(tried[reference]) < _LONGEST_OF_REFERENCE
                ):
                    tried[reference].append(run(reference, batch, turn, False))
                longest = _LONGEST_OF_REFERENCE if name == reference else _LONGEST_TO_REPEAT
                if attempt == 0 or spent(tried[name]) < longest:
                    tried[name].append(run(name, batch, turn, attempt == 0))
        for name, done in tried.items():
            runs[name].append(sorted(done, key=lambda one: one.seconds)[(len(done) - 1) // 2])
    return Comparison(
        reference=reference,
        batch=sizes.pop(),
        runs=len(batches),
        tries=tries,
        seed=seed,
        generation_options=generation_kwargs,
        measurements=tuple(
            _measurement(name, own, runs[reference], memory[name]) for name, own in runs.items()
        ),
    )


def _run(decoder: Decoder, batch: PromptBatch, seed: int, generation_kwargs: dict[str, Any]) -> _Run:
    sequences, width = batch.input_ids.shape
    arrivals = _Arrivals()
    start = perf_counter()
    output = decoder.generate(
        batch.input_ids,
        batch.attention_mask,
        seed=seed,
        return_dict_in_generate=True,
        trace=False,
        streamer=arrivals if sequences == 1 else None,
        **generation_kwargs,
    )
    tokens = output.sequences[:, width:].tolist()
    seconds = perf_counter() - start
    stats: EFTStats = output.stats
    if sequences == 1:
        times, counts = arrivals.times, arrivals.counts
        first = times[0] - start
        gaps = [now - before for before, now in pairwise(times)]
        waits = [
            1000 * gap / count for gap, count in zip(gaps, counts[1:], strict=True) for _ in range(count)
        ]
    else:
        prefill = stats.seconds.get("prefill", 0.0)
        first = prefill + (seconds - prefill) / stats.rounds
        later = len(tokens[0]) - 1
        waits = [1000 * (seconds - first) / later] if later else []
    return _Run(tokens, seconds, first, waits or [1000 * first], stats)


def _measurement(name: str, runs: list[_Run], reference: list[_Run], memory: int | None) -> Measurement:
    all_stats = [run.stats for run in runs]
    emitted = sum(stats.emitted_tokens for stats in all_stats)
    rounds = sum(stats.rounds for stats in all_stats)
    sequence_rounds = sum(stats.sequence_rounds for stats in all_stats)
    tested = sum(stats.tested_tokens for stats in all_stats)
    accepted = sum(stats.accepted_tokens for stats in all_stats)
    expected = sum(stats.expected_acceptance * stats.tested_tokens for stats in all_stats)
    run_tokens = tuple(stats.emitted_tokens for stats in all_stats)
    run_seconds = tuple(run.seconds for run in runs)
    own = [tokens / seconds for tokens, seconds in zip(run_tokens, run_seconds, strict=True)]
    return Measurement(
        name=name,
        run_tokens=run_tokens,
        run_seconds=run_seconds,
        same_output=sum(run.tokens == other.tokens for run, other in zip(runs, reference, strict=True)),
        tokens_per_second=Spread.of(own),
        ratio=_ratio(own, [run.stats.emitted_tokens / run.seconds for run in reference]),
        seconds_to_first_token=Spread.of([run.first_token for run in runs]),
        milliseconds_per_token=Percentiles.of([wait for run in runs for wait in run.token_milliseconds]),
        rounds=rounds,
        tokens_per_round=emitted / sequence_rounds,
        drafted_per_round=sum(stats.drafted_tokens for stats in all_stats) / sequence_rounds,
        tested_tokens=tested,
        acceptance_rate=accepted / tested if tested else None,
        expected_acceptance=expected / tested if tested else None,
        accepted_by_position=_by_position(all_stats),
        large_calls_per_token=sequence_rounds / emitted,
        milliseconds_per_round={
            phase: 1000 * sum(stats.seconds.get(phase, 0.0) for stats in all_stats) / rounds
            for phase in PHASES
        },
        prefill_milliseconds=1000
        * statistics.fmean(stats.seconds.get("prefill", 0.0) for stats in all_stats),
        peak_memory_bytes=memory,
    )


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
