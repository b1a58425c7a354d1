"""Numbers of 16 bits on a CPU are read and rounded as torch does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ..device import skip_unless_compiled

numba = pytest.importorskip("numba", reason="the extra [cpu] is not installed")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(scope="module")
def calls() -> Any:
    from speculative_eft.kernels.cpu import elements
    from speculative_eft.kernels.cpu.jit import VECTOR

    @numba.njit(f"void(int64, int64, {VECTOR})")  # type: ignore[untyped-decorator]
    def read(address: int, element: int, out: Any) -> None:
        elements.read_floats(address, element, out)

    @numba.njit(f"void({VECTOR}, int64, int64)")  # type: ignore[untyped-decorator]
    def put(values: Any, address: int, element: int) -> None:
        elements.put_floats(values, address, element)

    @numba.njit(f"{VECTOR}(int64, int64, int64)")  # type: ignore[untyped-decorator]
    def at(address: int, element: int, size: int) -> Any:
        return elements.floats_at(address, element, size)

    return read, put, at


def numbers(dtype: torch.dtype) -> Tensor:
    """Every one of 16 bits, or as many of 32 with any bits."""
    if dtype == torch.float32:
        bits = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0))
        return bits.to(torch.int32).view(dtype)
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@DTYPES
def test_numbers_are_read_as_they_are(dtype: torch.dtype, calls: Any) -> None:
    skip_unless_compiled(dtype)
    from speculative_eft.kernels.cpu.elements import ELEMENTS

    read, _, at = calls
    all_numbers = numbers(dtype)
    address, element, size = all_numbers.data_ptr(), ELEMENTS[dtype], len(all_numbers)
    out = torch.zeros(size)
    read(address, element, out.numpy())
    for found in (out, torch.from_numpy(at(address, element, size))):
        torch.testing.assert_close(found, all_numbers.float(), rtol=0, atol=0, equal_nan=True)


@DTYPES
def test_numbers_are_rounded_to_the_nearest(dtype: torch.dtype, calls: Any) -> None:
    skip_unless_compiled(dtype)
    from speculative_eft.kernels.cpu.elements import ELEMENTS

    _, put, _ = calls
    exact = numbers(torch.bfloat16).float()
    # Those of any bits, and such as lie in the middle between two, or next to it.
    halves = torch.cat(
        [
            (numbers(kind).float().view(torch.int32) + step).view(torch.float32)
            for kind in (torch.bfloat16, torch.float16)
            for step in (0x7FFF, 0x8000, 0x8001, 0x1000)
        ]
    )
    wide = torch.cat((numbers(torch.float32), exact, halves)).contiguous()
    wide = torch.where(wide.isnan(), torch.nan, wide)
    out = torch.zeros(len(wide), dtype=dtype)
    put(wide.numpy(), out.data_ptr(), ELEMENTS[dtype])
    torch.testing.assert_close(out, wide.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_number_stays_none(dtype: torch.dtype, calls: Any) -> None:
    skip_unless_compiled(dtype)
    from speculative_eft.kernels.cpu.elements import ELEMENTS

    _, put, _ = calls
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, -0x7FFFFF], dtype=torch.int32)
    out = torch.zeros(4, dtype=dtype)
    put(bits.view(torch.float32).numpy(), out.data_ptr(), ELEMENTS[dtype])
    assert out.isnan().all()
