"""Verification: how many drafted tokens the target accepts, and the token that follows them.

Three rules, all of which leave the target's law unchanged:

* `token` (Leviathan et al., ICML 2023; Chen et al., 2023): accept x_i while u_i < p(x_i) / q(x_i); the
  replacement comes from (p - q)_+.
* `block` (Sun et al., arXiv 2403.10444): with p_0 = 1 and p_i = min(1, p_{i-1} p(x_i) / q(x_i)), keep the
  longest prefix i with u_i < h_i, where h_i = Z_i / (Z_i + 1 - p_i), Z_i = sum (p_i p - q)_+ at the row
  after x_i, and h_i = p_i at the last drafted token; the replacement comes from (p_i p - q)_+.
* `shared_seed`: both laws are raced with the same Gumbel noise, keyed by absolute position; accept while
  the winners agree. The output is what plain decoding of the target gives for that noise.

A fully accepted draft is followed by a bonus token from the target itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .backend import backend
from .filters import Sampling, plain_or_warped, warp
from .mix import Coefficients, draft_logits, target_logits
from .noise import NoiseKey, Stream, exponential_noise, uniform_noise

__all__ = ["RULES", "AcceptanceRule", "Verdict", "verification_streams", "verify"]

AcceptanceRule = Literal["block", "token", "shared_seed"]
RULES: tuple[AcceptanceRule, ...] = get_args(AcceptanceRule)
"""By their places compiled kernels know the rules."""

_ACCEPT, _RESIDUAL, _SHARED = Stream.ACCEPT, Stream.RESIDUAL, Stream.SHARED


def verification_streams() -> tuple[int, int, int]:
    """The streams of noise that accept, that draw the token that follows, and that are shared."""
    return int(_ACCEPT), int(_RESIDUAL), int(_SHARED)


@dataclass(frozen=True)
class Verdict:
    """The outcome of one verification.

    Attributes:
        accepted_lens: int64 [batch], drafted tokens accepted, 0..draft_lens.
        next_token: int64 [batch], the replacement or bonus token.
        expected_acceptance: float32 [batch, drafted], sum min(p, q) at each row of a sequence's own draft,
            the chance that the token rule accepts there; for a greedy sequence 1 where draft and target
            agree, else 0. None if not asked for.
        log_probs: float32 [batch, drafted + 1], the target's log-probability of each drafted token up to
            `accepted_lens` and there of `next_token`, after temperature and filters; for a greedy sequence,
            before them. None if not asked for.
    """

    accepted_lens: Tensor
    next_token: Tensor
    expected_acceptance: Tensor | None
    log_probs: Tensor | None


def verify(
    large: Tensor,
    tuned: Sequence[Tensor],
    base: Tensor,
    draft_tokens: Tensor,
    draft_lens: Tensor,
    coefficients: Coefficients,
    sampling: Sampling,
    draft_sampling: Sampling,
    noise: NoiseKey,
    rule: AcceptanceRule,
    vocab_size: int,
    correction: Tensor | None = None,
    statistics: bool = True,
) -> Verdict:
    """Accept a prefix of each sequence's draft and draw the token that follows it.

    Row i of the logits is the models' prediction of drafted token i, given the tokens before it; the
    row after the last drafted token predicts the bonus token.

    Args:
        large, base: [batch, drafted + 1, >= vocab_size] logits, float32, bfloat16 or float16.
        tuned: one such tensor a tuned model, the very logits the draft was drawn from.
        draft_tokens: int64 [batch, drafted]; entries at or beyond a sequence's own length are ignored.
        draft_lens: int64 [batch], in 0..drafted.
        sampling: of the target; draft_sampling: of the draft.
        noise: seeds and counters of the round.
        correction: finite float32 [batch, drafted, vocab_size], added to the logits the draft was drawn from.
        statistics: whether `expected_acceptance` and `log_probs` are wanted, which may cost a second read.

    Returns:
        A `Verdict`; with `drafted` 0 it is plain sampling from the target.
    """
    kind = backend(large.device)
    logits_of_all = [large, *tuned, base] if correction is None else [large, *tuned, base, correction]
    if kind == "triton":
        from .gpu import verify as on_gpu

        return Verdict(
            *on_gpu.verify(
                logits_of_all, draft_tokens, draft_lens, coefficients, sampling, draft_sampling, noise,
                verification_streams(), rule, vocab_size, statistics,
            )
        )  # fmt: skip
    if kind == "numba":
        from .cpu import verify as on_cpu

        return Verdict(
            *on_cpu.verify(
                logits_of_all, coefficients, draft_tokens, draft_lens, sampling, draft_sampling, noise, rule,
                vocab_size,
            )
        )  # fmt: skip
    drafted = draft_tokens.shape[1]
    logits = target_logits(large, tuned, base, coefficients, vocab_size)
    rows = torch.arange(drafted + 1, device=logits.device)
    submitted = rows[:drafted] < draft_lens[:, None]
    draft_tokens = draft_tokens.masked_fill(~submitted, 0)
    if sampling.all_greedy:
        decided = _accept_greedily(logits, draft_tokens, submitted)
        return _verdict(*decided, logits, sampling, draft_tokens, statistics)

    log_target = warp(logits, sampling)
    target = log_target.exp()
    log_draft = warp(
        draft_logits(
            [row[:, :drafted] for row in tuned], base[:, :drafted], coefficients, vocab_size, correction
        ),
        draft_sampling,
    )
    draft = log_draft.exp()
    if rule == "shared_seed":
        winners = (log_target + noise.gumbel(_SHARED, rows, vocab_size)).argmax(dim=-1)
        accepted, next_token = _accept_equal(winners, draft_tokens, submitted)
    else:
        log_ratio = _log_ratio(log_target, log_draft, draft_tokens)
        uniform = uniform_noise(
            noise.seeds, noise.rounds[:, None].expand(-1, drafted), rows[:drafted], _ACCEPT
        )
        if rule == "token":
            accepted = ((uniform < log_ratio.exp()) & submitted).cumprod(dim=1).sum(dim=1)
            scale = torch.ones_like(sampling.temperature)
        else:
            accepted, scale = _accept_block(target, draft, log_ratio, uniform, draft_lens, submitted)
        next_token = _draw_replacement(target, draft, accepted, draft_lens, scale, noise)
    overlap = torch.minimum(target[:, :drafted], draft).sum(dim=-1)
    if sampling.any_greedy:
        greedy = sampling.temperature == 0
        plain_accepted, plain_next, agreement = _accept_greedily(logits, draft_tokens, submitted)
        accepted = torch.where(greedy, plain_accepted, accepted)
        next_token = torch.where(greedy, plain_next, next_token)
        overlap = torch.where(greedy[:, None], agreement, overlap)
    return _verdict(accepted, next_token, overlap, logits, sampling, draft_tokens, statistics)


def _verdict(
    accepted: Tensor,
    next_token: Tensor,
    overlap: Tensor,
    logits: Tensor,
    sampling: Sampling,
    draft_tokens: Tensor,
    statistics: bool,
) -> Verdict:
    if not statistics:
        return Verdict(accepted, next_token, None, None)
    log_law = plain_or_warped(logits, sampling)
    tokens = torch.cat([draft_tokens, next_token[:, None]], dim=1)
    tokens.scatter_(1, accepted[:, None], next_token[:, None])
    return Verdict(accepted, next_token, overlap, log_law.gather(-1, tokens[..., None])[..., 0])


def _take(rows: Tensor, index: Tensor) -> Tensor:
    return rows.gather(1, index[:, None])[:, 0]


def _take_row(rows: Tensor, index: Tensor) -> Tensor:
    return rows.gather(1, index[:, None, None].expand(-1, 1, rows.shape[-1]))[:, 0]


def _log_ratio(log_target: Tensor, log_draft: Tensor, draft_tokens: Tensor) -> Tensor:
    """log p(x) / q(x) of each drafted token: float32 [batch, drafted]."""
    chosen = draft_tokens[..., None]
    return (log_target[:, : draft_tokens.shape[1]].gather(-1, chosen) - log_draft.gather(-1, chosen))[..., 0]


def _accept_equal(winners: Tensor, draft_tokens: Tensor, submitted: Tensor) -> tuple[Tensor, Tensor]:
    accepted = ((winners[:, :-1] == draft_tokens) & submitted).cumprod(dim=1).sum(dim=1)
    return accepted, _take(winners, accepted)


def _accept_greedily(
    logits: Tensor, draft_tokens: Tensor, submitted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Accepted lengths and next tokens, int64 [batch]; where the draft agrees, float32 [batch, drafted]."""
    winners = logits.argmax(dim=-1)
    agreement = (winners[:, :-1] == draft_tokens).to(torch.float32)
    return *_accept_equal(winners, draft_tokens, submitted), agreement


def _accept_block(
    target: Tensor,
    draft: Tensor,
    log_ratio: Tensor,
    uniform: Tensor,
    draft_lens: Tensor,
    submitted: Tensor,
) -> tuple[Tensor, Tensor]:
    """Accepted lengths tau, int64 [batch], and prefix probabilities p_tau, float32 [batch]."""
    drafted = draft.shape[1]
    if drafted == 0:
        return draft_lens, torch.ones_like(draft_lens, dtype=torch.float32)
    # log p_i = C_i - max(0, C_1, ..., C_i) for the cumulative log-ratio C: the recursion with its
    # minimum at each step, without a loop.
    walk = log_ratio.cumsum(dim=1)
    prefix = (walk - walk.cummax(dim=1).values.clamp(min=0)).exp()
    excess = (prefix[:, :-1, None] * target[:, 1:drafted] - draft[:, 1:]).clamp_(min=0).sum(dim=-1)
    slack = excess + 1 - prefix[:, :-1]
    # Without slack p_i = 1 and the laws after it are equal: the prefix is surely kept, as its limit says.
    # What neither law gives has no prefix, nor a slack that compares: it is not.
    chance = torch.where(slack <= 0, 1.0, excess / slack)
    lengths = torch.arange(1, drafted + 1, device=target.device)
    chance = torch.where(lengths == draft_lens[:, None], prefix, torch.cat([chance, prefix[:, -1:]], dim=1))
    accepted = (((uniform < chance) & submitted) * lengths).amax(dim=1)
    scale = torch.where(accepted > 0, _take(prefix, (accepted - 1).clamp(min=0)), 1.0)
    return accepted, scale


def _draw_replacement(
    target: Tensor, draft: Tensor, accepted: Tensor, draft_lens: Tensor, scale: Tensor, noise: NoiseKey
) -> Tensor:
    """Race (scale p - q)_+ at the first row not accepted, or p at the bonus row; int64 [batch]."""
    drafted, vocab_size = draft.shape[1:]
    weights = _take_row(target, accepted)
    if drafted:
        rejected = (accepted < draft_lens)[:, None]
        draft_row = _take_row(draft, accepted.clamp(max=drafted - 1))
        residual = (weights * scale[:, None] - draft_row).clamp_(min=0)
        # Rounding can empty the residual of two laws that are equal but for rounding: draw from p.
        usable = rejected & (residual.sum(dim=-1, keepdim=True) > 0)
        weights = torch.where(usable, residual, weights)
    race = exponential_noise(noise.seeds, noise.rounds[:, None], accepted[:, None], _RESIDUAL, vocab_size)
    return (weights / race[:, 0]).argmax(dim=-1)
