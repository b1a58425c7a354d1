"""The products of a decoder layer over few rows, with what surrounds them, and norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from .backend import backend
from .quantised import Weight, product

__all__ = ["GATES", "Gate", "RMSNorm", "normalised", "projections"]

Gate: TypeAlias = Literal["silu", "gelu_pytorch_tanh"]

GATES: dict[Gate, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}
"""Activations that `projections` knows, by the names that configurations have for them."""


@dataclass(frozen=True)
class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * (offset + weight), over the last dimension (arXiv 1910.07467).

    Attributes:
        weight: [inside], of the inputs' dtype.
        offset: what the Gemmas add to their weights, in float32.
    """

    weight: Tensor
    eps: float
    offset: float = 0.0


def normalised(inputs: Tensor, norm: RMSNorm, residual: Tensor | None = None) -> Tensor:
    """`norm` of `inputs`, rounded to their dtype, and then added to `residual`, if there is one.

    Args:
        inputs: [rows, inside] or [rows, parts, inside], contiguous but for the strides of rows; float32,
            bfloat16 or float16.
        residual: contiguous, of the inputs' shape.

    Returns:
        A tensor like the inputs, contiguous where it is not the plain norm.
    """
    if norm.offset == 0.0 and residual is None:
        return F.rms_norm(inputs, norm.weight.shape, norm.weight, norm.eps)
    if backend(inputs.device) == "triton":
        from .gpu.layers import normalised as compiled

        return compiled(inputs, norm, residual)
    plain = F.rms_norm(inputs.to(torch.float32), norm.weight.shape, None, norm.eps)
    scaled = (plain * (norm.weight.to(torch.float32) + norm.offset)).to(inputs.dtype)
    return scaled if residual is None else residual + scaled


def projections(
    inputs: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None] | None = None,
    norm: RMSNorm | None = None,
    residual: Tensor | None = None,
    factor: float = 1.0,
    gate: Gate | None = None,
) -> list[Tensor]:
    """The products of few `inputs` with some weights, with what comes before and after them.

    Products are summed in float32. What is added to them is added before they are rounded to the inputs'
    dtype; with `gate` both are rounded first, as two products would be.

    Args:
        inputs: [rows, inside], float32, bfloat16 or float16.
        weights: [outside, inside] each, all tensors or all `QuantisedWeight`; tensors other than contiguous
            ones of the inputs' dtype are left to torch.
        biases: [outside] of each weight, all given or all None.
        norm: what the inputs go through first, weights [inside]; None for nothing.
        residual: [rows, outside], to which `factor` times the product of a single weight is added.
        gate: the activation with which the result is activation(first) * second of two weights (Shazeer,
            arXiv 2002.05202), without biases.

    Returns:
        [rows, outside] of the inputs' dtype for each weight, or one with `gate`; they may share rows.
    """
    biases = [None] * len(weights) if biases is None else biases
    if backend(inputs.device) == "triton":
        from .gpu.layers import projections as compiled
        from .gpu.layers import takes

        if takes(inputs, weights):
            return compiled(inputs, weights, biases, norm, residual, factor, gate)
    if norm is not None:
        inputs = normalised(inputs, norm)
    parts = [product(inputs, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    if gate is not None:
        return [GATES[gate](parts[0]) * parts[1]]
    return parts if residual is None else [torch.add(residual, parts[0], alpha=factor)]
