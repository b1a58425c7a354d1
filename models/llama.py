"""A short way through decoders built like Llama: their weights, without their modules.

One step of a small model costs more in Python and in small operations than in arithmetic. This body does
what the modules of Llama, Mistral, Qwen2 and Qwen3 do in a third of the operations, on the modules' own
weights: nothing is copied, and weights changed in place are seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .attention import attend, ragged_bias
from .bodies import Block
from .configs import changes_with_length, layer_windows
from .slot_cache import SlotCache

# By name: importing four modelling modules to recognise one costs seconds.
_DECODERS = {
    f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}Model"
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3")
}


@dataclass
class _Layer:
    kind: str
    attention_norm: Tensor
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: nn.Linear
    mlp_norm: Tensor
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
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
        return all(type(module) is nn.Linear for module in projections) and not any(
            module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
            for module in decoder.modules()
        )

    def __init__(self, decoder: Any) -> None:
        """Read the layers of a `decoder` that `fits`."""
        config = decoder.config
        self.decoder = decoder
        self.eps = config.rms_norm_eps
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.groups = self.heads // self.kv_heads
        self.windows = layer_windows(config)
        kinds = config.layer_types if len(self.windows) > 1 else list(self.windows) * config.num_hidden_layers
        self.layers = [_read(layer, kind) for layer, kind in zip(decoder.layers, kinds, strict=True)]
        self.dim = self.layers[0].query.out_features // self.heads
        self.rotations = torch.empty(0)

    def __call__(self, block: Block, cache: SlotCache) -> Tensor:
        if self.rotations.shape[0] < cache.capacity:
            self.rotations = self._rotations(cache.capacity)
        batch, length = block.tokens.shape
        count, dim = batch * length, self.dim
        hidden = F.embedding(block.tokens.reshape(-1), self.decoder.embed_tokens.weight)
        rows = block.positions.repeat(1, self.groups) if length > 1 else block.positions
        dtype = hidden.dtype
        biases = {kind: ragged_bias(rows, block.span, window, dtype) for kind, window in self.windows.items()}
        rotation = self.rotations.index_select(0, block.positions.view(-1)).unsqueeze(1)
        cos, sin = rotation[..., :dim], rotation[..., dim:]

        for index, layer in enumerate(self.layers):
            inputs = self._norm(hidden, layer.attention_norm)
            query = F.linear(inputs, layer.query.weight, layer.query.bias).view(count, self.heads, dim)
            key = F.linear(inputs, layer.key.weight, layer.key.bias).view(count, self.kv_heads, dim)
            value = F.linear(inputs, layer.value.weight, layer.value.bias)
            if layer.query_norm is not None and layer.key_norm is not None:
                query, key = self._norm(query, layer.query_norm), self._norm(key, layer.key_norm)
            both = torch.cat((query, key), 1)
            both = torch.addcmul(both * cos, both.roll(dim // 2, -1), sin).view(batch, length, -1, dim)
            query, key = both[:, :, : self.heads], both[:, :, self.heads :]
            seen = cache.write(index, key, value.view(batch, length, self.kv_heads, dim))
            mixed = attend(query.transpose(1, 2), *seen, biases[layer.kind]).reshape(count, self.heads * dim)
            hidden = hidden + F.linear(mixed, layer.output.weight, layer.output.bias)

            inputs = self._norm(hidden, layer.mlp_norm)
            gate = layer.activation(F.linear(inputs, layer.gate.weight, layer.gate.bias))
            inputs = gate * F.linear(inputs, layer.up.weight, layer.up.bias)
            hidden = hidden + F.linear(inputs, layer.down.weight, layer.down.bias)

        return self._norm(hidden, self.decoder.norm.weight).view(batch, length, -1)

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, (hidden.shape[-1],), weight, self.eps)

    def _rotations(self, positions: int) -> Tensor:
        """The model's own cosines and sines [positions, 2 * dim].

        The sines' first half changes sign: rotating halves is then a roll, times these.
        """
        weight = self.decoder.embed_tokens.weight
        cos, sin = self.decoder.rotary_emb(weight, torch.arange(positions, device=weight.device)[None])
        first, second = sin[0].chunk(2, -1)
        return torch.cat((cos[0], -first, second), -1)


def _read(layer: Any, kind: str) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        kind=kind,
        attention_norm=layer.input_layernorm.weight,
        query=attention.q_proj,
        key=attention.k_proj,
        value=attention.v_proj,
        query_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
        key_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        output=attention.o_proj,
        mlp_norm=layer.post_attention_layernorm.weight,
        gate=mlp.gate_proj,
        up=mlp.up_proj,
        down=mlp.down_proj,
        activation=mlp.act_fn,
    )
