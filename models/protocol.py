"""What the decoders ask of a network: the `Runner` protocol, and a runner for each role."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from threading import RLock
from typing import Any, Protocol

import torch
from torch import Tensor

from speculative_eft.kernels import DraftLoop

from .locks import Turns
from .sources import tuned_arguments


class Runner(Protocol):
    """A network with a cache of its own, seen from the decoder.

    Token `j` of sequence `b` stands at position `lengths[b] + j`. A forward pass writes there and reads
    everything up to there, but never moves `lengths`: the caller moves them in place, forwards to commit
    tokens and backwards to take them back.
    """

    vocab_size: int
    """Columns of the logits as the network has them, padding included."""

    max_context: int | None
    """Longest sequence the network supports, None if there is no limit."""

    device: torch.device

    @property
    def ends_drafts(self) -> bool:
        """Whether a draft from this network alone that ends early is spared the steps it does not take."""
        ...

    @property
    def addresses(self) -> list[float]:
        """Where its weights are, and factors that passes know by value: what makes a graph useless."""
        ...

    @property
    def reservations(self) -> int:
        """How often `reserve` was called: what the caches hold is its last caller's."""
        ...

    @property
    def lengths(self) -> Tensor:
        """int64 [batch]: tokens in the cache of each sequence, in one storage from `reserve` to `reserve`."""
        ...

    def reserve(self, batch: int, length: int, keep: bool = False) -> None:
        """Start anew with room for `batch` sequences of up to `length` tokens; `lengths` become zero.

        With `keep` the tokens in the cache, which must be of as many sequences, stay.
        """

    def use(self, batch: int) -> None:
        """Go on with the first `batch` sequences alone: `lengths` are theirs."""

    def rearrange(self, slots: Sequence[int], sources: Sequence[int], span: int) -> None:
        """Let each of `slots` hold the sequence, of at most `span` tokens, of its source, another of them."""

    def fill_slot(self, slot: int, tokens: Tensor) -> None:
        """Start the sequence of `slot` anew with int64 `tokens` [1, P], P may be 0; the others stay."""

    def forward(self, tokens: Tensor, span: int) -> Tensor:
        """Run int64 `tokens` [batch, q] and return their logits [batch, q, vocab_size].

        `span` is a host integer, at least `max(lengths) + q`.
        """

    def forward_together(self, others: Sequence[Runner], tokens: Tensor, span: int) -> list[Tensor] | None:
        """`forward` of this network and `others`, which reads the weights that they share once.

        None where they do not share their weights, or it would not be faster.
        """

    def bind(self, block: Tensor, counts: Tensor, logits: Tensor) -> Callable[[], None] | None:
        """A call that runs int64 `block` [batch, q] and writes float32 `logits`, as often as it is made.

        Of each sequence only the first `counts` tokens need run, int64 [batch]. All are contiguous and in the
        host's memory. The call is good until the cache's storage or number of sequences changes. None where
        the network has no such call: `forward` runs it.
        """

    def bind_together(
        self, others: Sequence[Runner], block: Tensor, counts: Tensor, logits: Sequence[Tensor]
    ) -> Callable[[], None] | None:
        """One call for `bind`'s of this network and `others`, which reads the weights that they share once.

        Each has its own of `logits`, this network the first. None where they do not share their weights.
        """

    def bind_draft(self, draft: DraftLoop, logits: Tensor) -> Callable[[], None] | None:
        """A call that runs a whole draft from this network alone; None where there is none.

        In the draft law this is the only tuned model. A step follows each token, the last one too, and
        `lengths` move by `drafted + 1`. Where the draft `keeps_logits`, for one of `EFTRunners.drafters`,
        that last step is not made, and `lengths` stay.

        Args:
            logits: float32 [drafted + 1, batch, vocab_size], written.
        """

    def prefill(
        self, tokens: Tensor, prompt_lengths: Tensor, chunk: int = 512, begins: Tensor | None = None
    ) -> None:
        """Fill the cache from right-padded `tokens` [batch, P] and set `lengths` to `prompt_lengths`.

        Row `b` of the tokens stands at position `begins[b]`, at 0 where `begins` is None.
        """


class StepByStep:
    """What a `Runner` inherits that has `forward` alone: it binds no calls and shares no passes."""

    @property
    def ends_drafts(self) -> bool:
        return False

    def forward_together(self, others: Sequence[Runner], tokens: Tensor, span: int) -> list[Tensor] | None:
        return None

    def bind(self, block: Tensor, counts: Tensor, logits: Tensor) -> Callable[[], None] | None:
        return None

    def bind_together(
        self, others: Sequence[Runner], block: Tensor, counts: Tensor, logits: Sequence[Tensor]
    ) -> Callable[[], None] | None:
        return None

    def bind_draft(self, draft: DraftLoop, logits: Tensor) -> Callable[[], None] | None:
        return None


def forward_each(runners: Sequence[Runner], tokens: Tensor, span: int) -> list[Tensor]:
    """`Runner.forward` of each, in one pass where they share weights."""
    together = runners[0].forward_together(runners[1:], tokens, span) if len(runners) > 1 else None
    return [runner.forward(tokens, span) for runner in runners] if together is None else together


def bind_passes(
    runners: Sequence[Runner], block: Tensor, counts: Tensor, logits: Sequence[Tensor]
) -> list[Callable[[], None]] | None:
    """`Runner.bind` of each, with its own of `logits`, in few calls; None where one has none."""
    first, *others = runners
    together = first.bind_together(others, block, counts, logits) if others else None
    if together is not None:
        return [together]
    calls = []
    for runner, own in zip(runners, logits, strict=True):
        call = runner.bind(block, counts, own)
        if call is None:
            return None
        calls.append(call)
    return calls


@cache
def _lock_of(device: torch.device) -> RLock:
    return RLock()


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Have a GPU to itself, and as the current one, on which torch and Triton launch unless told otherwise.

    Threads would share its capture and the storage that kernels keep on it, and so would streams: the present
    one waits for what was last begun on another.
    """
    if device.type != "cuda":
        yield
        return
    with _lock_of(device), torch.cuda.device(device):
        stream, last = torch.cuda.current_stream(), _last_streams.get(device)
        if last is not None and last != stream:
            stream.wait_stream(last)
        _last_streams[device] = stream
        yield


_last_streams: dict[torch.device, torch.cuda.Stream] = {}


@dataclass(frozen=True)
class EFTRunners:
    """A runner for each model, every one with a cache of its own.

    Attributes:
        drafters: what drafts in the place of the tuned models and, where it drafts along, the small base: for
            each a network over that runner's cache, which is not reserved or filled itself. Without any they
            draft themselves.
        turns: who decodes takes one, since the caches are one batch's at a time.
        modules: what others that run the same modules wait for, where passes change these while they last.
    """

    large: Runner
    tuned: list[Runner]
    base: Runner
    drafters: list[Runner] = field(default_factory=list)
    turns: Turns = field(default_factory=Turns, repr=False, compare=False)
    modules: AbstractContextManager[Any] = field(default_factory=nullcontext, repr=False, compare=False)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Have the caches, and their GPU, to oneself; raises RuntimeError for a call within a call."""
        # What others may hold comes first: who waits for it has no turn that another is waiting for.
        with on_device(self.large.device), self.modules, self.turns:
            yield

    @property
    def small(self) -> list[Runner]:
        """Those of the tuned models and the small base."""
        return [*self.tuned, self.base]

    @property
    def every(self) -> list[Runner]:
        """Those of the large base, the tuned models and the small base."""
        return [self.large, *self.small]

    @property
    def names(self) -> list[str]:
        """What errors call these."""
        return ["large_base", *tuned_arguments(len(self.tuned)), "small_base"]

    @property
    def max_context(self) -> int | None:
        """Longest sequence that all models support, None if there is no limit."""
        limits = [runner.max_context for runner in self.every]
        return min((limit for limit in limits if limit is not None), default=None)


def steps_together(runners: EFTRunners, batch: int) -> bool:
    """Whether the tuned models and the small base read their weights once for a step of all of them."""
    first, *others = runners.small
    block = torch.zeros(batch, 1, dtype=torch.int64)
    logits = [torch.empty(batch, 1, runner.vocab_size) for runner in (first, *others)]
    return first.bind_together(others, block, block[:, 0], logits) is not None
