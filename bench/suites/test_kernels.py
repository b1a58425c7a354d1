"""Kernels of a round on a CPU: `make bench`."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from speculative_eft.kernels import (
    AcceptanceRule,
    Coefficients,
    NoiseKey,
    Sampling,
    Stream,
    derive_seeds,
    draft_step,
    verify,
)

DRAFTED = 4


def coefficients(batch: int) -> Coefficients:
    """Of alpha = beta = 1, for a draft by the tuned model alone."""
    ones = torch.ones(batch)
    return Coefficients(ones[:, None], ones, ones[:, None], None, some_weight_is_zero=False)


def noise(batch: int) -> NoiseKey:
    zeros = torch.zeros(batch, dtype=torch.int64)
    return NoiseKey(derive_seeds(0, batch), zeros, zeros)


def logits(batch: int, vocab_size: int) -> list[torch.Tensor]:
    """Of the large base, the tuned model and the small base: [batch, drafted + 1, vocabulary] each."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(batch, DRAFTED + 1, vocab_size, generator=generator)
    near = [base + 0.3 * torch.randn(base.shape, generator=generator) for _ in range(2)]
    return [*near, base]


@pytest.mark.parametrize("rule", ["block", "token", "shared_seed"])
@pytest.mark.parametrize("vocab_size", [4096, 32000])
@pytest.mark.parametrize("batch", [1, 8])
def test_verify(benchmark: BenchmarkFixture, batch: int, vocab_size: int, rule: AcceptanceRule) -> None:
    large, tuned, base = logits(batch, vocab_size)
    mix, sampling, key = coefficients(batch), Sampling(torch.ones(batch)), noise(batch)
    tokens = torch.randint(vocab_size, (batch, DRAFTED), generator=torch.Generator().manual_seed(1))
    lens = torch.full((batch,), DRAFTED)
    benchmark(
        verify,
        large, [tuned], base, tokens, lens, mix, sampling, sampling, key, rule, vocab_size,
        statistics=False,
    )  # fmt: skip


@pytest.mark.parametrize("vocab_size", [4096, 32000])
@pytest.mark.parametrize("batch", [1, 8])
def test_draft_step(benchmark: BenchmarkFixture, batch: int, vocab_size: int) -> None:
    _, tuned, _ = logits(batch, vocab_size)
    sampling, key = Sampling(torch.ones(batch)), noise(batch)
    benchmark(
        draft_step, [tuned[:, 0]], None, coefficients(batch), sampling, key, Stream.DRAFT, 0, vocab_size
    )
