"""A short way through decoders built like Llama: their weights, without their modules.

One step of a small model costs more in Python and in small operations than in arithmetic. `LlamaBody` does
what the modules of Llama, Mistral, Qwen2 and Qwen3 do in a third of the operations, and `LlamaWeights` knows
for `models.llama_cpu` where these, the Gemmas, Granite, OLMo-2, OLMo-3 and Phi-3 have their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from speculative_eft.kernels import (
    QuantisedWeight,
    Weight,
    product,
    projections,
    quantise,
    quantised,
    rotated_attention,
)

from .adapters import LowRank, adapter_layers, is_low_rank, low_ranks
from .attention import Attention, attend, attend_ragged, attention_for, ragged_bias, visible_lengths
from .bodies import Block
from .configs import changes_with_length, declared, layer_windows, rotates_whole_heads
from .slot_cache import SlotCache

# By name: importing their modelling modules to recognise one costs seconds.
_DECODERS = {
    f"transformers.models.{family}.modeling_{family}.{name}Model": family
    for family, name in (
        ("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"),
        ("gemma", "Gemma"), ("gemma2", "Gemma2"), ("gemma3", "Gemma3Text"), ("granite", "Granite"),
        ("olmo2", "Olmo2"), ("olmo3", "Olmo3"), ("phi3", "Phi3"),
    )
}  # fmt: skip
_SHORT = {"llama", "mistral", "qwen2", "qwen3"}
"""What `LlamaBody` runs."""
_GEMMAS = {"gemma", "gemma2", "gemma3"}


@dataclass
class Linear:
    """A linear layer: weight [out, in], bias [out], and what adapters add."""

    weight: Weight
    bias: Tensor | None
    low_ranks: list[LowRank]

    def __call__(self, inputs: Tensor) -> Tensor:
        plain = product(inputs, self.weight, self.bias)
        if not self.low_ranks:
            return plain
        # An adapter may be of a wider dtype, in which sums are kept until the end, as peft does it.
        out = plain
        for part in self.low_ranks:
            narrow = F.linear(inputs.to(part.down.dtype), part.down)
            out = out + F.linear(narrow, part.up, part.bias) * part.scaling
        return out.to(plain.dtype)

    def split(self, sizes: Sequence[int]) -> list[Linear]:
        """Layers that give so many of this one's outputs each, in turn; `weight` is a tensor."""
        assert isinstance(self.weight, Tensor)
        parts, first = [], 0
        for size in sizes:
            own = slice(first, first + size)
            bias, first = None if self.bias is None else self.bias[own], first + size
            low_ranks = [
                replace(part, up=part.up[own], bias=None if part.bias is None else part.bias[own])
                for part in self.low_ranks
            ]
            parts.append(Linear(self.weight[own], bias, low_ranks))
        return parts


class EightBitCopies:
    """Copies of weights in eight bits, by name; one stays where it is when its weight changes in place."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[int, int], QuantisedWeight]] = {}

    def of(self, name: str, linear: Linear) -> Linear:
        """`linear` with the copy of this `name`, made anew if its weight is another than it was made of."""
        weight = linear.weight
        assert isinstance(weight, Tensor)
        stamp = weight.data_ptr(), 0 if weight.is_inference() else weight._version
        last, copy = self._known.get(name, (None, None))
        if copy is None or copy.shape != weight.shape:
            copy = quantised(weight)
        elif last != stamp:
            quantise(weight, copy.numbers, copy.scales)
        self._known[name] = stamp, copy
        return replace(linear, weight=copy)


@dataclass
class Layer:
    """The weights of one decoder layer, and what else tells it from the others.

    Norms are of what goes into a part of the layer or, `.._end_norm`, of what it adds; None where a family
    has none there. Those of queries and keys are of each head, or in OLMo of all together.
    """

    kind: str
    attention_norm: nn.Parameter | None
    query: Linear
    key: Linear
    value: Linear
    query_norm: nn.Parameter | None
    key_norm: nn.Parameter | None
    output: Linear
    attention_end_norm: nn.Parameter | None
    mlp_norm: nn.Parameter | None
    gate: Linear
    up: Linear
    down: Linear
    mlp_end_norm: nn.Parameter | None
    activation: Callable[[Tensor], Tensor]

    @property
    def is_fusable(self) -> bool:
        """Whether `projections` can do what the layer does: adapters of its dtype, a SiLU, no odd biases."""
        linears = (self.query, self.key, self.value, self.output, self.gate, self.up, self.down)
        return (
            self.activation is F.silu
            and all(
                isinstance(linear.weight, Tensor) and part.down.dtype == part.up.dtype == linear.weight.dtype
                for linear in linears
                for part in linear.low_ranks
            )
            and self.gate.bias is None
            and self.up.bias is None
            and len({linear.bias is None for linear in (self.query, self.key, self.value)}) == 1
        )

    def quantised(self, copies: EightBitCopies, name: str) -> Layer:
        """This layer, the one of that `name`, with weights of eight bits."""
        changes: dict[str, Any] = {}
        for field in fields(self):
            linear = getattr(self, field.name)
            if isinstance(linear, Linear):
                changes[field.name] = copies.of(f"{name}.{field.name}", linear)
        return replace(self, **changes)


class LlamaWeights:
    """What passes of our own through a decoder built like Llama read, and how its family differs.

    Attributes:
        decoder, adapters, copies: as given.
        heads, kv_heads, groups, dim: of attention; `groups` heads share keys and values.
        windows: of each kind of layer, as `configs.layer_windows` has them; `kinds` has each layer's.
        eps, norm_offset: of all norms, and what they add to their weights.
        activation: the name of that between the layers' products, as configurations have it.
        embedding_scale: what embeddings are multiplied by, rounded as the model does.
        residual_scale: what is multiplied by it before it is added to the hidden state.
        attention_scale, softcap: what scores are multiplied by, and what they are squeezed into, if anything.
        layers: the weights, found by `prepare`.
        rotations: for each kind of layer [capacity, 2 * dim], cosines and sines, of which the first half has
            changed its sign.
    """

    @staticmethod
    def fits(decoder: PreTrainedModel, adapters: Sequence[str] | None = None) -> bool:
        """Whether `decoder` is one of these models as transformers builds it, on one device.

        Quantised layers, adapted ones other than linear layers with plain LoRAs, hooks (also those that
        spread a model over devices), rotations that change with the length of the input, and those of a part
        of each head are left to the model's own modules. `adapters` are as for the runner.
        """
        config = decoder.config
        if _family(decoder) is None or changes_with_length(config) or not rotates_whole_heads(config):
            return False
        linears = [module for name, module in decoder.named_modules() if name.endswith("_proj")]
        return (
            all(type(module) is nn.Linear or is_low_rank(module, adapters) for module in linears)
            and all(layer in linears for layer in adapter_layers(decoder))
            and all(map(is_plain, decoder.modules()))
            and all(map(is_ordinary, decoder.parameters()))
        )

    def __init__(
        self, decoder: Any, adapters: Sequence[str] | None = None, copies: EightBitCopies | None = None
    ) -> None:
        """Take a `decoder` that `fits` with these `adapters`, to run by `copies` of its weights if given."""
        self.copies = copies
        config = decoder.config
        self.adapters = adapters or ()
        self.decoder = decoder
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.groups = self.heads // self.kv_heads
        self.dim = decoder.layers[0].self_attn.head_dim
        self.windows = layer_windows(config)
        uniform = list(self.windows) * config.num_hidden_layers
        self.kinds = config.layer_types if len(self.windows) > 1 else uniform
        self.eps = config.rms_norm_eps
        self.norm_offset, self.embedding_scale = 0.0, declared(config, "embedding_multiplier") or 1.0
        if _family(decoder) in _GEMMAS:
            weight = decoder.embed_tokens.weight
            self.norm_offset = 1.0
            self.embedding_scale = float(torch.tensor(config.hidden_size**0.5).to(weight.dtype))
        self.activation: str = declared(config, "hidden_activation") or config.hidden_act
        scale = declared(config, "attention_multiplier")
        self.attention_scale = scale or (declared(config, "query_pre_attn_scalar") or self.dim) ** -0.5
        self.residual_scale = declared(config, "residual_multiplier") or 1.0
        self.softcap: float | None = declared(config, "attn_logit_softcapping")
        self.layers: list[Layer] = []
        self.rotations: dict[str, Tensor] = {}
        self._capacity = -1

    def prepare(self, cache: SlotCache) -> None:
        """Find the weights again and make a rotation for every position of `cache`."""
        layers = zip(self.decoder.layers, self.kinds, strict=True)
        self.layers = [self._read(layer, kind) for layer, kind in layers]
        if self.copies is not None:
            self.layers = [
                layer.quantised(self.copies, str(index)) for index, layer in enumerate(self.layers)
            ]
        if self._capacity == cache.capacity:
            return
        self._capacity = cache.capacity
        rotary = self.decoder.rotary_emb
        if "layer_type" in signature(rotary.forward).parameters:
            self.rotations = {kind: self._rotation(kind) for kind in self.windows}
        else:
            self.rotations = dict.fromkeys(self.windows, self._rotation())

    def _rotation(self, *kind: str) -> Tensor:
        weight = self.decoder.embed_tokens.weight
        positions = torch.arange(self._capacity, device=weight.device)
        cos, sin = self.decoder.rotary_emb(weight, positions[None], *kind)
        # The sines' first half changes sign: rotating halves is then a roll, times these.
        first, second = sin[0].chunk(2, -1)
        return torch.cat((cos[0], -first, second), -1)

    def _read(self, layer: Any, kind: str) -> Layer:
        # Before each prompt: by attributes, which modules look up in Python, it takes three times as long.
        parts = layer._modules
        attention, mlp = parts["self_attn"]._modules, parts["mlp"]._modules

        def norm(module: Any) -> Any:
            return None if module is None else module._parameters["weight"]

        def linear(module: Any) -> Linear:
            return linear_of(module, self.adapters)

        if "qkv_proj" in attention:
            sizes = [self.heads * self.dim, *[self.kv_heads * self.dim] * 2]
            query, key, value = linear(attention["qkv_proj"]).split(sizes)
            joined = linear(mlp["gate_up_proj"])
            gate, up = joined.split([joined.weight.shape[0] // 2] * 2)
        else:
            query, key, value, gate, up = (
                linear(part)
                for part in (
                    attention["q_proj"], attention["k_proj"], attention["v_proj"], mlp["gate_proj"],
                    mlp["up_proj"],
                )
            )  # fmt: skip
        # Llama's norm of this name is of what goes into its second part, Gemma-2's of what the first adds.
        after_attention = norm(parts["post_attention_layernorm"])
        has_end_norms = "post_feedforward_layernorm" in parts
        return Layer(
            kind=kind,
            attention_norm=norm(parts.get("input_layernorm")),
            query=query,
            key=key,
            value=value,
            query_norm=norm(attention.get("q_norm")),
            key_norm=norm(attention.get("k_norm")),
            output=linear(attention["o_proj"]),
            attention_end_norm=after_attention if has_end_norms else None,
            mlp_norm=norm(parts.get("pre_feedforward_layernorm")) if has_end_norms else after_attention,
            gate=gate,
            up=up,
            down=linear(mlp["down_proj"]),
            mlp_end_norm=norm(parts.get("post_feedforward_layernorm")),
            activation=F.silu if self.activation == "silu" else parts["mlp"].act_fn,
        )


class LlamaBody(LlamaWeights):
    """Runs a `LlamaModel`, `MistralModel`, `Qwen2Model` or `Qwen3Model`; see `fits`."""

    @staticmethod
    def fits(decoder: PreTrainedModel, adapters: Sequence[str] | None = None) -> bool:
        """`LlamaWeights.fits`, of these models."""
        return _family(decoder) in _SHORT and LlamaWeights.fits(decoder, adapters)

    def __init__(
        self,
        decoder: Any,
        attention: Attention,
        adapters: Sequence[str] | None = None,
        copies: EightBitCopies | None = None,
    ) -> None:
        """Take what `LlamaWeights` takes, and how attention is computed."""
        super().__init__(decoder, adapters, copies)
        self.attention = attention
        self.is_fusable = False

    def prepare(self, cache: SlotCache) -> None:
        """Find the weights again and make a rotation for every position of `cache`."""
        super().prepare(cache)
        self.is_fusable = all(layer.is_fusable for layer in self.layers)

    def fill(self, block: Block, cache: SlotCache) -> None:
        """Run `block` for its keys and values alone, with which the last layer ends where it is not fused."""
        self(block, cache, reads_out=False)

    def __call__(self, block: Block, cache: SlotCache, reads_out: bool = True) -> Tensor:
        batch, length = block.tokens.shape
        count, heads, dim = batch * length, self.heads, self.dim
        attention = attention_for(self.attention, length)
        if attention == "triton" and self.is_fusable:
            return self.fused([(self, cache)], block)
        hidden = F.embedding(block.tokens.reshape(-1), self.decoder.embed_tokens.weight)
        if attention == "sdpa":
            rows = block.positions.repeat(1, self.groups) if length > 1 else block.positions
            biases = {
                kind: ragged_bias(rows, block.columns, window, hidden.dtype)
                for kind, window in self.windows.items()
            }
        else:
            lengths = visible_lengths(attention, cache.lengths, length, block.columns.shape[0])
        # All kinds of layers of these families turn alike.
        rotation = self.rotations[self.kinds[0]].index_select(0, block.positions.view(-1)).unsqueeze(1)
        cos, sin = rotation[..., :dim], rotation[..., dim:]

        for index, layer in enumerate(self.layers):
            inputs = self._norm(hidden, layer.attention_norm)
            query, key, value = (part(inputs) for part in (layer.query, layer.key, layer.value))
            query, key = query.view(count, heads, dim), key.view(count, self.kv_heads, dim)
            if layer.query_norm is not None and layer.key_norm is not None:
                query, key = self._norm(query, layer.query_norm), self._norm(key, layer.key_norm)
            both = torch.cat((query, key), 1)
            both = torch.addcmul(both * cos, both.roll(dim // 2, -1), sin).view(batch, length, -1, dim)
            value = value.view(batch, length, self.kv_heads, dim)
            keys, values = cache.write(index, both[:, :, heads:], value)
            if not reads_out and layer is self.layers[-1]:
                break
            query = both[:, :, :heads]
            if attention == "sdpa":
                mixed = attend(query.transpose(1, 2), keys, values, biases[layer.kind])
            else:
                window = self.windows[layer.kind]
                mixed = attend_ragged(attention, query, keys, values, lengths, window=window)
            hidden = hidden + layer.output(mixed.reshape(count, heads * dim))
            inputs = self._norm(hidden, layer.mlp_norm)
            gated = layer.activation(layer.gate(inputs)) * layer.up(inputs)
            hidden = hidden + layer.down(gated)

        return self._norm(hidden, self.decoder.norm.weight).view(batch, length, -1)

    def fuses_with(self, other: LlamaBody) -> bool:
        """Whether `fused` can run `other` beside this body: the same decoder, but for adapters."""
        return (
            self.decoder is other.decoder
            and self.copies is other.copies is None
            and self.attention == other.attention == "triton"
            and self.is_fusable
            and other.is_fusable
        )

    @staticmethod
    def fused(members: Sequence[tuple[LlamaBody, SlotCache]], block: Block) -> Tensor:
        """The layers of `__call__` in five launches each, or seven or eight for a few rows, not twenty.

        Adapters of all parts of a layer make them some twenty where they would be fifty. Of several members,
        bodies that fuse with each other and the cache of each, all run the same tokens, each behind what its
        own cache holds, and the weights that they share are read once. Returns hidden states
        [members * batch, q, hidden], member by member.
        """
        (first, _), (batch, length), span = members[0], block.tokens.shape, block.columns.shape[0]
        dim, sequences = first.dim, len(members) * batch
        embedded = F.embedding(block.tokens.reshape(-1), first.decoder.embed_tokens.weight)
        hidden = embedded.repeat(len(members), 1) if len(members) > 1 else embedded
        for index, layer in enumerate(first.layers):
            same = [body.layers[index] for body, _ in members]
            both = first._products(
                hidden, [[own.query, own.key, own.value] for own in same], layer.attention_norm
            )
            query, key, value = (part.view(sequences, length, -1, dim) for part in both)
            if layer.query_norm is not None and layer.key_norm is not None:
                query, key = first._norm(query, layer.query_norm), first._norm(key, layer.key_norm)
            mixed = []
            for member, (body, cache) in enumerate(members):
                own = slice(member * batch, (member + 1) * batch)
                mixed.append(rotated_attention(
                    query[own], key[own], value[own], body.rotations[layer.kind],
                    *cache.layer_storage(index, body.kv_heads, dim, key.dtype), cache.lengths, span,
                    body.windows[layer.kind],
                ))  # fmt: skip
            attended = (torch.cat(mixed) if len(members) > 1 else mixed[0]).view(-1, first.heads * dim)
            (hidden,) = first._products(attended, [[own.output] for own in same], residual=hidden)
            (inner,) = first._products(
                hidden, [[own.gate, own.up] for own in same], layer.mlp_norm, gated=True
            )
            (hidden,) = first._products(inner, [[own.down] for own in same], residual=hidden)
        return first._norm(hidden, first.decoder.norm.weight).view(sequences, length, -1)

    def _products(
        self,
        inputs: Tensor,
        members: Sequence[Sequence[Linear]],
        norm: Tensor | None = None,
        residual: Tensor | None = None,
        gated: bool = False,
    ) -> list[Tensor]:
        """`projections` by linear layers, of which each of `members` has its own adapters for its rows."""
        linears = members[0]
        weights = [linear.weight for linear in linears]
        biases = None if gated else [linear.bias for linear in linears]
        if not any(linear.low_ranks for own in members for linear in own):
            return projections(inputs, weights, biases, norm, self.eps, residual, gated)
        if norm is not None:
            inputs = self._norm(inputs, norm)
        parts = projections(inputs, weights, biases, residual=residual)
        rows = inputs.shape[0] // len(members)
        for index, own in enumerate(members):
            mine = slice(index * rows, (index + 1) * rows)
            for part, linear in zip(parts, own, strict=True):
                out = part[mine]
                for added in linear.low_ranks:
                    out.addmm_(F.linear(inputs[mine], added.down), added.up.T, alpha=added.scaling)
                    if added.bias is not None:
                        out.add_(added.bias, alpha=added.scaling)
        return [F.silu(parts[0]) * parts[1]] if gated else parts

    def _norm(self, hidden: Tensor, weight: Tensor | None) -> Tensor:
        return F.rms_norm(hidden, (hidden.shape[-1],), weight, self.eps)


def is_plain(module: nn.Module) -> bool:
    """Whether calling `module` does what its class says: no hook, no wrapper, no replaced forward."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def is_ordinary(weight: nn.Parameter) -> bool:
    """Whether `weight` holds its numbers as they are: no quantised or distributed tensor."""
    return type(weight) is nn.Parameter


def _family(decoder: PreTrainedModel) -> str | None:
    kind = type(decoder)
    return _DECODERS.get(f"{kind.__module__}.{kind.__qualname__}")


def linear_of(module: Any, adapters: Sequence[str]) -> Linear:
    """`module`, torch's linear layer or one that `is_low_rank`, with what `adapters` add; or what it is."""
    if isinstance(module, Linear):
        return module
    if type(module) is nn.Linear:
        own: Any = module._parameters
        return Linear(own["weight"], own["bias"], [])
    return Linear(module.base_layer.weight, module.base_layer.bias, low_ranks(module, adapters))
