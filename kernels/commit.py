"""Commit: what a verified round adds to each sequence, cut at end-of-sequence tokens and length limits."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["committed_tokens"]


def committed_tokens(
    draft_tokens: Tensor,
    accepted_lens: Tensor,
    next_token: Tensor,
    done: Tensor,
    remaining: Tensor,
    eos_token_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens a round commits, and which sequences end with them.

    Args:
        draft_tokens: int64 [batch, drafted].
        accepted_lens: int64 [batch], in 0..drafted.
        next_token: int64 [batch], follows the accepted tokens.
        done: bool [batch], sequences that had ended before: they commit nothing.
        remaining: int64 [batch], tokens a sequence may still commit, at least 1 unless done.
        eos_token_ids: int64 [count], possibly empty; the first to be committed ends its sequence.

    Returns:
        tokens int64 [batch, drafted + 1], of which the first `counts` are committed;
        counts int64 [batch], 0..drafted + 1; done bool [batch].
    """
    tokens = torch.cat([draft_tokens, next_token[:, None]], dim=1)
    tokens.scatter_(1, accepted_lens[:, None], next_token[:, None])
    column = torch.arange(tokens.shape[1], device=tokens.device)
    available = torch.minimum(accepted_lens + 1, remaining)[:, None]
    is_end = (tokens[..., None] == eos_token_ids).any(dim=-1) & (column < available)
    before_end = is_end.cumsum(dim=1) - is_end.to(torch.int64) == 0
    counts = (before_end & (column < available)).sum(dim=1)
    counts = torch.where(done, 0, counts)
    return tokens, counts, done | is_end.any(dim=1) | (counts >= remaining)
