"""Steps of decoders built like Llama on a CPU, compiled by Numba: what one costs is reading its weights.

A step of a small model is a few hundred kilobytes to a few tens of megabytes of weights, read in less time
than torch needs to dispatch its operations. Here one call runs the whole network, its products are made for
few rows, and its threads stay together for a whole pass. Where LoRA adapters share their base, one call
also runs several networks, of which each row gets what its own adapters add.

Importing this module needs Numba, the extra `[cpu]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from speculative_eft.kernels import (
    DraftLoop,
    QuantisedWeight,
)
from speculative_eft.kernels.cpu.arguments import arguments_at, bound_call
from speculative_eft.kernels.cpu.draft_loop import DRAWS, begin_arguments, begin_draft, draw, draw_arguments
from speculative_eft.kernels.cpu.elements import (
    ELEMENTS,
    FLOAT32,
    element_bytes,
    floats_at,
    put_floats,
    read_floats,
)
from speculative_eft.kernels.cpu.jit import (
    CUBE,
    FLAGS,
    FLOAT,
    MATRIX,
    TABLE,
    TABLES,
    VECTOR,
    array_at,
    compiled,
    entry,
    exp,
    integers_at,
    largest,
    record,
    stay_a_function,
    strictly_compiled,
)
from speculative_eft.kernels.cpu.products import ask_for, dot_products, quantised_products
from speculative_eft.kernels.cpu.team import claim, finish, meetings, wait
from speculative_eft.kernels.cpu.threads import in_parallel, use_threads

from .adapters import is_low_rank, parameters_with
from .llama import Linear, LlamaWeights, is_ordinary, is_plain, linear_of
from .slot_cache import SlotCache


@record(TABLE, "int64", VECTOR, TABLE, TABLE, TABLES, TABLES, CUBE, TABLE, "int64[:, :, ::1]")
class NetworkArrays(NamedTuple):
    """What passes of a network read.

    Attributes:
        sizes: int64 [8]: heads, those of keys and values, a head's width, and the widths of the network and
            of its inner layers; then whether gates go through a GELU and not a SiLU, whether all queries, and
            all keys, are normalised together and not by heads, and whether something is done to what a part
            of a layer adds before it is added.
        element: what its weights and its caches hold, but for weights of eight bits.
        numbers: float32, the numbers by which families differ.
        windows: int64 [layers], positions that a layer attends to; 0 for all.
        ends: int64, addresses of what stands before and after the layers.
        weights, stores: int64 [layers, columns], addresses of a layer's weights, and of its keys and values.
        rotations: float32 [kinds, positions, 2 x a head's width], cosines and sines with their signs.
        kinds: int64 [layers], which of them each layer has.
        low_ranks: int64 [layers, most of a layer, columns], what adapters add.
    """

    sizes: Any
    element: int
    numbers: Any
    windows: Any
    ends: Any
    weights: Any
    stores: Any
    rotations: Any
    kinds: Any
    low_ranks: Any


class CompiledLlama:
    """Runs blocks of any number of rows by `LlamaWeights`, from the weights and a cache as they are.

    Weights are read where the model has them: nothing is copied, and what is done to them in place is seen.
    Half of what adapters add is copied by `prepare`, which sees what was done to it before; all of it, if it
    is not of float32.

    Arithmetic is in float32 whatever the model's dtype, but that inputs of a product with weights of bfloat16
    may be rounded to it (`kernels.cpu.products`). Caches are of the model's dtype, logits of float32.
    """

    @staticmethod
    def fits(weights: LlamaWeights, head: Any) -> bool:
        """Whether `weights` with output layer `head` are a model on a CPU that these functions know."""
        if type(head) is not nn.Linear and not (weights.adapters and is_low_rank(head, weights.adapters)):
            return False
        parameters = [*weights.decoder.parameters(), *head.parameters()]
        without_adapters = [*parameters_with(weights.decoder, ()), *parameters_with(head, ())]
        return (
            is_plain(head)
            and all(map(is_ordinary, head.parameters()))
            and len({p.dtype for p in without_adapters}) == 1
            and all(p.dtype in ELEMENTS and p.device.type == "cpu" for p in parameters)
            and all(p.is_contiguous() for p in parameters)
            and weights.gate is not None
            and weights.dim % 2 == 0
        )

    def __init__(
        self, weights: LlamaWeights, head: Any, logit_scale: float = 1.0, logit_softcap: float | None = None
    ) -> None:
        """Take `weights` and a `head` that fit, or copies of such of eight bits.

        Logits are what `head` gives, times `logit_scale`, and then squeezed into +-`logit_softcap`.
        """
        self.weights = weights
        self.head = head
        self._changes = logit_scale, logit_softcap
        self.vocab_size = linear_of(head, weights.adapters).weight.shape[0]
        self._dtype = weights.decoder.embed_tokens.weight.dtype
        # Copies of eight bits are no modules, and made anew when what they are of changes.
        parts = [part for part in (weights.decoder, head) if isinstance(part, nn.Module)]
        wanted = {id(weight) for part in parts for weight in parameters_with(part, weights.adapters)}
        # To go through all modules before each call would take longer than to look at their weights.
        self._places = [
            (module._parameters, name)
            for part in parts
            for module in part.modules()
            for name, weight in module._parameters.items()
            if id(weight) in wanted
        ]
        self._kinds = self._kinds_of_weights()
        self._sizes: np.ndarray[Any, Any]
        self._numbers = np.array([
            weights.eps, weights.norm_offset, weights.embedding_scale, weights.attention_scale,
            weights.softcap or 0.0, weights.residual_scale, logit_scale, logit_softcap or 0.0,
        ], dtype=FLOAT)  # fmt: skip
        windows = [weights.windows[kind] for kind in weights.kinds]
        self._windows = np.array([0 if window is None else window for window in windows])
        self._weights = np.zeros((len(windows), _WEIGHTS), dtype=np.int64)
        self._ends = np.zeros(_ENDS, dtype=np.int64)
        self._stores: np.ndarray[Any, Any] = np.zeros((len(windows), 2), dtype=np.int64)
        self._rotations = torch.empty(0)
        self._rotations_of: dict[str, Tensor] = {}
        self._kinds_of_layers = np.array([list(weights.windows).index(kind) for kind in weights.kinds])
        self._added: list[list[_LowRankRows]] = []
        self._network: NetworkArrays

    def of(self, weights: LlamaWeights, head: Any) -> CompiledLlama:
        """The same network by other copies of its weights and its head."""
        return CompiledLlama(weights, head, *self._changes)

    def _kinds_of_weights(self) -> list[tuple[torch.dtype, torch.Size, bool] | None]:
        """What compiled functions take for granted of each weight, which they know by its address."""
        weights = [parameters.get(name) for parameters, name in self._places]
        return [
            None if weight is None else (weight.dtype, weight.shape, weight.is_contiguous())
            for weight in weights
        ]

    def prepare(self, cache: SlotCache) -> None:
        """Find the weights, and the storage of `cache`.

        Raises ValueError if a weight has been given another dtype, shape or layout.
        """
        weights = self.weights
        if self._kinds_of_weights() != self._kinds:
            raise ValueError(
                f"weights of {type(weights.decoder).__name__} have another dtype, shape or layout than when "
                "its runner was made: make EFTModels anew"
            )
        weights.prepare(cache)
        self._added = []
        brought: Tensor | None = None
        for row, layer in zip(self._weights, weights.layers, strict=True):
            norms = (
                brought, layer.attention_norm, layer.query_norm, layer.key_norm, layer.attention_end_norm,
                layer.mlp_norm,
            )  # fmt: skip
            brought = layer.mlp_end_norm
            linears = (
                layer.query, layer.key, layer.value, layer.output, layer.gate, layer.up, layer.down,
            )  # fmt: skip
            row[:] = _addresses(*norms, *(part for linear in linears for part in _parts(linear)))
            columns = range(_QUERY, _WEIGHTS, _PARTS)
            own = _low_ranks(dict(zip(columns, linears, strict=True))) if weights.adapters else []
            self._added.append(own)
        decoder, head = weights.decoder, linear_of(self.head, weights.adapters)
        self._ends[:] = _addresses(brought, decoder.embed_tokens.weight, decoder.norm.weight, *_parts(head))
        # Of the first layer are the tables with which the head runs.
        self._added[0] += _low_ranks({_HEAD: head})
        self._sizes = _sizes(weights)
        if self._rotations_of is not weights.rotations:
            self._rotations_of = weights.rotations
            self._rotations = torch.stack([*weights.rotations.values()]).float()
        self.use_storage(cache)

    def use_storage(self, cache: SlotCache) -> None:
        """Go on with `cache`, of as many positions as the one that was prepared for."""
        weights = self.weights
        for index, row in enumerate(self._stores):
            row[:] = _addresses(*cache.layer_storage(index, weights.kv_heads, weights.dim, self._dtype))
        self._network = _network([self])

    def __call__(self, tokens: Tensor, cache: SlotCache) -> Tensor:
        """float32 logits [batch, q, vocab_size] of int64 `tokens` [batch, q], behind `cache.lengths`."""
        logits = torch.empty(*tokens.shape, self.vocab_size)
        self.bind(tokens.contiguous(), cache, logits)()
        return logits

    def fill(self, tokens: Tensor, cache: SlotCache) -> None:
        """Run int64 `tokens` [batch, q] for their keys and values alone."""
        self.bind(tokens.contiguous(), cache, torch.empty(0, self.vocab_size))()

    def bind(
        self, tokens: Tensor, cache: SlotCache, logits: Tensor, counts: Tensor | None = None
    ) -> Callable[[], None]:
        """A call that does what `__call__` does with these very tensors, as often as it is made.

        `tokens` and float32 `logits` [batch, q, vocab_size] are contiguous; without room for logits none are
        made. Of each sequence only the first `counts` tokens run, int64 [batch]; all without them. It is good
        until `cache` changes its storage or its number of sequences, or is prepared for anew.
        """
        rows = logits.view(-1, self.vocab_size)
        if counts is None:
            counts = torch.full((tokens.shape[0],), tokens.shape[1])
        arguments = (
            tokens.numpy(), counts.numpy(), cache.lengths.numpy(), self._network, rows.numpy(), use_threads(),
        )  # fmt: skip
        return bound_call(_forward_at, _FORWARD, arguments)

    def shares_weights(self, other: CompiledLlama) -> bool:
        """Whether `other` is this network but for what adapters add, with as much room for a sequence."""
        return (
            np.array_equal(self._weights, other._weights)
            and np.array_equal(self._ends, other._ends)
            and self.weights.decoder is other.weights.decoder
            and self._rotations.shape == other._rotations.shape
        )

    @staticmethod
    def bind_together(
        networks: Sequence[tuple[CompiledLlama, SlotCache]],
        tokens: Tensor,
        counts: Tensor,
        logits: Sequence[Tensor],
    ) -> Callable[[], None]:
        """One call in the place of `bind`'s of several networks that share weights, which it reads once.

        Each has its own of `logits`, float32 [batch, q, vocab_size].
        """
        members = [network for network, _ in networks]
        room = torch.empty(len(members) * tokens.numel(), members[0].vocab_size)
        lengths = [cache.lengths for _, cache in networks]
        places = np.array([_addresses(*both) for both in zip(lengths, logits, strict=True)])
        arguments = (
            tokens.numpy(), counts.numpy(), places, _network(members), room.numpy(), use_threads(),
        )  # fmt: skip
        return bound_call(_forward_together, _FORWARD_TOGETHER, arguments, (lengths, logits))

    def bind_draft(self, draft: DraftLoop, logits: Tensor, cache: SlotCache) -> Callable[[], None]:
        """`Runner.bind_draft` over `cache`."""
        arguments = (
            *begin_arguments(draft), cache.lengths.numpy(), self._network, logits.numpy(), use_threads(),
            *draw_arguments(draft, [None, logits, None]),
        )  # fmt: skip
        return bound_call(_draft, _DRAFT, arguments)


def _addresses(*weights: Tensor | None) -> list[int]:
    return [0 if weight is None else weight.data_ptr() for weight in weights]


def _parts(linear: Linear) -> tuple[Tensor | None, ...]:
    """What tables have of a linear layer: its weight, its bias, and the scales of a weight of eight bits."""
    if isinstance(linear.weight, QuantisedWeight):
        return linear.weight.numbers, linear.bias, linear.weight.scales
    return linear.weight, linear.bias, None


@dataclass(frozen=True)
class _LowRankRows:
    """What an adapter adds to a linear layer, ready for `_add_low_rank`.

    Attributes:
        matrix: the layer's column in the tables of addresses.
        down: float32 [rank, in], as the model has it if that is of float32.
        up: float32 [rank, out], or with the bias as another row; scaled.
    """

    matrix: int
    down: Tensor
    up: Tensor


def _low_ranks(linears: dict[int, Linear]) -> list[_LowRankRows]:
    return [
        _LowRankRows(
            matrix,
            part.down.detach().float(),
            # Its columns lie together: sums over a rank are too short to be taken in vectors.
            torch.vstack([part.up.detach().T, *([] if part.bias is None else [part.bias.detach()[None]])])
            .float()
            .mul(part.scaling),
        )
        for matrix, linear in linears.items()
        for part in linear.low_ranks
    ]


def _network(members: Sequence[CompiledLlama]) -> NetworkArrays:
    """What passes read, for networks that share all weights but their adapters'."""
    first = members[0]
    added: list[list[list[int]]] = [[] for _ in first._weights]
    for index, member in enumerate(members):
        for rows, own in zip(added, member._added, strict=True):
            for part in own:
                shape = [part.down.shape[0], part.up.shape[0]]
                rows.append([part.matrix, index, len(members), *shape, *_addresses(part.down, part.up)])
    low_ranks = np.zeros((len(added), max(map(len, added)), _LOW_RANK), dtype=np.int64)
    for table, rows in zip(low_ranks, added, strict=True):
        # A row without a matrix stands for none.
        table[: len(rows)] = np.array(rows, dtype=np.int64).reshape(-1, _LOW_RANK)
    return NetworkArrays(
        first._sizes, ELEMENTS[first._dtype], first._numbers, first._windows, first._ends, first._weights,
        np.hstack([member._stores for member in members]), first._rotations.numpy(), first._kinds_of_layers,
        low_ranks,
    )  # fmt: skip


def _sizes(weights: LlamaWeights) -> np.ndarray[Any, Any]:
    config, layer = weights.decoder.config, weights.layers[0]
    norms_all_heads = layer.query_norm is not None and layer.query_norm.shape[0] != weights.dim
    return np.array([
        weights.heads, weights.kv_heads, weights.dim, config.hidden_size, config.intermediate_size,
        weights.gate != "silu", norms_all_heads,
        layer.attention_end_norm is not None or weights.residual_scale != 1.0,
    ], dtype=np.int64)  # fmt: skip


# Of `NetworkArrays.sizes` those that tell families apart, and of `numbers` all; a cap of 0 is none.
_IS_GELU, _NORMS_ALL_HEADS, _ADDS_LATER = range(5, 8)
_EPS, _NORM_OFFSET, _EMBEDDING_SCALE, _SCALE, _CAP, _RESIDUAL_SCALE, _LOGIT_SCALE, _LOGIT_CAP = range(8)

# Columns of the table of addresses. After a matrix come its bias and the scales of one of eight bits; what a
# layer does not have is 0. The first is of what the layer before has added.
_PARTS = 3
_BROUGHT_NORM, _ATTENTION_NORM, _QUERY_NORM, _KEY_NORM, _JOINED_NORM, _MLP_NORM = range(6)
_QUERY, _KEY, _VALUE, _OUTPUT, _GATE, _UP, _DOWN = range(6, 27, _PARTS)
_WEIGHTS = 27
_EMBEDDING, _FINAL_NORM, _HEAD = range(1, 4)
_ENDS = 6

# Columns of the table of what adapters add: to which product, for which of how many networks, and what.
_MATRIX_COLUMN, _NETWORK_INDEX, _NETWORKS, _RANK, _UP_ROWS, _DOWN_AT, _UP_AT = range(7)
_LOW_RANK = 7


# Rows of values that are read, and widened where they are of 16 bits, for all queries at a time; and about as
# many queries as have room for their scores in a core's cache.
_VALUES_AT_ONCE, _QUERIES_AT_ONCE = 64, 96
_LEAST_QUERIES = 32
"""Tokens of a sequence that another thread is worth, which writes all keys and values before them anew."""

# What the threads do between two meetings: every stage of a layer, then the last one. Without logits the last
# layer ends with its keys and values.
_PROJECT, _ATTEND, _JOIN, _GATE_UP, _CLOSE, _READ_OUT, _PROJECT_KEPT, _KEEP = range(8)


@record(*[MATRIX] * 8)
class _Buffers(NamedTuple):
    """What the stages of a pass hand on, a row a token.

    `middle` and `joined` are `hidden`, but where something is done to what a part of a layer adds. Then that
    is left in `joined`, and the next part adds it to `middle` for `hidden`, or halfway the other way round.
    """

    hidden: Any
    middle: Any
    joined: Any
    projected: Any
    mixed: Any
    gated: Any
    up: Any
    logits: Any


@record(TABLE, TABLE, TABLE, "int64", VECTOR, TABLE, TABLE, "int64", MATRIX, TABLE, TABLES, "int64")
class _Layer(NamedTuple):
    """What the stages of one layer read: parts of `NetworkArrays`, and where each sequence's rows stand.

    `pieces` is by how many shares a sequence attends with each of its heads of keys.
    """

    sizes: Any
    table: Any
    ends: Any
    element: int
    numbers: Any
    starts: Any
    lengths: Any
    window: int
    rotation: Any
    stores: Any
    low_ranks: Any
    pieces: int


@compiled(f"float32({VECTOR}, float32)")
def _inverse_size(values: Any, eps: float) -> Any:
    """What an RMS norm multiplies these `values` by."""
    total = FLOAT(0)
    for k in range(values.shape[0]):
        total += values[k] * values[k]
    return FLOAT(1) / np.sqrt(total / FLOAT(values.shape[0]) + eps)


@compiled(f"{MATRIX}({MATRIX}, int64, int64, {VECTOR})")
def _normalised(hidden: Any, address: int, element: int, numbers: Any) -> Any:
    """RMS norm of the rows of `hidden`, times the weight at `address`, in new memory; without one they."""
    if address == 0:
        return hidden
    rows, width = hidden.shape
    weight, offset = floats_at(address, element, width), numbers[_NORM_OFFSET]
    out = np.empty((rows, width), FLOAT)
    for r in range(rows):
        scale = _inverse_size(hidden[r], numbers[_EPS])
        for k in range(width):
            out[r, k] = hidden[r, k] * scale * (offset + weight[k])
    return out


@compiled(f"{MATRIX}({MATRIX}, {MATRIX}, int64, {MATRIX}, int64, _Layer)")
def _added_up(before: Any, joined: Any, norm: int, after: Any, share: int, layer: Any) -> Any:
    """What goes into a part of a layer: `before`, and what was `joined` since and is not in it yet.

    Each share makes it for itself, and the first also leaves it in `after`.
    """
    if layer.sizes[_ADDS_LATER] == 0:
        return before
    added, scale = _normalised(joined, norm, layer.element, layer.numbers), layer.numbers[_RESIDUAL_SCALE]
    out = np.empty(joined.shape, FLOAT)
    for r in range(out.shape[0]):
        for k in range(out.shape[1]):
            out[r, k] = before[r, k] + scale * added[r, k]
    if share == 0:
        for r in range(out.shape[0]):
            for k in range(out.shape[1]):
                after[r, k] = out[r, k]
    return out


@compiled(f"void({MATRIX}, {TABLE}, int64, int64, int64, {MATRIX}, int64)")
def _add_low_rank(inputs: Any, part: Any, size: int, first: int, last: int, out: Any, column: int) -> None:
    """Add what an adapter adds to the outputs `first` to `last - 1` of `size` of a linear layer."""
    rows = inputs.shape[0]
    rank, count = part[_RANK], part[_UP_ROWS]
    # All threads make these same sums: they are few, and a meeting takes longer. A bias is times 1.
    narrow = np.ones((rows, count), FLOAT)
    dot_products(inputs, part[_DOWN_AT], FLOAT32, 0, rank, narrow, 0, False)
    up = array_at(part[_UP_AT], (count, size))
    for r in range(rows):
        target, factors = out[r, column + first : column + last], narrow[r]
        for k in range(0, count // 4 * 4, 4):
            a, b, c, d = factors[k], factors[k + 1], factors[k + 2], factors[k + 3]
            up_a, up_b, up_c, up_d = (
                up[k, first:last], up[k + 1, first:last], up[k + 2, first:last], up[k + 3, first:last],
            )  # fmt: skip
            for n in range(target.shape[0]):
                target[n] += a * up_a[n] + b * up_b[n] + c * up_c[n] + d * up_d[n]
        for k in range(count // 4 * 4, count):
            factor, row = factors[k], up[k, first:last]
            for n in range(target.shape[0]):
                target[n] += factor * row[n]


@compiled(f"void({TABLE}, int64, int64, int64, int64, int64, int64)")
def _ask_for_product(
    table: Any, element: int, matrix: int, size: int, width: int, share: int, threads: int
) -> None:
    """Ask for what `_product` of inputs of this `width` will read first."""
    row_bytes = width if table[matrix + 2] != 0 else element_bytes(element) * width
    ask_for(table[matrix], row_bytes, share * size // threads, (share + 1) * size // threads)


@compiled(f"void({MATRIX}, {TABLE}, int64, int64, {MATRIX}, int64, int64, int64, boolean, _Layer)")
def _product(
    inputs: Any,
    table: Any,
    matrix: int,
    size: int,
    out: Any,
    column: int,
    share: int,
    threads: int,
    add: bool,
    layer: Any,
) -> None:
    """One thread's share of the `size` outputs of a linear layer, put in `out` from `column` on."""
    first, last = share * size // threads, (share + 1) * size // threads
    low_ranks, starts = layer.low_ranks, layer.starts
    if table[matrix + 1] != 0:
        bias = floats_at(table[matrix + 1], layer.element, size)
        for r in range(inputs.shape[0]):
            for n in range(first, last):
                out[r, column + n] = bias[n] + (out[r, column + n] if add else FLOAT(0))
        add = True
    if table[matrix + 2] != 0:
        quantised_products(inputs, table[matrix], table[matrix + 2], first, last, out, column, add)
    else:
        dot_products(inputs, table[matrix], layer.element, first, last, out, column, add)
    for index in range(low_ranks.shape[0]):
        part = low_ranks[index]
        if part[_MATRIX_COLUMN] == matrix:
            sequences = (starts.shape[0] - 1) // part[_NETWORKS]
            begin = starts[part[_NETWORK_INDEX] * sequences]
            end = starts[(part[_NETWORK_INDEX] + 1) * sequences]
            if begin < end:
                _add_low_rank(inputs[begin:end], part, size, first, last, out[begin:end], column)


@compiled(f"void({VECTOR}, int64, int64, int64, {VECTOR}, {VECTOR}, {VECTOR}, _Layer)")
def _rotate(row: Any, first: int, at: int, size: int, weight: Any, turn: Any, out: Any, layer: Any) -> None:
    """Put the head of `row` that begins `at`, normalised and turned, in `out`.

    It is one of those in the `size` numbers from `first` on, and normalised if there is a weight for it.
    """
    dim, numbers = out.shape[0], layer.numbers
    half = dim // 2
    head = row[at : at + dim]
    if weight.shape[0] > 0:
        offset = numbers[_NORM_OFFSET]
        if layer.sizes[_NORMS_ALL_HEADS] != 0:
            scale, own = _inverse_size(row[first : first + size], numbers[_EPS]), weight[at - first :]
        else:
            scale, own = _inverse_size(head, numbers[_EPS]), weight
        for k in range(dim):
            out[k] = head[k] * scale * (offset + own[k])
    else:
        for k in range(dim):
            out[k] = head[k]
    # Views, since an index that is a sum might be negative, and a loop that must look is not vectorised.
    left_half, right_half = out[:half], out[half:]
    cos_first, cos_second, sin_first, sin_second = (
        turn[:half], turn[half:dim], turn[dim : dim + half], turn[dim + half :],
    )  # fmt: skip
    for k in range(half):
        left, right = left_half[k], right_half[k]
        left_half[k] = left * cos_first[k] + right * sin_first[k]
        right_half[k] = right * cos_second[k] + left * sin_second[k]


@strictly_compiled(f"void({MATRIX}, int64, int64, int64, int64, {MATRIX})")
def _weighted_sums(weights: Any, values_at: int, element: int, first: int, last: int, out: Any) -> None:
    """out[r] = sum of weights[r, n] times row n of the values at this address, for n in first..last-1.

    Added up in that order, so that a row's sums do not depend on who stands beside it.
    """
    rows, dim = out.shape
    for row in range(rows):
        for k in range(dim):
            out[row, k] = FLOAT(0)
    for begin in range(first, last, _VALUES_AT_ONCE):
        end = min(begin + _VALUES_AT_ONCE, last)
        count, address = end - begin, values_at + element_bytes(element) * dim * begin
        values = floats_at(address, element, count * dim).reshape((count, dim))
        for row in range(0, rows // 3 * 3, 3):
            row_0, row_1, row_2 = (
                weights[row, begin:end], weights[row + 1, begin:end], weights[row + 2, begin:end],
            )  # fmt: skip
            out_0, out_1, out_2 = out[row], out[row + 1], out[row + 2]
            for n in range(0, count // 4 * 4, 4):
                a_0, a_1, a_2, a_3 = row_0[n], row_0[n + 1], row_0[n + 2], row_0[n + 3]
                b_0, b_1, b_2, b_3 = row_1[n], row_1[n + 1], row_1[n + 2], row_1[n + 3]
                c_0, c_1, c_2, c_3 = row_2[n], row_2[n + 1], row_2[n + 2], row_2[n + 3]
                value_0, value_1, value_2, value_3 = values[n], values[n + 1], values[n + 2], values[n + 3]
                for k in range(dim):
                    v_0, v_1, v_2, v_3 = value_0[k], value_1[k], value_2[k], value_3[k]
                    out_0[k] = out_0[k] + a_0 * v_0 + a_1 * v_1 + a_2 * v_2 + a_3 * v_3
                    out_1[k] = out_1[k] + b_0 * v_0 + b_1 * v_1 + b_2 * v_2 + b_3 * v_3
                    out_2[k] = out_2[k] + c_0 * v_0 + c_1 * v_1 + c_2 * v_2 + c_3 * v_3
            for n in range(count // 4 * 4, count):
                value = values[n]
                for k in range(dim):
                    out_0[k] += row_0[n] * value[k]
                    out_1[k] += row_1[n] * value[k]
                    out_2[k] += row_2[n] * value[k]
        for row in range(rows // 3 * 3, rows):
            out_0 = out[row]
            for n in range(count):
                weight, value = weights[row, begin + n], values[n]
                for k in range(dim):
                    out_0[k] += weight * value[k]


@compiled(f"void({VECTOR}, float32, float32)")
def _squeeze(values: Any, scale: float, cap: float) -> None:
    """Multiply `values` by `scale`, and squeeze them into +-`cap` by a hyperbolic tangent if it is not 0."""
    if cap == FLOAT(0):
        for k in range(values.shape[0]):
            values[k] *= scale
        return
    factor = FLOAT(2) * scale / cap
    for k in range(values.shape[0]):
        values[k] = cap - FLOAT(2) * cap / (FLOAT(1) + exp(values[k] * factor))


@compiled(f"void({VECTOR}, int64, int64, int64, float32, float32)")
def _softmax(scores: Any, first: int, begin: int, end: int, scale: Any, cap: Any) -> None:
    """Softmax of scores[begin:end] times `scale`, squeezed into +-`cap` if it is not 0.

    The other scores from `first` on become 0.
    """
    seen, factor = scores[begin:end], scale
    if cap != FLOAT(0):
        _squeeze(seen, scale, cap)
        factor = FLOAT(1)
    highest = largest(seen)
    total = FLOAT(0)
    for k in range(seen.shape[0]):
        seen[k] = exp((seen[k] - highest) * factor)
        total += seen[k]
    for k in range(seen.shape[0]):
        seen[k] /= total
    for column in range(first, begin):
        scores[column] = FLOAT(0)
    for column in range(end, scores.shape[0]):
        scores[column] = FLOAT(0)


@compiled(f"void({MATRIX}, {MATRIX}, int64, boolean, _Layer)")
def _attend(projected: Any, mixed: Any, share: int, attends: bool, layer: Any) -> None:
    """Write the new keys and values of one sequence's group of heads; attend to them and the past, or not.

    Of several pieces, shares of its queries, each writes all keys and values that it will read.
    """
    table, element, window, starts = layer.table, layer.element, layer.window, layer.starts
    rotation, stores, sizes, numbers = layer.rotation, layer.stores, layer.sizes, layer.numbers
    capacity, dim = rotation.shape[0], rotation.shape[1] // 2
    heads, kv_heads = sizes[0], sizes[1]
    groups = heads // kv_heads
    pieces = layer.pieces
    share, piece = share // pieces, share % pieces
    sequence, kv_head = share // kv_heads, share % kv_heads
    own, length = starts[sequence], starts[sequence + 1] - starts[sequence]
    if length == 0:
        return
    # Each network has its own sequences, after those of the one before, and its own storage.
    shares = (starts.shape[0] - 1) // (stores.shape[0] // 2) * kv_heads
    row_bytes = element_bytes(element) * dim
    at, offset = share // shares * 2, share % shares * capacity * row_bytes
    keys, values = stores[at] + offset, stores[at + 1] + offset
    all_queries, all_keys = heads * dim, kv_heads * dim
    # Of models without these norms there is nothing at 0.
    normed_queries, normed_keys = (all_queries, all_keys) if sizes[_NORMS_ALL_HEADS] != 0 else (dim, dim)
    query_norm = floats_at(table[_QUERY_NORM], element, normed_queries if table[_QUERY_NORM] != 0 else 0)
    key_norm = floats_at(table[_KEY_NORM], element, normed_keys if table[_KEY_NORM] != 0 else 0)
    first_query, last_query = piece * length // pieces, (piece + 1) * length // pieces
    queries, key = np.empty(((last_query - first_query) * groups, dim), FLOAT), np.empty(dim, FLOAT)
    last = capacity - 1
    start = layer.lengths[sequence]
    for step in range(last_query):
        position = min(start + step, last)
        turn = rotation[position]
        row = projected[own + step]
        key_at, value_at = (heads + kv_head) * dim, (heads + kv_heads + kv_head) * dim
        _rotate(row, all_queries, key_at, all_keys, key_norm, turn, key, layer)
        put_floats(key, keys + position * row_bytes, element)
        put_floats(row[value_at : value_at + dim], values + position * row_bytes, element)
        for group in range(groups if attends and step >= first_query else 0):
            query_at = (kv_head * groups + group) * dim
            query = queries[(step - first_query) * groups + group]
            _rotate(row, 0, query_at, all_queries, query_norm, turn, query, layer)
    if not attends:
        return

    step = max(1, _QUERIES_AT_ONCE // groups)
    for begun in range(first_query, last_query, step):
        ended = min(begun + step, last_query)
        span = min(start + ended, capacity)
        first = 0 if window == 0 else max(0, start + begun - window + 1) // 4 * 4
        # By fours, as capacities are: those left over are added up in another order, and which they are must
        # not depend on the length of a block.
        columns = (span + 3) // 4 * 4
        own_queries = queries[(begun - first_query) * groups : (ended - first_query) * groups]
        rows = own_queries.shape[0]
        scores, sums = np.empty((rows, columns), FLOAT), np.empty((rows, dim), FLOAT)
        dot_products(own_queries, keys, element, first, columns, scores, 0, False)
        for index in range(rows):
            end = min(start + begun + index // groups, last) + 1
            begin = first if window == 0 else max(0, end - window)
            _softmax(scores[index], first, begin, end, numbers[_SCALE], numbers[_CAP])
        _weighted_sums(scores, values, element, first, span, sums)
        for index in range(rows):
            at = (kv_head * groups + index % groups) * dim
            out = mixed[own + begun + index // groups, at : at + dim]
            for k in range(dim):
                out[k] = sums[index, k]


@compiled(f"void({VECTOR}, {VECTOR}, boolean)")
def _gate(gate: Any, factor: Any, is_gelu: bool) -> None:
    """Multiply the SiLU of `gate`, or its GELU as made of a hyperbolic tangent, by `factor`."""
    if is_gelu:
        # x (1 + tanh(y)) / 2 = x / (1 + exp(-2 y)) with y = sqrt(2 / pi) (x + 0.044715 x^3).
        for k in range(gate.shape[0]):
            x = gate[k]
            twice = x * (FLOAT(1.5957691216057308) + FLOAT(0.07135481282052803) * x * x)
            gate[k] = x / (FLOAT(1) + exp(-twice)) * factor[k]
        return
    for k in range(gate.shape[0]):
        gate[k] = gate[k] / (FLOAT(1) + exp(-gate[k])) * factor[k]


@compiled("void(int64, int64, int64, _Buffers, _Layer)")
def _share(stage: int, threads: int, share: int, buffers: Any, layer: Any) -> None:
    """What one thread does of one stage."""
    stay_a_function()
    table, element, numbers, sizes = layer.table, layer.element, layer.numbers, layer.sizes
    hidden, middle, joined = buffers.hidden, buffers.middle, buffers.joined
    projected, mixed, gated = buffers.projected, buffers.mixed, buffers.gated
    adds = sizes[_ADDS_LATER] == 0
    if stage in (_PROJECT, _PROJECT_KEPT):
        total = _added_up(middle, joined, table[_BROUGHT_NORM], hidden, share, layer)
        inputs = _normalised(total, table[_ATTENTION_NORM], element, numbers)
        key_size = sizes[1] * sizes[2]
        query_size, width = projected.shape[1] - 2 * key_size, inputs.shape[1]
        for matrix in (_KEY, _VALUE):
            _ask_for_product(table, element, matrix, key_size, width, share, threads)
        if stage == _PROJECT:
            _product(inputs, table, _QUERY, query_size, projected, 0, share, threads, False, layer)
        for matrix, column in ((_KEY, query_size), (_VALUE, query_size + key_size)):
            _product(inputs, table, matrix, key_size, projected, column, share, threads, False, layer)
    elif stage in (_ATTEND, _KEEP):
        _attend(projected, mixed, share, stage == _ATTEND, layer)
    elif stage == _JOIN:
        _product(mixed, table, _OUTPUT, hidden.shape[1], joined, 0, share, threads, adds, layer)
    elif stage == _GATE_UP:
        total = _added_up(hidden, joined, table[_JOINED_NORM], middle, share, layer)
        inputs, up = _normalised(total, table[_MLP_NORM], element, numbers), buffers.up
        rows, inner = gated.shape
        _ask_for_product(table, element, _UP, inner, inputs.shape[1], share, threads)
        _product(inputs, table, _GATE, inner, gated, 0, share, threads, False, layer)
        _product(inputs, table, _UP, inner, up, 0, share, threads, False, layer)
        first, last = share * inner // threads, (share + 1) * inner // threads
        for row in range(rows):
            _gate(gated[row, first:last], up[row, first:last], sizes[_IS_GELU] != 0)
    elif stage == _CLOSE:
        _product(gated, table, _DOWN, hidden.shape[1], joined, 0, share, threads, adds, layer)
    else:
        total = _added_up(middle, joined, layer.ends[_BROUGHT_NORM], hidden, share, layer)
        inputs, logits = _normalised(total, layer.ends[_FINAL_NORM], element, numbers), buffers.logits
        size = logits.shape[1]
        _product(inputs, layer.ends, _HEAD, size, logits, 0, share, threads, False, layer)
        if numbers[_LOGIT_SCALE] != FLOAT(1) or numbers[_LOGIT_CAP] != FLOAT(0):
            first, last = share * size // threads, (share + 1) * size // threads
            for row in range(logits.shape[0]):
                _squeeze(logits[row, first:last], numbers[_LOGIT_SCALE], numbers[_LOGIT_CAP])


@compiled("UniTuple(int64, 2)(int64, int64, boolean)")
def _place(step: int, layers: int, reads_out: bool) -> Any:
    """The layer and the stage of a step of a pass."""
    layer, stage = step // _READ_OUT, step % _READ_OUT
    if layer == layers:
        return 0, _READ_OUT
    if layer == layers - 1 and not reads_out:
        return layer, stage + _PROJECT_KEPT
    return layer, stage


@compiled(f"void(int64, {TABLE}, {TABLE}, int64, _Buffers, int64, int64)")
def _ask_for_stage(
    stage: int, table: Any, ends: Any, element: int, buffers: Any, share: int, threads: int
) -> None:
    """Ask for the first weights of a stage, or of the one after where it reads none."""
    width, joined, inner = buffers.hidden.shape[1], buffers.mixed.shape[1], buffers.gated.shape[1]
    if stage == _PROJECT:
        _ask_for_product(table, element, _QUERY, joined, width, share, threads)
    elif stage == _PROJECT_KEPT:
        key_size = (buffers.projected.shape[1] - joined) // 2
        _ask_for_product(table, element, _KEY, key_size, width, share, threads)
    elif stage in (_ATTEND, _JOIN):
        _ask_for_product(table, element, _OUTPUT, width, joined, share, threads)
    elif stage == _GATE_UP:
        _ask_for_product(table, element, _GATE, inner, width, share, threads)
    elif stage == _CLOSE:
        _ask_for_product(table, element, _DOWN, width, inner, share, threads)
    elif stage == _READ_OUT:
        _ask_for_product(ends, element, _HEAD, buffers.logits.shape[1], width, share, threads)


@in_parallel(f"void(int64, int64, {TABLE}, {TABLE}, NetworkArrays, _Buffers, {TABLES})")
def _pass_together(
    thread: int, threads: int, starts: Any, lengths: Any, network: Any, buffers: Any, all_meetings: Any
) -> None:
    """What one thread does of a pass, which has logits where its last meeting is for reading out."""
    layers, kv_heads, steps = network.weights.shape[0], network.sizes[1], all_meetings.shape[0]
    reads_out = steps > _READ_OUT * layers
    sequences = starts.shape[0] - 1
    # Of a prompt, where there are fewer heads of keys than threads.
    pieces = max(
        1, min(2 * threads // (sequences * kv_heads), starts[sequences] // (sequences * _LEAST_QUERIES))
    )
    for step in range(steps):
        layer, stage = _place(step, layers, reads_out)
        own = _Layer(
            network.sizes, network.weights[layer], network.ends, network.element, network.numbers, starts,
            lengths, network.windows[layer], network.rotations[network.kinds[layer]], network.stores[layer],
            network.low_ranks[layer], pieces if stage == _ATTEND else 1,
        )  # fmt: skip
        shares = sequences * kv_heads * own.pieces if stage in (_ATTEND, _KEEP) else threads
        meeting = all_meetings[step]
        share = claim(meeting, thread, threads, shares)
        while share >= 0:
            _share(stage, threads, share, buffers, own)
            finish(meeting)
            share = claim(meeting, thread, threads, shares)
        if step + 1 < steps:
            layer, stage = _place(step + 1, layers, reads_out)
            _ask_for_stage(
                stage, network.weights[layer], network.ends, network.element, buffers, thread, threads
            )
        wait(meeting, shares)


_FORWARD = f"{TABLES}, {TABLE}, {TABLE}, NetworkArrays, {MATRIX}, int64"
_forward_arguments = arguments_at(_FORWARD)


@compiled(f"void({_FORWARD})")
def _forward(
    tokens: Any,
    counts: Any,
    lengths: Any,
    network: Any,
    logits: Any,
    threads: int,
) -> None:
    """Run the first `counts` of each sequence's tokens; their logits stand where those of all would."""
    heads, kv_heads, dim, width, inner = network.sizes[:5]
    batch, length = tokens.shape
    starts = np.zeros(batch + 1, np.int64)
    for sequence in range(batch):
        starts[sequence + 1] = starts[sequence] + counts[sequence]
    rows = starts[batch]
    row_bytes = element_bytes(network.element) * width
    hidden = np.empty((rows, width), FLOAT)
    middle, joined = hidden, hidden
    if network.sizes[_ADDS_LATER] != 0:
        middle, joined = np.empty((rows, width), FLOAT), np.zeros((rows, width), FLOAT)
    scale = network.numbers[_EMBEDDING_SCALE]
    for sequence in range(batch):
        for step in range(counts[sequence]):
            address = network.ends[_EMBEDDING] + tokens[sequence, step] * row_bytes
            row = middle[starts[sequence] + step]
            read_floats(address, network.element, row)
            for k in range(width):
                row[k] *= scale
    projected = np.empty((rows, (heads + 2 * kv_heads) * dim), FLOAT)
    mixed = np.empty((rows, heads * dim), FLOAT)
    gated = np.empty((rows, inner), FLOAT)
    up = np.empty((rows, inner), FLOAT)
    layers = network.weights.shape[0]
    # One sequence's stand in their places as they are.
    is_ragged = rows < logits.shape[0] and batch > 1
    packed = np.empty((rows, logits.shape[1]), FLOAT) if is_ragged else logits[:rows]
    buffers = _Buffers(hidden, middle, joined, projected, mixed, gated, up, packed)
    # Without room for logits none are made.
    steps = _READ_OUT * layers + 1 if logits.shape[0] > 0 else _READ_OUT * (layers - 1) + 2
    _pass_together(threads, threads, starts, lengths, network, buffers, meetings(steps, threads))
    for sequence in range(batch if is_ragged else 0):
        for step in range(counts[sequence]):
            row, out = packed[starts[sequence] + step], logits[sequence * length + step]
            for k in range(row.shape[0]):
                out[k] = row[k]


@entry("void(int64)")
def _forward_at(address: int) -> None:
    tokens, counts, lengths, network, logits, threads = _forward_arguments(address)
    _forward(tokens, counts, lengths, network, logits, threads)


_FORWARD_TOGETHER = f"{TABLES}, {TABLE}, {TABLES}, NetworkArrays, {MATRIX}, int64"
_forward_together_arguments = arguments_at(_FORWARD_TOGETHER)


@entry("void(int64)")
def _forward_together(address: int) -> None:
    """`_forward` of several networks, for each of which `places` says where lengths and logits are."""
    tokens, counts, places, network, room, threads = _forward_together_arguments(address)
    batch, length = tokens.shape
    networks = places.shape[0]
    all_tokens = np.empty((networks * batch, length), np.int64)
    all_counts, all_lengths = np.empty(networks * batch, np.int64), np.empty(networks * batch, np.int64)
    for member in range(networks):
        lengths = integers_at(places[member, 0], (batch,))
        for sequence in range(batch):
            at = member * batch + sequence
            all_tokens[at] = tokens[sequence]
            all_counts[at], all_lengths[at] = counts[sequence], lengths[sequence]
    _forward(all_tokens, all_counts, all_lengths, network, room, threads)
    rows, vocabulary = batch * length, room.shape[1]
    for member in range(networks):
        out = array_at(places[member, 1], (rows, vocabulary))
        for row in range(rows):
            own, target = room[member * rows + row], out[row]
            for k in range(vocabulary):
                target[k] = own[k]


_DRAFT = f"{TABLE}, {TABLE}, {FLAGS}, {TABLES}, {TABLE}, {TABLE}, NetworkArrays, {CUBE}, int64, {DRAWS}"
_draft_arguments = arguments_at(_DRAFT)


@entry("void(int64)")
def _draft(address: int) -> None:
    (
        last_token, draft_lens, done, block, counts, lengths, network, logits, threads, draws, sampling,
        memory, early,
    ) = _draft_arguments(address)  # fmt: skip
    drafted, batch = block.shape[1] - 1, block.shape[0]
    drawn, takes_part = np.empty(batch, np.int64), np.empty(batch, np.int64)
    longest = begin_draft(last_token, draft_lens, done, block, counts, drawn, takes_part)
    step = 0
    # The last step is for the token after the draft, of which one that only drafts says nothing.
    while step < longest - draws.keeps_logits:
        _forward(drawn.reshape((batch, 1)), takes_part, lengths, network, logits[step], threads)
        for sequence in range(batch):
            lengths[sequence] += 1
        if step < drafted:
            longest = draw(step, block, counts, drawn, takes_part, draws, sampling, memory, early)
        step += 1
    for sequence in range(batch):
        lengths[sequence] += (0 if draws.keeps_logits else drafted + 1) - step
