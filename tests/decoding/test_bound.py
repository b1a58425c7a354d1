"""Rounds as bound calls give what the same rounds give operation by operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from speculative_eft.decoding import EFTConfig, EFTDecoder, EFTOutput
from speculative_eft.decoding import running as running_module
from speculative_eft.decoding.bound import Room, bind_round
from speculative_eft.decoding.options import read_options
from speculative_eft.decoding.prompts import read_prompts, read_seeds
from speculative_eft.decoding.round import PhaseTimer, new_trace_buffers
from speculative_eft.models import EFTModels

from ..models.families import tiny_model
from ..sync_guard import no_host_sync
from ..tiny_models import perturbed, ragged_prompts, tiny_trio
from .test_round import storages

pytest.importorskip("numba", reason="the extra [cpu] is not installed")


@pytest.fixture(autouse=True)
def _numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "numba")


def mixed_trio() -> EFTModels:
    """A large model that no compiled pass knows, with small ones that one does."""
    return EFTModels(
        large_base=tiny_model("gpt2", 0),
        small_tuned=perturbed(tiny_model("llama", 0), 2, 0.02),
        small_base=tiny_model("llama", 0),
    )


@pytest.mark.parametrize("trio", [lambda: tiny_trio("llama"), mixed_trio], ids=["llama", "mixed"])
@pytest.mark.parametrize("acceptance", ["block", "token", "shared_seed"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "temperature": 1.2, "top_k": 9, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=["greedy", "sampled", "filtered"],
)
@pytest.mark.parametrize("draft_tokens", [3, "auto"])
@pytest.mark.parametrize(("remembered", "draft_weights"), [(0, "own"), (8, "own"), (0, "int8"), (8, "int8")])
def test_bound_rounds_equal_plain_ones(
    trio: Any,
    acceptance: Any,
    options: dict[str, Any],
    draft_tokens: Any,
    remembered: int,
    draft_weights: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = EFTConfig(
        acceptance=acceptance,
        draft_tokens=draft_tokens,
        cost_ratio=0.3,
        remembered=remembered,
        draft_weights=draft_weights,
    )
    assert_bound_equals_plain(trio, config, options, monkeypatch)


@pytest.mark.parametrize("acceptance", ["block", "shared_seed"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 1.2, "top_k": 9}])
@pytest.mark.parametrize("draft_tokens", [3, "auto"])
@pytest.mark.parametrize("alpha", [0.6, (0.3, 0.7), (0.9, 0.4)], ids=["pair", "experts", "experts and base"])
@pytest.mark.parametrize("draft_weights", ["own", "int8"])
def test_bound_rounds_of_several_models_that_draft(
    draft_weights: Any,
    alpha: Any,
    draft_tokens: Any,
    acceptance: Any,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experts = 1 if isinstance(alpha, float) else 2

    def models() -> EFTModels:
        small = tiny_model("llama", 0)
        tuned = [perturbed(tiny_model("llama", 0), 2 + index, 0.02) for index in range(experts)]
        return EFTModels(perturbed(tiny_model("llama", 0), 1, 0.02), tuned, small)

    config = EFTConfig(
        alpha, 0.8, draft_tokens=draft_tokens, acceptance=acceptance, cost_ratio=0.3, remembered=8,
        draft_weights=draft_weights,
    )  # fmt: skip
    assert_bound_equals_plain(models, config, options, monkeypatch)


def assert_bound_equals_plain(
    trio: Callable[[], EFTModels],
    config: EFTConfig,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Sequences end at different times, so rows are given to others.
    given = {
        **ragged_prompts(5),
        **options,
        "max_new_tokens": 25,
        "eos_token_id": [3, 4],
        "seed": [5, 1, 4, 2, 8],
    }
    bound = 0

    def counted(*arguments: Any) -> Any:
        nonlocal bound
        result = bind_round(*arguments)
        bound += result is not None
        return result

    def output() -> EFTOutput:
        result = EFTDecoder(trio(), config).generate(**given, return_dict_in_generate=True)
        assert isinstance(result, EFTOutput)
        return result

    monkeypatch.setattr(running_module, "bind_round", counted)
    result = output()
    assert bound
    monkeypatch.setattr(running_module, "bind_round", lambda *_: None)
    expected = output()
    assert torch.equal(result.sequences, expected.sequences)
    assert result.stats is not None
    assert expected.stats is not None
    alike = {"seconds": {}, "expected_acceptance": 0.0}
    assert replace(result.stats, **alike) == replace(expected.stats, **alike)
    assert result.stats.expected_acceptance == pytest.approx(expected.stats.expected_acceptance, abs=1e-5)
    assert result.trace is not None
    assert expected.trace is not None
    assert torch.equal(result.trace.source_ids, expected.trace.source_ids)
    for own, other in (
        (result.trace.target, expected.trace.target),
        (result.trace.large, expected.trace.large),
        (result.trace.base, expected.trace.base),
        *zip(result.trace.tuned, expected.trace.tuned, strict=True),
    ):
        torch.testing.assert_close(own, other, equal_nan=True, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 0.9, "top_k": 9}])
def test_the_general_path_ends_drafts_where_bound_rounds_do(options: dict[str, Any]) -> None:
    # The general path drafts by the models' own weights.
    config = EFTConfig(draft_tokens="auto", cost_ratio=0.3, draft_weights="own")
    given = {**ragged_prompts(4), **options, "max_new_tokens": 25, "seed": 3, "return_dict_in_generate": True}
    decoder = EFTDecoder(tiny_trio("llama"), config)
    fused, general = decoder.generate(**given), decoder.generate(**given, output_scores=True)
    assert isinstance(fused, EFTOutput)
    assert isinstance(general, EFTOutput)
    assert torch.equal(fused.sequences, general.sequences)
    assert fused.stats is not None
    assert general.stats is not None
    assert fused.stats.drafted_tokens == general.stats.drafted_tokens
    assert fused.stats.drafted_tokens < fused.stats.sequence_rounds * decoder.longest_draft / 2


@pytest.mark.parametrize("draft", ["tuned", "pair"])
def test_a_bound_round_waits_for_nothing_and_moves_nothing(draft: Any) -> None:
    decoder = EFTDecoder(tiny_trio("llama"), EFTConfig(draft_tokens=3, draft=draft))
    given = ragged_prompts(4)
    prompts = read_prompts(given["input_ids"], given["attention_mask"], decoder.vocab_size)
    wanted = {"max_new_tokens": 20, "return_dict_in_generate": True, "do_sample": True, "top_k": 0}
    with torch.inference_mode():
        state, plan = decoder._start(prompts, prompts, read_options(None, wanted, [], 11), read_seeds(0, 4))
        trace = new_trace_buffers(state, 1)
        bound = bind_round(decoder.runners, state, plan, 3, Room(3))
        assert bound is not None
        before = list(storages(state))
        for _ in range(3):
            with no_host_sync():
                bound.run(state, plan, 40, PhaseTimer(), trace)
        assert list(storages(state)) == before
    assert (state.generated > 0).all()


@pytest.mark.parametrize(("trio", "pays"), [(lambda: tiny_trio("llama"), False), (mixed_trio, True)])
def test_rows_of_those_done_go_where_a_pass_would_run_them(
    trio: Any, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compact = running_module.RunningBatch.compact
    rows: list[int] = []

    def counted(self: running_module.RunningBatch) -> None:
        compact(self)
        rows.append(self.rows)

    monkeypatch.setattr(running_module.RunningBatch, "compact", counted)
    given = {**ragged_prompts(5), "eos_token_id": [3, 4, 5, 6], "seed": 0, "max_new_tokens": 40}
    EFTDecoder(trio(), EFTConfig(draft_tokens=3)).generate(**given, do_sample=True, top_k=0)
    assert (min(rows, default=5) < 5) == pays


def test_what_is_not_bound_runs_as_it_is() -> None:
    decoder = EFTDecoder(tiny_trio("gpt2"), EFTConfig(draft_tokens=2, draft="pair"))
    given = ragged_prompts(2)
    prompts = read_prompts(given["input_ids"], given["attention_mask"], decoder.vocab_size)
    with torch.inference_mode():
        resolved = read_options(None, {"max_new_tokens": 4}, [], 11)
        state, plan = decoder._start(prompts, prompts, resolved, read_seeds(0, 2))
        assert bind_round(decoder.runners, state, plan, 2, Room(2)) is None
    tokens = decoder.generate(**given, max_new_tokens=4)
    assert isinstance(tokens, Tensor)
    assert tokens.shape == (2, 15)
