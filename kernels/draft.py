"""One draft step: from the small models' logits to a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import backend
from .early_stop import EarlyStop
from .filters import Sampling, largest_of, plain_or_warped, warp
from .memory import DraftMemory
from .mix import Coefficients, draft_logits
from .noise import NoiseKey, Stream

__all__ = ["DraftLoop", "draft_step"]


@dataclass(frozen=True)
class DraftLoop:
    """What the steps of a draft read and write, in place from round to round.

    Attributes:
        last_token: int64 [batch], the last committed tokens.
        draft_lens: int64 [batch], tokens that each sequence drafts at most.
        done: bool [batch], sequences that take no part.
        block: int64 [batch, drafted + 1], written: the last committed token and the drafted ones. What lies
            beyond a sequence's own draft may hold anything.
        counts: int64 [batch], written: steps of each sequence, one more than it drafted, 0 where it was done.
        coefficients, sampling: of the draft law.
        noise, stream: of the draws.
        memory: what the draft law is corrected by, or None.
        early_stop: ends drafts early, or None.
        correction: float32 [batch, drafted, vocabulary], written: what the logits of each token were
            corrected by, or, where the draft `keeps_logits`, all of them; else without memory
            [batch, 0, vocabulary].
        keeps_logits: whether others verify what is drafted: the step after the last token is then not made.
    """

    last_token: Tensor
    draft_lens: Tensor
    done: Tensor
    block: Tensor
    counts: Tensor
    coefficients: Coefficients
    sampling: Sampling
    noise: NoiseKey
    stream: Stream
    memory: DraftMemory | None
    early_stop: EarlyStop | None
    correction: Tensor
    keeps_logits: bool


def draft_step(
    tuned: Sequence[Tensor],
    base: Tensor | None,
    coefficients: Coefficients,
    sampling: Sampling,
    noise: NoiseKey,
    stream: Stream,
    row: int,
    vocab_size: int,
    correction: Tensor | None = None,
    chances: Tensor | None = None,
) -> Tensor:
    """Draw one token a sequence from the draft law, or take its argmax at temperature 0.

    The draw is the Gumbel race argmax(log q + noise), which needs no normaliser and, unfiltered, no
    softmax.

    Args:
        tuned: one [batch, >= vocab_size] logits tensor a tuned model.
        base: the small base's logits, read only where the draft law includes it.
        noise, stream, row: the draw is that of this row of the round's noise.
        correction: finite float32 [batch, vocab_size], added to the draft law's logits.
        chances: contiguous float32 [batch], receives the probability of the token drawn in the draft law,
            after temperature and filters, and before them at temperature 0.

    Returns:
        int64 [batch].
    """
    kind = backend(tuned[0].device)
    # Chances are asked for to end drafts early, which is done on a CPU alone.
    if kind == "numba" or (kind == "triton" and chances is None):
        # A base or a correction that is not there has weight 0.
        logits = [*tuned, tuned[0] if base is None else base]
        logits += [] if correction is None else [correction]
        shared = stream is Stream.SHARED
        address = (
            noise.seeds, noise.positions + row if shared else noise.rounds, 0 if shared else row, int(stream)
        )  # fmt: skip
        rows = [part[:, None] for part in logits]
        weights = coefficients.draft_weights[:, 1 : 1 + len(logits)]
        if kind == "triton":
            from .gpu.draft import draft as on_gpu

            return on_gpu(rows, weights, sampling, *address, vocab_size)
        from .cpu.draft import draft as on_cpu

        return on_cpu(rows, weights, sampling, *address, vocab_size, chances)
    mixed = draft_logits(
        [rows[:, None] for rows in tuned],
        None if base is None else base[:, None],
        coefficients,
        vocab_size,
        None if correction is None else correction[:, None],
    )
    token = _race(mixed, sampling, noise, stream, row, vocab_size)
    if chances is not None:
        log_law = plain_or_warped(mixed, sampling)[:, 0]
        chances.copy_(log_law.gather(1, token[:, None])[:, 0].exp())
    return token


def _race(
    mixed: Tensor, sampling: Sampling, noise: NoiseKey, stream: Stream, row: int, vocab_size: int
) -> Tensor:
    if sampling.all_greedy:
        return mixed[:, 0].argmax(dim=-1)
    gumbel = noise.gumbel(stream, torch.full((1,), row, device=mixed.device), vocab_size)[:, 0]
    if not sampling.filtered:
        # Scaling the noise instead of the logits makes temperature 0 the argmax without a branch. That of a
        # cold one would be lost beside large logits, of which differences alone matter.
        raced = mixed[:, 0] - largest_of(mixed[:, 0])
        return torch.addcmul(raced, gumbel, sampling.temperature[:, None]).argmax(dim=-1)
    tokens = (warp(mixed, sampling)[:, 0] + gumbel).argmax(dim=-1)
    if sampling.any_greedy:
        tokens = torch.where(sampling.temperature == 0, mixed[:, 0].argmax(dim=-1), tokens)
    return tokens
