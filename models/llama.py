"""A short way through decoders built like Llama: their weights, without their modules.

One step of a small model costs more in Python and in small operations than in arithmetic. This body does
what the modules of Llama, Mistral, Qwen2 and Qwen3 do in a third of the operations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .attention import Attention, attend, attend_ragged, attention_for, ragged_bias, visible_lengths
from .bodies import Block
from .configs import changes_with_length, layer_windows
from .slot_cache import SlotCache

# By name: importing four modelling modules to recognise one costs seconds.
_DECODERS = {
    f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}Model"
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3")
}


# Weight [out, in] and bias [out].
Linear: TypeAlias = tuple[nn.Parameter, "nn.Parameter | None"]


@dataclass
class Layer:
    """The weights of one decoder layer, and what else tells it from the others."""

    kind: str
    attention_norm: nn.Parameter
    query: Linear
    key: Linear
    value: Linear
    query_norm: nn.Parameter | None
    key_norm: nn.Parameter | None
    output: Linear
    mlp_norm: nn.Parameter
    gate: Linear
    up: Linear
    down: Linear
    activation: Callable[[Tensor], Tensor]


class LlamaBody:
    """Runs a `LlamaModel`, `MistralModel`, `Qwen2Model` or `Qwen3Model`; see `fits`."""

    @staticmethod
    def fits(decoder: PreTrainedModel) -> bool:
        """Whether `decoder` is one of these models as transformers builds it, on one device.

        Quantised or adapted layers, hooks (also those that spread a model over devices) and rotations that
        change with the length of the input are left to the model's own modules.
        """
        kind = type(decoder)
        if f"{kind.__module__}.{kind.__qualname__}" not in _DECODERS or changes_with_length(decoder.config):
            return False
        projections = [module for name, module in decoder.named_modules() if name.endswith("_proj")]
        return (
            all(type(module) is nn.Linear for module in projections)
            and all(map(is_plain, decoder.modules()))
            and all(map(is_ordinary, decoder.parameters()))
        )

    def __init__(self, decoder: Any, attention: Attention) -> None:
        """Take a `decoder` that `fits`."""
        config = decoder.config
        self.attention = attention
        self.decoder = decoder
        self.eps = config.rms_norm_eps
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.groups = self.heads // self.kv_heads
        self.dim = decoder.layers[0].self_attn.head_dim
        self.windows = layer_windows(config)
        uniform = list(self.windows) * config.num_hidden_layers
        self.kinds = config.layer_types if len(self.windows) > 1 else uniform
        self.layers: list[Layer] = []
        self.rotations = torch.empty(0)

    def prepare(self, cache: SlotCache) -> None:
        """Find the weights again and make a rotation for every position of `cache`."""
        layers = zip(self.decoder.layers, self.kinds, strict=True)
        self.layers = [_read(layer, kind) for layer, kind in layers]
        if self.rotations.shape[0] == cache.capacity:
            return
        # The sines' first half changes sign: rotating halves is then a roll, times these.
        weight = self.decoder.embed_tokens.weight
        positions = torch.arange(cache.capacity, device=weight.device)
        cos, sin = self.decoder.rotary_emb(weight, positions[None])
        first, second = sin[0].chunk(2, -1)
        self.rotations = torch.cat((cos[0], -first, second), -1)

    def __call__(self, block: Block, cache: SlotCache) -> Tensor:
        batch, length = block.tokens.shape
        count, heads, dim = batch * length, self.heads, self.dim
        hidden = F.embedding(block.tokens.reshape(-1), self.decoder.embed_tokens.weight)
        attention = attention_for(self.attention, length)
        if attention == "sdpa":
            rows = block.positions.repeat(1, self.groups) if length > 1 else block.positions
            biases = {
                kind: ragged_bias(rows, block.columns, window, hidden.dtype)
                for kind, window in self.windows.items()
            }
        else:
            lengths = visible_lengths(attention, cache.lengths, length, block.columns.shape[0])
        rotation = self.rotations.index_select(0, block.positions.view(-1)).unsqueeze(1)
        cos, sin = rotation[..., :dim], rotation[..., dim:]

        for index, layer in enumerate(self.layers):
            inputs = self._norm(hidden, layer.attention_norm)
            query, key, value = (F.linear(inputs, *part) for part in (layer.query, layer.key, layer.value))
            query, key = query.view(count, heads, dim), key.view(count, self.kv_heads, dim)
            if layer.query_norm is not None and layer.key_norm is not None:
                query, key = self._norm(query, layer.query_norm), self._norm(key, layer.key_norm)
            both = torch.cat((query, key), 1)
            both = torch.addcmul(both * cos, both.roll(dim // 2, -1), sin).view(batch, length, -1, dim)
            value = value.view(batch, length, self.kv_heads, dim)
            keys, values = cache.write(index, both[:, :, heads:], value)
            query = both[:, :, :heads]
            if attention == "sdpa":
                mixed = attend(query.transpose(1, 2), keys, values, biases[layer.kind])
            else:
                window = self.windows[layer.kind]
                mixed = attend_ragged(attention, query, keys, values, lengths, window=window)
            hidden = hidden + F.linear(mixed.reshape(count, heads * dim), *layer.output)
            inputs = self._norm(hidden, layer.mlp_norm)
            gated = layer.activation(F.linear(inputs, *layer.gate)) * F.linear(inputs, *layer.up)
            hidden = hidden + F.linear(gated, *layer.down)

        return self._norm(hidden, self.decoder.norm.weight).view(batch, length, -1)

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, (hidden.shape[-1],), weight, self.eps)


def is_plain(module: nn.Module) -> bool:
    """Whether calling `module` does what its class says: no hook, no wrapper, no replaced forward."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def is_ordinary(weight: nn.Parameter) -> bool:
    """Whether `weight` holds its numbers as they are: no quantised or distributed tensor."""
    return type(weight) is nn.Parameter


def _read(layer: Any, kind: str) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        kind=kind,
        attention_norm=layer.input_layernorm.weight,
        query=_linear(attention.q_proj),
        key=_linear(attention.k_proj),
        value=_linear(attention.v_proj),
        query_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
        key_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        output=_linear(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        down=_linear(mlp.down_proj),
        activation=F.silu if mlp.config.hidden_act == "silu" else mlp.act_fn,
    )


def _linear(module: Any) -> Linear:
    return module.weight, module.bias
