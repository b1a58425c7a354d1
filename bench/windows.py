"""Rounds timed in windows that all begin alike, and acceptance that is set instead of found.

A window drives `RunningBatch` as `generate` does, on caches that were filled once: rolling back is a change
of lengths, so the next window begins where the last one did, whichever decoder runs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor
from transformers import DynamicCache

from speculative_eft.decoding import round as round_module
from speculative_eft.decoding import running as running_module
from speculative_eft.decoding.round import PhaseTimer, RoundPlan
from speculative_eft.decoding.running import CapturedBatch, RunningBatch
from speculative_eft.kernels import (
    NoiseKey,
    RoundState,
    Sampling,
    Stream,
    Verdict,
    derive_seeds,
    exponential_noise,
    verify,
)
from speculative_eft.models import EFTModels, EFTRunners
from speculative_eft.models.describe import head_dim

from .baselines import SingleModelDecoder, SingleModelRounds, TransformersLoop
from .script import filtered

__all__ = ["RoundDecoder", "Start", "Window", "begin", "forced_acceptance", "run_window", "warm_up_rounds"]


class RoundDecoder(Protocol):
    """What a window can run: `EFTDecoder`, `NaiveEFTDecoder` or `SingleModelDecoder`."""

    runners: EFTRunners
    captured: CapturedBatch | None

    @property
    def longest_draft(self) -> int: ...

    def new_state(
        self, last_token: Tensor, lengths: Tensor, seeds: Tensor, max_new_tokens: int, pad_token_id: int
    ) -> RoundState: ...

    def new_plan(
        self, sampling: Sampling, draft_sampling: Sampling, eos_token_ids: Sequence[int], statistics: bool
    ) -> RoundPlan: ...


@dataclass(frozen=True)
class Start:
    """Where windows begin: the caches of `models` hold all but the last token of each sequence.

    Attributes:
        last_token, lengths: int64 [batch] on the device.
        longest: of the lengths.
        limit: tokens after which a sequence is done.
    """

    models: EFTModels
    last_token: Tensor
    lengths: Tensor
    longest: int
    limit: int


@dataclass(frozen=True)
class Window:
    """What some rounds took.

    Attributes:
        seconds: until the device was done.
        host_seconds: that the host spent on launching and reading rounds, without waiting for the device.
        waited: seconds for which the host waited for reports.
        drafted: tokens drafted a sequence, of each round.
        tokens: that all sequences gained.
        accepted, tested: drafted tokens accepted, and those up to the first one not accepted.
    """

    seconds: float
    host_seconds: float
    waited: float
    drafted: tuple[int, ...]
    tokens: int
    accepted: int
    tested: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def round_seconds(self) -> float:
        return self.seconds / len(self.drafted)


@contextmanager
def forced_acceptance(chance: Tensor) -> Iterator[None]:
    """Let each drafted token be accepted with `chance`, float32 [1] on the device, whatever its law says.

    Verification runs in full, and then its accepted lengths are replaced, in a handful of small kernels. A
    graph that is captured inside reads `chance` when it is replayed.
    """

    def forced(
        large: Tensor,
        tuned: Sequence[Tensor],
        base: Tensor,
        draft_tokens: Tensor,
        draft_lens: Tensor,
        coefficients: Any,
        sampling: Sampling,
        draft_sampling: Sampling,
        noise: NoiseKey,
        *others: Any,
    ) -> Verdict:
        verdict = verify(
            large, tuned, base, draft_tokens, draft_lens, coefficients, sampling, draft_sampling, noise,
            *others,
        )  # fmt: skip
        accepted_lens = _accepted_lens(chance, draft_tokens.shape[1], draft_lens, noise)
        return dataclasses.replace(verdict, accepted_lens=accepted_lens)

    with (
        mock.patch.object(round_module, "verify", forced),
        mock.patch.object(running_module, "bind_round", lambda *_: None),
    ):
        yield


def _accepted_lens(chance: Tensor, drafted: int, draft_lens: Tensor, noise: NoiseKey) -> Tensor:
    """How many of the tokens each sequence drafted come before the first that chance does not accept."""
    if drafted == 0:
        return torch.zeros_like(draft_lens)
    column = torch.arange(drafted, device=draft_lens.device)
    counters = noise.rounds[:, None].repeat(1, drafted)
    # The verification's own draws at these addresses came to nothing.
    draws = exponential_noise(noise.seeds, counters, column, Stream.ACCEPT, 4)[..., 0]
    is_accepted = (draws < -torch.log1p(-chance)) & (column < draft_lens[:, None])
    return is_accepted.to(torch.int64).cumprod(dim=1).sum(dim=1)


def begin(decoder: RoundDecoder, start: Start, seed: int, filters: Sequence[str] = ()) -> RunningBatch:
    """The sequences of `start`, ready for `decoder`'s rounds; none has ended, and none ends by a token.

    `filters` are those of `filtered`, here and below, for the target and for drafts.
    """
    batch, device = start.last_token.shape[0], start.last_token.device
    runners = start.models.runners()
    for runner in runners.every:
        runner.use(batch)
        runner.lengths.copy_(start.lengths - 1)
    seeds = derive_seeds(seed, batch).to(device)
    state = decoder.new_state(start.last_token.clone(), start.lengths, seeds, start.limit, 0)
    sampling = filtered(batch, start.models.vocab_size, device, *filters)
    plan = decoder.new_plan(sampling, sampling, (), False)
    if decoder.captured is not None:
        state, plan, _ = decoder.captured.take((state, plan, None), decoder.runners)
    kind = SingleModelRounds if isinstance(decoder, SingleModelDecoder) else RunningBatch
    lengths, limits = [start.longest] * batch, [start.longest + start.limit] * batch
    return kind(decoder.runners, state, plan, None, lengths, limits, decoder.captured)


@torch.inference_mode()
def warm_up_rounds(
    decoder: RoundDecoder,
    start: Start,
    draft_lens: Sequence[int],
    filters: Sequence[str] = (),
    *,
    narrowing: bool,
) -> None:
    """Compile and capture the rounds of these draft lengths, `narrowing` also those of fewer rows."""
    rows = start.last_token.shape[0]
    while True:
        # Each time from the start: the rounds of all numbers of rows would end the sequences before the last.
        running = begin(decoder, start, 0, filters)
        running.end(range(rows, running.rows))
        running.compact()
        for drafted in draft_lens:
            # Once as they are, once captured, once replayed.
            wanted = running.rounds + 3
            while running.rounds < wanted:
                running.state.draft_lens.zero_()
                if running.state.offered_lens is not None:
                    running.state.offered_lens.zero_()
                running.advance(drafted, PhaseTimer())
        running.restore()
        if not narrowing or rows == 1:
            break
        rows = (rows + 1) // 2


@torch.inference_mode()
def run_window(
    decoder: RoundDecoder, start: Start, seed: int, rounds: int | None, filters: Sequence[str] = ()
) -> Window:
    """Time `rounds` rounds from the start, or all rounds until every sequence has reached its limit."""
    running = begin(decoder, start, seed, filters)
    state, timer = running.state, PhaseTimer()
    drafted = int(state.draft_lens.max())
    launched: list[int] = []
    _synchronize(start.last_token.device)
    begun = perf_counter()
    while drafted >= 0 and (rounds is None or len(launched) < rounds):
        report = running.advance(drafted, timer)
        if running.rounds > len(launched):
            launched.append(drafted)
        if report is None:
            continue
        drafted = max(row[1] for row in report.values())
        if drafted >= 0:
            running.compact()
    host_seconds = perf_counter() - begun - running.waited
    _synchronize(start.last_token.device)
    seconds = perf_counter() - begun
    running.restore()
    return Window(
        seconds=seconds,
        host_seconds=host_seconds,
        waited=running.waited,
        drafted=tuple(launched),
        tokens=int(state.generated.sum()),
        accepted=int(state.accepted.sum()),
        tested=int(state.tested.sum()),
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PlainLoop(TransformersLoop):
    """A `TransformersLoop` that samples at temperature 1, and begins in the middle of sequences."""

    def __init__(self, models: EFTModels) -> None:
        super().__init__(models)
        self.caches: list[DynamicCache] = []

    @torch.inference_mode()
    def start(self, batch: int, context: int) -> None:
        """Begin with caches that hold random keys and values of `context` tokens a sequence."""
        self.caches = []
        for model, _ in self.networks:
            config = model.config
            heads = config.num_key_value_heads
            cache = DynamicCache(config=config)
            for layer in range(config.num_hidden_layers):
                shape = (batch, heads, context, head_dim(config))
                keys, values = (
                    torch.empty(shape, dtype=model.dtype, device=model.device).normal_() for _ in range(2)
                )
                cache.update(keys, values, layer)
            self.caches.append(cache)

    @torch.inference_mode()
    def run(self, token: Tensor, steps: int) -> Tensor:
        """Sample `steps` tokens after `token`, int64 [batch]; the last one."""
        for _ in range(steps):
            law = self.step(token[:, None], self.caches, PhaseTimer()).softmax(dim=-1)
            token = torch.multinomial(law, 1)[:, 0]
        return token
