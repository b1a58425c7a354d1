"""Products of a few rows with a matrix, of floats or of bytes, which take the time that reading it takes.

Matrices of bfloat16 are multiplied by rows that are rounded to it where a processor multiplies such pairs at
twice the speed of float32, and by rows as they are where it does not. Matrices of float16 are always widened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .elements import BFLOAT16, ELEMENTS, FEATURES, FLOAT32, element_bytes, floats_at, put_floats, widened
from .jit import (
    FLOAT,
    LARGEST_FLOAT,
    MATRIX,
    array_at,
    bytes_at,
    compiled,
    external,
    largest,
    stay_a_function,
)

__all__ = ["MULTIPLIES_PAIRS", "ask_for", "dot_products", "quantised_products"]

_LANES = 16 if "avx512f" in FEATURES else 8 if "avx2" in FEATURES else 4
_MOST_ROWS = 3 if _LANES == 8 else 6
"""Rows of a tile whose sums, with the weights, fit in the registers: AVX2 has half as many as the others."""

_ROWS_AT_ONCE = 20 * _MOST_ROWS
"""Rows of inputs that all weights pass before the next do: so many stay in a core's caches at any width."""

_LINE, _LINE_OF_BYTES = 16, 64
"""Floats and bytes that a processor reads together."""

MULTIPLIES_PAIRS = "avx512bf16" in FEATURES
"""Whether a processor adds up products of bfloat16 two at a time, in float32 (vdpbf16ps)."""

_LARGEST_BYTE, _LARGEST_WORD, _LARGEST_SUM = 2**7 - 1, 2**15 - 1, 2**31 - 1

_STREAMS = 4
_AHEAD = 4096
"""Bytes before which weights are asked for. Left to itself a processor foresees no further than a page, and
waits at each for memory while no sum is added to."""
_ASKED = 2048
"""Bytes that each stream asks for before it begins; half and twice as many did as well."""


def _prefetched(builder: Any, address: Any) -> None:
    """Ask for the line at `address`, to be read, in the second of the caches: the first has room for few."""
    byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
    prefetch = external(builder, "llvm.prefetch.p0", ir.VoidType(), byte, flag, flag, flag)
    builder.call(prefetch, [builder.inttoptr(address, byte), flag(0), flag(2), flag(1)])


@intrinsic  # type: ignore[untyped-decorator]
def _ask_for_line(typing_context: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _prefetched(builder, *arguments)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def _constant(value: int) -> Any:
    return ir.Constant(ir.IntType(64), value)


def _load(builder: Any, address: Any, kind: Any, align: int) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def _not_unrolled(module: Any) -> Any:
    """What tells LLVM not to unroll a loop: the sums and the numbers of two lines do not fit in registers."""
    never = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
    loop = module.add_metadata([never])
    # Of a loop's metadata the first is itself.
    loop.operands = (loop, never)
    return loop


def _in_lines(
    builder: Any, size: Any, line: int, zero: Any, count: int, step: Callable[[Any, list[Any]], list[Any]]
) -> list[Any]:
    """`count` sums, vectors that begin as `zero`, to which `step` adds what stands in each whole line.

    It is given where a line of `line` elements begins and the sums so far, and gives the new ones.
    """
    before = builder.block
    loop, after = builder.append_basic_block("lines"), builder.append_basic_block("sums")
    whole_lines = builder.and_(size, _constant(-line))
    builder.cbranch(builder.icmp_signed(">", whole_lines, _constant(0)), loop, after)

    builder.position_at_end(loop)
    k = builder.phi(ir.IntType(64))
    k.add_incoming(_constant(0), before)
    running = [builder.phi(zero.type) for _ in range(count)]
    values = step(k, list(running))
    following = builder.add(k, _constant(line))
    k.add_incoming(following, loop)
    for phi, value in zip(running, values, strict=True):
        phi.add_incoming(zero, before)
        phi.add_incoming(value, loop)
    again = builder.cbranch(builder.icmp_signed("<", following, whole_lines), loop, after)
    again.set_metadata("llvm.loop", _not_unrolled(builder.module))

    builder.position_at_end(after)
    added = [builder.phi(zero.type) for _ in range(count)]
    for phi, value in zip(added, values, strict=True):
        phi.add_incoming(zero, before)
        phi.add_incoming(value, loop)
    return added


class _BrainFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BrainFloat)

    def __hash__(self) -> int:
        return hash(_BrainFloat)


@dataclass(frozen=True)
class _Terms:
    """How what lies in one line of weights is multiplied by inputs and added to sums.

    Attributes:
        line: numbers in a line of weights.
        at_once: how many of them one operation takes.
        input_bytes, weight_bytes: of one number.
        read_inputs, read_weights: give a vector of `at_once` numbers from an address.
        add: gives a sum, a vector, after a vector of inputs and one of weights.
    """

    line: int
    at_once: int
    input_bytes: int
    weight_bytes: int
    read_inputs: Callable[[Any], Any]
    read_weights: Callable[[Any], Any]
    add: Callable[[Any, Any, Any], Any]


def _terms(builder: Any, element: int) -> _Terms:
    sums = ir.VectorType(ir.FloatType(), _LANES)
    if element == BFLOAT16 and MULTIPLIES_PAIRS:
        pairs = ir.VectorType(_BrainFloat(), 2 * _LANES)
        dot = external(builder, f"llvm.x86.avx512bf16.dpbf16ps.{32 * _LANES}", sums, sums, pairs, pairs)
        read = partial(_load, builder, kind=pairs, align=2)
        return _Terms(
            2 * _LINE, 2 * _LANES, 2, 2, read, read, lambda sum_, x, w: builder.call(dot, [sum_, x, w])
        )
    fused = external(builder, f"llvm.fmuladd.v{_LANES}f32", sums, sums, sums, sums)
    read = partial(_load, builder, kind=sums, align=4)

    def add(sum_: Any, x: Any, w: Any) -> Any:
        return builder.call(fused, [x, w, sum_])

    if element == FLOAT32:
        return _Terms(_LINE, _LANES, 4, 4, read, read, add)
    words = partial(_load, builder, kind=ir.VectorType(ir.IntType(16), _LANES), align=2)
    return _Terms(_LINE, _LANES, 4, 2, read, lambda at: widened(builder, words(at), element), add)


def _sums(rows: int) -> Callable[..., None]:
    """What adds up `rows` rows of inputs with four rows of weights at a time.

    It is written in LLVM's terms: Numba takes no loop in vectors that asks for memory ahead, and in those it
    does take, a row alone may be added up in another order than beside others, so that a sequence would
    depend on its neighbours.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def sums(
        typing_context: Any,
        element: Any,
        inputs: Any,
        input_step: Any,
        weights: Any,
        weight_step: Any,
        size: Any,
        ahead: Any,
        ahead_of_others: Any,
        out: Any,
        out_row: Any,
        out_step: Any,
        add: Any,
    ) -> Any:
        return types.void(*[types.int64] * 11, types.boolean), codegen

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for element in ELEMENTS.values():
            with builder.if_then(builder.icmp_signed("==", arguments[0], _constant(element))):
                sums_of(builder, _terms(builder, element), arguments[1:])
        return context.get_dummy_value()

    def sums_of(builder: Any, terms: _Terms, arguments: Sequence[Any]) -> None:
        inputs, input_step, weights, weight_step, size, *aheads, out, out_row, out_step, add = arguments
        rows_at = [builder.add(inputs, builder.mul(_constant(r), input_step)) for r in range(rows)]
        weights_at = [builder.add(weights, builder.mul(_constant(c), weight_step)) for c in range(_STREAMS)]

        def step(k: Any, values: list[Any]) -> list[Any]:
            offset = builder.mul(k, _constant(terms.weight_bytes))
            for c, address in enumerate(weights_at):
                _prefetched(builder, builder.add(builder.add(address, offset), aheads[c // 2]))
            for part in range(0, terms.line, terms.at_once):
                at = builder.add(k, _constant(part))
                of_rows, of_weights = (
                    [
                        partial(read, builder.add(address, builder.mul(at, _constant(bytes_))))
                        for address in own
                    ]
                    for own, read, bytes_ in (
                        (rows_at, terms.read_inputs, terms.input_bytes),
                        (weights_at, terms.read_weights, terms.weight_bytes),
                    )
                )
                # The fewer stay in registers while the others pass, or there are too few for the sums.
                by_weights = rows <= _STREAMS
                streamed, held = (of_weights, of_rows) if by_weights else (of_rows, of_weights)
                kept = [read() for read in held]
                for s, read in enumerate(streamed):
                    passing = read()
                    for h, other in enumerate(kept):
                        r, c, x, w = (h, s, other, passing) if by_weights else (s, h, passing, other)
                        place = r * _STREAMS + c
                        values[place] = terms.add(values[place], x, w)
            return values

        zeros = ir.Constant(ir.VectorType(ir.FloatType(), _LANES), [0.0] * _LANES)
        values = _in_lines(builder, size, terms.line, zeros, rows * _STREAMS, step)
        for r in range(rows):
            totals = _sums_of_four(builder, values[r * _STREAMS : (r + 1) * _STREAMS], builder.fadd)
            results = [builder.extract_element(totals, ir.IntType(32)(c)) for c in range(_STREAMS)]
            _put(builder, results, builder.add(out, builder.mul(_constant(r), out_row)), out_step, add)

    adds: Callable[..., None] = sums
    return adds


def _shuffled(builder: Any, left: Any, right: Any, places: Iterable[int]) -> Any:
    """The elements of `left` and, numbered on from there, of `right` that stand at `places`."""
    chosen = list(places)
    return builder.shuffle_vector(
        left, right, ir.Constant(ir.VectorType(ir.IntType(32), len(chosen)), chosen)
    )


def _sums_of_four(builder: Any, vectors: Sequence[Any], add: Callable[[Any, Any], Any]) -> Any:
    """The sum of each of four vectors, as one vector of four.

    Side by side: lines are so short that each sum on its own would take a good part of the time of its terms.
    """
    lanes = vectors[0].type.count
    for width in (1, 2):
        folded = []
        for left, right in zip(vectors[::2], vectors[1::2], strict=True):
            # Both first halves of each four elements, and both second ones, in turns of `width`: what
            # processors have an instruction for.
            halves = [
                [
                    base + first + k
                    for four in range(begin, lanes, _STREAMS)
                    for first in range(four, four + 2, width)
                    for base in (0, lanes)
                    for k in range(width)
                ]
                for begin in (0, 2)
            ]
            folded.append(add(*(_shuffled(builder, left, right, half) for half in halves)))
        vectors = folded
    (total,) = vectors
    while lanes > _STREAMS:
        lanes //= 2
        parts = (_shuffled(builder, total, total, range(at, at + lanes)) for at in (0, lanes))
        total = add(*parts)
    return total


def _put(builder: Any, results: Sequence[Any], out: Any, out_step: Any, add: Any) -> None:
    """Store float32 `results` from the address `out` on, added to what is there if `add`."""
    real = ir.FloatType()
    for c, result in enumerate(results):
        place = builder.inttoptr(builder.add(out, builder.mul(_constant(c), out_step)), real.as_pointer())
        there = builder.select(add, builder.load(place), ir.Constant(real, 0.0))
        builder.store(builder.fadd(result, there), place)


@intrinsic  # type: ignore[untyped-decorator]
def _integer_sums(
    typing_context: Any,
    inputs: Any,
    weights: Any,
    weight_step: Any,
    size: Any,
    ahead: Any,
    factor: Any,
    scales: Any,
    out: Any,
    out_step: Any,
    add: Any,
) -> Any:
    """What adds up a row of inputs of 16 bits with four rows of weights of eight, times `factor` and a scale.

    Neighbours are multiplied and added in pairs, for which processors have one instruction (vpmaddwd).
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        inputs, weights, weight_step, size, ahead, factor, scales, out, out_step, add = arguments
        real, number, pairs = ir.FloatType(), ir.IntType(32), _LANES
        wide, words, bytes_ = (ir.VectorType(ir.IntType(bits), 2 * pairs) for bits in (32, 16, 8))
        sums = ir.VectorType(number, pairs)
        weights_at = [builder.add(weights, builder.mul(_constant(c), weight_step)) for c in range(_STREAMS)]

        def step(k: Any, values: list[Any]) -> list[Any]:
            for address in weights_at:
                _prefetched(builder, builder.add(builder.add(address, k), ahead))
            for part in range(_LINE_OF_BYTES // (2 * pairs)):
                at = builder.add(k, _constant(2 * pairs * part))
                row = _load(builder, builder.add(inputs, builder.mul(at, _constant(2))), words, 2)
                for c, address in enumerate(weights_at):
                    own = builder.sext(_load(builder, builder.add(address, at), bytes_, 1), words)
                    products = builder.mul(builder.sext(row, wide), builder.sext(own, wide))
                    halves = [
                        _shuffled(builder, products, products, range(first, 2 * pairs, 2)) for first in (0, 1)
                    ]
                    values[c] = builder.add(values[c], builder.add(*halves))
            return values

        values = _in_lines(builder, size, _LINE_OF_BYTES, ir.Constant(sums, [0] * pairs), _STREAMS, step)
        totals = builder.sitofp(_sums_of_four(builder, values, builder.add), ir.VectorType(real, _STREAMS))
        results = []
        for c in range(_STREAMS):
            at = builder.add(scales, builder.mul(_constant(c), out_step))
            scale = builder.fmul(_load(builder, at, real, 4), factor)
            results.append(builder.fmul(builder.extract_element(totals, ir.IntType(32)(c)), scale))
        _put(builder, results, out, out_step, add)
        return context.get_dummy_value()

    integers = [types.int64] * 5
    return types.void(*integers, types.float32, *[types.int64] * 3, types.boolean), codegen


_sums_1, _sums_2, _sums_3, _sums_4, _sums_5, _sums_6 = map(_sums, range(1, 7))


@compiled("void(int64, int64, int64, int64)")
def ask_for(weights: int, row_bytes: int, first: int, last: int) -> None:
    """Ask for what products with rows first..last-1 of the matrix at `weights` will read first."""
    stay_a_function()
    step = (last - first) // _STREAMS * row_bytes
    for at in range(0, min(step, _ASKED), 4 * _LINE):
        for stream in range(_STREAMS):
            _ask_for_line(weights + first * row_bytes + stream * step + at)


@compiled(f"void({MATRIX}, int64, int64, int64, int64, {MATRIX}, int64, boolean)")
def dot_products(
    inputs: Any, weights: int, element: int, first: int, last: int, out: Any, column: int, add: bool
) -> None:
    """out[r, column + n] = inputs[r] . weights[n] for n in first..last-1, added to what is there if `add`.

    Contiguous float32 `inputs` [rows, size], `out` [rows, ..], and from the address `weights` on a contiguous
    matrix [.., size] of this `element`. For few rows the time goes into reading the weights: they are read
    once, as four streams.
    """
    stay_a_function()
    rows, size = inputs.shape
    quarter = (last - first) // _STREAMS
    row_bytes, out_bytes = element_bytes(element) * size, 4 * out.shape[1]
    is_rounded = MULTIPLIES_PAIRS and element == BFLOAT16
    rounded = np.empty((rows, size) if is_rounded else (0, 0), np.uint16)
    for r in range(rows if is_rounded else 0):
        put_floats(inputs[r], rounded.ctypes.data + 2 * size * r, element)
    x_step = 2 * size if is_rounded else 4 * size
    for begin_row in range(0, rows, _ROWS_AT_ONCE):
        end_row = min(begin_row + _ROWS_AT_ONCE, rows)
        tiles = (end_row - begin_row + _MOST_ROWS - 1) // _MOST_ROWS
        for n in range(first, first + quarter):
            r = begin_row
            at, step = weights + n * row_bytes, quarter * row_bytes
            for tile in range(tiles):
                taken = (end_row - r + tiles - tile - 1) // (tiles - tile)
                # The first tile asks for half of the streams, the next for the others, or memory would rest.
                ahead, others = _AHEAD * (tile == 0), _AHEAD * (tile == min(tiles - 1, 1))
                # Here, since Numba frees an array after it is last named, whoever knows its address.
                x = (rounded.ctypes.data if is_rounded else inputs.ctypes.data) + r * x_step
                y = out.ctypes.data + r * out_bytes + 4 * (column + n)
                if taken == 1:
                    _sums_1(element, x, x_step, at, step, size, ahead, others, y, out_bytes, 4 * quarter, add)
                elif taken == 2:
                    _sums_2(element, x, x_step, at, step, size, ahead, others, y, out_bytes, 4 * quarter, add)
                elif taken == 3:
                    _sums_3(element, x, x_step, at, step, size, ahead, others, y, out_bytes, 4 * quarter, add)
                elif taken == 4:
                    _sums_4(element, x, x_step, at, step, size, ahead, others, y, out_bytes, 4 * quarter, add)
                elif taken == 5:
                    _sums_5(element, x, x_step, at, step, size, ahead, others, y, out_bytes, 4 * quarter, add)
                else:
                    _sums_6(element, x, x_step, at, step, size, ahead, others, y, out_bytes, 4 * quarter, add)
                r += taken
    line = 2 * _LINE if is_rounded else _LINE
    for n in range(first, last):
        # What follows the last whole line of a row; of the last few rows all.
        begin = size // line * line if n < first + _STREAMS * quarter else 0
        if begin < size:
            w = floats_at(weights + n * row_bytes + begin * element_bytes(element), element, size - begin)
            for r in range(rows):
                x_row = inputs[r, begin:]
                total = FLOAT(0)
                for k in range(x_row.shape[0]):
                    total += x_row[k] * w[k]
                out[r, column + n] = total + (out[r, column + n] if add or begin > 0 else FLOAT(0))


@compiled(f"void({MATRIX}, int64, int64, int64, int64, {MATRIX}, int64, boolean)")
def quantised_products(
    inputs: Any, numbers: int, scales: int, first: int, last: int, out: Any, column: int, add: bool
) -> None:
    """`dot_products` with weights scales[n] * numbers[n], whose int8 and float32 stand at these addresses.

    Inputs are rounded to as many of 16 bits as no sum of 32 can overflow by: that is at least 11 for up to
    16,000 of them, next to which the rounding of weights to eight is all that counts.
    """
    stay_a_function()
    rows, size = inputs.shape
    quarter = (last - first) // _STREAMS
    out_bytes = 4 * out.shape[1]
    narrow, factors, magnitudes = (
        np.empty((rows, size), np.int16),
        np.empty(rows, FLOAT),
        np.empty(size, FLOAT),
    )
    most = FLOAT(min(_LARGEST_WORD, _LARGEST_SUM // (_LARGEST_BYTE * size)))
    for r in range(rows):
        row, rounded = inputs[r], narrow[r]
        for k in range(size):
            magnitudes[k] = abs(row[k]) if abs(row[k]) <= LARGEST_FLOAT else FLOAT(0)
        highest = largest(magnitudes)
        scale = most / highest if highest > FLOAT(0) else FLOAT(0)
        for k in range(size):
            rounded[k] = np.int16(np.floor(row[k] * scale + FLOAT(0.5)))
        factors[r] = highest / most
    for n in range(first, first + quarter):
        at, scale_at, ahead = numbers + n * size, scales + 4 * n, _AHEAD
        for r in range(rows):
            x, y = narrow.ctypes.data + 2 * size * r, out.ctypes.data + r * out_bytes + 4 * (column + n)
            _integer_sums(x, at, quarter * size, size, ahead, factors[r], scale_at, y, 4 * quarter, add)
            ahead = 0
    all_scales = array_at(scales, (last,))
    for n in range(first, last):
        begin = size // _LINE_OF_BYTES * _LINE_OF_BYTES if n < first + _STREAMS * quarter else 0
        if begin < size:
            w = bytes_at(numbers + n * size, (size,))
            for r in range(rows):
                rounded = narrow[r]
                total = np.int32(0)
                for k in range(begin, size):
                    total += np.int32(rounded[k]) * np.int32(w[k])
                there = out[r, column + n] if add or begin > 0 else FLOAT(0)
                out[r, column + n] = FLOAT(total) * (all_scales[n] * factors[r]) + there
