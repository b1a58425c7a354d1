"""A key/value cache in which every sequence has a length of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from speculative_eft.kernels import append

from .attention import Attention

SPAN_MULTIPLE = 64
"""Spans and capacities are multiples of this, so that attention meets few distinct shapes."""


@dataclass
class _Layer:
    """One layer's storage [slots, heads, capacity, dim], seen in the two ways in which it is used."""

    keys: Tensor
    values: Tensor
    key_rows: Tensor
    """[slots * heads * capacity, dim]"""
    value_rows: Tensor
    visible: tuple[Tensor, Tensor]
    """Keys and values [batch, heads, span, dim] of the pass at hand."""


class SlotCache(Cache):
    """Keys and values [slots, heads, capacity, dim] a layer, and the `lengths` of the sequences in them.

    Sequence `b` lives in slot `b`. `begin` fixes where the tokens of one pass go, then every layer calls
    `update` (as transformers' attention modules do) or `write`, or writes to its `layer_storage`. A layer is
    allocated in its first pass; after that nothing is moved or allocated, and rolling back is a subtraction
    on `lengths`. Nothing is ever read from the device.
    """

    def __init__(
        self, slots: int, max_length: int, device: torch.device, attention: Attention = "sdpa"
    ) -> None:
        """Make room for `slots` sequences of up to `max_length` tokens, to be read by `attention`."""
        super().__init__(layers=[])
        self.slots = slots
        self.attention = attention
        # One position more than asked for: tokens beyond `max_length` end up there, where no token within
        # `max_length` looks. flash-attn counts back from a pass's last token, which then must not move.
        self.spare = SPAN_MULTIPLE if attention == "flash_attn" else 1
        self.capacity = round_up(max_length + self.spare)
        self.device = device
        self.positions = torch.arange(self.capacity, device=device)
        with _ordinary_tensors():
            self._all_lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        self.lengths = self._all_lengths
        self._slots: dict[int, _Layer] = {}
        self._visible = (slots, self.capacity)
        self._written = self.positions[:0]
        self._rows: dict[int, Tensor] = {}
        self._slot_rows: dict[int, Tensor] = {}
        self._whole: SlotCache | None = None
        self._first = 0
        self._used = (0, 0)
        """The slots, and the positions of each, that may hold anything; beside these the spare positions."""

    @property
    def is_allocated(self) -> bool:
        """Whether a pass has allocated the layers."""
        return bool(self._slots)

    def holds(self, batch: int, length: int) -> bool:
        """Whether there is room for `batch` sequences of up to `length` tokens."""
        return batch <= self.slots and length + self.spare <= self.capacity

    def restart(self, batch: int, length: int) -> None:
        """Empty the cache, keeping its storage, for `batch` sequences of up to `length` tokens."""
        self.lengths = self._all_lengths[:batch]
        self._all_lengths.zero_()
        self._zero()
        self._used = (0, 0)
        self.keep(batch, length)

    def keep(self, batch: int, length: int) -> None:
        """Go on with what the cache holds, for `batch` sequences of up to `length` tokens."""
        slots, positions = self._used
        self._used = max(slots, batch), max(positions, length)

    def _zero(self) -> None:
        # What is masked weighs nothing, but nothing times infinity is not a number.
        slots, positions = self._used
        for stored in self.storage():
            stored[:slots, :, :positions].zero_()
            stored[:slots, :, self.capacity - self.spare :].zero_()

    def grown(self, slots: int, max_length: int) -> SlotCache:
        """A cache for `slots` sequences of up to `max_length` tokens that holds what this one does."""
        length = max(max_length, self.capacity - self.spare)
        larger = SlotCache(max(slots, self.slots), length, self.device, self.attention)
        larger.lengths = larger._all_lengths[:slots]
        larger.lengths.copy_(self.lengths)
        # What were spare positions are among the others now.
        larger._used = self._used[0], self.capacity
        for index, layer in self._slots.items():
            layout = layer.keys[:, :, :1].transpose(1, 2)
            copy = larger._allocate(index, layout, layer.values[:, :, :1].transpose(1, 2))
            larger._slots[index] = copy
            copy.keys[: self.slots, :, : self.capacity] = layer.keys
            copy.values[: self.slots, :, : self.capacity] = layer.values
        return larger

    def use(self, batch: int) -> None:
        """Let `lengths` be those of the first `batch` slots; what the others hold stays."""
        self.lengths = self._all_lengths[:batch]

    def rearrange(self, slots: Sequence[int], sources: Sequence[int], span: int) -> None:
        """Let each of `slots` hold what its source, another of them, holds in its first `span` positions."""
        places = torch.tensor([slots, sources], device=self.device)
        self._all_lengths[places[0]] = self._all_lengths[places[1]]
        for layer in self._slots.values():
            at, source = places.to(layer.keys.device)
            for stored in (layer.keys[:, :, :span], layer.values[:, :, :span]):
                stored[at] = stored[source]

    def part(self, slot: int) -> SlotCache:
        """One slot as a cache of its own, empty, over the same storage."""
        one = SlotCache(0, 0, self.device, self.attention)
        one.slots, one.capacity, one.positions = 1, self.capacity, self.positions
        one.lengths = one._all_lengths = self._all_lengths[slot : slot + 1]
        one.lengths.zero_()
        one._whole, one._first = self, slot
        one._visible = (1, self.capacity)
        for index in self._slots:
            one._slots[index] = one._within(index)
        one._used = self._used
        one._zero()
        return one

    def begin(self, positions: Tensor, span: int) -> None:
        """Fix where the next pass writes, int64 [batch, q] below `capacity`, and that it reads `span`."""
        self._written = positions
        self._rows.clear()
        visible = (positions.shape[0], span)
        if visible != self._visible:
            self._visible = visible
            for layer in self._slots.values():
                layer.visible = self._view(layer.keys, layer.values)

    def write(self, layer_idx: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store `keys` and `values` [batch, q, heads, dim]; return views [batch, heads, span, dim]."""
        layer = self._layer_for(layer_idx, keys, values)
        if torch.compiler.is_compiling():
            return self._write_in_graph(layer, keys, values)
        if self.attention != "sdpa":
            append(keys, values, layer.keys, layer.values, self.lengths)
            return layer.visible
        heads = keys.shape[2]
        rows = self._rows.get(heads)
        if rows is None:
            rows = self._rows[heads] = self._rows_of(heads)
        if rows.device != layer.key_rows.device:
            rows = rows.to(layer.key_rows.device)
        layer.key_rows.index_copy_(0, rows, keys.reshape(-1, keys.shape[-1]))
        layer.value_rows.index_copy_(0, rows, values.reshape(-1, values.shape[-1]))
        return layer.visible

    def _write_in_graph(self, layer: _Layer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """`write` where torch.compile looks on, which takes no two tensors that share memory."""
        if self.attention != "sdpa":
            torch.ops.speculative_eft.append(keys, values, layer.keys, layer.values, self.lengths)
        else:
            rows = self._rows_of(keys.shape[2])
            for stored, new in ((layer.keys, keys), (layer.values, values)):
                stored.view(-1, stored.shape[3]).index_copy_(0, rows, new.reshape(-1, new.shape[3]))
        return self._view(layer.keys, layer.values)

    def layer_storage(
        self, layer_idx: int, heads: int, dim: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """A layer's keys and values [slots, heads, capacity, dim], allocated of `dtype` if they were not."""
        layer = self._slots.get(layer_idx)
        if layer is None:
            vectors = torch.empty(0, 0, heads, dim, dtype=dtype, device=self.device)
            layer = self._layer_for(layer_idx, vectors, vectors)
        return layer.keys, layer.values

    def holds_numbers(self) -> Tensor:
        """Whether the last layer's values of each sequence's last token, of which each has one, are finite.

        What is not finite anywhere else has reached these, unless a window has passed it by.
        """
        values = self._slots[max(self._slots)].values
        last = (self.lengths - 1).to(values.device)
        slots = torch.arange(last.shape[0], device=values.device)
        return values[slots, :, last].isfinite().all()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """`write` for `key_states` and `value_states` that are [batch, heads, q, dim]."""
        return self.write(layer_idx, key_states.transpose(1, 2), value_states.transpose(1, 2))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Always 0: models are told positions, and no single length would be right."""
        return 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Positions in a slot, the spare ones included."""
        return self.capacity

    def storage(self) -> list[Tensor]:
        """Keys and values [slots, heads, capacity, dim] of each layer allocated so far."""
        return [tensor for layer in self._slots.values() for tensor in (layer.keys, layer.values)]

    def _layer_for(self, layer_idx: int, keys: Tensor, values: Tensor) -> _Layer:
        """A layer's storage, for vectors shaped as these, allocated if it was not."""
        layer = self._slots.get(layer_idx)
        if layer is None:
            layer = self._slots[layer_idx] = self._allocate(layer_idx, keys, values)
        return layer

    def _allocate(self, layer_idx: int, keys: Tensor, values: Tensor) -> _Layer:
        if self._whole is not None:
            self._whole._slots[layer_idx] = self._whole._allocate(layer_idx, keys, values)
            return self._within(layer_idx)

        def zeros(like: Tensor) -> Tensor:
            shape = (self.slots, like.shape[2], self.capacity, like.shape[3])
            with _ordinary_tensors():
                return torch.zeros(shape, dtype=like.dtype, device=like.device)

        return self._layer(zeros(keys), zeros(values))

    def _within(self, layer_idx: int) -> _Layer:
        """This part of a layer of the whole cache."""
        assert self._whole is not None
        layer, own = self._whole._slots[layer_idx], slice(self._first, self._first + self.slots)
        return self._layer(layer.keys[own], layer.values[own])

    def _layer(self, keys: Tensor, values: Tensor) -> _Layer:
        rows = (keys.flatten(0, 2), values.flatten(0, 2))
        return _Layer(keys, values, *rows, visible=self._view(keys, values))

    def _view(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        batch, span = self._visible
        return keys[:batch, :, :span], values[:batch, :, :span]

    def _rows_of(self, heads: int) -> Tensor:
        """Where the new vectors go in a layer's rows, int64 [batch * q * heads]."""
        first = self._slot_rows.get(heads)
        if first is None:
            first = torch.arange(self.slots * heads, device=self.device).mul_(self.capacity)
            self._slot_rows[heads] = first = first.view(self.slots, 1, heads)
        return (self._written.unsqueeze(2) + first[: self._written.shape[0]]).view(-1)


@torch.library.custom_op(
    "speculative_eft::append",
    mutates_args=("cached_keys", "cached_values"),
    schema="(Tensor keys, Tensor values, Tensor(a!) cached_keys, Tensor(b!) cached_values, "
    "Tensor lengths) -> ()",
)
def _append(
    keys: Tensor, values: Tensor, cached_keys: Tensor, cached_values: Tensor, lengths: Tensor
) -> None:
    append(keys, values, cached_keys, cached_values, lengths)


def _ordinary_tensors() -> torch.inference_mode:
    """For tensors that are written both in inference mode and out of it."""
    return torch.inference_mode(False)


def round_up(length: int) -> int:
    """The next multiple of `SPAN_MULTIPLE`."""
    return -(-length // SPAN_MULTIPLE) * SPAN_MULTIPLE
