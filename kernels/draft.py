"""One draft step: from the small models' logits to a token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import backend
from .filters import Sampling, plain_or_warped, warp
from .mix import Coefficients, draft_logits
from .noise import NoiseKey, Stream

__all__ = ["draft_step"]


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
    measures: Tensor | None = None,
) -> Tensor:
    """Draw one token a sequence from the draft law, or take its argmax at temperature 0.

    The draw is the Gumbel race argmax(log q + noise), which needs no normaliser and, unfiltered, no
    softmax.

    Args:
        tuned: one [batch, >= vocab_size] logits tensor a tuned model.
        base: the small base's logits, read only where the draft law includes it.
        noise, stream, row: the draw is that of this row of the round's noise.
        correction: finite float32 [batch, vocab_size], added to the draft law's logits.
        measures: float32 [3, batch], into which are written the token's log-probability in the draft law, and
            that law's entropy in nats and largest probability, after temperature and filters, and before them
            at temperature 0.

    Returns:
        int64 [batch].
    """
    kind = backend(tuned[0].device)
    if kind == "triton" or (kind == "numba" and measures is None):
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

            return on_gpu(rows, weights, sampling, *address, vocab_size, measures)
        from .cpu.draft import draft as on_cpu

        return on_cpu(rows, weights, sampling, *address, vocab_size)
    mixed = draft_logits(
        [rows[:, None] for rows in tuned],
        None if base is None else base[:, None],
        coefficients,
        vocab_size,
        None if correction is None else correction[:, None],
    )
    token = _race(mixed, sampling, noise, stream, row, vocab_size)
    if measures is None:
        return token
    log_law = plain_or_warped(mixed, sampling)[:, 0]
    law = log_law.exp()
    measures[0] = log_law.gather(1, token[:, None])[:, 0]
    measures[1] = -torch.where(law > 0, law * log_law, 0.0).sum(dim=1)
    measures[2] = law.amax(dim=1)
    return token


def _race(
    mixed: Tensor, sampling: Sampling, noise: NoiseKey, stream: Stream, row: int, vocab_size: int
) -> Tensor:
    if sampling.all_greedy:
        return mixed[:, 0].argmax(dim=-1)
    gumbel = noise.gumbel(stream, torch.full((1,), row, device=mixed.device), vocab_size)[:, 0]
    if not sampling.filtered:
        # Scaling the noise instead of the logits makes temperature 0 the argmax without a branch.
        return torch.addcmul(mixed[:, 0], gumbel, sampling.temperature[:, None]).argmax(dim=-1)
    tokens = (warp(mixed, sampling)[:, 0] + gumbel).argmax(dim=-1)
    if sampling.any_greedy:
        tokens = torch.where(sampling.temperature == 0, mixed[:, 0].argmax(dim=-1), tokens)
    return tokens
