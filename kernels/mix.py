"""The log-ratio: how the three models' logits become the target's and the draft's.

With log-probabilities of the large base L, the small tuned models F_i and the small base B,

    log D = log_softmax( B + sum_i alpha_i (F_i - B) )              the small pair's law
    log p = log_softmax( log D + beta (L - B) )                     the target

(Mitchell et al., ICLR 2024, arXiv 2310.12962, with proxy-tuning's alpha). The models' own normalisers
cancel, so raw logits serve, except under the conservative filter, which compares tokens inside a set
with tokens outside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

__all__ = [
    "Coefficients",
    "draft_logits",
    "log_probabilities",
    "log_softmax",
    "target_logits",
    "top_p_set",
]


@dataclass(frozen=True)
class Coefficients:
    """Per-sequence weights of the mix.

    Attributes:
        alpha: float32 [batch, experts], scale of each tuned model's delta.
        beta: float32 [batch], scale of the large model's delta.
        draft_alpha: float32 [batch, experts], weights of the tuned models in the draft law.
        draft_base: float32 [batch], weight of the small base in the draft law; None where the draft
            does not read it.
        conservative_top_p: float32 [batch] in (0, 1], mass of the set inside which the large model's
            delta applies; None without the filter.
        some_weight_is_zero: whether any model's weight in the target or the draft may be 0 for some
            sequence, known to the host. A model of weight 0 is not consulted, which costs a pass to ensure.
    """

    alpha: Tensor
    beta: Tensor
    draft_alpha: Tensor
    draft_base: Tensor | None
    conservative_top_p: Tensor | None = None
    some_weight_is_zero: bool = True

    @property
    def filtered(self) -> bool:
        """Whether the conservative filter is in use."""
        return self.conservative_top_p is not None

    @cached_property
    def target_weights(self) -> Tensor:
        """float32 [batch, models + 1]: weights in the target's logits, where there is no filter, of the large
        base, the tuned models, the small base, and a correction of the draft.
        """
        base = 1 - self.alpha.sum(dim=1) - self.beta
        nothing = torch.zeros_like(base)
        return torch.cat([self.beta[:, None], self.alpha, base[:, None], nothing[:, None]], dim=1)

    @cached_property
    def plain_weights(self) -> Tensor:
        """float32 [batch, models + 1]: the same for the law without the large model's delta."""
        base = 1 - self.alpha.sum(dim=1)
        nothing = torch.zeros_like(base)
        return torch.cat([nothing[:, None], self.alpha, base[:, None], nothing[:, None]], dim=1)

    @cached_property
    def delta_weights(self) -> Tensor:
        """float32 [batch, models + 1]: the same for the large model's delta alone."""
        nothing = torch.zeros_like(self.alpha)
        return torch.cat(
            [self.beta[:, None], nothing, -self.beta[:, None], torch.zeros_like(self.beta)[:, None]], dim=1
        )

    @cached_property
    def draft_weights(self) -> Tensor:
        """float32 [batch, models + 1]: the same for the draft law's logits."""
        nothing = torch.zeros_like(self.beta)
        base = nothing if self.draft_base is None else self.draft_base
        whole = torch.ones_like(base)
        return torch.cat([nothing[:, None], self.draft_alpha, base[:, None], whole[:, None]], dim=1)

    @cached_property
    def of_given_draft(self) -> Coefficients:
        """The same target, with a draft law whose logits are all in the correction."""
        return replace(
            self, draft_alpha=torch.zeros_like(self.draft_alpha), draft_base=None, some_weight_is_zero=True
        )


def _weighted_sum(
    weights: Sequence[Tensor], logits: Sequence[Tensor], vocab_size: int, some_weight_is_zero: bool
) -> Tensor:
    """Sum of weight times logits in float32; a new tensor [batch, rows, vocab_size].

    A model of weight 0 is not consulted. A token is left out (-inf) where a model that is consulted has
    -inf, NaN or +inf for it: no ratio is defined there.
    """
    total: Tensor | None = None
    for weight, model_logits in zip(weights, logits, strict=True):
        scale = weight[:, None, None]
        rows = model_logits[..., :vocab_size].to(torch.float32)
        if some_weight_is_zero:
            rows = rows.masked_fill(scale == 0, 0.0)
        total = rows * scale if total is None else total.addcmul_(rows, scale)
    assert total is not None
    return total.nan_to_num_(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)


def log_softmax(logits: Tensor) -> Tensor:
    """log_softmax over the last dimension of finite or -inf entries; a row of only -inf becomes NaN.

    torch's own adds up 150,000 terms of float32 one after the other on a CPU, which costs two digits.
    """
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    return shifted - shifted.exp().sum(dim=-1, keepdim=True).log()


def log_probabilities(logits: Tensor) -> Tensor:
    """`log_softmax`, but a row of only -inf stays one."""
    log_law = log_softmax(logits)
    return torch.where(log_law.isnan(), -torch.inf, log_law)


def top_p_set(logits: Tensor, top_p: Tensor) -> Tensor:
    """The smallest set of most probable tokens whose mass reaches top_p, as transformers cuts it.

    Args:
        logits: float32 [batch, rows, vocab], log-probabilities but for a number a row, finite or -inf.
        top_p: float32 [batch].

    Returns:
        bool [batch, rows, vocab]. The most probable token is always in; among equal probabilities
        higher ids come first, as in an ascending stable sort cut from below.
    """
    ascending, order = torch.sort(logits, dim=-1, stable=True)
    dropped = log_softmax(ascending).exp().cumsum(dim=-1) <= 1 - top_p[:, None, None]
    dropped[..., -1] = False
    return torch.empty_like(dropped).scatter_(-1, order, ~dropped)


def draft_logits(
    tuned: Sequence[Tensor],
    base: Tensor | None,
    coefficients: Coefficients,
    vocab_size: int,
    correction: Tensor | None = None,
) -> Tensor:
    """The draft law's unnormalised log-probabilities before temperature and filters.

    Args:
        tuned: one [batch, rows, >= vocab_size] tensor a tuned model, float32, bfloat16 or float16.
        base: the small base's logits, same shape; not read where `coefficients.draft_base` is None.
        vocab_size: ids at or above it are never produced.
        correction: finite float32 [batch, rows, vocab_size], added to the logits.

    Returns:
        float32 [batch, rows, vocab_size].
    """
    weights = list(coefficients.draft_alpha.unbind(1))
    logits = list(tuned)
    if coefficients.draft_base is not None:
        assert base is not None
        weights.append(coefficients.draft_base)
        logits.append(base)
    mixed = _weighted_sum(weights, logits, vocab_size, coefficients.some_weight_is_zero)
    return mixed if correction is None else mixed + correction


def target_logits(
    large: Tensor, tuned: Sequence[Tensor], base: Tensor, coefficients: Coefficients, vocab_size: int
) -> Tensor:
    """The target's unnormalised log-probabilities before temperature and filters.

    Args:
        large, base: [batch, rows, >= vocab_size] logits, float32, bfloat16 or float16.
        tuned: one such tensor a tuned model.
        vocab_size: ids at or above it are never produced.

    Returns:
        float32 [batch, rows, vocab_size].
    """
    alpha, beta = coefficients.alpha, coefficients.beta
    zeros = coefficients.some_weight_is_zero
    small_base_weight = 1 - alpha.sum(dim=1)
    if coefficients.conservative_top_p is None:
        weights = [beta, *alpha.unbind(1), small_base_weight - beta]
        return _weighted_sum(weights, [large, *tuned, base], vocab_size, zeros)
    weights = [*alpha.unbind(1), small_base_weight]
    log_draft = log_probabilities(_weighted_sum(weights, [*tuned, base], vocab_size, zeros))
    delta = _weighted_sum(
        [beta, -beta],
        [log_probabilities(_finite(large, vocab_size)), log_probabilities(_finite(base, vocab_size))],
        vocab_size,
        zeros,
    )
    inside = top_p_set(log_draft, coefficients.conservative_top_p)
    return torch.where(inside, log_draft + delta, log_draft)


def _finite(logits: Tensor, vocab_size: int) -> Tensor:
    logits = logits[..., :vocab_size].to(torch.float32)
    return torch.where(logits.isfinite(), logits, -torch.inf)
