"""The products of a decoder layer over few rows, with what surrounds them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from .backend import backend
from .quantised import Weight, product

__all__ = ["projections"]


def projections(
    inputs: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None] | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
) -> list[Tensor]:
    """The products of few `inputs` with some weights, with what comes before and after them.

    Products are summed in float32. What is added to them is added before they are rounded to the inputs'
    dtype; with `gated` both are rounded first, as two products would be.

    Args:
        inputs: [rows, inside], float32, bfloat16 or float16.
        weights: [outside, inside] each, all tensors or all `QuantisedWeight`; tensors other than contiguous
            ones of the inputs' dtype are left to torch.
        biases: [outside] of each weight, all given or all None.
        norm: [inside], the weight of an RMS norm with `eps` (Zhang and Sennrich, arXiv 1910.07467) that the
            inputs go through first; None for none.
        residual: [rows, outside], added to the product of a single weight.
        gated: whether the result is silu(first) * second of two weights (Shazeer, arXiv 2002.05202), without
            biases.

    Returns:
        [rows, outside] of the inputs' dtype for each weight, or one with `gated`; they may share rows.
    """
    biases = [None] * len(weights) if biases is None else biases
    if backend(inputs.device) == "triton":
        from .gpu.layers import projections as compiled
        from .gpu.layers import takes

        if takes(inputs, weights):
            return compiled(inputs, weights, biases, norm, eps, residual, gated)
    if norm is not None:
        inputs = F.rms_norm(inputs, norm.shape, norm, eps)
    parts = [product(inputs, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    if gated:
        return [F.silu(parts[0]) * parts[1]]
    return parts if residual is None else [residual + parts[0]]
