"""What a sequence remembers of log L - log B, to draft better: a correction of the draft law.

The draft law lacks the large model's delta. That delta repeats: after the same previous token it resembles
its last value, after the same two tokens more so, and over a text it has a mean. All are known before a token
is drawn, and any draft law that is fixed by then leaves the target's law unchanged (docs/math.md), so
remembering them changes speed alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import backend

__all__ = [
    "LAST_WEIGHT", "LAST_WEIGHT_AFTER_TWO", "MEAN_FADING", "MEAN_WEIGHT", "DraftMemory", "new_draft_memory",
    "recall", "remember",
]  # fmt: skip

MEAN_FADING = 0.9
"""What a mean keeps of itself with each row that is added to it: it is chiefly of the last ten."""
MEAN_WEIGHT = 0.5
"""Of the mean. This and the weights below were chosen on texts that the bundled trio drew (docs/math.md)."""
LAST_WEIGHT, LAST_WEIGHT_AFTER_TWO = 0.4, 0.75
"""Of the last log-ratio after the same token, and after the same two tokens."""


@dataclass
class DraftMemory:
    """The last log-ratios of each sequence, written in place.

    Attributes:
        ratios: float32 [batch, slots, vocab], log L - log B up to a constant.
        tokens: int64 [batch, slots], the token before each; -1 where nothing is remembered yet.
        mean: float32 [batch, vocab], their fading mean.
        count: int64 [batch], log-ratios seen so far; the i-th lies in slot i mod slots.
    """

    ratios: Tensor
    tokens: Tensor
    mean: Tensor
    count: Tensor


def new_draft_memory(batch: int, slots: int, vocab_size: int, device: torch.device) -> DraftMemory:
    """An empty memory; `slots` must exceed the longest draft."""
    return DraftMemory(
        # Of a large vocabulary a batch has most of a GB of them; none is read that was not written.
        ratios=torch.empty(batch, slots, vocab_size, device=device),
        tokens=torch.full((batch, slots), -1, dtype=torch.int64, device=device),
        mean=torch.zeros(batch, vocab_size, device=device),
        count=torch.zeros(batch, dtype=torch.int64, device=device),
    )


def recall(memory: DraftMemory, token: Tensor, previous: Tensor | None, beta: Tensor) -> Tensor:
    """The correction of the draft logits after `previous` and `token`: float32 [batch, vocab], finite.

    It is beta times half the mean, drawn towards the last log-ratio after the same two tokens, or else after
    the same `token`, if there is one.

    Args:
        token: int64 [batch].
        previous: int64 [batch], the token before; None for the last of which there is a log-ratio, which
            stands before the first token of a draft.
        beta: float32 [batch].
    """
    if backend(token.device) == "triton":
        from .gpu.memory import recall as compiled

        return compiled(memory, token, previous, beta)
    slots = memory.tokens.shape[1]
    slot = torch.arange(slots, device=token.device)
    # How long ago each slot was written: the newest of those that match is wanted.
    age = (memory.count[:, None] - 1 - slot) % slots
    if previous is None:
        previous = memory.tokens.gather(1, (memory.count[:, None] - 1) % slots)[:, 0]
    # What was before the oldest is forgotten.
    both = (memory.tokens.roll(1, dims=1) == previous[:, None]) & (age < slots - 1)
    rank = torch.where(memory.tokens == token[:, None], torch.where(both, age, age + slots), 2 * slots)
    rank, best = rank.min(dim=1)
    last = memory.ratios.gather(1, best[:, None, None].expand(-1, 1, memory.mean.shape[1]))[:, 0]
    weight = torch.where(rank < slots, LAST_WEIGHT_AFTER_TWO, LAST_WEIGHT)[:, None]
    mean = MEAN_WEIGHT * memory.mean
    return beta[:, None] * torch.where((rank < 2 * slots)[:, None], mean + weight * (last - mean), mean)


def remember(
    memory: DraftMemory, large: Tensor, base: Tensor, block: Tensor, accepted_lens: Tensor, done: Tensor
) -> None:
    """Keep the log-ratios of the rows whose whole past has been committed.

    Args:
        large, base: [batch, drafted + 1, >= vocab] logits.
        block: int64 [batch, drafted + 1], the token before each row.
        accepted_lens: int64 [batch]; rows 0..accepted_lens are kept.
        done: bool [batch], sequences that had ended before the round: they keep nothing.
    """
    kind = backend(large.device)
    if kind != "torch":
        if kind == "numba":
            from .cpu.memory import remember as compiled
        else:
            from .gpu.memory import remember as compiled
        compiled(memory, large, base, block, accepted_lens, done)
        return
    vocab_size, slots = memory.mean.shape[1], memory.tokens.shape[1]
    ratios = large[..., :vocab_size].to(torch.float32) - base[..., :vocab_size].to(torch.float32)
    is_finite = ratios.isfinite()
    ratios = torch.where(is_finite, ratios, 0.0)
    centre = ratios.sum(-1, keepdim=True) / is_finite.sum(-1, keepdim=True).clamp(min=1)
    ratios = torch.where(is_finite, ratios - centre, 0.0)

    row = torch.arange(block.shape[1], device=block.device)
    kept = (row <= accepted_lens[:, None]) & ~done[:, None]
    slot = (memory.count[:, None] + row) % slots
    memory.tokens.scatter_(1, slot, torch.where(kept, block, memory.tokens.gather(1, slot)))
    wide = slot[..., None].expand(-1, -1, vocab_size)
    memory.ratios.scatter_(1, wide, torch.where(kept[..., None], ratios, memory.ratios.gather(1, wide)))
    total = kept.sum(dim=1)
    weight = torch.where(kept, (1 - MEAN_FADING) * MEAN_FADING ** (total[:, None] - 1 - row), 0.0)
    memory.mean.mul_(MEAN_FADING ** total[:, None]).add_((weight[..., None] * ratios).sum(dim=1))
    memory.count.add_(total)
