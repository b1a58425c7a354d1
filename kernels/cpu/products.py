"""Products of a few rows with a matrix, which take the time that reading the matrix takes."""

from __future__ import annotations

from typing import Any

from .compile import FLOAT, MATRIX, compiled, stay_a_function

__all__ = ["dot_products"]

_TILE = f"void({MATRIX}, {MATRIX}, int64, int64, int64, {MATRIX}, int64, boolean)"


@compiled(f"void({MATRIX}, int64, int64, int64, float32, float32, float32, float32, boolean)")
def _put(out: Any, r: int, n: int, step: int, a: float, b: float, c: float, d: float, add: bool) -> None:
    if add:
        out[r, n] += a
        out[r, n + step] += b
        out[r, n + 2 * step] += c
        out[r, n + 3 * step] += d
    else:
        out[r, n] = a
        out[r, n + step] = b
        out[r, n + 2 * step] = c
        out[r, n + 3 * step] = d


# A dozen sums at once hide how long one addition takes. The inputs stay in registers while the weights go
# by: in the other order the sums did not fit in those of AVX2, at half the speed.


@compiled(_TILE)
def _tile_1(inputs: Any, weights: Any, r: int, n: int, step: int, out: Any, column: int, add: bool) -> None:
    x = inputs[r]
    w_a, w_b, w_c, w_d = weights[n], weights[n + step], weights[n + 2 * step], weights[n + 3 * step]
    a = b = c = d = FLOAT(0)
    for k in range(x.shape[0]):
        a += x[k] * w_a[k]
        b += x[k] * w_b[k]
        c += x[k] * w_c[k]
        d += x[k] * w_d[k]
    _put(out, r, column + n, step, a, b, c, d, add)


@compiled(_TILE)
def _tile_2(inputs: Any, weights: Any, r: int, n: int, step: int, out: Any, column: int, add: bool) -> None:
    x_row, y_row = inputs[r], inputs[r + 1]
    a, b, c, d = weights[n], weights[n + step], weights[n + 2 * step], weights[n + 3 * step]
    x_a = x_b = x_c = x_d = FLOAT(0)
    y_a = y_b = y_c = y_d = FLOAT(0)
    for k in range(x_row.shape[0]):
        x, y = x_row[k], y_row[k]
        x_a += x * a[k]
        y_a += y * a[k]
        x_b += x * b[k]
        y_b += y * b[k]
        x_c += x * c[k]
        y_c += y * c[k]
        x_d += x * d[k]
        y_d += y * d[k]
    _put(out, r, column + n, step, x_a, x_b, x_c, x_d, add)
    _put(out, r + 1, column + n, step, y_a, y_b, y_c, y_d, add)


@compiled(_TILE)
def _tile_3(inputs: Any, weights: Any, r: int, n: int, step: int, out: Any, column: int, add: bool) -> None:
    x_row, y_row, z_row = inputs[r], inputs[r + 1], inputs[r + 2]
    a, b, c, d = weights[n], weights[n + step], weights[n + 2 * step], weights[n + 3 * step]
    x_a = x_b = x_c = x_d = FLOAT(0)
    y_a = y_b = y_c = y_d = FLOAT(0)
    z_a = z_b = z_c = z_d = FLOAT(0)
    for k in range(x_row.shape[0]):
        x, y, z = x_row[k], y_row[k], z_row[k]
        x_a += x * a[k]
        y_a += y * a[k]
        z_a += z * a[k]
        x_b += x * b[k]
        y_b += y * b[k]
        z_b += z * b[k]
        x_c += x * c[k]
        y_c += y * c[k]
        z_c += z * c[k]
        x_d += x * d[k]
        y_d += y * d[k]
        z_d += z * d[k]
    _put(out, r, column + n, step, x_a, x_b, x_c, x_d, add)
    _put(out, r + 1, column + n, step, y_a, y_b, y_c, y_d, add)
    _put(out, r + 2, column + n, step, z_a, z_b, z_c, z_d, add)


@compiled(f"void({MATRIX}, {MATRIX}, int64, int64, {MATRIX}, int64, boolean)")
def dot_products(inputs: Any, weights: Any, first: int, last: int, out: Any, column: int, add: bool) -> None:
    """out[r, column + n] = inputs[r] . weights[n] for n in first..last-1, added to what is there if `add`.

    float32 `inputs` [rows, size], `weights` [.., size], `out` [rows, ..], all contiguous. For few rows the
    time goes into reading the weights: they are read once, as four streams that the processor can foresee.
    """
    stay_a_function()
    rows = inputs.shape[0]
    quarter = (last - first) // 4
    for n in range(first, first + quarter):
        r = 0
        while r < rows:
            left = rows - r
            if left == 1:
                _tile_1(inputs, weights, r, n, quarter, out, column, add)
                r += 1
            elif left == 2 or left == 4:
                _tile_2(inputs, weights, r, n, quarter, out, column, add)
                r += 2
            else:
                _tile_3(inputs, weights, r, n, quarter, out, column, add)
                r += 3
    for n in range(first + 4 * quarter, last):
        w = weights[n]
        for r in range(rows):
            x = inputs[r]
            total = FLOAT(0)
            for k in range(x.shape[0]):
                total += x[k] * w[k]
            out[r, column + n] = total + (out[r, column + n] if add else FLOAT(0))
