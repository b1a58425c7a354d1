"""What runs between the tokens and the output head, one way for each kind of architecture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from itertools import count
from types import FunctionType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from speculative_eft.kernels import MOST_ROWS

from .attention import (
    REGISTERED,
    Attention,
    attend_ragged,
    attention_for,
    ragged_bias,
    visible_lengths,
)
from .configs import changes_with_length, declared, layer_windows, position_limit
from .slot_cache import SlotCache

_FEW_TOKENS = 64

_NUMBERS = count()
_VARIANTS = 64
"""Kinds of pass that torch.compile keeps for one model: of one row or several, of one sequence or several,
and of each before it knows that its lengths vary."""


@dataclass
class Block:
    """The tokens of one pass and where they stand."""

    tokens: Tensor
    """int64 [batch, q]"""
    positions: Tensor
    """int64 [batch, q], below the cache's capacity"""
    columns: Tensor
    """int64 [span]: 0, 1, ..., the positions of the cache that attention looks at"""


class Body(Protocol):
    """Turns a block into hidden states [batch, q, hidden], ready for the output head."""

    def prepare(self, cache: SlotCache) -> None:
        """Get ready for passes with `cache`, which starts anew."""

    def __call__(self, block: Block, cache: SlotCache) -> Tensor: ...

    def fill(self, block: Block, cache: SlotCache) -> None:
        """Run `block` for its keys and values alone."""
        self(block, cache)


class TransformersBody(Body):
    """Any decoder of transformers that takes a mask, positions and a cache from outside."""

    def __init__(self, decoder: PreTrainedModel, attention: Attention, takes_ours: bool) -> None:
        """Run `decoder` with `attention`; `takes_ours` says whether it asks transformers for that function.

        Raises ValueError for a decoder that keeps another state than keys and values.
        """
        config = decoder.config
        self.decoder = decoder
        self.attention = attention
        self.compiled: Callable[..., Any] | None = None
        # The others know `sdpa` by name.
        self.names: dict[Attention, str] = REGISTERED if takes_ours else {"sdpa": "sdpa"}
        # Our sdpa makes one row of every head that shares keys, so the mask has them too.
        kv_heads = declared(config, "num_key_value_heads") or config.num_attention_heads
        self.groups = int(config.num_attention_heads // kv_heads) if takes_ours else 1
        self.windows = layer_windows(config)
        self.position_limit = position_limit(config)
        # Newer versions of transformers have another name for it.
        accepts = signature(decoder.forward).parameters
        self.cache_argument = "cache" if "cache" in accepts else "past_key_values"
        self.has_experts = any(name.endswith("experts") for name, _ in decoder.named_modules())
        self.rotations: list[tuple[Any, Tensor]] = []

    def compile(self) -> None:
        """Run passes of few rows by torch.compile from now on."""
        self.compiled = _compiled(self.decoder)

    def prepare(self, cache: SlotCache) -> None:
        """Find the rotations that would change with the length of the input."""
        if changes_with_length(self.decoder.config):
            modules: list[Any] = [m for m in self.decoder.modules() if hasattr(m, "original_inv_freq")]
            self.rotations = [(m, m.original_inv_freq.to(self.decoder.device)) for m in modules]

    def __call__(self, block: Block, cache: SlotCache) -> Tensor:
        positions = block.positions
        attention = attention_for(self.attention, positions.shape[1])
        masks = self._masks(attention, block, cache)
        if self.position_limit is not None:
            # Only padding stands beyond the limit, but a table of positions has no row for it.
            positions = positions.clamp(max=self.position_limit - 1)
        with ExitStack() as stack:
            self._prepare(attention, block, stack)
            # Prompts' passes are bound by arithmetic, and storage is allocated outside of graphs.
            few = positions.shape[1] <= MOST_ROWS and cache.is_allocated
            run = self.compiled if self.compiled is not None and few else self.decoder
            output = run(
                input_ids=block.tokens,
                attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
                position_ids=positions,
                use_cache=True,
                **{self.cache_argument: cache},
            )
        return cast(Tensor, output.last_hidden_state)

    def _masks(self, attention: Attention, block: Block, cache: SlotCache) -> dict[str, Tensor]:
        """For each kind of layer what `attention` takes as its mask."""
        positions = block.positions
        rows = positions.shape[1]
        if attention != "sdpa":
            lengths = visible_lengths(attention, cache.lengths, rows, block.columns.shape[0])
            return dict.fromkeys(self.windows, lengths)
        if self.groups > 1 and rows > 1:
            positions = positions.repeat(1, self.groups)
        dtype = self.decoder.dtype
        return {
            kind: ragged_bias(positions, block.columns, window, dtype)
            for kind, window in self.windows.items()
        }

    def _prepare(self, attention: Attention, block: Block, stack: ExitStack) -> None:
        """Set what our pass needs and the model's owner may want otherwise."""
        config = self.decoder.config
        stack.enter_context(replaced(config, "_attn_implementation", self.names[attention]))
        if self.has_experts and block.tokens.numel() <= _FEW_TOKENS:
            # The others ask the device how many tokens each expert got.
            grouped = self.decoder.device.type == "cuda" and self.decoder.dtype == torch.bfloat16
            experts = "grouped_mm" if grouped else "batched_mm"
            stack.enter_context(replaced(config, "_experts_implementation", experts))
        for module, frequencies in self.rotations:
            # Frequencies that follow the longest input of the batch would tie a sequence to its neighbours.
            stack.enter_context(replaced(module, "rope_type", "default"))
            stack.enter_context(replaced(module, "inv_freq", frequencies))


def _compiled(decoder: PreTrainedModel) -> Callable[..., Any]:
    def forward(**arguments: Any) -> Any:
        return decoder(**arguments)

    # What torch.compile has learnt of a function, such as which sizes vary, it keeps by the name in its code:
    # under one name, models of different shapes would have no size that is known.
    code = forward.__code__.replace(co_name=f"forward_{next(_NUMBERS)}")
    own = FunctionType(code, forward.__globals__, code.co_name, None, forward.__closure__)
    options: dict[str, Any] = {"recompile_limit": _VARIANTS}
    if "recompile_limit" not in signature(torch.compile).parameters:
        dynamo: Any = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, _VARIANTS)
        options = {}
    compiled: Callable[..., Any] = torch.compile(own, **options)
    return compiled


class FalconAlibiBody(Body):
    """Falcon with alibi, whose own forward makes the bias from a mask that all sequences share."""

    def __init__(self, decoder: Any, attention: Attention) -> None:
        self.decoder = decoder
        self.attention = attention
        self.bias = torch.empty(0)
        self.ragged = [_RaggedFalconAttention(layer.self_attention, attention) for layer in self.decoder.h]

    def prepare(self, cache: SlotCache) -> None:
        """Make the bias of every head at every position of `cache` [1, heads, 1, capacity]."""
        from transformers.models.falcon.modeling_falcon import build_alibi_tensor

        # Captured passes know where it is.
        if self.bias.shape[-1] == cache.capacity:
            return
        config = self.decoder.config
        seen = torch.ones(1, cache.capacity, dtype=torch.int64, device=self.decoder.device)
        alibi = build_alibi_tensor(seen, config.num_attention_heads, self.decoder.dtype)
        self.bias = alibi[None] / math.sqrt(config.hidden_size // config.num_attention_heads)
        for attention in self.ragged:
            # At position 1 stand the slopes; Falcon rounds them, and all else, to bfloat16.
            attention.slopes = alibi[:, 0, 1].to(torch.bfloat16).contiguous()

    def __call__(self, block: Block, cache: SlotCache) -> Tensor:
        rows, span = block.positions.shape[1], block.columns.shape[0]
        attention = attention_for(self.attention, rows)
        with ExitStack() as stack:
            if attention == "sdpa":
                allowed = ragged_bias(block.positions, block.columns, None, self.bias.dtype)
                bias = self.bias[..., :span] + allowed
                stack.enter_context(replaced(self.decoder.config, "_attn_implementation", "sdpa"))
            else:
                bias = visible_lengths(attention, cache.lengths, rows, span)
                for layer, ragged in zip(self.decoder.h, self.ragged, strict=True):
                    stack.enter_context(replaced(layer, "self_attention", ragged))
            hidden = self.decoder.word_embeddings(block.tokens)
            for layer in self.decoder.h:
                # Given an alibi a layer applies no rotation; the numbers it reads from the mask alone.
                hidden = layer(hidden, alibi=bias, attention_mask=bias, layer_past=cache, use_cache=True)[0]
        return cast(Tensor, self.decoder.ln_f(hidden))


class _RaggedFalconAttention(nn.Module):
    """In the place of a layer's attention that cannot be told which function to use."""

    def __init__(self, own: Any, attention: Attention) -> None:
        super().__init__()
        self.own = own
        self.attention = attention
        self.slopes = torch.empty(0)

    def forward(
        self, hidden: Tensor, attention_mask: Tensor, layer_past: SlotCache, **kwargs: Any
    ) -> tuple[Tensor, None]:
        query, key, value = self.own._split_heads(self.own.query_key_value(hidden))
        keys, values = layer_past.write(self.own.layer_idx, key, value)
        mixed = attend_ragged(self.attention, query, keys, values, attention_mask, alibi_slopes=self.slopes)
        return self.own.dense(mixed.flatten(2)), None


@contextmanager
def replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for the length of a `with`, so that a model we were given stays as it was."""
    before = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, before)
