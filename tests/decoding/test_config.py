"""Bad configurations are refused when they are written down."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from speculative_eft.decoding import EFTConfig, EFTDecoder
from speculative_eft.models import eft_models

from ..exactness.sampling import table_runners
from ..table_models import random_tables
from ..tiny_models import tiny_trio


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", math.nan),
        ("alpha", (1.0, math.inf)),
        ("alpha", "1"),
        ("beta", math.nan),
        ("beta", None),
        ("draft_tokens", 0),
        ("draft_tokens", -3),
        ("draft_tokens", 2.5),
        ("draft_tokens", True),
        ("draft_tokens", "many"),
        ("draft_tokens", 10**20),
        ("acceptance", "greedy"),
        ("draft", "base"),
        ("draft_weights", "int4"),
        ("draft_temperature", 0.0),
        ("draft_temperature", math.inf),
        ("conservative_top_p", 0.0),
        ("conservative_top_p", 1.5),
        ("cost_ratio", -0.1),
        ("row_cost", -0.1),
        ("row_cost", math.inf),
        ("expected_batch", 0),
        ("expected_batch", 1.5),
        ("remembered", -1),
        ("remembered", True),
    ],
)
def test_the_argument_is_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        EFTConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"alpha must lie between -1e\+30 and 1e\+30, got nan", {"alpha": (1.0, math.nan)}),
        (r"alpha must lie between -1e\+30 and 1e\+30, got 1e\+39", {"alpha": 1e39}),
        (r"beta must lie between -1e\+30 and 1e\+30, got None", {"beta": None}),
        (r"beta must lie between -1e\+30 and 1e\+30, got -1e\+39", {"beta": -1e39}),
        ("row_cost must be a finite number of at least 0, got 10000", {"row_cost": 10**400}),
        ('draft_tokens must be an integer of at least 1 or "auto", got 0', {"draft_tokens": 0}),
        ("draft_temperature must be a finite number above 0 or None, got 0", {"draft_temperature": 0}),
        (r"conservative_top_p must lie in \(0, 1\] or be None, got 2", {"conservative_top_p": 2}),
        ("row_cost must be a finite number of at least 0, got inf", {"row_cost": math.inf}),
        ("row_cost needs cost_ratio", {"row_cost": 0.1}),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value.split()[0],
)
def test_the_message_says_what_is_taken(message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        EFTConfig(**arguments)


def test_numbers_may_be_of_numpy() -> None:
    given: Any = {"draft_tokens": np.int64(3), "expected_batch": np.int32(2), "remembered": np.int64(0)}
    config = EFTConfig(**given)
    assert config == EFTConfig(draft_tokens=3, expected_batch=2, remembered=0)
    assert {type(value) for value in (config.draft_tokens, config.expected_batch, config.remembered)} == {int}
    half: Any = np.float32(0.5)
    for name in ("alpha", "beta", "draft_temperature", "conservative_top_p", "cost_ratio", "row_cost"):
        assert type(getattr(EFTConfig(**{"cost_ratio": 0.1, name: half}), name)) is float
    assert EFTConfig(alpha=[half, half]).alpha == (0.5, 0.5)


@pytest.mark.parametrize("name", ["alpha", "beta"])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_weights_stay_finite(name: str, sign: int) -> None:
    """The law of a weight of 1e30 is all on the tokens with the largest difference, as that of 1e6 is."""
    ids, models = torch.tensor([[5, 6, 7]]), tiny_trio("llama")
    outputs = [
        EFTDecoder(models, EFTConfig(draft_tokens=2, **{name: sign * size})).generate(ids, max_new_tokens=8)
        for size in (1e6, 1e30)
    ]
    assert torch.equal(*outputs)


def test_alpha_must_fit_the_tuned_models() -> None:
    with pytest.raises(ValueError, match="alpha has 2 values: give one"):
        EFTDecoder(table_runners(random_tables(0, 4)), EFTConfig(alpha=(0.5, 0.5), draft_tokens=2))


def test_other_types_are_named() -> None:
    with pytest.raises(ValueError, match="config must be an EFTConfig, got dict"):
        EFTDecoder(table_runners(random_tables(0, 4)), {"alpha": 1})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="models must be EFTModels or their runners, got str"):
        EFTDecoder("x")  # type: ignore[arg-type]


def test_drafts_of_eight_bits_need_models_like_llama() -> None:
    config = EFTConfig(draft_tokens=2, draft_weights="int8")
    with pytest.raises(ValueError, match="needs models, not their runners"):
        EFTDecoder(table_runners(random_tables(0, 4)), config)
    with pytest.raises(ValueError, match=r"draft_weights=.*, but small_tuned is a GPTNeoXForCausalLM"):
        EFTDecoder(tiny_trio("gpt-neox"), config)


def test_copies_of_eight_bits_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    models, config = tiny_trio("llama"), EFTConfig(draft_tokens=2, draft_weights="int8")
    monkeypatch.setattr(eft_models, "free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"needs .* GiB for its copies, and 0.0 GiB are free"):
        EFTDecoder(models, config)
    monkeypatch.setattr(eft_models, "free_bytes", lambda device: None)
    EFTDecoder(models, config)
    monkeypatch.setattr(eft_models, "free_bytes", lambda device: 0)
    # They are there by now.
    EFTDecoder(models, config)


def test_adaptive_lengths_need_a_cost_ratio() -> None:
    with pytest.raises(ValueError, match="cost_ratio"):
        EFTDecoder(table_runners(random_tables(0, 4)))
