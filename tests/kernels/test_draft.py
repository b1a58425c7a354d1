"""Drawing drafted tokens: the compiled kernels against their references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from speculative_eft.kernels import (
    Coefficients,
    NoiseKey,
    Sampling,
    Stream,
    derive_seeds,
    draft_logits,
    draft_step,
    warp,
)

from ..conftest import is_interpreted
from ..device import test_device
from .cases import COMPILED, DTYPES, VOCABULARIES, batch_of, filtered, random_case, spare


@COMPILED
@pytest.mark.parametrize("stream", [Stream.DRAFT, Stream.SHARED])
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_draft_step(
    vocab_size: int, stream: Stream, compiled: str, both: Any, request: pytest.FixtureRequest
) -> None:
    spare(vocab_size == 128_256 or (vocab_size > 128_256 and stream is Stream.SHARED), compiled, request)
    case = random_case(vocab_size, DTYPES[vocab_size % 3], 2, batch_of(vocab_size, compiled, request))
    for row in range(3):
        expected, tokens = both(lambda row=row: case.draft(row, stream), compiled)
        assert torch.equal(tokens, expected)


@COMPILED
@pytest.mark.parametrize("name", ["none", "all"])
@pytest.mark.parametrize("vocab_size", [100, 8_193])
def test_chances_are_those_of_the_drawn_tokens(vocab_size: int, name: str, compiled: str, both: Any) -> None:
    case = filtered(random_case(vocab_size), name, conservative=False)
    mixed = draft_logits([case.tuned[0][:, :1]], case.base[:, :1], case.coefficients, vocab_size)
    law = warp(mixed, case.sampling)[:, 0].exp()
    # The second sequence's temperature is 0.
    law[1] = mixed[1, 0].softmax(-1)

    def run() -> tuple[Tensor, Tensor]:
        chances = torch.empty(3)
        return case.draft(0, Stream.DRAFT, chances), chances

    for tokens, chances in both(run, compiled):
        assert torch.equal(tokens, case.draft(0, Stream.DRAFT))
        torch.testing.assert_close(chances, law.gather(1, tokens[:, None])[:, 0], rtol=1e-5, atol=1e-6)


@COMPILED
@pytest.mark.parametrize("temperature", [1e30, 1.0, 1e-4, 1e-6, 1e-30])
def test_large_logits_are_drawn_from_and_verified_by_their_differences(
    temperature: float, compiled: str, both: Any
) -> None:
    """Divided by a cold temperature, or beside its noise, 20 is rounded by more than neighbours differ."""
    samples = 400 if is_interpreted(compiled) else 4_000
    above = torch.nextafter(torch.tensor(20.0), torch.tensor(21.0))
    logits = torch.tensor([20.0, 20.0, float(above), 17.0])
    ones = torch.ones(samples)
    rows = logits.repeat(samples, 1)
    law = ((logits.double() - above.double()) / temperature).softmax(-1)
    noise = NoiseKey(derive_seeds(5, samples).to(test_device()), *torch.zeros(2, samples).long())
    mix, sampling = Coefficients(ones[:, None], ones, ones[:, None], None), Sampling(temperature * ones)
    for tokens in both(
        lambda: draft_step([rows], None, mix, sampling, noise, Stream.DRAFT, 0, len(logits)), compiled
    ):
        counts = torch.bincount(tokens, minlength=len(logits)).double()
        # Of a law of four tokens: five deviations of the rarest and the commonest alike.
        bound = 5 * (samples * law * (1 - law)).sqrt() + 1e-9
        assert ((counts - samples * law).abs() <= bound).all(), (counts / samples, law)
    if compiled == "triton":
        return
    chances = torch.empty(samples)
    (_, tokens) = both(
        lambda: draft_step([rows], None, mix, sampling, noise, Stream.DRAFT, 0, len(logits), chances=chances),
        compiled,
    )
    torch.testing.assert_close(chances.double(), law[tokens], rtol=1e-4, atol=0)
