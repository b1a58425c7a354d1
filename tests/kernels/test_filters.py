"""Filters of drafts and targets: the compiled kernels against their references."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from speculative_eft.kernels import Coefficients, Sampling, Stream
from speculative_eft.kernels.verify import RULES

from .cases import (
    COMPILED,
    DTYPES,
    FILTERS,
    VOCABULARIES,
    assert_same,
    extreme_case,
    filtered,
    random_case,
    spare,
)

# Of the larger vocabularies a filter each; the conservative filter alone and with the others.
FILTERED_CASES = [
    (vocab_size, name, conservative)
    for place, vocab_size in enumerate(VOCABULARIES)
    for index, name in enumerate([*FILTERS, "none"])
    for conservative in (False, True)
    if (conservative or name != "none")
    and (vocab_size <= 4_096 or (index + place) % 5 == 0 or (vocab_size == 8_193 and name == "all"))
]


@COMPILED
@pytest.mark.parametrize(("vocab_size", "name", "conservative"), FILTERED_CASES)
def test_filters(
    vocab_size: int,
    name: str,
    conservative: bool,
    compiled: str,
    both: Any,
    request: pytest.FixtureRequest,
) -> None:
    spare(vocab_size > 100_000 or (conservative and vocab_size > 10_000), compiled, request)
    rule = RULES[(vocab_size + len(name)) % 3]
    case = filtered(random_case(vocab_size, DTYPES[(vocab_size + len(name)) % 3]), name, conservative)
    assert_same(case, *both(lambda: case.verify(rule), compiled))
    expected, tokens = both(lambda: case.draft(1, Stream.DRAFT), compiled)
    assert torch.equal(tokens, expected)


@COMPILED
@pytest.mark.parametrize("name", [*FILTERS, "none"])
@pytest.mark.parametrize("vocab_size", [100, 8_193])
def test_filters_where_logits_tie(
    vocab_size: int, name: str, compiled: str, both: Any, request: pytest.FixtureRequest
) -> None:
    spare(vocab_size > 100 and name != "all", compiled, request)
    case = random_case(vocab_size)
    for logits in (case.large, *case.tuned, case.base):
        logits.mul_(0.5).round_()
    # Weights in which sums of ties are exact, and a row of which every token is equal.
    ones = torch.ones(3)
    case.coefficients = Coefficients(ones[:, None], ones, ones[:, None], None)
    case.large[0, 1] = case.tuned[0][0, 1] = case.base[0, 1] = 1.0
    case.sampling = dataclasses.replace(case.sampling, temperature=torch.tensor([1.0, 0.0, 0.5]))
    case = filtered(case, name, conservative=name == "none")
    assert_same(case, *both(lambda: case.verify("token"), compiled))


def test_filters_that_are_met_exactly(both: Any) -> None:
    # Of the law (0.5, 0.25, 0.25) three quarters are two tokens, and half the highest is all three.
    law = torch.tensor([0.5, 0.25, 0.25])
    for filters, kept in (({"top_p": 0.75}, [0, 2]), ({"min_p": 0.5}, [0, 1, 2])):
        case = random_case(3)
        case.large = case.base = torch.zeros(3, 1, 3)
        case.tuned = [law.log().expand(3, 1, 3).contiguous()]
        case.draft_tokens, case.draft_lens = case.draft_tokens[:, :0], torch.zeros_like(case.draft_lens)
        values = {name: torch.full((3,), value) for name, value in filters.items()}
        case.coefficients = Coefficients(torch.ones(3, 1), torch.ones(3), torch.ones(3, 1), None)
        case.sampling = Sampling(torch.ones(3), **values)
        for verdict in both(lambda case=case: case.verify("token"), "numba"):
            wanted = (law / law[kept].sum())[verdict.next_token]
            torch.testing.assert_close(verdict.log_probs[:, 0].exp(), wanted)


@COMPILED
@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("vocab_size", [100, 8_193])
def test_filters_where_logits_are_extreme(
    vocab_size: int, name: str, compiled: str, both: Any, request: pytest.FixtureRequest
) -> None:
    spare(vocab_size > 100 and name != "all", compiled, request)
    case = filtered(extreme_case(vocab_size), name, conservative=False)
    assert_same(case, *both(lambda: case.verify("block"), compiled))
