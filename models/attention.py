"""Attention over a ragged cache, in the ways that `ModelRunner` can be told: with torch, Triton, flash-attn.

torch's takes masks that know each sequence's length; the others take the lengths themselves.
"""

from __future__ import annotations

from functools import cache, partial
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from speculative_eft.kernels import HEAD_DIMS, LARGEST_HEAD_DIM, MOST_ROWS, attention, backend

from .configs import TESTED_FAMILIES, text_config
from .describe import head_dim
from .extras import install_command

Attention: TypeAlias = Literal["sdpa", "triton", "flash_attn"]

REGISTERED: dict[Attention, str] = {
    "sdpa": "speculative_eft_sdpa",
    "triton": "speculative_eft_triton",
    # transformers takes a name with "flash" in it for its own.
    "flash_attn": "speculative_eft_kvcache",
}
"""Names under which the attention functions are registered with transformers."""

FLASH_DTYPES = (torch.float16, torch.bfloat16)


def check_attention(asked: str) -> None:
    """Raise ValueError if `asked` names no attention."""
    choices = ("auto", *get_args(Attention))
    if asked not in choices:
        raise ValueError(f"attention must be one of {', '.join(map(repr, choices))}, not {asked!r}.")


def choose_attention(asked: str, model: PreTrainedModel) -> Attention:
    """The attention that `model` is to be run with: what is `asked` for, or for `"auto"` what fits.

    `"auto"` is Triton's on a GPU where the kernel is compiled ahead of time for the model's size of head,
    else torch's.

    Raises:
        ValueError: if `asked` is none of them, or cannot run this model here.
    """
    check_attention(asked)
    if asked == "auto":
        fits = model.device.type == "cuda" and head_dim(text_config(model.config)) in HEAD_DIMS
        return "triton" if fits and not _obstacle("triton", model) else "sdpa"
    chosen = cast(Attention, asked)
    if problem := _obstacle(chosen, model):
        raise ValueError(f"attention={chosen!r} cannot run {type(model).__name__}: {problem}; 'auto' can.")
    return chosen


def _obstacle(chosen: Attention, model: PreTrainedModel) -> str | None:
    """Why `model` cannot be run with `chosen`, if it cannot."""
    if chosen == "sdpa":
        return None
    config = text_config(model.config)
    dim = head_dim(config)
    if config.model_type not in TESTED_FAMILIES:
        return f"it is not tested with {config.model_type} models"
    if not model._supports_attention_backend and not getattr(config, "alibi", False):
        return "these models have an attention of their own"
    if dim > LARGEST_HEAD_DIM:
        return f"its heads of {dim} numbers are larger than {LARGEST_HEAD_DIM}"
    if chosen == "triton":
        usable = backend(model.device) == "triton"
        return None if usable else f"it needs Triton and a model on a GPU, not on {model.device}"
    if find_spec("flash_attn") is None:
        return f"flash-attn is not installed ({install_command('flash')})"
    if model.dtype not in FLASH_DTYPES:
        return f"flash-attn takes float16 or bfloat16, not {str(model.dtype).removeprefix('torch.')}"
    if dim % 8:
        return f"flash-attn takes heads of a multiple of 8 numbers, not {dim}"
    if _compute_capability(model.device) < (8, 0):
        return f"flash-attn needs an NVIDIA GPU of compute capability 8.0 or newer, not {model.device}"
    return None


def _compute_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def attention_for(chosen: Attention, rows: int) -> Attention:
    """The attention for a pass of `rows` tokens a sequence: Triton's is for few."""
    return "sdpa" if chosen == "triton" and rows > MOST_ROWS else chosen


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
    _refuse_sinks(module, s_aux)
    return attend(query, key, value, attention_mask, scaling, softcap), None


def _refuse_sinks(module: nn.Module, s_aux: Tensor | None) -> None:
    if s_aux is not None:
        raise ValueError(f"{type(module).__name__} uses attention sinks, which are not supported.")


def visible_lengths(chosen: Attention, lengths: Tensor, rows: int, span: int) -> Tensor:
    """What `attend_ragged` has to know of `lengths`, int64 [batch], for a pass of `rows` tokens a sequence.

    Shaped like a mask [batch, 1, 1, 1]: that is the one argument that all of transformers' models hand on
    untouched.
    """
    if chosen == "flash_attn":
        lengths = (lengths + rows).clamp(max=span).to(torch.int32)
    return lengths.view(-1, 1, 1, 1)


def attend_ragged(
    chosen: Attention,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Attention of `query` [batch, q, heads, dim] over [batch, kv_heads, span, dim], with no mask.

    `lengths` are `visible_lengths` for this `chosen`. Other arguments as in `kernels.attention`. Returns
    [batch, q, heads, dim].
    """
    if torch.compiler.is_compiling() and alibi_slopes is None:
        operation: Any = torch.ops.speculative_eft.attend_ragged
        return cast(Tensor, operation(chosen, query, keys, values, lengths, scale, window, softcap))
    lengths = lengths.view(-1)
    if chosen == "triton":
        return attention(query, keys, values, lengths, scale, window, softcap, alibi_slopes)
    from flash_attn import flash_attn_with_kvcache

    scale = query.shape[3] ** -0.5 if scale is None else scale
    mixed = flash_attn_with_kvcache(
        query,
        keys.transpose(1, 2),
        values.transpose(1, 2),
        cache_seqlens=lengths,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
        # It adds them after the scale, and does not round them as Falcon does.
        alibi_slopes=None if alibi_slopes is None else alibi_slopes.float() * scale,
    )
    return cast(Tensor, mixed)


@torch.library.custom_op(
    "speculative_eft::attend_ragged",
    mutates_args=(),
    schema="(str chosen, Tensor query, Tensor keys, Tensor values, Tensor lengths, float? scale, "
    "int? window, float? softcap) -> Tensor",
)
def _attend_ragged(chosen: Attention, query: Tensor, *arguments: Any) -> Tensor:
    return attend_ragged(chosen, query, *arguments).contiguous()


@_attend_ragged.register_fake
def _(chosen: str, query: Tensor, *arguments: Any) -> Tensor:
    return query.new_empty(query.shape)


def _ragged(
    chosen: Attention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`attend_ragged`, called as transformers' attention modules do, with lengths in the mask's place."""
    _refuse_sinks(module, s_aux)
    query = query.transpose(1, 2)
    return attend_ragged(chosen, query, key, value, attention_mask, scaling, sliding_window, softcap), None


AttentionInterface.register(REGISTERED["sdpa"], ragged_sdpa)
AttentionInterface.register(REGISTERED["triton"], partial(_ragged, "triton"))
AttentionInterface.register(REGISTERED["flash_attn"], partial(_ragged, "flash_attn"))
