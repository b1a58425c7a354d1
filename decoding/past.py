"""Prefill re-use: what the models' caches hold after a call, and starting the next call from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from speculative_eft.models import Runner

from .prompts import Prompts

__all__ = ["EFTPast", "extended", "kept_lengths", "reserved_cache"]

DEFAULT_CHUNK = 512

CACHE_NAMES = ("past_key_values", "cache")
"""What transformers calls a past, in older and in newer versions."""


@dataclass(eq=False)
class EFTPast:
    """What the caches hold after a call: an `EFTOutput` has it as `past_key_values`.

    Given to the next call of the same decoder, that call fills the caches only from where its prompts
    differ. The keys and values themselves stay in the decoder's caches, which the next call overwrites: a
    past is good for the call that follows it, and later it does no harm but saves nothing.

    Attributes:
        base, tuned: tokens in the bases' and in the tuned models' caches.
        reservations: those of the runners by then, by which it is known whether others have used the caches.
    """

    base: Prompts
    tuned: Prompts
    reservations: int

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0, for transformers' `generate`: prompts are given whole."""
        return 0


def extended(prompts: Prompts, output: Tensor, generated: Tensor) -> Prompts:
    """Prompts followed by what was generated, but for the last token, which is in no cache."""
    output, generated = output.to(prompts.tokens), generated.to(prompts.lengths)
    lengths = prompts.lengths + generated - 1
    width = int(lengths.max())
    tokens = torch.cat([prompts.tokens, torch.zeros_like(output)], dim=1)
    column = torch.arange(output.shape[1], device=tokens.device)
    places = (prompts.lengths[:, None] + column).clamp(max=tokens.shape[1] - 1)
    tokens.scatter_(1, places, output)
    return Prompts(tokens[:, :width], lengths, width)


def kept_lengths(held: Prompts, prompts: Prompts) -> Tensor:
    """How many tokens of each prompt the cache holds already, int64 [batch]; never all of them."""
    width = min(held.tokens.shape[1], prompts.tokens.shape[1])
    column = torch.arange(width, device=prompts.tokens.device)
    same = held.tokens[:, :width].to(prompts.tokens) == prompts.tokens[:, :width]
    same &= column < held.lengths.to(column)[:, None]
    common = same.to(torch.int64).cumprod(dim=1).sum(dim=1)
    return torch.minimum(common, prompts.lengths - 1)


def reserved_cache(
    runner: Runner, prompts: Prompts, room: int, kept: Tensor | None, chunk: int | None
) -> Callable[[], None]:
    """Make room in a runner's cache; what then fills it with all but the last token of each prompt.

    Args:
        room: tokens a sequence may reach beyond its prompt.
        kept: int64 [batch], tokens that the cache holds already; None to start anew.
        chunk: tokens that run at a time; None for the default.
    """
    batch, device = prompts.tokens.shape[0], runner.device
    tokens, lengths = prompts.tokens[:, : prompts.longest - 1], prompts.lengths - 1
    chunk = chunk or DEFAULT_CHUNK
    if kept is None:
        runner.reserve(batch, prompts.longest + room)
        return partial(runner.prefill, tokens.to(device), lengths.to(device), chunk)
    new = int((lengths - kept).max())
    column = (kept[:, None] + torch.arange(new, device=kept.device)).clamp(max=max(tokens.shape[1] - 1, 0))
    part = tokens.gather(1, column) if new else tokens[:, :0]
    runner.reserve(batch, max(prompts.longest, int(kept.max()) + new) + room, keep=True)
    return partial(runner.prefill, part.to(device), lengths.to(device), chunk, kept.to(device))
