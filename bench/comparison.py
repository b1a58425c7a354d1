"""Decoders measured against each other in interleaved pairs, so that a machine's moods hit all of them.

Every decoder answers every prompt before the next prompt's turn comes: A B C, A B C, ... A pair is one
decoder's run and the reference's run of the same turn, and ratios of speed are taken within pairs.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from speculative_eft.decoding import EFTStats
from speculative_eft.kernels import backend

__all__ = [
    "PHASES",
    "Comparison",
    "Decoder",
    "Environment",
    "Measurement",
    "Spread",
    "compare",
    "environment",
    "speeds",
]

PHASES = ("draft", "large", "base", "verify", "other")
"""Phases of a round in `EFTStats.seconds`."""


class Decoder(Protocol):
    """What is compared: anything with `EFTDecoder`'s `generate`."""

    def generate(self, input_ids: Tensor, *, seed: int, **generation_kwargs: Any) -> Any:
        """Return an `EFTOutput` for `return_dict_in_generate=True`."""


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
class Measurement:
    """One decoder's runs; counts and shares are over all of them.

    Attributes:
        name: as given to `compare`.
        run_tokens: new tokens of each run, in the order of the runs.
        run_seconds: wall-clock seconds of each run, prefill included.
        same_output: runs whose tokens are those of the reference's run of the pair.
        tokens_per_second: over runs.
        ratio: this decoder's tokens a second over the reference's, over pairs.
        tokens_per_round: new tokens a round.
        tested_tokens: drafted tokens up to and including the first one not accepted in each round.
        acceptance_rate: share of the tested tokens that were accepted; None where nothing was drafted.
        expected_acceptance: mean of sum min(p, q) over the tested tokens, which the token rule's rate
            estimates and the block rule's exceeds; None where nothing was drafted.
        large_calls_per_token: calls of the large model for one new token.
        milliseconds_per_round: by phase, prefill left out.
    """

    name: str
    run_tokens: tuple[int, ...]
    run_seconds: tuple[float, ...]
    same_output: int
    tokens_per_second: Spread
    ratio: Spread
    tokens_per_round: float
    tested_tokens: int
    acceptance_rate: float | None
    expected_acceptance: float | None
    large_calls_per_token: float
    milliseconds_per_round: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured.

    Attributes:
        reference: the decoder that ratios refer to.
        prompts, repeats: their product is the number of runs of each decoder.
        seed: that of the first turn; turn i has seed + i.
        generation_options: as given to `generate`.
        measurements: in the order of the turns.
    """

    reference: str
    prompts: int
    repeats: int
    seed: int
    generation_options: dict[str, Any]
    measurements: tuple[Measurement, ...]

    def __getitem__(self, name: str) -> Measurement:
        """The measurement of the decoder of that name; KeyError for another."""
        return {measurement.name: measurement for measurement in self.measurements}[name]

    def ratio(self, name: str, reference: str) -> Spread:
        """Tokens a second of one decoder over those of another, over pairs."""
        return _ratio(_speeds(self[name]), _speeds(self[reference]))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain containers and numbers, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Environment:
    """Where a measurement was taken.

    Attributes:
        cores: logical processors this process may run on.
        threads: threads of one torch operation.
        accelerators: names of the GPUs that torch sees.
        backend: the implementation of the kernels for tensors in the host's memory.
    """

    cpu: str
    cores: int
    threads: int
    accelerators: list[str]
    system: str
    python: str
    torch: str
    transformers: str
    backend: str


@dataclass(frozen=True)
class _Run:
    tokens: list[int]
    seconds: float
    stats: EFTStats


def compare(
    decoders: Mapping[str, Decoder],
    prompts: Sequence[Tensor],
    *,
    reference: str,
    repeats: int = 3,
    seed: int = 0,
    on_run: Callable[[str], None] | None = None,
    **generation_kwargs: Any,
) -> Comparison:
    """Run the decoders in turn, prompt by prompt, `repeats` times over, after one warm-up each.

    Args:
        decoders: by name, in the order of the turns.
        prompts: integers [1, length] each.
        reference: the decoder that ratios refer to.
        repeats: runs of each decoder on each prompt, at least 1.
        seed: turn i has seed + i, so that every run of a decoder draws anew and a pair shares a seed.
        on_run: called with the decoder's name after each run, warm-ups included.
        **generation_kwargs: options of `generate`.

    Raises:
        ValueError: for an unknown reference, no prompts, or no repeats.
    """
    if reference not in decoders:
        raise ValueError(f"reference must be one of {', '.join(decoders)}, got {reference!r}")
    if not prompts or repeats < 1:
        raise ValueError("there must be at least one prompt and one repeat")
    runs: dict[str, list[_Run]] = {name: [] for name in decoders}
    for name, decoder in decoders.items():
        _run(decoder, prompts[0], seed, generation_kwargs)
        if on_run is not None:
            on_run(name)
    for turn, prompt in enumerate(prompt for _ in range(repeats) for prompt in prompts):
        for name, decoder in decoders.items():
            runs[name].append(_run(decoder, prompt, seed + turn, generation_kwargs))
            if on_run is not None:
                on_run(name)
    return Comparison(
        reference=reference,
        prompts=len(prompts),
        repeats=repeats,
        seed=seed,
        generation_options=generation_kwargs,
        measurements=tuple(_measurement(name, own, runs[reference]) for name, own in runs.items()),
    )


def _run(decoder: Decoder, prompt: Tensor, seed: int, generation_kwargs: dict[str, Any]) -> _Run:
    start = perf_counter()
    output = decoder.generate(
        prompt, seed=seed, return_dict_in_generate=True, trace=False, **generation_kwargs
    )
    tokens = output.sequences[0, prompt.shape[1] :].tolist()
    return _Run(tokens, perf_counter() - start, output.stats)


def _measurement(name: str, runs: list[_Run], reference: list[_Run]) -> Measurement:
    all_stats = [run.stats for run in runs]
    emitted = sum(stats.emitted_tokens for stats in all_stats)
    rounds = sum(stats.rounds for stats in all_stats)
    tested = sum(stats.tested_tokens for stats in all_stats)
    accepted = sum(stats.accepted_tokens for stats in all_stats)
    expected = sum(stats.expected_acceptance * stats.tested_tokens for stats in all_stats)
    own = [len(run.tokens) / run.seconds for run in runs]
    return Measurement(
        name=name,
        run_tokens=tuple(len(run.tokens) for run in runs),
        run_seconds=tuple(run.seconds for run in runs),
        same_output=sum(run.tokens == other.tokens for run, other in zip(runs, reference, strict=True)),
        tokens_per_second=Spread.of(own),
        ratio=_ratio(own, [len(run.tokens) / run.seconds for run in reference]),
        tokens_per_round=emitted / rounds,
        tested_tokens=tested,
        acceptance_rate=accepted / tested if tested else None,
        expected_acceptance=expected / tested if tested else None,
        large_calls_per_token=rounds / emitted,
        milliseconds_per_round={
            phase: 1000 * sum(stats.seconds.get(phase, 0.0) for stats in all_stats) / rounds
            for phase in PHASES
        },
    )


def speeds(run_tokens: Sequence[int], run_seconds: Sequence[float]) -> list[float]:
    """Tokens a second of each run."""
    return [tokens / seconds for tokens, seconds in zip(run_tokens, run_seconds, strict=True)]


def _speeds(measurement: Measurement) -> list[float]:
    return speeds(measurement.run_tokens, measurement.run_seconds)


def _ratio(own: Sequence[float], reference: Sequence[float]) -> Spread:
    return Spread.of([speed / other for speed, other in zip(own, reference, strict=True)])


def environment() -> Environment:
    """The machine and the versions at hand."""
    affinity = getattr(os, "sched_getaffinity", None)
    cuda = range(torch.cuda.device_count())
    return Environment(
        cpu=_cpu_name(),
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        accelerators=[torch.cuda.get_device_name(index) for index in cuda],
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=version("torch"),
        transformers=version("transformers"),
        backend=_backend_and_version(),
    )


def _backend_and_version() -> str:
    chosen = backend(torch.device("cpu"))
    return chosen if chosen == "torch" else f"{chosen} {version(chosen)}"


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
