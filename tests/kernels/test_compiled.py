"""The compiled kernels against their torch references: same tokens, same counts, same laws."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from speculative_eft.kernels import (
    AcceptanceRule,
    Coefficients,
    DraftLengthRule,
    NoiseKey,
    RoundState,
    Sampling,
    Stream,
    Verdict,
    backend,
    commit,
    derive_seeds,
    draft_step,
    end_drafts,
    exponential_noise,
    learn,
    new_draft_memory,
    new_early_stop,
    recall,
    remember,
    uniform_noise,
    verify,
)

from ..conftest import is_spared
from ..device import test_device

VOCABULARIES = [7, 100, 4_096, 8_193, 32_000, 128_256, 151_936]
RULES: tuple[AcceptanceRule, ...] = ("block", "token", "shared_seed")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INFINITY = float("inf")

# Every vocabulary, rule and dtype, but of the large vocabularies, slow in Triton's interpreter, each dtype
# with one rule.
CASES = [
    (vocab_size, rule, dtype)
    for place, vocab_size in enumerate(VOCABULARIES)
    for index, rule in enumerate(RULES)
    for number, dtype in enumerate(DTYPES)
    if vocab_size < 10_000 or (index + place) % 3 == number
]
COMPILED = pytest.mark.parametrize("compiled", ["numba", "triton"])


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Any]]:
    """Runs a function with torch's kernels and with compiled ones."""

    def run(function: Callable[[], Any], compiled: str) -> tuple[Any, Any]:
        if compiled == "numba" and test_device().type != "cpu":
            pytest.skip("Numba's kernels are a CPU's")
        pytest.importorskip(compiled, reason=f"{compiled} is not installed")
        results = []
        for name in ("torch", compiled):
            monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", name)
            results.append(function())
        return results[0], results[1]

    return run


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

    def draft(self, row: int, stream: Stream, measures: Tensor | None = None) -> Tensor:
        return draft_step(
            [logits[:, row] for logits in self.tuned], self.base[:, row], self.coefficients, self.sampling,
            self.noise, stream, row, self.vocab_size, measures=measures,
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


def extreme_case(vocab_size: int) -> Case:
    """-inf, NaN, models without a finite logit, huge logits, and ties."""
    case = random_case(vocab_size)
    case.large[0, 0, 5:60] = -INFINITY
    case.base[0, 1, 3:90] = -INFINITY
    case.tuned[0][0, 1, 50:] = torch.nan
    case.large[0, 2] = -INFINITY
    case.base[1, 0] = -INFINITY
    case.large[2] *= 1e4
    case.large[1, 1] = case.base[1, 1] = 0.0
    case.tuned[0][1, 1] = 2.0
    return case


def draft_from(case: Case) -> Case:
    """The case with tokens that its draft law gives, as verification expects."""
    case.draft_tokens = torch.stack([case.draft(row, Stream.DRAFT) for row in range(3)], dim=1)
    return case


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
    case.coefficients = dataclasses.replace(case.coefficients, beta=torch.zeros(3))
    expected, verdict = both(lambda: case.verify("block"), compiled)
    assert_same(case, expected, verdict)
    assert verdict.log_probs[0, 0].isfinite()


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


FILTERS: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": torch.tensor([5, 3, 40])},
    "top_p": {"top_p": torch.tensor([0.9, 0.5, 0.6])},
    "min_p": {"min_p": torch.tensor([0.05, 0.2, 0.01])},
    "all": {
        "top_k": torch.tensor([50, 6, 2]),
        "top_p": torch.tensor([0.95, 0.9, 1.0]),
        "min_p": torch.tensor([0.01, 0.0, 0.1]),
    },
}
# Of the larger vocabularies a filter each; the conservative filter alone and with the others.
FILTERED_CASES = [
    (vocab_size, name, conservative)
    for place, vocab_size in enumerate(VOCABULARIES)
    for index, name in enumerate([*FILTERS, "none"])
    for conservative in (False, True)
    if (conservative or name != "none")
    and (vocab_size <= 4_096 or (index + place) % 5 == 0 or (vocab_size == 8_193 and name == "all"))
]


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


@COMPILED
@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("vocab_size", [100, 8_193])
def test_filters_where_logits_are_extreme(
    vocab_size: int, name: str, compiled: str, both: Any, request: pytest.FixtureRequest
) -> None:
    spare(vocab_size > 100 and name != "all", compiled, request)
    case = filtered(extreme_case(vocab_size), name, conservative=False)
    assert_same(case, *both(lambda: case.verify("block"), compiled))


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


@pytest.mark.parametrize("vocab_size", [7, 4_096, 8_193])
def test_exponential_noise_has_the_references_bits(vocab_size: int, both: Any) -> None:
    seeds = torch.tensor([3, -5, 2**63 - 1, -(2**63)])
    counters = torch.tensor([[0, 2**32 - 1]] * 4)
    arguments = (seeds, counters, torch.tensor([2, 5]), Stream.RESIDUAL, vocab_size)
    expected, drawn = both(lambda: exponential_noise(*arguments), "triton")
    # On a GPU a division is off by up to two units in the last place, a logarithm by one, as torch's own is.
    torch.testing.assert_close(drawn, expected, rtol=6e-7 if drawn.is_cuda else 4e-7, atol=0)


@pytest.fixture
def races() -> Any:
    """Compiled noise: a uniform draw, a race of logits and one of weights, to be called from Python."""
    numba = pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    if test_device().type != "cpu":
        pytest.skip("Numba's kernels are a CPU's")
    from speculative_eft.kernels.cpu.noise import race_of_logits, race_of_weights, uniform

    return [
        numba.njit(lambda seed, counter, row, stream: uniform(seed, counter, row, stream)),
        numba.njit(lambda values, scale, *address: race_of_logits(values, scale, *address)),
        numba.njit(lambda values, *address: race_of_weights(values, *address)),
    ]


def where_of(seed: int, counter: int) -> tuple[Tensor, Tensor, Tensor, Stream]:
    """The noise of row 2 there, as the reference asks for it."""
    return torch.tensor([seed]), torch.tensor([[counter]]), torch.tensor([2]), Stream.ACCEPT


def test_noise_has_the_references_bits(races: Any) -> None:
    uniform, *_ = races
    for seed in (3, -5, 2**63 - 1, -(2**63)):
        first = uniform(seed, 2**32 - 1, 2, int(Stream.ACCEPT))
        assert first == uniform_noise(*where_of(seed, 2**32 - 1)).item()


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0, 3000.0])
@pytest.mark.parametrize("size", [3, 7, 4099, 151_936])
def test_races_have_the_references_winners(size: int, spread: float, temperature: float, races: Any) -> None:
    _, race_of_logits, race_of_weights = races
    generator = np.random.default_rng(0)
    counts = 0
    for counter in range(400 if size < 10_000 else 25):
        logits = (spread * generator.standard_normal(size)).astype(np.float32)
        logits[generator.random(size) < 0.2 * (counter % 2)] = -np.inf
        logits[counter % size] = spread
        noise = exponential_noise(*where_of(5, counter), size)[0, 0].double().numpy()
        address = (5, counter, 2, int(Stream.ACCEPT))
        weights = np.exp((logits - logits.max()) / np.float32(temperature)) / np.float32(size)
        scores = logits.astype(np.float64) - temperature * np.log(noise)
        shares = weights.astype(np.float64) / noise
        second, first = np.sort(scores)[-2:]
        if first - second > 1e-4 * temperature + 1e-6 * spread:
            counts += 1
            assert race_of_logits(logits, np.float32(temperature), *address) == scores.argmax()
        second, first = np.sort(shares)[-2:]
        if second < (1 - 1e-4) * first:
            assert race_of_weights(weights, *address) == shares.argmax()
    assert counts > 20


def test_a_race_that_nobody_can_win_is_the_first_ids(races: Any) -> None:
    _, race_of_logits, race_of_weights = races
    address = (5, 1, 2, int(Stream.ACCEPT))
    assert race_of_logits(np.full(9, -np.inf, np.float32), np.float32(1), *address) == 0
    assert race_of_weights(np.zeros(9, np.float32), *address) == 0


def tensors_of(part: Any) -> dict[str, Tensor]:
    """The tensors in the fields of a dataclass, by name."""
    values = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    return {name: value for name, value in values.items() if value is not None}


def random_state(batch: int, longest: int, generator: torch.Generator) -> RoundState:
    def counts(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape or (batch,), generator=generator)

    generated = counts(0, 20)
    return RoundState(
        last_token=counts(0, 50),
        seeds=counts(0, 50),
        rounds=counts(0, 9),
        positions=generated + 7,
        generated=generated,
        limits=generated + counts(1, 12),
        done=counts(0, 4) == 0,
        draft_lens=counts(0, longest + 1),
        output=counts(0, 50, batch, 40),
        accepted_history=torch.rand(batch, generator=generator) * 5,
        tested_history=torch.rand(batch, generator=generator) * 5 + 5,
        drafted=counts(0, 9),
        tested=counts(0, 9),
        accepted=counts(0, 9),
        expected=torch.rand(batch, generator=generator),
        tested_at=counts(0, 9, longest),
        accepted_at=counts(0, 9, longest),
    )


def test_early_stop() -> None:
    """Of Numba's functions, which rounds call from inside others."""
    numba = pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    if test_device().type != "cpu":
        pytest.skip("Numba's kernels are a CPU's")
    from speculative_eft.kernels.cpu.early_stop import early_stop_arrays, ends_draft, learn_rows

    @numba.njit
    def ends(arrays: Any, step: int, chances: Any, counts: Any) -> None:
        accepted, tested, least, reach, grades = arrays
        for sequence in range(counts.shape[0]):
            if step + 1 < counts[sequence] and ends_draft(
                accepted, tested, least, reach, grades, sequence, step, chances[sequence]
            ):
                counts[sequence] = step + 2

    @numba.njit
    def learned(arrays: Any, rule: Any, counts: Any, accepted_lens: Any) -> None:
        learn_rows(*arrays, *rule, counts, accepted_lens)

    batch, longest = 40, 6
    generator = torch.Generator().manual_seed(4)
    least_chances = torch.linspace(1, 0.1, 64)
    reference, compiled = (new_early_stop(batch, longest, least_chances, 0.9, 3.0, 4.0) for _ in range(2))
    lens_seen = set()
    for _ in range(6):
        asked = torch.randint(0, longest + 1, (batch,), generator=generator)
        done = torch.rand(batch, generator=generator) < 0.2
        draft_lens, counts = asked.clone(), torch.where(done, 0, asked + 1)
        arrays = early_stop_arrays(compiled)
        for step in range(longest):
            chance = torch.rand(batch, generator=generator) ** 0.3
            end_drafts(reference, draft_lens, step, chance)
            ends(arrays[:5], step, chance.numpy(), counts.numpy())
        assert torch.equal(counts[~done] - 1, draft_lens[~done])
        lens_seen |= set(draft_lens.tolist())
        accepted_lens = (torch.rand(batch, generator=generator) * (draft_lens + 1)).long()
        learn(reference, draft_lens, accepted_lens, done)
        learned(arrays[:6], arrays[6:], counts.numpy(), accepted_lens.numpy())
        for name in ("accepted", "tested", "least"):
            torch.testing.assert_close(getattr(compiled, name), getattr(reference, name))
    assert lens_seen == set(range(longest + 1))


@COMPILED
@pytest.mark.parametrize("adaptive", [True, False])
def test_commit(adaptive: bool, compiled: str, both: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    batch, longest = 200, 6
    rule = DraftLengthRule(torch.tensor([0.3, 0.5, 0.6, 0.8, INFINITY]), 0.9, 3.0, 4.0)
    state = random_state(batch, longest, generator)
    drafted = torch.randint(0, 50, (batch, longest), generator=generator)
    accepted = (torch.rand(batch, generator=generator) * (state.draft_lens + 1)).long()
    following = torch.randint(0, 50, (batch,), generator=generator)
    overlap = torch.rand(batch, longest, generator=generator)
    lengths = [torch.full((batch,), 30), torch.full((batch,), 40)]

    def run() -> list[Tensor]:
        own = RoundState(**{name: value.clone() for name, value in tensors_of(state).items()})
        caches = [(lengths[0].clone(), False), (lengths[1].clone(), True)]
        report = commit(
            own,
            drafted,
            accepted,
            following,
            overlap,
            torch.tensor([4, 9]),
            rule if adaptive else None,
            caches,
        )
        own.output[:, -1] = 0
        # Of what is not committed the report says nothing.
        report[:, 2:].masked_fill_(torch.arange(longest + 1) >= report[:, :1], 0)
        return [report, *(cache for cache, _ in caches), *tensors_of(own).values()]

    for expected, result in zip(*both(run, compiled), strict=True):
        torch.testing.assert_close(result, expected)


def test_the_backend_is_named_or_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    monkeypatch.delenv("SPECULATIVE_EFT_BACKEND", raising=False)
    assert backend(torch.device("cpu")) == "numba"
    assert backend(torch.device("cuda")) == "triton"
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "torch")
    assert backend(torch.device("cpu")) == backend(torch.device("cuda")) == "torch"
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="triton needs Triton and tensors on a GPU"):
        backend(torch.device("cpu"))
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "cuda")
    with pytest.raises(ValueError, match="must be one of torch, numba, triton, got 'cuda'"):
        backend(torch.device("cpu"))
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "numba")
    with pytest.raises(ValueError, match="needs tensors on a CPU"):
        backend(torch.device("cuda"))


def test_torch_keeps_its_number_of_threads() -> None:
    pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    code = (
        "import torch; torch.set_num_threads(1); "
        "from speculative_eft.kernels.cpu.jit import use_threads; "
        "assert use_threads() == torch.get_num_threads() == 1"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


@COMPILED
@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(30, torch.float32), (100, torch.float16), (4_100, torch.bfloat16)]
)
def test_memory(vocab_size: int, dtype: torch.dtype, compiled: str, both: Any) -> None:
    batch, slots, rows = 5, 7, 4

    def run() -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        memory = new_draft_memory(batch, slots, vocab_size, test_device())
        seen = []
        for turn in range(4):
            # Every other row of a larger tensor: rows are not contiguous.
            large, base = (
                torch.randn(batch, 2 * rows, vocab_size + 2, generator=generator).to(dtype)[:, ::2]
                for _ in range(2)
            )
            large[0, :, 3] = -INFINITY
            base[1, 2] = torch.nan
            block = torch.randint(0, 4, (batch, rows), generator=generator)
            accepted = torch.randint(0, rows, (batch,), generator=generator)
            done = torch.arange(batch) == turn
            remember(memory, large, base, block, accepted, done)
            for token in range(4):
                tokens = torch.full((batch,), token)
                # One number for all sequences stands in memory once.
                for beta in (torch.linspace(0.5, 2, batch), torch.tensor(0.7).expand(batch)):
                    for previous in (None, tokens, (tokens + 1) % 4):
                        seen.append(recall(memory, tokens, previous, beta))
        return [*seen, *tensors_of(memory).values()]

    for expected, result in zip(*both(run, compiled), strict=True):
        assert result.isfinite().all()
        torch.testing.assert_close(result, expected)
