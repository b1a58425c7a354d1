"""Random and extreme arguments of the operations, and what a compiled kernel's results may differ by."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from speculative_eft.kernels import (
    AcceptanceRule,
    Coefficients,
    NoiseKey,
    Sampling,
    Stream,
    Verdict,
    derive_seeds,
    draft_step,
    verify,
)

from ..conftest import is_spared
from ..device import test_device

VOCABULARIES = [7, 100, 4_096, 8_193, 32_000, 128_256, 151_936]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMPILED = pytest.mark.parametrize("compiled", ["numba", "triton"])
FILTERS: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": torch.tensor([5, 3, 40])},
    "top_p": {"top_p": torch.tensor([0.9, 0.5, 0.6])},
    "min_p": {"min_p": torch.tensor([0.05, 0.2, 1.0])},
    "all": {
        "top_k": torch.tensor([50, 6, 2]),
        "top_p": torch.tensor([0.95, 0.9, 1.0]),
        "min_p": torch.tensor([0.01, 0.0, 0.1]),
    },
}


@dataclasses.dataclass
class Case:
    """The arguments of one verification; models' logits have a column more than the vocabulary."""

    large: Tensor
    tuned: list[Tensor]
    base: Tensor
    draft_tokens: Tensor
    draft_lens: Tensor
    coefficients: Coefficients
    sampling: Sampling
    noise: NoiseKey
    vocab_size: int

    def verify(self, rule: AcceptanceRule) -> Verdict:
        return verify(
            self.large, self.tuned, self.base, self.draft_tokens, self.draft_lens, self.coefficients,
            self.sampling, self.sampling, self.noise, rule, self.vocab_size,
        )  # fmt: skip

    def draft(self, row: int, stream: Stream, chances: Tensor | None = None) -> Tensor:
        return draft_step(
            [logits[:, row] for logits in self.tuned], self.base[:, row], self.coefficients, self.sampling,
            self.noise, stream, row, self.vocab_size, chances=chances,
        )  # fmt: skip


def random_case(
    vocab_size: int, dtype: torch.dtype = torch.float32, experts: int = 1, batch: int = 3
) -> Case:
    generator = torch.Generator().manual_seed(vocab_size)
    drafted = 3
    # Every other row of a larger tensor: rows are not contiguous.
    base = 3 * torch.randn(batch, 2 * (drafted + 1), vocab_size + 1, generator=generator)[:, ::2]
    large = base + 0.7 * torch.randn(base.shape, generator=generator)
    tuned = [base + 0.7 * torch.randn(base.shape, generator=generator) for _ in range(experts)]
    temperature = torch.tensor([1.0, 0.0, 0.7])[:batch]
    alpha = torch.rand(batch, experts, generator=generator)
    noise = NoiseKey(
        derive_seeds(5, batch).to(test_device()),
        torch.tensor([0, 3, 2**31])[:batch],
        torch.tensor([9, 0, 4])[:batch],
    )
    return Case(
        large=large.to(dtype),
        tuned=[logits.to(dtype) for logits in tuned],
        base=base.to(dtype),
        draft_tokens=tuned[0][:, :drafted, :vocab_size].argmax(-1),
        draft_lens=torch.tensor([3, 2, 0])[:batch],
        coefficients=Coefficients(alpha, torch.rand(batch, generator=generator), alpha, 1 - alpha.sum(1)),
        sampling=Sampling(temperature, any_greedy=batch > 1),
        noise=noise,
        vocab_size=vocab_size,
    )


def extreme_case(vocab_size: int) -> Case:
    """-inf, NaN, models without a finite logit, huge logits, and ties."""
    case = random_case(vocab_size)
    case.large[0, 0, 5:60] = -float("inf")
    case.base[0, 1, 3:90] = -float("inf")
    case.tuned[0][0, 1, 50:] = torch.nan
    case.large[0, 2] = -float("inf")
    case.base[1, 0] = -float("inf")
    case.large[2] *= 1e4
    case.large[1, 1] = case.base[1, 1] = 0.0
    case.tuned[0][1, 1] = 2.0
    return case


def draft_from(case: Case) -> Case:
    """The case with tokens that its draft law gives, as verification expects."""
    case.draft_tokens = torch.stack([case.draft(row, Stream.DRAFT) for row in range(3)], dim=1)
    return case


def filtered(case: Case, name: str, conservative: bool) -> Case:
    # Made where tests are collected, before tensors are placed.
    values = {key: value.to(test_device()) for key, value in FILTERS.get(name, {}).items()}
    sampling = dataclasses.replace(case.sampling, **values)
    if sampling.top_k is not None:
        sampling = dataclasses.replace(sampling, top_k=sampling.top_k.clamp(max=case.vocab_size))
    case.sampling = sampling
    if conservative:
        top_p = torch.tensor([0.7, 0.9, 0.4])
        case.coefficients = dataclasses.replace(case.coefficients, conservative_top_p=top_p)
    return draft_from(case)


def assert_same(case: Case, expected: Verdict, verdict: Verdict) -> None:
    assert torch.equal(verdict.accepted_lens, expected.accepted_lens)
    assert torch.equal(verdict.next_token, expected.next_token)
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    submitted = torch.arange(case.draft_tokens.shape[1]) < case.draft_lens[:, None]
    torch.testing.assert_close(
        verdict.expected_acceptance[submitted], expected.expected_acceptance[submitted], **tolerance
    )
    committed = torch.arange(expected.log_probs.shape[1]) <= expected.accepted_lens[:, None]
    torch.testing.assert_close(verdict.log_probs[committed], expected.log_probs[committed], **tolerance)


def spare(takes_long: bool, compiled: str, request: pytest.FixtureRequest) -> None:
    """Skips a case that takes the interpreter long, and is no other code than a shorter one that it runs."""
    if takes_long and is_spared(compiled, request):
        pytest.skip("takes Triton's interpreter long: on a GPU, or with --every-law")


def batch_of(vocab_size: int, compiled: str, request: pytest.FixtureRequest) -> int:
    """Sequences of a case: of a large vocabulary the interpreter takes one, which is long enough."""
    return 1 if vocab_size > 100_000 and is_spared(compiled, request) else 3


def tensors_of(part: Any) -> dict[str, Tensor]:
    """The tensors in the fields of a dataclass, by name."""
    values = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    return {name: value for name, value in values.items() if value is not None}
