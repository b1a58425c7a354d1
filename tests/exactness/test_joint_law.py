"""The decoders' joint law over several rounds equals exact enumeration."""

from __future__ import annotations

import pytest

from speculative_eft.decoding import EFTConfig, NaiveEFTDecoder

from ..conftest import is_interpreted, is_spared
from ..table_models import random_tables
from .sampling import Record, assert_exact, compare_with_law

pytestmark = pytest.mark.usefixtures("each_backend")

RULES = ("block", "token", "shared_seed")


def copies(backend: str) -> int:
    """Sequences a prompt: 8,100 in all fill one program of Triton's interpreter, which is slow."""
    return 2_700 if is_interpreted(backend) else 6_000


# Name of a law, its config, its generation options, and its number of tuned models.
LAWS: list[tuple[str, dict[str, object], dict[str, float], int]] = [
    ("cool", {}, {"temperature": 0.6}, 1),
    ("hot", {}, {"temperature": 1.7}, 1),
    ("top_k", {}, {"top_k": 2}, 1),
    ("top_p", {}, {"top_p": 0.8}, 1),
    ("min_p", {}, {"min_p": 0.15}, 1),
    ("all_filters", {}, {"temperature": 1.3, "top_k": 3, "top_p": 0.9, "min_p": 0.1}, 1),
    ("alpha_half", {"alpha": 0.5}, {}, 1),
    ("alpha_double", {"alpha": 2.0, "draft": "tuned"}, {}, 1),
    ("alpha_zero", {"alpha": 0.0}, {"temperature": 0.8}, 1),
    ("beta_zero", {"beta": 0.0}, {}, 1),
    ("beta_half", {"beta": 0.5}, {"top_p": 0.9}, 1),
    ("beta_large", {"alpha": 1.3, "beta": 1.6}, {}, 1),
    ("beta_negative", {"beta": -0.4}, {}, 1),
    ("experts_sum_to_one", {"alpha": (0.3, 0.7)}, {}, 2),
    ("experts_as_pair", {"alpha": (0.8, 0.6), "beta": 0.9}, {"temperature": 0.9}, 2),
    ("expert_negative", {"alpha": (1.5, -0.5)}, {"top_k": 3}, 2),
    ("conservative", {"conservative_top_p": 0.7}, {}, 1),
    ("conservative_mixed", {"conservative_top_p": 0.8, "alpha": 0.7, "beta": 1.4}, {"temperature": 1.2}, 1),
    ("draft_hot", {"draft_temperature": 1.5}, {"temperature": 0.7}, 1),
    ("draft_cold", {"draft_temperature": 1e-8}, {}, 1),
    ("draft_as_pair", {"draft": "pair"}, {"min_p": 0.05}, 1),
    ("adaptive", {"draft_tokens": "auto", "cost_ratio": 0.1}, {}, 1),
    ("adaptive_or_plain", {"draft_tokens": "auto", "cost_ratio": 0.4, "row_cost": 0.35}, {}, 1),
    ("adaptive_costly", {"draft_tokens": "auto", "cost_ratio": 0.5, "alpha": 0.6}, {"top_p": 0.9}, 1),
]


LAW_NAMES = [law[0] for law in LAWS]

# Laws that differ in what the kernels do, not in the numbers they are given, and the rule of each.
INTERPRETED = {
    "top_p": "block", "all_filters": "shared_seed", "alpha_zero": "token", "beta_large": "block",
    "experts_as_pair": "token", "expert_negative": "block", "conservative_mixed": "shared_seed",
    "draft_hot": "block", "draft_as_pair": "shared_seed", "adaptive": "token", "adaptive_or_plain": "block",
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("drafted", [1, 2, 3, 5, 8])
def test_every_rule_and_draft_length(
    rule: str,
    drafted: int,
    each_backend: str,
    request: pytest.FixtureRequest,
    record_chi_square: Record,
) -> None:
    if is_spared(each_backend, request) and RULES.index(rule) != (drafted if drafted < 3 else 0):
        pytest.skip("Triton's interpreter is slow: a rule a draft length, or all with --every-law")
    config = EFTConfig(acceptance=rule, draft_tokens=drafted)
    # Longer than a draft, so that the last four tokens lie across rounds that start anywhere.
    results = compare_with_law(random_tables(drafted, 4), config, {}, drafted + 5, copies(each_backend))
    assert_exact(results, record_chi_square)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("name", "fields", "options", "experts"), LAWS, ids=LAW_NAMES)
def test_every_law(
    rule: str,
    name: str,
    fields: dict[str, object],
    options: dict[str, float],
    experts: int,
    each_backend: str,
    request: pytest.FixtureRequest,
    record_chi_square: Record,
) -> None:
    if is_spared(each_backend, request) and INTERPRETED.get(name) != rule:
        pytest.skip("Triton's interpreter is slow: a rule of some laws, or all with --every-law")
    config = EFTConfig(**{"acceptance": rule, "draft_tokens": 3, **fields})
    # What a round did wrong fades over the tokens that follow; but a length that adapts needs some rounds.
    new_tokens = 8 if config.draft_tokens == "auto" else 6
    tables = random_tables(11, 4, experts)
    results = compare_with_law(tables, config, options, new_tokens, copies(each_backend))
    assert_exact(results, record_chi_square)


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ("block", "cool"),
        ("token", "top_p"),
        ("shared_seed", "all_filters"),
        ("block", "experts_as_pair"),
        ("token", "conservative_mixed"),
        ("block", "draft_hot"),
        ("block", "adaptive"),
    ],
)
def test_others_that_draft_in_the_models_place(
    rule: str, name: str, each_backend: str, request: pytest.FixtureRequest, record_chi_square: Record
) -> None:
    if is_spared(each_backend, request) and name != "experts_as_pair":
        pytest.skip("Triton's interpreter is slow: one of the laws, or all with --every-law")
    fields, options, experts = next(law[1:] for law in LAWS if law[0] == name)
    config = EFTConfig(**{"acceptance": rule, "draft_tokens": 3, **fields})
    tables, samples = random_tables(17, 4, experts), copies(each_backend)
    results = compare_with_law(tables, config, options, 8, samples, drafters=True)
    assert_exact(results, record_chi_square)


@pytest.mark.parametrize("rule", ["block", "token"])
def test_rounds_ahead_of_the_host(rule: str, each_backend: str, record_chi_square: Record) -> None:
    """As on a GPU: a draft is no longer than the host knew of when it started the round."""
    if is_interpreted(each_backend):
        pytest.skip("what differs is not in the kernels")
    config = EFTConfig(acceptance=rule, draft_tokens="auto", cost_ratio=0.15)
    tables, new_tokens = random_tables(13, 4), 12
    results = compare_with_law(tables, config, {}, new_tokens, copies(each_backend), lagging=True)
    assert_exact(results, record_chi_square)


@pytest.mark.parametrize(("name", "fields", "options", "experts"), LAWS, ids=LAW_NAMES)
def test_naive_decoder(
    name: str,
    fields: dict[str, object],
    options: dict[str, float],
    experts: int,
    each_backend: str,
    request: pytest.FixtureRequest,
    record_chi_square: Record,
) -> None:
    if is_spared(each_backend, request) and LAW_NAMES.index(name) % 8:
        pytest.skip("Triton's interpreter is slow: every eighth law, or all with --every-law")
    results = compare_with_law(
        random_tables(12, 4, experts),
        EFTConfig(**fields),
        options,
        6,
        copies(each_backend),
        decoder=NaiveEFTDecoder,
    )
    assert_exact(results, record_chi_square)
