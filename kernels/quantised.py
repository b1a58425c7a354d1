"""Weights of eight bits, for a model that only drafts: what it gets wrong costs acceptance, not exactness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["QuantisedWeight", "Weight", "product", "quantise", "quantised"]

_LARGEST = 127
_AT_ONCE = 2**26
"""Numbers that are rounded at a time, in float32."""


@dataclass(frozen=True)
class QuantisedWeight:
    """A weight [outside, inside] as integers and a scale a row: symmetric, rounded to the nearest.

    Attributes:
        numbers: contiguous int8 [outside, inside].
        scales: float32 [outside].
    """

    numbers: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.numbers.shape


Weight: TypeAlias = Tensor | QuantisedWeight


def quantised(weight: Tensor) -> QuantisedWeight:
    """The nearest weight of eight bits to `weight` [outside, inside], of whose rows the largest stays."""
    numbers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], device=weight.device)
    quantise(weight, numbers, scales)
    return QuantisedWeight(numbers, scales)


def quantise(weight: Tensor, numbers: Tensor, scales: Tensor) -> None:
    """Write what is `quantised` of `weight` into int8 `numbers` [outside, inside] and `scales` [outside]."""
    step = max(_AT_ONCE // weight.shape[1], 1)
    for first in range(0, weight.shape[0], step):
        rows = slice(first, first + step)
        wide = weight[rows].detach().to(torch.float32)
        largest = wide.abs().amax(dim=1)
        scales[rows] = largest / _LARGEST
        numbers[rows] = (wide * torch.where(largest > 0, _LARGEST / largest, 0.0)[:, None]).round_()


def product(inputs: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """`inputs` [rows, inside] times `weight` and plus `bias`, [rows, outside] in the inputs' dtype.

    With a `QuantisedWeight` it is summed in float32, in which its numbers are written out.
    """
    if isinstance(weight, Tensor):
        return F.linear(inputs, weight, bias)
    total = F.linear(inputs.to(torch.float32), weight.numbers.to(torch.float32)) * weight.scales
    return (total if bias is None else total + bias).to(inputs.dtype)
