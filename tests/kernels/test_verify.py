"""Verification on laws known in full, and the compiled kernels against their references."""

from __future__ import annotations

from dataclasses import fields, replace
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
from speculative_eft.kernels.verify import RULES, _draw_replacement

from ..conftest import is_interpreted
from ..device import test_device
from .cases import (
    COMPILED,
    DTYPES,
    VOCABULARIES,
    assert_same,
    batch_of,
    draft_from,
    extreme_case,
    random_case,
    spare,
)

# Every vocabulary, rule and dtype, but of the large vocabularies, slow in Triton's interpreter, each dtype
# with one rule.
CASES = [
    (vocab_size, rule, dtype)
    for place, vocab_size in enumerate(VOCABULARIES)
    for index, rule in enumerate(RULES)
    for number, dtype in enumerate(DTYPES)
    if vocab_size < 10_000 or (index + place) % 3 == number
]


@pytest.fixture
def samples(each_backend: str) -> int:
    """Sequences of a comparison: 8,192 fill a program of Triton's interpreter, which is slow."""
    return 3 * 8_192 if is_interpreted(each_backend) else 100_000


def verify_fixed_laws(
    draft: list[float], target: list[float], drafted: int, rule: AcceptanceRule, samples: int
) -> Verdict:
    """Draft from one law and verify against another, both the same in every row, for many seeds."""
    ones = torch.ones(samples)
    mix = Coefficients(ones[:, None], ones, ones[:, None], None)
    sampling = Sampling(ones)
    zeros = torch.zeros(samples, dtype=torch.int64)
    noise = NoiseKey(derive_seeds(1, samples).to(test_device()), zeros, zeros)
    vocab_size = len(draft)
    stream = Stream.SHARED if rule == "shared_seed" else Stream.DRAFT
    rows = torch.tensor(draft).log().expand(samples, drafted + 1, -1)
    base = torch.zeros_like(rows)
    large = torch.tensor(target).log() - torch.tensor(draft).log() + base
    tokens = torch.stack(
        [
            draft_step([rows[:, step]], None, mix, sampling, noise, stream, step, vocab_size)
            for step in range(drafted)
        ],
        dim=1,
    )
    lens = torch.full((samples,), drafted)
    return verify(large, [rows], base, tokens, lens, mix, sampling, sampling, noise, rule, vocab_size)


@pytest.mark.parametrize(("rule", "expected"), [("token", 10 / 9), ("block", 11 / 9)])
def test_published_two_token_toy(rule: AcceptanceRule, expected: float, samples: int) -> None:
    """Sun et al., arXiv 2403.10444, section 2: accepted tokens of a draft of two."""
    verdict = verify_fixed_laws([2 / 3, 1 / 3], [1 / 3, 2 / 3], 2, rule, samples)
    accepted = verdict.accepted_lens.double()
    assert abs(accepted.mean().item() - expected) < 6 * accepted.std().item() / samples**0.5


def test_expected_acceptance_is_the_overlap_of_the_laws(samples: int) -> None:
    verdict = verify_fixed_laws([0.5, 0.3, 0.2], [0.1, 0.45, 0.45], 1, "token", samples)
    torch.testing.assert_close(verdict.expected_acceptance, torch.full((samples, 1), 0.6))
    rate = verdict.accepted_lens.double().mean().item()
    assert abs(rate - 0.6) < 6 * (0.24 / samples) ** 0.5


@pytest.mark.parametrize("rule", RULES)
def test_equal_laws_are_always_accepted(rule: AcceptanceRule, samples: int) -> None:
    verdict = verify_fixed_laws([0.2, 0.5, 0.3], [0.2, 0.5, 0.3], 4, rule, samples)
    # Rounding of p / q rejects about one token in ten million.
    assert (verdict.accepted_lens == 4).double().mean() > 1 - 1e-4


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("rule", RULES)
def test_what_neither_law_gives_is_not_accepted(rule: AcceptanceRule) -> None:
    """Rounding could have verification cut off by a filter what a draft was left with."""
    batch, drafted, size = 8, 3, 16
    logits = -torch.arange(size, dtype=torch.float32).expand(batch, drafted + 1, size)
    ones, zeros = torch.ones(batch), torch.zeros(batch, dtype=torch.int64)
    mix = Coefficients(ones[:, None], ones, ones[:, None], None)
    sampling = Sampling(ones, top_k=torch.full((batch,), 2))
    tokens = torch.full((batch, drafted), 5)
    noise = NoiseKey(derive_seeds(1, batch).to(test_device()), zeros, zeros)
    lens = torch.full((batch,), drafted)
    verdict = verify(
        logits, [logits], torch.zeros_like(logits), tokens, lens, mix, sampling, sampling, noise, rule, size
    )
    assert not verdict.accepted_lens.any()
    assert (verdict.next_token < 2).all()


def test_where_rounding_empties_the_residual_the_target_is_drawn_from() -> None:
    samples = 4_000
    ones, zeros = torch.ones(samples), torch.zeros(samples, dtype=torch.int64)
    noise = NoiseKey(derive_seeds(1, samples).to(test_device()), zeros, zeros)
    law = torch.full((samples, 2, 2), 0.5)
    drawn = _draw_replacement(law, law[:, :1], zeros, zeros + 1, ones, noise)
    assert abs(drawn.double().mean() - 0.5) < 0.05
    if test_device().type != "cpu":
        return
    pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    from speculative_eft.kernels.cpu.jit import FLOAT, MATRIX, entry
    from speculative_eft.kernels.cpu.verify import _replacement

    @entry(f"int64({MATRIX}, int64)")
    def replacement(of_both: Any, seed: int) -> Any:
        return _replacement(of_both, of_both, 0, 1, FLOAT(1), seed, 0, 0)

    of_both = law[0].numpy()
    tokens = [replacement(of_both, seed) for seed in range(samples)]
    assert abs(sum(tokens) / samples - 0.5) < 0.05


def ragged_inputs(greedy: Tensor) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    batch, drafted, vocab_size = len(greedy), 5, 40
    large, tuned, base = (torch.randn(batch, drafted + 1, vocab_size, generator=generator) for _ in range(3))
    ones = torch.ones(batch)
    sampling = Sampling(
        torch.where(greedy, 0.0, 0.8), any_greedy=bool(greedy.any()), all_greedy=bool(greedy.all())
    )
    return {
        "large": large,
        "tuned": [tuned],
        "base": base,
        "draft_tokens": torch.randint(vocab_size, (batch, drafted), generator=generator),
        "draft_lens": torch.arange(batch) % (drafted + 1),
        "coefficients": Coefficients(ones[:, None], ones, ones[:, None], None),
        "sampling": sampling,
        "draft_sampling": sampling,
        "noise": NoiseKey(
            derive_seeds(3, batch).to(test_device()), torch.arange(batch), 7 * torch.arange(batch)
        ),
        "vocab_size": vocab_size,
    }


def take_rows(value: object, index: int) -> object:
    if isinstance(value, Tensor):
        return value[index : index + 1]
    if isinstance(value, list):
        return [take_rows(item, index) for item in value]
    if isinstance(value, Coefficients | NoiseKey):
        return type(value)(*(take_rows(getattr(value, field.name), index) for field in fields(value)))
    if isinstance(value, Sampling):
        greedy = bool(value.temperature[index] == 0)
        return Sampling(value.temperature[index : index + 1], any_greedy=greedy, all_greedy=greedy)
    return value


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("rule", RULES)
def test_a_sequence_depends_on_itself_alone(rule: AcceptanceRule) -> None:
    # Every length of a draft, greedy or drawn, twice.
    batch = 12
    greedy = torch.arange(batch) % 3 == 0
    inputs = ragged_inputs(greedy)
    together = verify(**inputs, rule=rule)  # type: ignore[arg-type]
    assert (together.accepted_lens <= inputs["draft_lens"]).all()
    for index in range(batch):
        alone = verify(**{name: take_rows(value, index) for name, value in inputs.items()}, rule=rule)  # type: ignore[arg-type]
        assert alone.accepted_lens[0] == together.accepted_lens[index]
        assert alone.next_token[0] == together.next_token[index]


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("rule", RULES)
def test_what_lies_beyond_a_sequences_own_draft_is_ignored(rule: AcceptanceRule) -> None:
    inputs = ragged_inputs(torch.zeros(24, dtype=torch.bool))
    sampling = Sampling(torch.full((24,), 0.8), top_k=torch.full((24,), 5))
    inputs |= {"sampling": sampling, "draft_sampling": sampling, "rule": rule}
    draft_tokens, lens = inputs["draft_tokens"], inputs["draft_lens"]
    assert isinstance(draft_tokens, Tensor)
    assert isinstance(lens, Tensor)
    correction = torch.randn(24, 5, 40, generator=torch.Generator().manual_seed(1))
    first = verify(**inputs, correction=correction)  # type: ignore[arg-type]
    is_beyond = torch.arange(5) >= lens[:, None]
    inputs["draft_tokens"] = torch.where(is_beyond, 10**6, draft_tokens)
    for anything in (3e38, -3e38, float("nan")):
        beyond = torch.where(is_beyond[..., None], anything, correction)
        second = verify(**inputs, correction=beyond)  # type: ignore[arg-type]
        assert torch.equal(first.accepted_lens, second.accepted_lens)
        assert torch.equal(first.next_token, second.next_token)


@COMPILED
@pytest.mark.parametrize(("vocab_size", "rule", "dtype"), CASES)
def test_verify(
    vocab_size: int,
    rule: AcceptanceRule,
    dtype: torch.dtype,
    compiled: str,
    both: Any,
    request: pytest.FixtureRequest,
) -> None:
    spare(vocab_size == 128_256 or (vocab_size > 128_256 and rule != "block"), compiled, request)
    experts = 2 if dtype is torch.float16 else 1
    case = random_case(vocab_size, dtype, experts, batch_of(vocab_size, compiled, request))
    assert_same(case, *both(lambda: case.verify(rule), compiled))


@COMPILED
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("vocab_size", [100, 8_193])
def test_verify_where_logits_are_extreme(
    vocab_size: int, rule: AcceptanceRule, compiled: str, both: Any
) -> None:
    case = draft_from(extreme_case(vocab_size))
    assert_same(case, *both(lambda: case.verify(rule), compiled))


@COMPILED
def test_a_model_of_no_weight_is_not_consulted(compiled: str, both: Any) -> None:
    case = random_case(50)
    case.large[:] = torch.nan
    case.coefficients = replace(case.coefficients, beta=torch.zeros(3))
    expected, verdict = both(lambda: case.verify("block"), compiled)
    assert_same(case, expected, verdict)
    assert verdict.log_probs[0, 0].isfinite()
