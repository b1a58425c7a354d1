"""One draft step: from the small models' logits to a token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .filters import Sampling, warp
from .mix import Coefficients, draft_logits

__all__ = ["draft_step"]


def draft_step(
    tuned: Sequence[Tensor],
    base: Tensor | None,
    coefficients: Coefficients,
    sampling: Sampling,
    noise: Tensor | None,
    vocab_size: int,
) -> Tensor:
    """Draw one token a sequence from the draft law, or take its argmax at temperature 0.

    The draw is the Gumbel race argmax(log q + noise), which needs no normaliser and, unfiltered, no
    softmax.

    Args:
        tuned: one [batch, >= vocab_size] logits tensor a tuned model.
        base: the small base's logits, read only where the draft law includes it.
        noise: float32 [batch, vocab_size] Gumbel draws; None when all sequences are greedy.

    Returns:
        int64 [batch].
    """
    logits = draft_logits(
        [rows[:, None] for rows in tuned], None if base is None else base[:, None], coefficients, vocab_size
    )
    if noise is None:
        return logits[:, 0].argmax(dim=-1)
    if not sampling.filtered:
        # Scaling the noise instead of the logits makes temperature 0 the argmax without a branch.
        return torch.addcmul(logits[:, 0], noise, sampling.temperature[:, None]).argmax(dim=-1)
    tokens = (warp(logits, sampling)[:, 0] + noise).argmax(dim=-1)
    if sampling.any_greedy:
        tokens = torch.where(sampling.temperature == 0, logits[:, 0].argmax(dim=-1), tokens)
    return tokens
