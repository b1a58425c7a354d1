"""The attention of a decoder layer over few rows, with the rotation before it and the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import append, attention, check_rows
from .backend import backend

__all__ = ["rotated_attention"]


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
    scale: float | None = None,
    softcap: float | None = None,
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
        window, scale, softcap: as for `attention`.

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

        scale = query.shape[3] ** -0.5 if scale is None else scale
        return compiled(
            query, key, value, rotations, cached_keys, cached_values, lengths, span, window, scale, softcap
        )
    steps = torch.arange(query.shape[1], device=lengths.device)
    position = (lengths[:, None] + steps).clamp(max=cached_keys.shape[2] - 1)
    cos, sin = rotations[position].unsqueeze(2).float().chunk(2, dim=-1)
    query, key = (
        (part.float() * cos + part.float().roll(part.shape[-1] // 2, -1) * sin).to(part.dtype)
        for part in (query, key)
    )
    append(key, value, cached_keys, cached_values, lengths)
    keys, values = cached_keys[:, :, :span], cached_values[:, :, :span]
    return attention(query, keys, values, lengths, scale, window, softcap)
