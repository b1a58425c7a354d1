"""Parts of a decoder layer over few rows: products, and attention, with what surrounds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import append, attention, check_rows
from .backend import backend
from .quantised import Weight, product

__all__ = ["projections", "rotated_attention"]


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


def rotated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotations: Tensor,
    cached_keys: Tensor,
    cached_values: Tensor,
    lengths: Tensor,
    span: int,
    window: int | None = None,
) -> Tensor:
    """Rotate queries and keys, write keys and values to a cache as `append` does, and attend to it.

    Row j of sequence b stands at position lengths[b] + j. What a sequence gets whose rows do not fit the
    cache or the span is not defined, but finite, and the others' is as if it were not there.
    A vector x is rotated by its halves (Su et al., arXiv 2104.09864, as Llama pairs them):

        x * cos + (x's second half, x's first half) * sin, where the sines' first half has changed its sign.

    Args:
        query, key, value: [batch, q, heads or kv_heads, dim] with q in 1..16, contiguous in `dim`.
        rotations: contiguous [capacity, 2 * dim], for each position cosines and sines.
        cached_keys, cached_values: [slots, kv_heads, capacity, dim] with slots >= batch, written in place.
        lengths: int64 [batch], which no launch that may overlap with this one writes.
        span: positions that may be read, at least max(lengths) + q.
        window: as for `attention`.

    Returns:
        `attention` of the rotated queries, [batch, q, heads, dim].

    Raises:
        ValueError: for more rows, or heads that are larger than `attention` takes or odd.
    """
    check_rows(query)
    if query.shape[3] % 2:
        raise ValueError(f"query must have heads of an even number of numbers, not {query.shape[3]}")
    if backend(query.device) == "triton":
        from .gpu.rotated_attention import rotated_attention as compiled

        return compiled(query, key, value, rotations, cached_keys, cached_values, lengths, span, window)
    steps = torch.arange(query.shape[1], device=lengths.device)
    position = (lengths[:, None] + steps).clamp(max=cached_keys.shape[2] - 1)
    cos, sin = rotations[position].unsqueeze(2).float().chunk(2, dim=-1)
    query, key = (
        (part.float() * cos + part.float().roll(part.shape[-1] // 2, -1) * sin).to(part.dtype)
        for part in (query, key)
    )
    append(key, value, cached_keys, cached_values, lengths)
    return attention(query, cached_keys[:, :, :span], cached_values[:, :, :span], lengths, window=window)
