"""The plain cost model of speculation, to hold beside a measurement and to project to other machines.

With `a` the chance that a drafted token is accepted and `c` the time of a small model's step over the large
model's, a round of K drafted tokens gives (1 - a^(K+1)) / (1 - a) tokens and costs (K + 1) c + 1 + c large
steps: K + 1 steps of the tuned model, one pass of the large model, one of the small base. Naive EFT costs
1 + 2 c a token, the large model alone 1. Everything else is taken to cost nothing, and a pass of several
rows as much as one of one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from .comparison import Comparison
from .published import SHAPES
from .shapes import random_model, step_bytes

__all__ = [
    "Projection",
    "break_even_batch",
    "expected_tokens",
    "measured_cost_ratio",
    "project",
    "speed_up_over_large",
    "speed_up_over_naive",
]

_LONGEST_DRAFT = 24
_DTYPE_BYTES = 2


def expected_tokens(acceptance: float, drafted: float) -> float:
    """Tokens of a round, (1 - a^(K+1)) / (1 - a); `drafted` may be a mean."""
    if acceptance >= 1:
        return drafted + 1
    return float((1 - acceptance ** (drafted + 1)) / (1 - acceptance))


def speed_up_over_large(acceptance: float, drafted: float, cost_ratio: float) -> float:
    """Tokens a second over those of the large model alone."""
    return expected_tokens(acceptance, drafted) / ((drafted + 2) * cost_ratio + 1)


def speed_up_over_naive(acceptance: float, drafted: float, cost_ratio: float) -> float:
    """Tokens a second over those of naive EFT."""
    return (1 + 2 * cost_ratio) * speed_up_over_large(acceptance, drafted, cost_ratio)


def measured_cost_ratio(comparison: Comparison, naive: str) -> float:
    """c as naive EFT's own steps give it: a small model's step, the mean of both, over the large model's."""
    split = comparison[naive].milliseconds_per_round
    return (split["draft"] + split["base"]) / 2 / split["large"]


def break_even_batch(ratios: Sequence[tuple[int, float]]) -> float | None:
    """The batch size at which a ratio of speeds falls to 1, between two that were measured.

    Args:
        ratios: (batch, ratio) by growing batch.

    Returns:
        Interpolated linearly over the logarithm of the batch; the smallest batch if the ratio is below 1
        there; None if it stays above 1.
    """
    if ratios and ratios[0][1] < 1:
        return float(ratios[0][0])
    for (small, above), (large, below) in pairwise(ratios):
        if below < 1:
            share = (above - 1) / (above - below)
            return float(small * (large / small) ** share)
    return None


@dataclass(frozen=True)
class Projection:
    """What the cost model says of machines that were not measured.

    Attributes:
        large, small: names in `SHAPES`.
        devices: that share the large model; a small model is on one of them.
        bandwidth: bytes a second of one device.
        dtype_bytes: of one weight.
        large_bytes, small_bytes: the weights of each, read in full once a step.
        acceptance: per token.
        cost_ratio: the small model's bytes over the large model's, times the devices.
        large_milliseconds: of one step of the large model at the full bandwidth of all devices.
        drafted: the best draft length.
        tokens_per_round: at that length.
        over_naive, over_large: ratios of speed.
        tokens_per_second: of one sequence, an upper bound: nothing but the reading of weights counted.
    """

    large: str
    small: str
    devices: int
    bandwidth: float
    dtype_bytes: int
    large_bytes: int
    small_bytes: int
    acceptance: float
    cost_ratio: float
    large_milliseconds: float
    drafted: int
    tokens_per_round: float
    over_naive: float
    over_large: float
    tokens_per_second: float


def project(large: str, small: str, devices: int, bandwidth: float, acceptance: float) -> Projection:
    """Project speculative EFT at one sequence to `devices` machines that share the large model.

    Steps are taken to be bound by the reading of weights. `acceptance` is what the user has reason to
    expect of those models: it is a property of the models and the text, not of the machine.

    Raises:
        ValueError: for a name that is not in `SHAPES`.
    """
    large_bytes, small_bytes = (_DTYPE_BYTES * _parameters(name) for name in (large, small))
    large_seconds = large_bytes / (bandwidth * devices)
    cost_ratio = small_bytes / bandwidth / large_seconds
    drafted = max(
        range(1, _LONGEST_DRAFT + 1), key=lambda count: speed_up_over_large(acceptance, count, cost_ratio)
    )
    over_large = speed_up_over_large(acceptance, drafted, cost_ratio)
    return Projection(
        large=large,
        small=small,
        devices=devices,
        bandwidth=bandwidth,
        dtype_bytes=_DTYPE_BYTES,
        large_bytes=large_bytes,
        small_bytes=small_bytes,
        acceptance=acceptance,
        cost_ratio=cost_ratio,
        large_milliseconds=1000 * large_seconds,
        drafted=drafted,
        tokens_per_round=expected_tokens(acceptance, drafted),
        over_naive=speed_up_over_naive(acceptance, drafted, cost_ratio),
        over_large=over_large,
        tokens_per_second=over_large / large_seconds,
    )


def _parameters(name: str) -> int:
    """Weights that a step reads: all but the table of embeddings, of which it reads a row a token."""
    if name not in SHAPES:
        raise ValueError(f"{name!r} is not one of {', '.join(SHAPES)}")
    with torch.device("meta"):
        return step_bytes(random_model(SHAPES[name], torch.float32), itemsize=1).weights
