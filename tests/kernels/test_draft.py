"""Drawing drafted tokens: the compiled kernels against their references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from speculative_eft.kernels import Stream

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


@pytest.mark.parametrize("name", ["none", "all"])
@pytest.mark.parametrize("vocab_size", [100, 8_193])
def test_draft_measures(vocab_size: int, name: str, both: Any) -> None:
    case = filtered(random_case(vocab_size), name, conservative=False)

    def run() -> Tensor:
        measures = torch.empty(3, 3)
        case.draft(0, Stream.DRAFT, measures)
        return measures

    expected, measures = both(run, "triton")
    torch.testing.assert_close(measures, expected, rtol=1e-5, atol=1e-5)
