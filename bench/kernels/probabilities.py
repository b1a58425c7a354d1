"""What `verify` is compared with: a verification kernel that takes probabilities.

Public chain-verification kernels take the target's and the draft's probabilities, so a target of three models
has to be mixed and normalised first, into tensors over the whole vocabulary. Here torch.compile does that
(`laws`) and one launch does the rest (`verify`): the token rule, with a race for the replacement that draws
the very numbers that ours draws, so that both commit the same tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from speculative_eft.kernels import NoiseKey, Stream
from speculative_eft.kernels.gpu.noise import exponential_tile, uniform
from speculative_eft.kernels.gpu.tile import arrive, best_split, power_of_two, zeros_kept

__all__ = ["laws", "verify"]

_COLUMNS = 4096


def laws(
    large: Tensor, tuned: Tensor, base: Tensor, alpha: Tensor, beta: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """Probabilities of the target [batch, drafted + 1, vocab] and of the draft [batch, drafted, vocab].

    The draft is F alone; all weights are float32 [batch, 1, 1].
    """
    small = tuned.float()
    mixed = beta * large.float() + alpha * small + (1 - alpha - beta) * base.float()
    target = torch.softmax(mixed / temperature, dim=-1)
    return target, torch.softmax(small[:, :-1] / temperature, dim=-1)


@triton.jit(do_not_specialize=["drafted", "splits", "batch"])
def _verify(
    target,
    draft,
    tokens,
    lens,
    seeds,
    rounds,
    accepted_lens,
    next_token,
    partials,
    arrivals,
    vocab_size,
    drafted,
    splits,
    batch,
    ACCEPT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    split = tl.program_id(1)
    rows = drafted + 1
    # Every program accepts for itself: it reads two numbers a row.
    row = tl.arange(0, ROWS)[None, :]
    length = tl.load(lens + sequence)
    seed = tl.load(seeds + sequence)
    counter = tl.load(rounds + sequence)
    submitted = row < length
    token = tl.load(tokens + sequence * drafted + row, mask=submitted, other=0)
    p = tl.load(target + (sequence * rows + row) * vocab_size + token, mask=submitted, other=0.0)
    q = tl.load(draft + (sequence * drafted + row) * vocab_size + token, mask=submitted, other=1.0)
    drawn = uniform(
        seed + tl.zeros_like(token), counter + tl.zeros_like(token), row + tl.zeros_like(token), ACCEPT
    )
    failed = submitted & (drawn * q >= p)
    accepted = tl.min(tl.where(failed, row, rows), axis=1, keep_dims=True).to(tl.int64)
    accepted = tl.minimum(accepted, length)
    is_rejected = accepted < length

    ids = split * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = ids < vocab_size
    p = tl.load(target + (sequence * rows + accepted) * vocab_size + ids, mask=inside, other=0.0)
    drafted_row = draft + (sequence * drafted + accepted) * vocab_size + ids
    q = tl.load(drafted_row, mask=inside & is_rejected, other=0.0)
    race = exponential_tile(seed, counter, accepted, RESIDUAL, split, COLUMNS)
    place = partials + sequence * splits + split
    field = splits.to(tl.int64) * batch
    best, winner = best_split(tl.where(inside, tl.maximum(p - q, 0.0) / race, -1.0), ids, 1)
    tl.store(place, best)
    tl.store(place + field, winner.to(tl.float32))
    best, winner = best_split(tl.where(inside, p / race, -1.0), ids, 1)
    tl.store(place + 2 * field, best)
    tl.store(place + 3 * field, winner.to(tl.float32))
    if arrive(arrivals, tl.program_id(0), splits):
        every = tl.arange(0, SPLITS)[None, :]
        is_there = every < splits
        places = partials + sequence * splits + every
        best, residual = _merge(places, field, is_there)
        _, whole = _merge(places + 2 * field, field, is_there)
        # Rounding can empty the residual: then the target decides.
        chosen = tl.where(is_rejected & (best > 0.0), residual, whole)
        tl.store(next_token + sequence, chosen.to(tl.int64))
        tl.store(accepted_lens + sequence, accepted)


@triton.jit
def _merge(places, field, is_there):
    """The best of the splits' bests and its id: [1, 1] each."""
    scores = tl.load(places, mask=is_there, other=float("-inf"))
    winners = tl.load(places + field, mask=is_there, other=0.0).to(tl.int32)
    return best_split(scores, winners, 1)


def verify(
    target: Tensor, draft: Tensor, draft_tokens: Tensor, draft_lens: Tensor, noise: NoiseKey
) -> tuple[Tensor, Tensor]:
    """Accepted lengths and next tokens, int64 [batch], of laws as `laws` gives them, by the token rule."""
    batch, rows, vocab_size = target.shape
    device = target.device
    splits = -(-vocab_size // _COLUMNS)
    accepted_lens = torch.empty(batch, dtype=torch.int64, device=device)
    next_token = torch.empty_like(accepted_lens)
    partials = torch.empty(4 * batch * splits, device=device)
    _verify[(batch, splits)](
        target, draft, draft_tokens, draft_lens, noise.seeds, noise.rounds, accepted_lens, next_token,
        partials, zeros_kept("arrivals", device, batch), vocab_size, rows - 1, splits, batch,
        ACCEPT=int(Stream.ACCEPT), RESIDUAL=int(Stream.RESIDUAL), COLUMNS=_COLUMNS, ROWS=power_of_two(rows),
        SPLITS=power_of_two(splits), num_warps=8,
    )  # fmt: skip
    return accepted_lens, next_token
