"""A short way through decoders built like Llama: their weights, without their modules.

One step of a small model costs more in Python and in small operations than in arithmetic. `LlamaBody` does
what the modules of Llama, Mistral, Qwen2, Qwen3, the Gemmas, Granite, OLMo-2, OLMo-3 and Phi-3 do in a third
of the operations, and `LlamaWeights` knows where these have their weights, for `models.llama_cpu` too.
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
    GATES,
    Gate,
    QuantisedWeight,
    RMSNorm,
    Weight,
    normalised,
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
    activation: Callable[[Tensor], Tensor]
    gate: Linear
    up: Linear
    down: Linear
    mlp_end_norm: nn.Parameter | None

    @property
    def is_fusable(self) -> bool:
        """Whether `projections` can do what the layer does: adapters of its dtype, no odd biases."""
        linears = (self.query, self.key, self.value, self.output, self.gate, self.up, self.down)
        return (
            all(
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
        gate: the activation between the layers' products; None for one that only the model's modules know.
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
            self.norm_offset = 1.0
            # A model that was made in 16 bits keeps what it rounded there; older versions have no such scale.
            scale = getattr(decoder.embed_tokens, "embed_scale", torch.tensor(config.hidden_size**0.5))
            self.embedding_scale = float(scale.to(decoder.embed_tokens.weight.dtype))
        activation = declared(config, "hidden_activation") or config.hidden_act
        self.gate: Gate | None = next((gate for gate in GATES if gate == activation), None)
        scale = declared(config, "attention_multiplier")
        self.attention_scale = scale or (declared(config, "query_pre_attn_scalar") or self.dim) ** -0.5
        self.residual_scale = declared(config, "residual_multiplier") or 1.0
        # Gemma-3 has the setting too, but its attention leaves it out.
        is_capped = _family(decoder) == "gemma2"
        self.softcap: float | None = config.attn_logit_softcapping if is_capped else None
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
        own_activation: Any = mlp["activation_fn" if "activation_fn" in mlp else "act_fn"]
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
            # Some have weights of their own in each layer.
            activation=own_activation if self.gate is None else GATES[self.gate],
            gate=gate,
            up=up,
            down=linear(mlp["down_proj"]),
            mlp_end_norm=norm(parts.get("post_feedforward_layernorm")),
        )


class LlamaBody(LlamaWeights):
    """Runs a decoder that `LlamaWeights.fits`."""

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
        self.is_fusable = self.gate is not None and all(layer.is_fusable for layer in self.layers)

    def fill(self, block: Block, cache: SlotCache) -> None:
        """Run `block` for its keys and values alone, with which the last layer ends."""
        self(block, cache, reads_out=False)

    def __call__(self, block: Block, cache: SlotCache, reads_out: bool = True) -> Tensor:
        batch, length = block.tokens.shape
        count, heads, dim = batch * length, self.heads, self.dim
        attention = attention_for(self.attention, length)
        hidden = self._embedded(block.tokens)
        if attention == "sdpa":
            rows = block.positions.repeat(1, self.groups) if length > 1 else block.positions
            biases = {
                kind: ragged_bias(rows, block.columns, window, hidden.dtype)
                for kind, window in self.windows.items()
            }
        else:
            lengths = visible_lengths(attention, cache.lengths, length, block.columns.shape[0])
        turns = {
            kind: rotation.index_select(0, block.positions.view(-1)).unsqueeze(1)
            for kind, rotation in self.rotations.items()
        }

        for index, layer in enumerate(self.layers):
            inputs = self._norm(hidden, layer.attention_norm)
            query = self._heads(layer.query(inputs), layer.query_norm)
            key = self._heads(layer.key(inputs), layer.key_norm)
            cos, sin = turns[layer.kind].chunk(2, -1)
            both = torch.cat((query, key), 1)
            # OLMo's rotations are of float32 in any dtype.
            both = torch.addcmul(both * cos, both.roll(dim // 2, -1), sin).to(both.dtype)
            both = both.view(batch, length, -1, dim)
            value = layer.value(inputs).view(batch, length, self.kv_heads, dim)
            keys, values = cache.write(index, both[:, :, heads:], value)
            if not reads_out and layer is self.layers[-1]:
                break
            query, scale, softcap = both[:, :, :heads], self.attention_scale, self.softcap
            if attention == "sdpa":
                mixed = attend(query.transpose(1, 2), keys, values, biases[layer.kind], scale, softcap)
            else:
                window = self.windows[layer.kind]
                mixed = attend_ragged(attention, query, keys, values, lengths, scale, window, softcap)
            joined = layer.output(mixed.reshape(count, heads * dim))
            hidden = self._added(hidden, joined, layer.attention_end_norm)
            inputs = self._norm(hidden, layer.mlp_norm)
            gated = layer.activation(layer.gate(inputs)) * layer.up(inputs)
            hidden = self._added(hidden, layer.down(gated), layer.mlp_end_norm)

        return self._norm(hidden, self.decoder.norm.weight).view(batch, length, -1)

    def fuses(self, rows: int) -> bool:
        """Whether `fused` can run blocks of `rows` tokens."""
        return self.is_fusable and attention_for(self.attention, rows) == "triton"

    def fuses_with(self, other: LlamaBody) -> bool:
        """Whether `fused` can run `other` beside this body: the same decoder, but for adapters."""
        return self.decoder is other.decoder and self.copies is other.copies is None

    @staticmethod
    def fused(members: Sequence[tuple[LlamaBody, SlotCache]], tokens: Tensor, span: int) -> Tensor:
        """The layers of `__call__` in five launches each, or seven or eight for a few rows, not twenty.

        Norms of queries and keys, and of what a part of a layer adds, take a launch each. Adapters of all
        parts of a layer make them some twenty where they would be fifty. Of several members, bodies that fuse
        with each other and the cache of each, all run the same tokens, each behind what its own cache holds,
        and the weights that they share are read once. `tokens` are int64 [batch, q], `span` the positions
        that may be read. Returns hidden states [members * batch, q, hidden], member by member.
        """
        (first, _), (batch, length) = members[0], tokens.shape
        dim, sequences = first.dim, len(members) * batch
        # Lengths have just changed, and later launches may overlap with those before them: this one does not.
        embedded = first._embedded(tokens)
        hidden = embedded.repeat(len(members), 1) if len(members) > 1 else embedded
        for index, layer in enumerate(first.layers):
            same = [body.layers[index] for body, _ in members]
            query, key, value = first._products(
                hidden, [[own.query, own.key, own.value] for own in same], layer.attention_norm
            )
            query, key, value = (
                part.view(sequences, length, -1, dim)
                for part in (
                    first._heads(query, layer.query_norm), first._heads(key, layer.key_norm), value,
                )
            )  # fmt: skip
            mixed = []
            for member, (body, cache) in enumerate(members):
                own = slice(member * batch, (member + 1) * batch)
                mixed.append(rotated_attention(
                    query[own], key[own], value[own], body.rotations[layer.kind],
                    *cache.layer_storage(index, body.kv_heads, dim, key.dtype), cache.lengths, span,
                    body.windows[layer.kind], body.attention_scale, body.softcap,
                ))  # fmt: skip
            attended = (torch.cat(mixed) if len(members) > 1 else mixed[0]).view(-1, first.heads * dim)
            hidden = first._joined(hidden, attended, [own.output for own in same], layer.attention_end_norm)
            (inner,) = first._products(
                hidden, [[own.gate, own.up] for own in same], layer.mlp_norm, gated=True
            )
            hidden = first._joined(hidden, inner, [own.down for own in same], layer.mlp_end_norm)
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
        gate = self.gate if gated else None
        if not any(linear.low_ranks for own in members for linear in own):
            given = None if norm is None else self._norm_of(norm)
            return projections(inputs, weights, biases, given, residual, self.residual_scale, gate)
        inputs = self._norm(inputs, norm)
        parts = projections(inputs, weights, biases, residual=residual, factor=self.residual_scale)
        scale = 1.0 if residual is None else self.residual_scale
        rows = inputs.shape[0] // len(members)
        for index, own in enumerate(members):
            mine = slice(index * rows, (index + 1) * rows)
            for part, linear in zip(parts, own, strict=True):
                out = part[mine]
                for added in linear.low_ranks:
                    out.addmm_(F.linear(inputs[mine], added.down), added.up.T, alpha=scale * added.scaling)
                    if added.bias is not None:
                        out.add_(added.bias, alpha=scale * added.scaling)
        return parts if gate is None else [GATES[gate](parts[0]) * parts[1]]

    def _joined(
        self, hidden: Tensor, inputs: Tensor, linears: Sequence[Linear], norm: nn.Parameter | None
    ) -> Tensor:
        """`hidden` with what a part of a layer adds: a linear layer at its end, each member's own."""
        members = [[linear] for linear in linears]
        if norm is None:
            return self._products(inputs, members, residual=hidden)[0]
        return self._added(hidden, self._products(inputs, members)[0], norm)

    def _added(self, hidden: Tensor, part: Tensor, norm: nn.Parameter | None) -> Tensor:
        """`hidden` with what a part of a layer adds."""
        if norm is None:
            return torch.add(hidden, part, alpha=self.residual_scale)
        return normalised(part, self._norm_of(norm), hidden)

    def _embedded(self, tokens: Tensor) -> Tensor:
        hidden = F.embedding(tokens.reshape(-1), self.decoder.embed_tokens.weight)
        return hidden if self.embedding_scale == 1.0 else hidden * self.embedding_scale

    def _heads(self, vectors: Tensor, norm: nn.Parameter | None) -> Tensor:
        """`vectors` [rows, heads * dim] as [rows, heads, dim], normalised by heads or all together."""
        is_of_all = norm is not None and norm.shape[0] != self.dim
        heads = (self._norm(vectors, norm) if is_of_all else vectors).view(vectors.shape[0], -1, self.dim)
        return heads if is_of_all else self._norm(heads, norm)

    def _norm(self, hidden: Tensor, weight: Tensor | None) -> Tensor:
        return hidden if weight is None else normalised(hidden, self._norm_of(weight))

    def _norm_of(self, weight: Tensor) -> RMSNorm:
        return RMSNorm(weight, self.eps, self.norm_offset)


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
