"""Temperature, top-k, top-p and min-p on a law, in transformers' order and with its ties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .mix import log_softmax, top_p_set

__all__ = ["Sampling", "batch_sampling", "largest_of", "plain_or_warped", "usable_temperature", "warp"]

_COLDEST, _HOTTEST = 1e-30, 1e30


@dataclass(frozen=True)
class Sampling:
    """Per-sequence sampling parameters; a filter nobody in the batch uses is None.

    Attributes:
        temperature: float32 [batch], 0 for greedy decoding.
        top_k: int64 [batch], tokens kept; the vocabulary size keeps all.
        top_p: float32 [batch] in (0, 1]; 1 keeps all.
        min_p: float32 [batch] in [0, 1], relative to the most probable token; 0 keeps all.
        any_greedy: whether some temperature is 0, known to the host.
        all_greedy: whether every temperature is 0, known to the host.
    """

    temperature: Tensor
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    any_greedy: bool = False
    all_greedy: bool = False

    @property
    def filtered(self) -> bool:
        """Whether any filter is in use."""
        return self.top_k is not None or self.top_p is not None or self.min_p is not None

    def as_general_as(self, other: Sampling, vocab_size: int) -> Sampling:
        """The same laws, for kernels that serve `other`, of as many sequences, too: with its filters."""

        def column(own: Tensor | None, theirs: Tensor | None, nothing: float) -> Tensor | None:
            return torch.full_like(theirs, nothing) if own is None and theirs is not None else own

        return Sampling(
            temperature=self.temperature,
            top_k=column(self.top_k, other.top_k, vocab_size),
            top_p=column(self.top_p, other.top_p, 1.0),
            min_p=column(self.min_p, other.min_p, 0.0),
            any_greedy=self.any_greedy or other.any_greedy,
            all_greedy=self.all_greedy and other.all_greedy,
        )


def largest_of(logits: Tensor) -> Tensor:
    """The largest of each row's logits, float32 [..., 1]; of a row of only -inf a finite number."""
    return logits.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)


def usable_temperature(temperature: float) -> float:
    """A temperature to calculate with in float32, of the same law as `temperature`; 0 stays 0.

    At 1e-30 all mass lies on the largest logits already, and those of up to 1e8 stay finite. At 1e30 all
    finite logits weigh the same, and noise that is scaled by it stays finite.
    """
    return min(max(temperature, _COLDEST), _HOTTEST) if temperature > 0 else 0.0


def batch_sampling(
    temperatures: Sequence[float],
    top_k: Sequence[int],
    top_p: Sequence[float],
    min_p: Sequence[float],
    vocab_size: int,
    device: torch.device,
) -> Sampling:
    """Sampling of sequences with these parameters each; 0 for `top_k` keeps all.

    A filter is left out where no sequence of a temperature above 0 cuts anything by it.
    """
    sampled = [temperature > 0 for temperature in temperatures]
    kept = [min(k, vocab_size) if k > 0 else vocab_size for k in top_k]

    def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    def cuts(values: Sequence[float], nothing: float) -> bool:
        return any(value != nothing for value, is_sampled in zip(values, sampled, strict=True) if is_sampled)

    return Sampling(
        temperature=column([usable_temperature(temperature) for temperature in temperatures]),
        top_k=column(kept, torch.int64) if cuts(kept, vocab_size) else None,
        top_p=column(top_p) if cuts(top_p, 1.0) else None,
        min_p=column(min_p) if cuts(min_p, 0.0) else None,
        any_greedy=not all(sampled),
        all_greedy=not any(sampled),
    )


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """Normalised log-probabilities after temperature, then top-k, top-p and min-p.

    Each filter sees the law the one before it left. As in transformers, top-k keeps every token equal
    to the k-th, and top-p cuts an ascending stable sort from below.

    Args:
        logits: float32 [batch, rows, vocab], finite or -inf.
        sampling: parameters; a sequence of temperature 0 is treated as temperature 1, its caller takes
            the argmax instead.

    Returns:
        float32 [batch, rows, vocab]. A row of only -inf, which is no law, becomes the point mass on id
        0, the token that an argmax or a race over such a row would give.
    """
    temperature = sampling.temperature[:, None, None]
    if sampling.any_greedy:
        temperature = torch.where(temperature == 0, 1.0, temperature)
    # Divided by a cold temperature large logits would be rounded by more than they differ.
    logits = (logits - largest_of(logits)) / temperature
    empty = logits.amax(dim=-1) == -torch.inf
    logits[..., 0].masked_fill_(empty, 0.0)
    # At a hot temperature log-probabilities would be rounded by more than they differ.
    if sampling.top_k is not None:
        ordered = torch.sort(logits, dim=-1, descending=True).values
        last = (sampling.top_k - 1)[:, None, None].expand(*logits.shape[:-1], 1)
        logits = logits.masked_fill(logits < ordered.gather(-1, last), -torch.inf)
    if sampling.top_p is not None:
        logits = logits.masked_fill(~top_p_set(logits, sampling.top_p), -torch.inf)
    if sampling.min_p is not None:
        logits = logits.masked_fill(logits < sampling.min_p.log()[:, None, None], -torch.inf)
    return log_softmax(logits)


def plain_or_warped(logits: Tensor, sampling: Sampling) -> Tensor:
    """`warp`, but for sequences of temperature 0 the log-probabilities before temperature and filters."""
    if not sampling.any_greedy:
        return warp(logits, sampling)
    plain = warp(logits, Sampling(torch.ones_like(sampling.temperature)))
    if sampling.all_greedy:
        return plain
    return torch.where((sampling.temperature == 0)[:, None, None], plain, warp(logits, sampling))
