"""Attention of new rows with their rotation and their append: Triton's kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from speculative_eft.kernels import rotated_attention

pytest.importorskip("triton", reason="triton is not installed")
from speculative_eft.kernels.gpu.rotated_attention import rotated_tile
from speculative_eft.kernels.gpu.tile import zeros_kept

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCES = {FP32: 1e-5, FP16: 2e-3, BF16: 1.6e-2}
"""Of numbers of about 1: a unit in the last place of the dtype, or two."""


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Case:
    """Inputs over a cache with one slot more than there are sequences."""

    def __init__(
        self, lengths: list[int], new: int, shared: int, kv_heads: int, dim: int, dtype: torch.dtype
    ) -> None:
        batch, heads = len(lengths), shared * kv_heads
        self.capacity = max(lengths) + new + 5
        fused = random(batch, new, heads + 2 * kv_heads, dim, dtype=dtype, seed=0)
        self.rows = fused.split([heads, kv_heads, kv_heads], dim=2)
        angles = random(self.capacity, dim, dtype=FP32, seed=1)
        self.rotations = torch.cat((angles.cos(), angles.sin()), -1).to(dtype)
        self.cache = random(2, batch + 1, kv_heads, self.capacity, dim, dtype=dtype, seed=2)
        self.lengths = torch.tensor(lengths)

    def run(
        self,
        monkeypatch: pytest.MonkeyPatch,
        backend: str,
        window: int | None = None,
        span: int = 0,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The result and the cache after it."""
        monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", backend)
        cache = self.cache.clone()
        result = rotated_attention(
            *self.rows, self.rotations, cache[0], cache[1], self.lengths, span or self.capacity, window,
            scale, softcap,
        )  # fmt: skip
        return result, cache


@pytest.mark.parametrize(
    ("new", "shared", "kv_heads", "dim", "dtype", "window"),
    [
        (1, 4, 2, 16, FP32, None),
        (3, 2, 1, 80, FP32, 70),
        (5, 7, 1, 64, FP32, 3),
        (1, 4, 1, 64, BF16, None),
        (1, 3, 1, 128, FP16, 200),
        (5, 4, 1, 64, BF16, None),
        (16, 5, 1, 128, BF16, 130),
        (2, 1, 1, 256, BF16, None),
        (1, 1, 2, 96, FP16, None),
        (4, 3, 1, 80, BF16, None),
        (2, 2, 1, 16, BF16, 40),
    ],
)
def test_equals_the_reference(
    new: int,
    shared: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    split = rotated_tile(new * shared, dim, dtype.itemsize).split
    # Nothing cached, new rows on both sides of a border, all of a split, and more than one.
    case = Case([0, split - new // 2, 2 * split, 5], new, shared, kv_heads, dim, dtype)
    expected, kept = case.run(monkeypatch, "torch", window)
    found, stored = case.run(monkeypatch, "triton", window)
    bound = TOLERANCES[dtype]
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)
    torch.testing.assert_close(stored, kept, rtol=bound, atol=bound)


@pytest.mark.parametrize(("dtype", "softcap"), [(FP32, 0.8), (BF16, 0.8), (FP32, None)])
def test_scores_may_have_a_scale_and_a_soft_cap(
    dtype: torch.dtype, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case([140, 3], 3, 2, 1, 64, dtype)
    expected, _ = case.run(monkeypatch, "torch", scale=0.3, softcap=softcap)
    found, _ = case.run(monkeypatch, "triton", scale=0.3, softcap=softcap)
    plain, _ = case.run(monkeypatch, "triton")
    bound = TOLERANCES[dtype]
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)
    assert (found - plain).abs().max() > 10 * bound


@pytest.mark.parametrize(("dtype", "window"), [(FP32, None), (BF16, 150)])
def test_a_sequence_gets_the_same_bits_alone(
    dtype: torch.dtype, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [300, 5, 126, 0]
    case = Case(lengths, 3, 2, 2, 64, dtype)
    together, stored = case.run(monkeypatch, "triton", window)
    everything = case.rows, case.cache
    for index, length in enumerate(lengths):
        one = slice(index, index + 1)
        case.rows, case.cache = tuple(part[one] for part in everything[0]), everything[1][:, one]
        case.lengths = torch.tensor([length])
        alone, own = case.run(monkeypatch, "triton", window, span=length + 3 + index)
        assert torch.equal(alone[0], together[index])
        assert torch.equal(own[:, 0], stored[:, index])
    assert not zeros_kept("arrivals", together.device, 1).any()


def test_many_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than one program merges."""
    case = Case([2100, 1, 2047], 2, 2, 1, 16, FP32)
    expected, _ = case.run(monkeypatch, "torch")
    found, _ = case.run(monkeypatch, "triton")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # Of the last bundle and the one before.
    expected, _ = case.run(monkeypatch, "torch", 400, span=2104)
    found, _ = case.run(monkeypatch, "triton", 400, span=2104)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not zeros_kept("arrivals", found.device, 1).any()


def test_what_no_row_sees_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([140, 3, 260], 3, 4, 1, 80, FP32)
    expected, _ = case.run(monkeypatch, "triton")
    for index, length in enumerate(case.lengths.tolist()):
        case.cache[:, index, :, length:] = float("nan")
    found, _ = case.run(monkeypatch, "triton")
    assert torch.equal(found, expected)
    assert found.isfinite().all()


def test_rows_beyond_the_capacity_do_not_leave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([60, 20], 4, 2, 1, 16, FP32)
    expected, kept = case.run(monkeypatch, "triton")
    case.lengths[0] = case.capacity - 2
    found, stored = case.run(monkeypatch, "triton")
    assert torch.equal(found[1], expected[1])
    assert torch.equal(stored[:, 1:], kept[:, 1:])
    assert torch.equal(stored[:, 0, :, : case.capacity - 2], case.cache[:, 0, :, : case.capacity - 2])
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("new", "dim", "message"),
    [(17, 16, "1 to 16 rows a sequence, not 17"), (1, 258, "at most 256"), (1, 15, "an even number")],
)
def test_shapes_that_cannot_be_run_are_refused(new: int, dim: int, message: str) -> None:
    case = Case([3], new, 1, 1, dim, FP32)
    before = case.cache.clone()
    with pytest.raises(ValueError, match=message):
        rotated_attention(*case.rows, case.rotations, *case.cache, case.lengths, case.capacity)
    assert torch.equal(case.cache, before)
