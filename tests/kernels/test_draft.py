"""Drawing drafted tokens: the compiled kernels against their references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from speculative_eft.kernels import Stream, draft_logits, warp

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
