"""Decoding attention and its append: the Triton kernels and the reference against softmax in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from speculative_eft.kernels import append, attention

pytest.importorskip("triton", reason="triton is not installed")
from speculative_eft.kernels.gpu.attention import attention_tile
from speculative_eft.kernels.gpu.tile import zeros_kept

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Sums of float32 products, some hundreds of them, and tanh: a wrong mask or position shows at 1e-2 and more.
ROUNDING = 5e-6


@pytest.fixture(params=["torch", "triton"])
def compared_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", request.param)
    return str(request.param)


@pytest.fixture
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "triton")


def random(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def rounded(number: float) -> float:
    return float(torch.tensor(number).to(BF16))


def plain_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: list[int],
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition row by row in float64, and the same with the values' magnitudes: a bound of rounding."""
    batch, count, heads, dim = query.shape
    query, keys, values = (tensor.double().cpu() for tensor in (query, keys, values))
    shared = heads // keys.shape[1]
    result, magnitude = torch.empty_like(query), torch.empty_like(query)
    for b in range(batch):
        for j in range(count):
            end = min(lengths[b] + j + 1, keys.shape[2])
            begin = 0 if window is None else max(end - window, 0)
            for h in range(heads):
                scores = keys[b, h // shared, begin:end] @ query[b, j, h]
                if alibi_slopes is not None:
                    slope = float(alibi_slopes[h])
                    for s in range(begin, end):
                        bias = slope * s
                        scores[s - begin] += (
                            rounded(slope * rounded(s)) if alibi_slopes.dtype == BF16 else bias
                        )
                scores = scores * (dim**-0.5 if scale is None else scale)
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = scores.softmax(0)
                seen = values[b, h // shared, begin:end]
                result[b, j, h] = weights @ seen
                magnitude[b, j, h] = weights @ seen.abs()
    return result, magnitude


def assert_near(result: Tensor, expected: Tensor, magnitude: Tensor, dtype: torch.dtype) -> None:
    """Weights and results are rounded to `dtype`, each by half a unit in the last place at most."""
    half_unit = torch.finfo(dtype).eps / 2
    bound = half_unit * (magnitude + expected.abs()) * 1.01 + ROUNDING
    assert result.dtype == dtype
    assert ((result.double().cpu() - expected).abs() <= bound).all()


SLOPES = torch.tensor([0.7, 0.31, 0.05, 0.001])

# dim, new rows, heads that share keys, heads with keys, dtype, options
CASES: list[tuple[int, int, int, int, torch.dtype, dict[str, Any]]] = [
    (64, 1, 1, 2, FP32, {}),
    (64, 3, 4, 2, BF16, {"window": 70}),
    (80, 3, 4, 1, FP32, {"scale": 0.3}),
    (80, 16, 1, 1, FP16, {"window": 1}),
    (96, 1, 7, 1, FP16, {}),
    (96, 3, 4, 1, BF16, {"softcap": 2.0}),
    (128, 1, 4, 1, BF16, {}),
    (128, 3, 7, 1, FP32, {"window": 300}),
    (128, 16, 4, 1, BF16, {}),
    (128, 16, 7, 1, FP16, {}),
    (256, 3, 1, 1, BF16, {"softcap": 1.5, "window": 100, "scale": 0.1}),
    (256, 1, 4, 1, FP32, {"softcap": 1.5}),
    (64, 3, 1, 4, FP32, {"alibi_slopes": SLOPES}),
    (64, 3, 4, 1, FP32, {"alibi_slopes": SLOPES.to(BF16)}),
    (64, 1, 4, 1, BF16, {"alibi_slopes": SLOPES.to(BF16).repeat_interleave(2)[::2]}),
    (8, 3, 2, 1, FP32, {}),
]


@pytest.mark.usefixtures("compared_backend")
@pytest.mark.parametrize(("dim", "count", "shared", "kv_heads", "dtype", "options"), CASES)
def test_equals_softmax_in_double_precision(
    dim: int, count: int, shared: int, kv_heads: int, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    split = attention_tile(shared * count, dim, dtype.itemsize).split
    lengths = [0, split - 2, 2 * split - count // 2]
    span = max(lengths) + count + 3
    query = random(len(lengths), count, kv_heads * shared, dim, dtype=dtype)
    keys, values = random(2, len(lengths), kv_heads, span, dim, dtype=dtype, seed=1)
    options = {
        name: value.to(query.device) if isinstance(value, Tensor) else value
        for name, value in options.items()
    }
    result = attention(query, keys, values, torch.tensor(lengths), **options)
    assert_near(result, *plain_attention(query, keys, values, lengths, **options), dtype)


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize(("dtype", "window"), [(FP32, None), (BF16, None), (FP16, 150)])
def test_a_sequence_gets_the_same_bits_alone(dtype: torch.dtype, window: int | None) -> None:
    lengths = [300, 5, 126, 0]
    query = random(4, 3, 4, 64, dtype=dtype)
    keys, values = random(2, 4, 2, 400, 64, dtype=dtype, seed=1)
    together = attention(query, keys, values, torch.tensor(lengths), window=window)
    for index, length in enumerate(lengths):
        one = slice(index, index + 1)
        own = [tensor[one, :, : length + 3 + index].clone() for tensor in (keys, values)]
        alone = attention(query[one], *own, torch.tensor([length]), window=window)
        assert torch.equal(alone[0], together[index])
    assert not zeros_kept("arrivals", query.device, 1).any()


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("window", [None, 400])
def test_many_splits(window: int | None) -> None:
    """More of them than one program merges, in one bundle or two, from the first split or a later one."""
    lengths, count = [1150, 1021, 900], 3
    query = random(3, count, 2, 16)
    keys, values = random(2, 3, 1, 1160, 16, seed=1)
    result = attention(query, keys, values, torch.tensor(lengths), window=window)
    assert_near(result, *plain_attention(query, keys, values, lengths, window=window), FP32)
    alone = attention(query[1:2], keys[1:2], values[1:2], torch.tensor(lengths[1:2]), window=window)
    assert torch.equal(alone[0], result[1])
    assert not zeros_kept("arrivals", query.device, 1).any()


@pytest.mark.usefixtures("_triton")
def test_what_no_row_sees_is_not_read() -> None:
    lengths, count = [140, 3, 260], 3
    query = random(3, count, 4, 80)
    keys, values = random(2, 3, 1, 300, 80, seed=1)
    expected = attention(query, keys, values, torch.tensor(lengths))
    for index, length in enumerate(lengths):
        for tensor in (keys, values):
            tensor[index, :, length + count :] = float("nan")
    assert torch.equal(attention(query, keys, values, torch.tensor(lengths)), expected)
    assert expected.isfinite().all()


@pytest.mark.usefixtures("compared_backend")
def test_rows_beyond_the_span_see_all_of_it() -> None:
    lengths = torch.tensor([150, 148])
    query = random(2, 4, 2, 64)
    keys, values = random(2, 2, 1, 150, 64, seed=1)
    result = attention(query, keys, values, lengths)
    assert_near(result, *plain_attention(query, keys, values, lengths.tolist()), FP32)


@pytest.mark.usefixtures("compared_backend")
def test_strides() -> None:
    lengths = torch.tensor([20, 131])
    fused = random(2, 3, 5, 64)
    cache = random(2, 3, 2, 256, 64, seed=1)
    keys, values = cache[0, :2, :, :140], cache[1, :2, :, :140]
    expected = attention(fused[:, :, :4].contiguous(), keys.contiguous(), values.contiguous(), lengths)
    for query in (fused[:, :, :4], fused[:, :, :4].transpose(1, 2).contiguous().transpose(1, 2)):
        assert torch.equal(attention(query, keys, values, lengths), expected)
    room = torch.zeros(2, 4, 3, 70)
    out = room[..., 2:66].transpose(1, 2)
    assert attention(fused[:, :, :4], keys, values, lengths, out=out) is out
    assert torch.equal(out, expected)
    assert not room[..., :2].any()
    assert not room[..., 66:].any()


@pytest.mark.usefixtures("compared_backend")
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("count", "heads", "dim"), [(1, 2, 64), (5, 3, 80), (40, 1, 8)])
def test_append(count: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    capacity, lengths = 64, [0, 17, 62]
    fused = random(3, count, 2 * heads, dim, dtype=dtype)
    keys, values = fused[:, :, :heads], fused[:, :, heads:]
    cached_keys, cached_values = random(2, 4, heads, capacity, dim, dtype=dtype, seed=1)
    before = cached_keys.clone(), cached_values.clone()
    append(keys, values, cached_keys, cached_values, torch.tensor(lengths))
    for new, old, cached in zip((keys, values), before, (cached_keys, cached_values), strict=True):
        for b, length in enumerate(lengths):
            # What lies beyond the capacity ends up in the last position, of each number one or another.
            end = min(length + count, capacity - 1)
            old[b, :, length:end] = new[b, : end - length].transpose(0, 1)
            if length + count >= capacity:
                last = cached[b, :, capacity - 1]
                assert (last == new[b, end - length :]).any(dim=0).all()
                old[b, :, capacity - 1] = last
        assert torch.equal(cached, old)


def test_shapes_that_cannot_be_run_are_refused() -> None:
    keys = values = torch.zeros(2, 2, 32, 64)
    lengths = torch.tensor([3, 4])
    with pytest.raises(ValueError, match="query must have 1 to 16 rows a sequence, not 17"):
        attention(torch.zeros(2, 17, 4, 64), keys, values, lengths)
    with pytest.raises(ValueError, match=r"keys and values must be .* not \[2, 2, 32, 64\]"):
        attention(torch.zeros(2, 1, 3, 64), keys, values, lengths)
    with pytest.raises(ValueError, match="heads of at most 256 numbers, not 512"):
        attention(torch.zeros(2, 1, 4, 512), keys, values, lengths)
    with pytest.raises(ValueError, match=r"query is torch\.bfloat16, keys torch\.float32"):
        attention(torch.zeros(2, 1, 4, 64, dtype=BF16), keys, values, lengths)
