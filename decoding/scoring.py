"""The target's log-probabilities of given tokens, by one pass of each model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from speculative_eft.kernels import Coefficients, target_logits
from speculative_eft.models import EFTRunners

from .past import DEFAULT_CHUNK
from .prompts import Prompts

__all__ = ["TokenScores", "score_tokens"]


@dataclass(frozen=True)
class TokenScores:
    """What the target says of each token but the first, given those before it; right-padded.

    Attributes:
        log_probs: float32 [batch, longest - 1], before temperature and filters; NaN for padding.
        is_greedy: bool [batch, longest - 1], whether greedy decoding would have chosen the token.
    """

    log_probs: Tensor
    is_greedy: Tensor


def score_tokens(
    runners: EFTRunners,
    prompts: Prompts,
    coefficients: Coefficients,
    vocab_size: int,
    chunk: int = DEFAULT_CHUNK,
) -> TokenScores:
    """Run every model once over the tokens, `chunk` positions at a time; what the caches held is lost."""
    batch, device = prompts.tokens.shape[0], runners.large.device
    tokens, lengths = prompts.tokens.to(device), prompts.lengths.to(device)
    for runner in runners.every:
        runner.reserve(batch, prompts.longest)
    log_probs, greedy = [tokens.new_empty(batch, 0, dtype=torch.float32)], [tokens.new_empty(batch, 0).bool()]
    for start in range(0, prompts.longest - 1, chunk):
        end = min(start + chunk, prompts.longest - 1)
        large, *tuned, base = (runner.forward(tokens[:, start:end], end) for runner in runners.every)
        for runner in runners.every:
            runner.lengths.add_(end - start)
        law = target_logits(large, tuned, base, coefficients, vocab_size).log_softmax(dim=-1)
        given = tokens[:, start + 1 : end + 1]
        log_probs.append(law.gather(-1, given[..., None])[..., 0])
        greedy.append(law.argmax(dim=-1) == given)
    is_token = torch.arange(1, prompts.longest, device=device) < lengths[:, None]
    return TokenScores(
        torch.cat(log_probs, dim=1).masked_fill(~is_token, torch.nan),
        torch.cat(greedy, dim=1) & is_token,
    )
