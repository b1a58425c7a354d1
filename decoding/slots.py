"""Sequences that join and leave while others run, in a fixed number of slots."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speculative_eft.kernels import Sampling, batch_sampling
from speculative_eft.models import check_caches

from .checks import between, int64_of, integer, is_integral, token_ids
from .decoder import EFTDecoder
from .round import PhaseTimer, RoundPlan
from .running import RunningBatch
from .sequences import end_rows, put

__all__ = ["SlotBatch", "SlotOptions", "SlotProgress"]


@dataclass(frozen=True)
class SlotOptions:
    """How one sequence is sampled.

    Attributes:
        max_new_tokens: at least 1.
        seed: an int of 64 bits; with it the output depends on nothing else.
        temperature: 0 for greedy decoding.
        top_k: 0 keeps all tokens; top_p and min_p: in [0, 1].

    Raises:
        ValueError: naming what is out of range or of another type.
    """

    max_new_tokens: int
    seed: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        seed = int64_of(self.seed)
        if seed is None:
            raise ValueError(f"seed must be an int of 64 bits, got {self.seed!r}")
        # Numbers of numpy and torch, of which some have a shape, become Python's.
        numbers = {
            "max_new_tokens": integer("max_new_tokens", self.max_new_tokens, least=1),
            "seed": seed,
            "temperature": between("temperature", self.temperature, 0, math.inf),
            "top_k": integer("top_k", self.top_k),
            "top_p": between("top_p", self.top_p, 0, 1),
            "min_p": between("min_p", self.min_p, 0, 1),
        }
        for name, number in numbers.items():
            object.__setattr__(self, name, number)


@dataclass(frozen=True)
class SlotProgress:
    """What a step did for one sequence: its new tokens, and whether it has ended."""

    tokens: list[int]
    ended: bool


class SlotBatch:
    """Continuous batching: sequences run together, each from when it joins until it ends.

    A sequence's output is what it would be alone: its noise is its own, its slot is emptied before it is
    used, and rounds depend on nothing in its neighbours.

    Args:
        decoder: whose models and law are used; no other call may use the models meanwhile.
        slots: most sequences at a time.
        max_length: most tokens of a prompt and its continuation.
        eos_token_ids: any of them ends a sequence; one id, several, or None. Unless given none does, those of
            the models neither.

    Raises:
        ValueError: if an argument is out of range or of another type, or if a GPU's memory does not hold the
            caches.
    """

    def __init__(
        self,
        decoder: EFTDecoder,
        slots: int,
        max_length: int,
        eos_token_ids: int | Sequence[int] | None = (),
    ) -> None:
        if not isinstance(decoder, EFTDecoder):
            raise ValueError(f"decoder must be an EFTDecoder, got {type(decoder).__name__}")
        runners = decoder.runners
        context = runners.max_context
        self.decoder = decoder
        self.slots = integer("slots", slots, least=1)
        self.max_length = integer("max_length", max_length, least=2)
        if context is not None and self.max_length > context:
            raise ValueError(f"max_length must lie in 2..{context}, got {max_length}")
        self._eos = token_ids("eos_token_ids", eos_token_ids)
        self._device = runners.large.device
        self._has_failed = False
        with runners.turn():
            self._begin(decoder)

    def _begin(self, decoder: EFTDecoder) -> None:
        runners, slots, max_length = decoder.runners, self.slots, self.max_length
        every, beyond = runners.every, decoder.longest_draft + 1
        lengths, beside = [max_length] * len(every), decoder.bytes_beside_caches
        check_caches(every, slots, lengths, beyond, beside, "slots and max_length")
        for runner in every:
            runner.reserve(slots, max_length + beyond)
        nothing = torch.zeros(3, slots, dtype=torch.int64, device=self._device)
        state = decoder.new_state(
            nothing[0], nothing[1], nothing[2], max_length, 0, longest_draft=decoder.longest_draft
        )
        # Whoever has no sequence yet is masked.
        end_rows(state, range(slots))
        self._options: dict[int, SlotOptions] = {}
        self._laws: tuple[Sampling, Sampling] | None = None
        self._first_lens: dict[int, int] = {}
        self._joined = 0
        self._drafted = 0
        self._timer = PhaseTimer()
        self._running = RunningBatch(
            runners, state, self._plan([]), None, [], [], decoder.captured  # nobody runs yet
        )  # fmt: skip
        self._reservations = runners.large.reservations

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What fails in here leaves some of the sequences' state moved on and some not."""
        try:
            yield
        except BaseException:
            self._has_failed = True
            raise

    def _check_state(self) -> None:
        if self._has_failed:
            raise RuntimeError(
                "an earlier call failed midway, so these sequences cannot go on; begin a new SlotBatch"
            )
        if self.decoder.runners.large.reservations != self._reservations:
            raise RuntimeError(
                "another call has used these models since the last step, and overwritten what their caches "
                "held; give it models of its own: models.with_own_caches()"
            )

    @property
    def free(self) -> int:
        """Sequences that could join now."""
        return self.slots - len(self._options)

    def _plan(self, order: Sequence[int | None]) -> RoundPlan:
        """A plan for all slots, of which the first hold the sequences of `order`."""
        is_greedy = all(option.temperature == 0 for option in self._options.values())
        unused = SlotOptions(1, 0, temperature=0.0 if is_greedy else 1.0)
        options = [unused if index is None else self._options.get(index, unused) for index in order]
        options += [unused] * (self.slots - len(options))
        own = self.decoder.config.draft_temperature

        def sampling(temperatures: list[float]) -> Sampling:
            return batch_sampling(
                temperatures,
                [option.top_k for option in options],
                [option.top_p for option in options],
                [option.min_p for option in options],
                self.decoder.vocab_size,
                self._device,
            )

        temperatures = [option.temperature for option in options]
        target = sampling(temperatures)
        draft = sampling([own if own is not None and value > 0 else value for value in temperatures])
        if self.decoder.captured is not None and self._options:
            # A graph is of the filters in use: with those that were once it serves whoever comes and goes.
            last_target, last_draft = self._laws or (target, draft)
            target = target.as_general_as(last_target, self.decoder.vocab_size)
            draft = draft.as_general_as(last_draft, self.decoder.vocab_size)
            self._laws = target, draft
        return self.decoder.new_plan(target, draft, self._eos, False)

    @torch.inference_mode()
    def join(self, prompt: Tensor | Sequence[int], options: SlotOptions) -> int:
        """Start the continuation of `prompt`, token ids of shape [length]; returns the sequence's number.

        One that fails, by a GPU without memory for the prompt, say, leaves the others as they were.

        Raises:
            ValueError: if no slot is free, or the prompt is empty, too long, or outside the vocabulary.
            RuntimeError: if another call has used the models meanwhile, or a step failed.
        """
        if not isinstance(options, SlotOptions):
            raise ValueError(f"options must be SlotOptions, got {options!r}")
        if not isinstance(prompt, Tensor):
            prompt = self._as_tensor(prompt)
        length = prompt.numel()
        if prompt.dim() != 1 or length == 0 or not is_integral(prompt):
            raise ValueError("prompt must be integers of shape [length], with at least one token")
        if length + options.max_new_tokens > self.max_length:
            raise ValueError(
                f"a prompt of {length} tokens and max_new_tokens={options.max_new_tokens} exceed max_length="
                f"{self.max_length}"
            )
        if not (int(prompt.min()) >= 0 and int(prompt.max()) < self.decoder.vocab_size):
            raise ValueError(f"prompt holds an id outside the vocabulary of {self.decoder.vocab_size} ids")
        with self.decoder.runners.turn():
            self._check_state()
            if self.free == 0:
                raise ValueError(f"all {self.slots} slots are taken: step until one is free")
            # A copy of what may lie in pinned memory, which whoever called may write to again.
            own = prompt.to(torch.int64, copy=True)
            return self._join(own.to(self._device, non_blocking=True), options)

    def _as_tensor(self, prompt: Sequence[int]) -> Tensor:
        try:
            tokens = list(prompt)
        except TypeError:
            tokens = []  # refused as a prompt without tokens is
        # The vocabulary's size stands for ids that may not fit in 64 bits: it is no id either.
        ids = [min(integer("an id of prompt", token), self.decoder.vocab_size) for token in tokens]
        return torch.tensor(ids, dtype=torch.int64)

    def _join(self, prompt: Tensor, options: SlotOptions) -> int:
        length = prompt.numel()
        sequence = self._joined
        self._joined += 1
        self._options[sequence] = options
        row = self._running.join(sequence, length, length + options.max_new_tokens)
        try:
            first = self._fill(row, prompt, options)
            self._go_on()
        except BaseException:
            self._end(sequence)
            raise
        self._first_lens[sequence] = first
        self._drafted = max(self._drafted, first)
        return sequence

    def _fill(self, row: int, prompt: Tensor, options: SlotOptions) -> int:
        """Start a sequence in `row`; its first draft length."""
        length = prompt.numel()
        for runner in self.decoder.runners.every:
            runner.fill_slot(row, prompt[None, :-1])
        place: dict[str, Any] = {"dtype": torch.int64, "device": self._device}
        one = self.decoder.new_state(
            prompt[-1:],
            torch.full((1,), length, **place),
            torch.full((1,), options.seed, **place),
            self.max_length,
            0,
            greedy=options.temperature == 0,
            longest_draft=self.decoder.longest_draft,
        )
        one.limits.fill_(options.max_new_tokens)
        one.draft_lens.clamp_(max=options.max_new_tokens - 1)
        if one.offered_lens is not None:
            one.offered_lens.copy_(one.draft_lens)
        put(self._running.state, row, one)
        # As the state has it; to read that would be to wait for a GPU's rounds.
        return min(self.decoder.first_draft_len(options.temperature == 0), options.max_new_tokens - 1)

    @torch.inference_mode()
    def leave(self, number: int) -> None:
        """End the sequence of this number, which nobody waits for any more, and free its slot.

        The others go on as if it had never been there.

        Raises:
            ValueError: if it is no number of a sequence that runs.
            RuntimeError: if another call has used the models meanwhile, or a step failed.
        """
        number = integer("number", number)
        with self.decoder.runners.turn():
            self._check_state()
            # It may have ended while this thread waited for its turn.
            if number not in self._options:
                raise ValueError(f"sequence {number} does not run: it has ended or never joined")
            self._end(number)

    def _end(self, sequence: int) -> None:
        """End a sequence whose next tokens are not wanted, and free its slot."""
        with self._whole():
            self._running.end([sequence])
            self._first_lens.pop(sequence, None)
            self._free_slots([sequence])

    def _free_slots(self, sequences: Sequence[int]) -> None:
        """Free the slots of sequences that have ended."""
        for index in sequences:
            del self._options[index]
        self._running.compact()
        self._go_on()

    def _go_on(self) -> None:
        """Let the rounds to come be of the sequences that are there now."""
        self._running.plan_anew(self._plan(self._running.order[: self._running.rows]))

    @torch.inference_mode()
    def step(self) -> dict[int, SlotProgress]:
        """Run one round; for each sequence whose report has arrived what it did. Nothing if nobody runs.

        Raises RuntimeError if another call has used the models meanwhile, or an earlier step failed: the
        sequences of a step that fails cannot go on, since a part of their state has moved.
        """
        with self.decoder.runners.turn():
            if self._running.rows == 0:
                return {}
            self._check_state()
            with self._whole():
                return self._step()

    def _step(self) -> dict[int, SlotProgress]:
        report = self._running.advance(self._drafted, self._timer)
        if report is None:
            return {}
        progress = {
            index: SlotProgress(tokens[:count], following < 0)
            for index, (count, following, *tokens) in report.items()
            if index in self._options
        }
        for index in report:
            self._first_lens.pop(index, None)
        self._drafted = max(0, *(row[1] for row in report.values()), *self._first_lens.values())
        ended = [index for index, own in progress.items() if own.ended]
        if ended:
            self._free_slots(ended)
        return progress
