"""Step costs are measured once a machine, rounded, and kept; where they cannot be kept they are measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from speculative_eft.decoding import EFTConfig, EFTDecoder, EFTOutput
from speculative_eft.decoding import decoder as decoder_module
from speculative_eft.models import EFTModels, eft_models
from speculative_eft.models import costs as costs_module
from speculative_eft.models.costs import StepCosts, kept_step_costs

from ..tiny_models import ragged_prompts, tiny_trio


def test_costs_are_kept_for_the_same_facts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = [StepCosts(0.25, 0.0), StepCosts(0.5, 0.125), StepCosts(1.0, 0.0)]
    first = kept_step_costs(["a", 1], lambda: measured[0])
    assert first == kept_step_costs(["a", 1], lambda: measured[1]) == measured[0]
    assert kept_step_costs(["a", 2], lambda: measured[1]) == measured[1]
    for file in tmp_path.rglob("*.json"):
        file.write_text("not what was written")
    assert kept_step_costs(["a", 1], lambda: measured[2]) == measured[2]
    # Another process measures meanwhile, and is the first to be done.
    costs = kept_step_costs(["c"], lambda: (kept_step_costs(["c"], lambda: measured[0]), measured[1])[1])
    assert costs == kept_step_costs(["c"], lambda: measured[2]) == measured[0]
    # A file stands where the folder should be.
    monkeypatch.setenv("XDG_CACHE_HOME", str(next(tmp_path.rglob("*.json"))))
    assert kept_step_costs(["b"], lambda: measured[1]) == measured[1]


def test_costs_of_a_user_without_a_home_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert kept_step_costs(["a"], lambda: StepCosts(0.25, 0.0)) == StepCosts(0.25, 0.0)


def test_the_models_own_costs_are_rounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    models = tiny_trio("llama")
    costs = models.step_costs(pair=True, batch=2)
    for cost in (costs.cost_ratio, costs.row_cost):
        assert cost == 0 or cost == pytest.approx(2 ** (round(8 * math.log2(cost)) / 8), rel=0.01)
    decoder = EFTDecoder(models)
    output = decoder.generate(**ragged_prompts(2), max_new_tokens=4, return_dict_in_generate=True)
    assert isinstance(output, EFTOutput)
    assert output.stats is not None
    # Those of drafts by eight bits where the decoder drafts so; by its own weights they are others.
    kept = models.step_costs(pair=False, batch=1, quantised=bool(decoder.runners.drafters))
    assert (output.stats.cost_ratio, output.stats.row_cost) == (kept.cost_ratio, kept.row_cost)


def test_costs_are_kept_for_each_batch_and_each_kind_of_draft(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kinds = [(False, 1), (False, 2), (True, 1)]
    costs = dict(zip(kinds, (StepCosts(0.25, 0.0), StepCosts(0.5, 0.0), StepCosts(1.0, 0.0)), strict=True))
    for pair, batch in kinds:
        monkeypatch.setattr(eft_models, "measure_step_costs", lambda *_, kind=(pair, batch): costs[kind])
        # Other models of the same kind, so that only what was written can tell.
        assert tiny_trio("llama").step_costs(pair, batch) == costs[pair, batch]


def test_measuring_costs_is_no_part_of_a_call_s_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    timer = decoder_module.PhaseTimer
    monkeypatch.setattr(decoder_module, "PhaseTimer", lambda: happened.append("clock") or timer())
    monkeypatch.setattr(EFTModels, "step_costs", lambda *_: happened.append("costs") or StepCosts(0.25, 0.0))
    EFTDecoder(tiny_trio("llama")).generate(**ragged_prompts(2), max_new_tokens=4)
    assert happened == ["costs", "clock"]


def test_costs_are_kept_for_each_kind_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Sequence[object]] = []
    monkeypatch.setattr(
        eft_models, "kept_step_costs", lambda facts, _: kept.append(facts) or StepCosts(0.25, 0.0)
    )
    for attention in ("sdpa", "triton"):
        models = tiny_trio("llama")
        for runner in models.runners().every:
            runner.attention = attention
        models.step_costs(pair=False, batch=1)
    assert kept[0] != kept[1]


@pytest.mark.parametrize(
    ("plain", "drafts", "large", "expected"),
    [
        # Two steps of a fifth, and a token that adds one more and a tenth.
        (1.4, 1.4 + 4 * 0.3, 1.0, (0.2, 0.1)),
        # A token adds less than the first steps took: all of it is the step's.
        (1.4, 1.4 + 4 * 0.14, 1.0, (0.125, 0.0)),
        # A pair of one hundredth of the large model, whose rows cost next to nothing; and by chance nothing.
        (1.02, 1.02 + 4 * 0.01, 1.0, (0.01, 0.0)),
        (1.02, 1.0, 1.0, (1 / 128, 0.0)),
    ],
)
def test_costs_tell_what_a_drafted_token_adds_to_a_plain_step(
    plain: float,
    drafts: float,
    large: float,
    expected: tuple[float, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = tiny_trio("llama")
    runners = models.runners()
    turn = [plain, drafts, large]
    # A machine slows down, and one turn is disturbed.
    turns = [turn, [3 * seconds for seconds in turn], [2 * plain, 2 * drafts, 5 * large]]
    monkeypatch.setattr(costs_module, "_turns", lambda *_: turns)
    costs = costs_module.measure_step_costs(runners, runners.tuned, 1)
    assert (costs.cost_ratio, costs.row_cost) == pytest.approx(expected, rel=0.05)
    assert EFTConfig(cost_ratio=costs.cost_ratio, row_cost=costs.row_cost).cost_ratio == costs.cost_ratio


def runners_are_compiled(models: Any) -> bool:
    return all(runner.is_compiled for runner in models.drafting_runners(pair=True))


def test_a_round_with_drafters_is_their_steps_and_the_models_passes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    models, passes = tiny_trio("llama"), []

    def turns(rounds: Any, device: torch.device) -> list[list[float]]:
        passes.extend(len(calls) for calls in rounds)
        return [[1.4, 2.4, 1.0]]

    monkeypatch.setattr(costs_module, "_turns", turns)
    models.step_costs(False, 1, quantised=True)
    # All score in one call; a compiled draft is one, and another that takes it back.
    drafting = (2, 2) if runners_are_compiled(models) else (0, 4)
    assert passes == [drafting[0] + 1, drafting[1] + 1, 1]
