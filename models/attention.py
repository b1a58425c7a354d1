"""Attention over a ragged cache: masks that know each sequence's length, and the functions that use them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

ATTENTION = "speculative_eft_sdpa"
"""Name under which `ragged_sdpa` is registered with transformers."""


def ragged_bias(positions: Tensor, columns: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """Additive mask [batch, 1, rows, span] of `dtype`: 0 where a row may look, -inf elsewhere.

    `positions`, int64 [batch, rows], is where each row stands, and `columns`, int64 [span], counts the
    cache's positions from 0. A row sees itself and what came before, or the last `window` positions of
    that. No row is empty, whatever its position, so no softmax makes a NaN.
    """
    opened, closed = _constants(dtype, positions.device)
    rows = positions[:, None, :, None]
    allowed = columns <= rows
    if window is not None:
        allowed.logical_and_(columns > rows.clamp(max=columns.shape[0] - 1) - window)
    return torch.where(allowed, opened, closed)


@cache
def _constants(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """0 and -inf, which torch.where would otherwise move to the device in every pass."""
    both = torch.tensor([0.0, float("-inf")], dtype=dtype, device=device)
    return both[0], both[1]


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of `query` [batch, heads, q, dim] over [batch, kv_heads, span, dim] with an additive `bias`.

    `bias` is [batch, 1, 1 or q, span], or has a row for each of the `heads / kv_heads * q` rows that share
    keys, head by head. `scale` is dim ** -0.5 by default; `softcap` squeezes the scores into +-softcap as
    Gemma-2 does. Returns [batch, q, heads, dim].
    """
    batch, heads, length, dim = query.shape
    kv_heads = keys.shape[1]
    # Heads that share keys become rows of one attention, so that keys are read once and never copied.
    rows = heads // kv_heads * length
    query = query.reshape(batch, kv_heads, rows, dim)
    if bias.shape[2] not in (1, rows):
        bias = bias.repeat(1, 1, rows // length, 1)
    if softcap is None:
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scale)
    else:
        scores = query @ keys.transpose(2, 3) * (dim**-0.5 if scale is None else scale)
        scores = torch.tanh(scores / softcap) * softcap + bias
        out = scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values
    return out.reshape(batch, heads, length, -1).transpose(1, 2)


def ragged_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`attend`, called as transformers' attention modules do.

    Raises ValueError for a module with attention sinks, which `attend` does not know.
    """
    if s_aux is not None:
        raise ValueError(f"{type(module).__name__} uses attention sinks, which are not supported.")
    return attend(query, key, value, attention_mask, scaling, softcap), None


AttentionInterface.register(ATTENTION, ragged_sdpa)
