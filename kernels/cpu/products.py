"""Products of a few rows with a matrix, of floats or of bytes, which take the time that reading it takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from .compile import FLOAT, MATRIX, array_at, bytes_at, compiled, stay_a_function

__all__ = ["dot_products", "quantised_products"]

_FEATURES = binding.get_host_cpu_features()
_LANES = 16 if _FEATURES.get("avx512f") else 8 if _FEATURES.get("avx2") else 4
_MOST_ROWS = 3 if _LANES == 8 else 6
"""Rows of a tile whose sums, with the weights, fit in the registers: AVX2 has half as many as the others."""

_LINE, _LINE_OF_BYTES = 16, 64
"""Floats and bytes that a processor reads together."""

_MOST_ROWS_BY_BYTES = 3
"""Rows of a tile with weights of eight bits, which are written out for each tile: drafts have one row."""

_STREAMS = 4
_AHEAD = 4096
"""Bytes before which weights are asked for. Left to itself a processor foresees no further than a page, and
waits at each for memory while no sum is added to."""


def _sums(rows: int, is_quantised: bool = False) -> Callable[..., None]:
    """What adds up `rows` rows of inputs with four rows of weights at a time, of float32 or of int8.

    It is written in LLVM's terms: Numba takes no loop in vectors that asks for memory ahead, and in those it
    does take, a row alone may be added up in another order than beside others, so that a sequence would
    depend on its neighbours.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def sums(
        typing_context: Any,
        inputs: Any,
        input_step: Any,
        weights: Any,
        weight_step: Any,
        size: Any,
        ahead: Any,
        scales: Any,
        out: Any,
        out_row: Any,
        out_step: Any,
        add: Any,
    ) -> Any:
        return types.void(*[types.int64] * 10, types.boolean), codegen

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        inputs, input_step, weights, weight_step, size, ahead, scales, out, out_row, out_step, add = arguments
        real, whole = ir.FloatType(), ir.IntType(64)
        vector = ir.VectorType(real, _LANES)
        line, width = (_LINE_OF_BYTES, 1) if is_quantised else (_LINE, 4)

        def constant(value: int) -> Any:
            return ir.Constant(whole, value)

        def function(name: str, result: Any, *parameters: Any) -> Any:
            known = builder.module.globals.get(name)
            return known or ir.Function(builder.module, ir.FunctionType(result, parameters), name)

        fused = function(f"llvm.fmuladd.v{_LANES}f32", vector, vector, vector, vector)
        total = function(f"llvm.vector.reduce.fadd.v{_LANES}f32", real, real, vector)
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        prefetch = function("llvm.prefetch.p0", ir.VoidType(), byte, flag, flag, flag)

        rows_at = [builder.add(inputs, builder.mul(constant(r), input_step)) for r in range(rows)]
        weights_at = [builder.add(weights, builder.mul(constant(c), weight_step)) for c in range(_STREAMS)]
        places = [(r, c) for r in range(rows) for c in range(_STREAMS)]

        def load(address: Any, kind: Any = vector, align: int = 4) -> Any:
            return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)

        def load_weights(address: Any) -> Any:
            if not is_quantised:
                return load(address)
            numbers = load(address, ir.VectorType(ir.IntType(8), _LANES), align=1)
            return builder.sitofp(builder.sext(numbers, ir.VectorType(ir.IntType(32), _LANES)), vector)

        before = builder.block
        loop, after = builder.append_basic_block("lines"), builder.append_basic_block("sums")
        whole_lines = builder.and_(size, constant(-line))
        builder.cbranch(builder.icmp_signed(">", whole_lines, constant(0)), loop, after)

        builder.position_at_end(loop)
        k = builder.phi(whole)
        k.add_incoming(constant(0), before)
        running = {place: builder.phi(vector) for place in places}
        zeros = ir.Constant(vector, [0.0] * _LANES)
        for phi in running.values():
            phi.add_incoming(zeros, before)
        values: dict[tuple[int, int], Any] = dict(running)
        weight_offset, input_offset = builder.mul(k, constant(width)), builder.mul(k, constant(4))
        for address in weights_at:
            wanted = builder.inttoptr(builder.add(builder.add(address, weight_offset), ahead), byte)
            # To be read, into the second of the caches: into the first there is room for few at a time.
            builder.call(prefetch, [wanted, flag(0), flag(2), flag(1)])
        for part in range(line // _LANES):
            first = _LANES * part
            at_weights = builder.add(weight_offset, constant(width * first))
            at_inputs = builder.add(input_offset, constant(4 * first))

            of_rows = [partial(load, builder.add(address, at_inputs)) for address in rows_at]
            of_weights = [partial(load_weights, builder.add(address, at_weights)) for address in weights_at]
            # The fewer stay in registers while the others pass, or there are too few registers for the sums.
            streamed, held = (of_weights, of_rows) if rows <= _STREAMS else (of_rows, of_weights)
            kept = [read() for read in held]
            for s, read in enumerate(streamed):
                passing = read()
                for h, other in enumerate(kept):
                    place = (h, s) if rows <= _STREAMS else (s, h)
                    values[place] = builder.call(fused, [other, passing, values[place]])
        following = builder.add(k, constant(line))
        k.add_incoming(following, loop)
        for place, phi in running.items():
            phi.add_incoming(values[place], loop)
        builder.cbranch(builder.icmp_signed("<", following, whole_lines), loop, after)

        builder.position_at_end(after)
        for r, c in places:
            added = builder.phi(vector)
            added.add_incoming(zeros, before)
            added.add_incoming(values[r, c], loop)
            values[r, c] = added
        for r, c in places:
            at = builder.add(builder.mul(constant(r), out_row), builder.mul(constant(c), out_step))
            place = builder.inttoptr(builder.add(out, at), real.as_pointer())
            result = builder.call(total, [ir.Constant(real, -0.0), values[r, c]], fastmath=("reassoc",))
            if is_quantised:
                scale_at = builder.add(scales, builder.mul(constant(c), out_step))
                result = builder.fmul(result, load(scale_at, real))
            there = builder.select(add, builder.load(place), ir.Constant(real, 0.0))
            builder.store(builder.fadd(result, there), place)
        return context.get_dummy_value()

    adds: Callable[..., None] = sums
    return adds


_sums_1, _sums_2, _sums_3, _sums_4, _sums_5, _sums_6 = map(_sums, range(1, 7))
_byte_sums_1, _byte_sums_2, _byte_sums_3 = (_sums(rows, is_quantised=True) for rows in range(1, 4))


@compiled(f"void({MATRIX}, {MATRIX}, int64, int64, {MATRIX}, int64, boolean)")
def dot_products(inputs: Any, weights: Any, first: int, last: int, out: Any, column: int, add: bool) -> None:
    """out[r, column + n] = inputs[r] . weights[n] for n in first..last-1, added to what is there if `add`.

    float32 `inputs` [rows, size], `weights` [.., size], `out` [rows, ..], all contiguous. For few rows the
    time goes into reading the weights: they are read once, as four streams.
    """
    stay_a_function()
    rows, size = inputs.shape
    quarter = (last - first) // _STREAMS
    row_bytes, out_bytes = 4 * size, 4 * out.shape[1]
    tiles = (rows + _MOST_ROWS - 1) // _MOST_ROWS
    for n in range(first, first + quarter):
        r, ahead = 0, _AHEAD
        at, step = weights.ctypes.data + n * row_bytes, quarter * row_bytes
        for tile in range(tiles):
            taken = (rows - r + tiles - tile - 1) // (tiles - tile)
            x = inputs.ctypes.data + r * row_bytes
            y = out.ctypes.data + r * out_bytes + 4 * (column + n)
            if taken == 1:
                _sums_1(x, row_bytes, at, step, size, ahead, 0, y, out_bytes, 4 * quarter, add)
            elif taken == 2:
                _sums_2(x, row_bytes, at, step, size, ahead, 0, y, out_bytes, 4 * quarter, add)
            elif taken == 3:
                _sums_3(x, row_bytes, at, step, size, ahead, 0, y, out_bytes, 4 * quarter, add)
            elif taken == 4:
                _sums_4(x, row_bytes, at, step, size, ahead, 0, y, out_bytes, 4 * quarter, add)
            elif taken == 5:
                _sums_5(x, row_bytes, at, step, size, ahead, 0, y, out_bytes, 4 * quarter, add)
            else:
                _sums_6(x, row_bytes, at, step, size, ahead, 0, y, out_bytes, 4 * quarter, add)
            r, ahead = r + taken, 0
    for n in range(first, last):
        w = weights[n]
        # What follows the last whole line of a row; of the last few rows all.
        begin = size // _LINE * _LINE if n < first + _STREAMS * quarter else 0
        if begin < size:
            for r in range(rows):
                x_row = inputs[r]
                total = FLOAT(0)
                for k in range(begin, size):
                    total += x_row[k] * w[k]
                out[r, column + n] = total + (out[r, column + n] if add or begin > 0 else FLOAT(0))


@compiled(f"void({MATRIX}, int64, int64, int64, int64, {MATRIX}, int64, boolean)")
def quantised_products(
    inputs: Any, numbers: int, scales: int, first: int, last: int, out: Any, column: int, add: bool
) -> None:
    """`dot_products` with weights scales[n] * numbers[n], whose int8 and float32 stand at these addresses."""
    stay_a_function()
    rows, size = inputs.shape
    quarter = (last - first) // _STREAMS
    row_bytes, out_bytes = 4 * size, 4 * out.shape[1]
    tiles = (rows + _MOST_ROWS_BY_BYTES - 1) // _MOST_ROWS_BY_BYTES
    for n in range(first, first + quarter):
        r, ahead = 0, _AHEAD
        at, step, scale = numbers + n * size, quarter * size, scales + 4 * n
        for tile in range(tiles):
            taken = (rows - r + tiles - tile - 1) // (tiles - tile)
            x = inputs.ctypes.data + r * row_bytes
            y = out.ctypes.data + r * out_bytes + 4 * (column + n)
            if taken == 1:
                _byte_sums_1(x, row_bytes, at, step, size, ahead, scale, y, out_bytes, 4 * quarter, add)
            elif taken == 2:
                _byte_sums_2(x, row_bytes, at, step, size, ahead, scale, y, out_bytes, 4 * quarter, add)
            else:
                _byte_sums_3(x, row_bytes, at, step, size, ahead, scale, y, out_bytes, 4 * quarter, add)
            r, ahead = r + taken, 0
    all_scales = array_at(scales, (last,))
    for n in range(first, last):
        begin = size // _LINE_OF_BYTES * _LINE_OF_BYTES if n < first + _STREAMS * quarter else 0
        if begin < size:
            w = bytes_at(numbers + n * size, (size,))
            for r in range(rows):
                x_row = inputs[r]
                total = FLOAT(0)
                for k in range(begin, size):
                    total += x_row[k] * FLOAT(w[k])
                there = out[r, column + n] if add or begin > 0 else FLOAT(0)
                out[r, column + n] = total * all_scales[n] + there
