"""Models whose laws are tables, for comparison with exact enumeration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from speculative_eft.kernels import backend
from speculative_eft.models import StepByStep

from .device import test_device


class TableRunner(StepByStep):
    """A `Runner` whose next-token logits depend on the last two tokens, read through a real cache.

    Attributes:
        table: float32 [vocab, vocab, vocab]: logits by token before the last, last token, next token.
    """

    def __init__(self, table: np.ndarray) -> None:
        self.device = test_device()
        self.table = torch.from_numpy(table).to(self.device, torch.float32)
        self.vocab_size = table.shape[-1]
        self.max_context: int | None = None
        self.reservations, self.addresses = 0, list[float]()
        self.all_lengths = self.lengths = torch.zeros(0, dtype=torch.int64)
        self.tokens = torch.zeros(0, 0, dtype=torch.int64)

    def reserve(self, batch: int, length: int, keep: bool = False) -> None:
        assert not keep or batch == self.tokens.shape[0]
        self.reservations += 1
        held, lengths = self.tokens, self.lengths
        # Column 0 stands before the sequence: a first token has token 0 before it.
        self.tokens = torch.zeros(batch, length + 1, dtype=torch.int64)
        self.all_lengths = self.lengths = torch.zeros(batch, dtype=torch.int64)
        if keep:
            width = min(held.shape[1], length + 1)
            self.tokens[:, :width] = held[:, :width]
            self.lengths.copy_(lengths)

    def use(self, batch: int) -> None:
        self.lengths = self.all_lengths[:batch]

    def rearrange(self, slots: Sequence[int], sources: Sequence[int], span: int) -> None:
        at, source = torch.tensor([slots, sources])
        for held in (self.tokens[:, : span + 1], self.all_lengths):
            held[at] = held[source]

    def fill_slot(self, slot: int, tokens: Tensor) -> None:
        self.tokens[slot, 1 : tokens.shape[1] + 1] = tokens[0]
        self.all_lengths[slot] = tokens.shape[1]

    def forward(self, tokens: Tensor, span: int) -> Tensor:
        # Of graphs spans are rounded up.
        assert span % 1024 == 0 or span < self.tokens.shape[1] + 1
        columns = self.lengths[:, None] + torch.arange(tokens.shape[1]) + 1
        held = self.tokens[: tokens.shape[0]]
        held.scatter_(1, columns, tokens)
        before = held.gather(1, columns - 1)
        return self.table[before, tokens]

    @property
    def ends_drafts(self) -> bool:
        # Nothing is spared here; the law is what is wanted.
        return backend(self.device) != "triton"

    def prefill(
        self, tokens: Tensor, prompt_lengths: Tensor, chunk: int = 512, begins: Tensor | None = None
    ) -> None:
        start = torch.zeros_like(prompt_lengths) if begins is None else begins
        self.tokens.scatter_(1, start[:, None] + torch.arange(tokens.shape[1]) + 1, tokens)
        self.lengths.copy_(prompt_lengths)


class TableDrafter(TableRunner):
    """What drafts in a runner's place, over its cache, by a table that resembles its own."""

    def __init__(self, runner: TableRunner, seed: int) -> None:
        vars(self).update(vars(runner))
        self.own = runner
        noise = torch.randn(runner.table.shape, generator=torch.Generator().manual_seed(seed))
        self.table = runner.table + 0.5 * noise.to(runner.device)

    def forward(self, tokens: Tensor, span: int) -> Tensor:
        self.tokens, self.lengths = self.own.tokens, self.own.lengths
        return super().forward(tokens, span)


@dataclass(frozen=True)
class Tables:
    """Logit tables of a trio: float64 [vocab, vocab, vocab] each."""

    large: np.ndarray
    tuned: list[np.ndarray]
    base: np.ndarray


def random_tables(seed: int, vocab_size: int, experts: int = 1, spread: float = 1.2) -> Tables:
    """A trio whose members resemble each other as a base and its tuned version do."""
    generator = np.random.default_rng(seed)
    shape = (vocab_size,) * 3
    base = spread * generator.normal(size=shape)
    large = base + 0.7 * generator.normal(size=shape)
    tuned = [base + 0.7 * generator.normal(size=shape) for _ in range(experts)]
    # The runners hold float32: enumerate the very logits they return.
    large, base, *tuned = (table.astype(np.float32).astype(np.float64) for table in (large, base, *tuned))
    return Tables(large, tuned, base)
