"""Decoding attention over a ragged cache: a few new rows a sequence, each sequence at a length of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import backend

__all__ = ["HEAD_DIMS", "LARGEST_HEAD_DIM", "MOST_ROWS", "append", "attention", "check_rows"]

MOST_ROWS = 16
"""New rows of a sequence that `attention` takes at once."""

HEAD_DIMS = (64, 80, 96, 128, 256)
"""Sizes of a head for which the Triton kernel is compiled and checked ahead of time."""

LARGEST_HEAD_DIM = 256


def append(keys: Tensor, values: Tensor, cached_keys: Tensor, cached_values: Tensor, lengths: Tensor) -> None:
    """Write new keys and values into a cache, each sequence's at its own length, in one launch.

    Row `j` of sequence `b` goes to position `lengths[b] + j`, or to the last one if that lies beyond: a cache
    keeps its last position for what nobody looks at.

    Args:
        keys, values: [batch, q, kv_heads, dim], contiguous in `dim`, of the cache's dtype.
        cached_keys, cached_values: [slots, kv_heads, capacity, dim] with slots >= batch, written in place;
            sequence `b` has slot `b`.
        lengths: int64 [batch], on the same device.
    """
    if backend(keys.device) == "triton":
        from .gpu.attention import append as compiled

        compiled(keys, values, cached_keys, cached_values, lengths)
        return
    batch, count = keys.shape[:2]
    steps = torch.arange(count, device=keys.device)
    position = (lengths[:, None] + steps).clamp(max=cached_keys.shape[2] - 1)
    slot = torch.arange(batch, device=keys.device)[:, None]
    cached_keys[slot, :, position] = keys
    cached_values[slot, :, position] = values


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of the newest rows of each sequence over its part of the cache, in one launch.

    Row `j` of sequence `b` stands at position t = lengths[b] + j, or at the last of the span if that lies
    beyond. It sees the positions s <= t, of which its own is one, so its keys and values are there already
    (`append`). Its result is sum_s w_s values[s] with

        w = softmax_s(squeeze(scale * (query . keys[s] + slope * s)))
        squeeze(x) = softcap * tanh(x / softcap).

    Everything between the tensors is float32, but that weights are rounded to the values' dtype before they
    meet them. A sequence's result depends on nothing in the other sequences, bit for bit, nor on how many
    there are or how large the span is.

    Args:
        query: [batch, q, heads, dim] with q in 1..16 and dim <= 256, float32, bfloat16 or float16.
        keys, values: [slots, kv_heads, span, dim] of the query's dtype with slots >= batch: the cache, or of
            it the first positions, at least max(lengths) + q if nothing of any sequence is to be cut off.
            Heads h * heads / kv_heads and following share the h-th keys and values.
        lengths: int64 [batch], positions before the new rows, on the same device; never read by the host.
        scale: dim ** -0.5 by default.
        window: a row sees the last `window` positions up to its own; None is no limit.
        softcap: None squeezes nothing (Gemma-2, arXiv 2408.00118).
        alibi_slopes: [heads] (Press et al., arXiv 2108.12409), added before `scale`: give slopes / scale for
            a model that adds afterwards. Of bfloat16 they make Falcon's bias: positions, and their products
            with slopes, are rounded to bfloat16.
        out: [batch, q, heads, dim] of the query's dtype, to write into.

    All tensors are contiguous in `dim`; their other strides are free.

    Returns:
        [batch, q, heads, dim] of the query's dtype, `out` if given.

    Raises:
        ValueError: for shapes or dtypes other than these.

    Example:
        >>> import torch
        >>> keys, values = torch.randn(2, 1, 4, 64, 80)  # one slot, 4 heads, 64 positions
        >>> attention(torch.randn(1, 3, 8, 80), keys, values, torch.tensor([10])).shape
        torch.Size([1, 3, 8, 80])
    """
    batch, _, heads, dim = query.shape
    slots, kv_heads, _, _ = keys.shape
    check_rows(query)
    if keys.shape != values.shape or keys.shape[3] != dim or slots < batch or heads % kv_heads:
        raise ValueError(
            "keys and values must be [slots >= batch, a divisor of heads, span, dim] for a query "
            f"{list(query.shape)}, not {list(keys.shape)} and {list(values.shape)}"
        )
    if not query.dtype == keys.dtype == values.dtype:
        raise ValueError(f"query is {query.dtype}, keys {keys.dtype}, values {values.dtype}: give one dtype")
    scale = dim**-0.5 if scale is None else scale
    if backend(query.device) == "triton":
        from .gpu.attention import attention as compiled

        return compiled(query, keys, values, lengths, scale, window, softcap, alibi_slopes, out)
    result = _attention(query, keys[:batch], values[:batch], lengths, scale, window, softcap, alibi_slopes)
    return result if out is None else out.copy_(result)


def check_rows(query: Tensor) -> None:
    """Raise ValueError for a query [batch, q, heads, dim] of too many rows, or too large heads."""
    _, count, _, dim = query.shape
    if not 1 <= count <= MOST_ROWS:
        raise ValueError(f"query must have 1 to {MOST_ROWS} rows a sequence, not {count}")
    if dim > LARGEST_HEAD_DIM:
        raise ValueError(f"query must have heads of at most {LARGEST_HEAD_DIM} numbers, not {dim}")


def _attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """The definition, in torch."""
    batch, count, heads, dim = query.shape
    kv_heads, span = keys.shape[1:3]
    steps, column = (torch.arange(size, device=query.device) for size in (count, span))
    position = (lengths[:, None] + steps).clamp(max=span - 1)[:, None, None, :, None]
    # [batch, kv_heads, heads that share keys, q, span]
    rows = query.float().reshape(batch, count, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4)
    scores = rows @ keys.float()[:, :, None].transpose(3, 4)
    if alibi_slopes is not None:
        slope = alibi_slopes.view(kv_heads, -1, 1, 1)
        if slope.dtype == torch.bfloat16:
            scores = scores + ((slope * column).float() - (slope * position).float())
        else:
            scores = scores + slope * (column - position)
    scores = scores * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    visible = column <= position
    if window is not None:
        visible = visible & (column > position - window)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    mixed = weights.to(values.dtype).float() @ values.float()[:, :, None]
    return mixed.permute(0, 3, 1, 2, 4).reshape(query.shape).to(query.dtype)
