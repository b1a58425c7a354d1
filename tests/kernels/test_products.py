"""Products of a few rows on a CPU: the sums, and that a row's do not depend on who stands beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ..device import skip_unless_compiled

numba = pytest.importorskip("numba", reason="the extra [cpu] is not installed")


@pytest.fixture(scope="module")
def dot_products() -> Callable[..., None]:
    from speculative_eft.kernels.cpu.jit import MATRIX
    from speculative_eft.kernels.cpu.products import dot_products as products

    # What compiled functions call has no entry from Python.
    @numba.njit(f"void({MATRIX}, int64, int64, int64, int64, {MATRIX}, int64, boolean)")  # type: ignore[untyped-decorator]
    def call(
        inputs: Any, weights: int, element: int, first: int, last: int, out: Any, column: int, add: bool
    ) -> None:
        products(inputs, weights, element, first, last, out, column, add)

    def entry(inputs: Any, weights: Tensor, first: int, last: int, out: Any, column: int, add: bool) -> None:
        from speculative_eft.kernels.cpu.elements import ELEMENTS

        skip_unless_compiled(weights.dtype)
        call(inputs, weights.data_ptr(), ELEMENTS[weights.dtype], first, last, out, column, add)

    return entry


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def random(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 64, 100])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 9, 13])
@pytest.mark.parametrize(("first", "last"), [(0, 64), (3, 70), (5, 7), (4, 4)])
@pytest.mark.parametrize("add", [False, True])
@DTYPES
def test_sums(
    rows: int, size: int, first: int, last: int, add: bool, dtype: torch.dtype, dot_products: Any
) -> None:
    from speculative_eft.kernels.cpu.products import MULTIPLIES_PAIRS

    weights = torch.from_numpy(random(80, size)).to(dtype)
    inputs, out = random(rows, size), random(rows, 100)
    if dtype == torch.bfloat16 and MULTIPLIES_PAIRS:
        # What they are rounded to there, so that all that remains are sums of float32.
        inputs = torch.from_numpy(inputs).to(dtype).float().numpy()
    expected = out.copy()
    own = expected[:, 10 + first : 10 + last]
    own[:] = inputs.astype(np.float64) @ weights[first:last].T.double().numpy() + (own if add else 0)
    dot_products(inputs, weights, first, last, out, 10, add)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_rows_are_rounded_for_products_of_pairs_alone(dot_products: Any) -> None:
    from speculative_eft.kernels.cpu.products import MULTIPLIES_PAIRS

    inputs, out = random(5, 64), np.zeros((5, 64), np.float32)
    weights = torch.from_numpy(random(64, 64)).to(torch.bfloat16)
    dot_products(inputs, weights, 0, 64, out, 0, False)
    error = np.abs(out - inputs.astype(np.float64) @ weights.T.double().numpy()).max()
    assert 1e-3 < error < 0.1 if MULTIPLIES_PAIRS else error < 1e-5


@pytest.fixture(scope="module")
def quantised_products() -> Callable[..., None]:
    from speculative_eft.kernels.cpu.jit import MATRIX
    from speculative_eft.kernels.cpu.products import quantised_products as products

    @numba.njit(f"void({MATRIX}, int64, int64, int64, int64, {MATRIX}, int64, boolean)")  # type: ignore[untyped-decorator]
    def call(
        inputs: Any, numbers: int, scales: int, first: int, last: int, out: Any, column: int, add: bool
    ) -> None:
        products(inputs, numbers, scales, first, last, out, column, add)

    entry: Callable[..., None] = call
    return entry


@pytest.mark.parametrize("size", [1, 15, 63, 64, 65, 200])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("first", "last"), [(0, 64), (3, 70), (5, 7), (4, 4)])
@pytest.mark.parametrize("add", [False, True])
def test_sums_of_bytes(
    rows: int, size: int, first: int, last: int, add: bool, quantised_products: Any
) -> None:
    inputs, out, scales = random(rows, size), random(rows, 100), random(80)
    numbers = np.random.default_rng(size).integers(-127, 128, (80, size)).astype(np.int8)
    expected = out.copy()
    own = expected[:, 10 + first : 10 + last]
    weights = (numbers * scales[:, None])[first:last].T.astype(np.float64)
    own[:] = inputs.astype(np.float64) @ weights + (own if add else 0)
    quantised_products(inputs, numbers.ctypes.data, scales.ctypes.data, first, last, out, 10, add)
    # Each input is off by half a step at most.
    step = np.abs(inputs).max(axis=1, keepdims=True) / min(2**15 - 1, (2**31 - 1) // (127 * size))
    bound = step / 2 * np.abs(weights).sum(axis=0, initial=0)
    assert (np.abs(out - expected)[:, 10 + first : 10 + last] <= 1.01 * bound + 1e-3).all()
    np.testing.assert_array_equal(
        np.delete(out, np.s_[10 + first : 10 + last], axis=1),
        np.delete(expected, np.s_[10 + first : 10 + last], axis=1),
    )


@pytest.mark.parametrize("size", [1024, 16_384])
def test_the_largest_sums_of_bytes_do_not_overflow(size: int, quantised_products: Any) -> None:
    inputs, numbers = np.ones((1, size), np.float32), np.full((4, size), 127, np.int8)
    scales, out = np.ones(4, np.float32), np.zeros((1, 4), np.float32)
    quantised_products(inputs, numbers.ctypes.data, scales.ctypes.data, 0, 4, out, 0, False)
    np.testing.assert_allclose(out, 127 * size, rtol=1e-6)


def test_a_row_of_zeros_has_sums_of_zero(quantised_products: Any) -> None:
    inputs, numbers = np.zeros((2, 70), np.float32), np.full((4, 70), 127, np.int8)
    scales, out = np.ones(4, np.float32), np.ones((2, 4), np.float32)
    quantised_products(inputs, numbers.ctypes.data, scales.ctypes.data, 0, 4, out, 0, False)
    assert (out == 0).all()


def test_a_row_of_bytes_has_the_same_sums_beside_any_others(quantised_products: Any) -> None:
    inputs, scales = random(5, 200), random(64)
    numbers = np.random.default_rng(0).integers(-127, 128, (64, 200)).astype(np.int8)
    together, alone = np.zeros((5, 64), np.float32), np.zeros((1, 64), np.float32)
    addresses = numbers.ctypes.data, scales.ctypes.data
    quantised_products(inputs, *addresses, 0, 64, together, 0, False)
    for row in range(5):
        quantised_products(inputs[row : row + 1], *addresses, 0, 64, alone, 0, False)
        assert (alone[0] == together[row]).all()


@pytest.mark.parametrize("size", [64, 100])
@DTYPES
def test_a_row_has_the_same_sums_beside_any_others(size: int, dtype: torch.dtype, dot_products: Any) -> None:
    inputs, weights = random(11, size), torch.from_numpy(random(64, size)).to(dtype)
    together, alone = np.zeros((11, 64), np.float32), np.zeros((1, 64), np.float32)
    dot_products(inputs, weights, 0, 64, together, 0, False)
    for row in range(11):
        dot_products(inputs[row : row + 1], weights, 0, 64, alone, 0, False)
        assert (alone[0] == together[row]).all()


def test_what_was_compiled_is_kept_until_any_source_changes() -> None:
    from speculative_eft.kernels.cpu import noise, verify

    for function in (noise.race_of_logits, verify.verify_rows):
        stamp = str(function._cache._cache_file._source_stamp)  # type: ignore[attr-defined]
        assert all(name in stamp for name in ("noise.py", "verify.py", "jit.py", "memory.py"))
