"""Known-wrong samplers must fail the comparison that the right ones pass."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from speculative_eft.decoding import EFTConfig
from speculative_eft.kernels import AcceptanceRule, NoiseKey, Stream
from speculative_eft.kernels import noise as noise_module

from ..conftest import is_spared
from ..device import test_device
from ..table_models import Tables, random_tables
from .sampling import PROMPTS, WINDOW, compare_with_law

# The packages export functions of the same names, which hide the modules.
verify_module = importlib.import_module("speculative_eft.kernels.verify")
round_module = importlib.import_module("speculative_eft.decoding.round")
commit_module = importlib.import_module("speculative_eft.kernels.commit")


def sharp_tables() -> Tables:
    """A trio whose draft and target differ where wrong samplers err: on what follows a rejection.

    After a rejection of the draft's favourite two tokens share the residual, in another proportion than
    in the draft. Each context permutes the vocabulary.
    """
    draft, target = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.1, 0.45, 0.4, 0.05])
    generator = np.random.default_rng(0)
    base = generator.normal(size=(4, 4, 4))
    tuned, large = np.empty_like(base), np.empty_like(base)
    for context in np.ndindex(4, 4):
        order = generator.permutation(4)
        tuned[context] = np.log(draft)[order]
        large[context] = base[context] + np.log(target / draft)[order]
    large, tuned, base = (table.astype(np.float32).astype(np.float64) for table in (large, tuned, base))
    return Tables(large, [tuned], base)


def passes(config: EFTConfig, tables: Tables, drafters: bool = False) -> bool:
    """The comparison, where it sees the most of what costs the least.

    An error shows after a first rejection, and less the more tokens follow; samples of one prompt add up
    where those of several are compared apart. 8,192 sequences fill a program of Triton's interpreter.
    """
    results = compare_with_law(
        tables, config, {}, WINDOW + 1, 4 * 8_192, drafters=drafters, prompts=PROMPTS[:1]
    )
    return all(result.accepts for result in results)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("rule", ["block", "token"])
@pytest.mark.parametrize("tables", [sharp_tables(), random_tables(5, 4)], ids=["sharp", "random"])
def test_the_right_sampler_passes(
    rule: AcceptanceRule,
    tables: Tables,
    each_backend: str,
    request: pytest.FixtureRequest,
) -> None:
    if is_spared(each_backend, request) and rule != "block":
        pytest.skip("Triton's interpreter is slow: one rule, or both with --every-law")
    assert passes(EFTConfig(acceptance=rule, draft_tokens=3), tables)


def test_accepting_by_the_large_models_ratio_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # The mistake is made inside the reference.
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "torch")
    real = round_module.verify

    def wrong(large: Tensor, tuned: Any, base: Tensor, draft_tokens: Tensor, *rest: Any) -> Any:
        drafted = draft_tokens.shape[1]

        def log_ratio(*_: Any) -> Tensor:
            ratio = (large.log_softmax(-1) - base.log_softmax(-1))[:, :drafted]
            return ratio.gather(-1, draft_tokens[..., None])[..., 0]

        monkeypatch.setattr(verify_module, "_log_ratio", log_ratio)
        return real(large, tuned, base, draft_tokens, *rest)

    monkeypatch.setattr(round_module, "verify", wrong)
    assert not passes(EFTConfig(acceptance="token", draft_tokens=3), sharp_tables())


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("rule", ["block", "token"])
def test_draft_law_at_the_wrong_temperature(
    rule: AcceptanceRule,
    monkeypatch: pytest.MonkeyPatch,
    each_backend: str,
    request: pytest.FixtureRequest,
) -> None:
    if is_spared(each_backend, request) and rule != "block":
        pytest.skip("Triton's interpreter is slow: one rule, or both with --every-law")
    real = round_module.draft_step

    def wrong(tuned: Any, base: Any, coefficients: Any, sampling: Any, *rest: Any) -> Tensor:
        cooler = dataclasses.replace(sampling, temperature=sampling.temperature * 0.8)
        return real(tuned, base, coefficients, cooler, *rest)

    monkeypatch.setattr(round_module, "draft_step", wrong)
    assert not passes(EFTConfig(acceptance=rule, draft_tokens=3), sharp_tables())


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("rule", ["block", "token"])
def test_residual_noise_shared_with_draft_noise(
    rule: AcceptanceRule,
    monkeypatch: pytest.MonkeyPatch,
    each_backend: str,
    request: pytest.FixtureRequest,
) -> None:
    if is_spared(each_backend, request) and rule != "token":
        pytest.skip("Triton's interpreter is slow: one rule, or both with --every-law")
    monkeypatch.setattr(verify_module, "_RESIDUAL", Stream.DRAFT)
    assert not passes(EFTConfig(acceptance=rule, draft_tokens=3), sharp_tables())


def test_block_rule_keyed_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    # The mistake is made inside the reference.
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "torch")

    def keyed_by_position(seeds: Tensor, rounds: Tensor, positions: Tensor) -> NoiseKey:
        return NoiseKey(seeds=seeds, rounds=positions, positions=positions)

    def at_position(name: str) -> Any:
        real = getattr(noise_module, name)
        return lambda seeds, counters, rows, *rest: real(
            seeds, counters + rows, torch.zeros_like(rows), *rest
        )

    monkeypatch.setattr(commit_module, "NoiseKey", keyed_by_position)
    for module, name in (
        (verify_module, "uniform_noise"),
        (verify_module, "exponential_noise"),
        (noise_module, "gumbel_noise"),
    ):
        monkeypatch.setattr(module, name, at_position(name))
    assert not passes(EFTConfig(acceptance="block", draft_tokens=3), random_tables(5, 4))


@pytest.mark.parametrize("rule", ["block", "token"])
def test_a_drafters_tokens_tested_by_the_models_own_law(
    rule: AcceptanceRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "torch")
    config, tables = EFTConfig(acceptance=rule, draft_tokens=3, remembered=0), sharp_tables()
    assert passes(config, tables, drafters=True)
    real = round_module.verify

    def wrong(large: Tensor, tuned: Any, base: Tensor, *rest: Any) -> Any:
        tokens, lens, coefficients, *others, vocab_size, _, statistics = rest
        own = dataclasses.replace(coefficients, draft_alpha=torch.ones_like(coefficients.draft_alpha))
        return real(large, tuned, base, tokens, lens, own, *others, vocab_size, None, statistics)

    monkeypatch.setattr(round_module, "verify", wrong)
    assert not passes(config, tables, drafters=True)


@pytest.mark.parametrize("rule", ["block", "token"])
@pytest.mark.parametrize("withheld", [True, False])
def test_withholding_the_token_that_ends_a_draft(
    rule: AcceptanceRule, withheld: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if test_device().type != "cpu":
        pytest.skip("drafts end by what was drawn on a CPU alone")
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "torch")
    real = round_module.end_drafts
    ended = 0

    def wrong(early: Any, draft_lens: Tensor, step: int, chance: Tensor) -> None:
        nonlocal ended
        before = draft_lens.clone()
        real(early, draft_lens, step, chance)
        ended += int((draft_lens < before).sum())
        if withheld:
            draft_lens.copy_(torch.where(draft_lens < before, step, draft_lens))

    monkeypatch.setattr(round_module, "end_drafts", wrong)
    config = EFTConfig(acceptance=rule, draft_tokens="auto", cost_ratio=0.3)
    assert passes(config, sharp_tables()) is not withheld
    assert ended > 1000


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("rule", ["block", "token"])
def test_redrawing_a_low_confidence_token(
    rule: AcceptanceRule,
    monkeypatch: pytest.MonkeyPatch,
    each_backend: str,
    request: pytest.FixtureRequest,
) -> None:
    if is_spared(each_backend, request) and rule != "block":
        pytest.skip("Triton's interpreter is slow: one rule, or both with --every-law")
    real = round_module.draft_step

    def wrong(
        tuned: Any,
        base: Any,
        coefficients: Any,
        sampling: Any,
        noise: NoiseKey,
        stream: Stream,
        row: int,
        *rest: Any,
    ) -> Tensor:
        first = real(tuned, base, coefficients, sampling, noise, stream, row, *rest)
        second = real(tuned, base, coefficients, sampling, noise, stream, row + 100, *rest)
        confidence = tuned[0].softmax(-1).gather(-1, first[:, None])[:, 0]
        return torch.where(confidence < 0.2, second, first)

    monkeypatch.setattr(round_module, "draft_step", wrong)
    assert not passes(EFTConfig(acceptance=rule, draft_tokens=3), sharp_tables())
