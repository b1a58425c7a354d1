"""The comparison's order and arithmetic, on decoders that only pretend."""

from __future__ import annotations

import json
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from speculative_eft.bench import comparison, turns
from speculative_eft.bench.comparison import PHASES, Comparison, Percentiles, Spread, compare
from speculative_eft.bench.machine import environment, peak_memory
from speculative_eft.bench.prompts import PromptBatch
from speculative_eft.decoding import EFTOutput, EFTStats

PROMPTS = [PromptBatch(torch.tensor([[1, 2]])), PromptBatch(torch.tensor([[3, 4, 5]]))]


class Clock:
    """Seconds that pass only when a decoder says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeDecoder:
    """Emits `tokens` tokens in `seconds[i]` seconds in its i-th run, in two rounds of two drafted tokens.

    Of these it accepts both and the first, but in every other run none and both.
    """

    def __init__(
        self, name: str, log: list[tuple[str, int, int]], clock: Clock, seconds: list[float], tokens: int
    ) -> None:
        self.name, self.log, self.clock = name, log, clock
        self.seconds, self.tokens = iter(seconds), tokens
        self.runs = 0

    def generate(
        self, input_ids: Tensor, attention_mask: None, *, seed: int, streamer: Any, **generation_kwargs: Any
    ) -> EFTOutput:
        assert generation_kwargs == {"return_dict_in_generate": True, "trace": False, "max_new_tokens": 9}
        self.log.append((self.name, int(input_ids[0, 0]), seed))
        batch, seconds, begun = input_ids.shape[0], next(self.seconds), self.clock.now
        if batch == 1:
            streamer.put(input_ids)
        # A quarter of the time and the tokens for the first round, the rest for the second.
        for share in (1, 3):
            self.clock.now += share * seconds / 4
            tokens = torch.full((share * self.tokens // 4,), 7)
            for index in range(batch):
                if batch == 1:
                    streamer.put(tokens)
                else:
                    streamer(index, tokens)
        self.runs += 1
        is_other = self.runs % 2 == 0
        stats = EFTStats(
            rounds=2,
            sequence_rounds=2 * batch,
            drafted_tokens=4 * batch,
            tested_tokens=(3 if is_other else 4) * batch,
            accepted_tokens=(2 if is_other else 3) * batch,
            emitted_tokens=self.tokens * batch,
            accepted_by_position=(0.5, 1.0) if is_other else (1.0, 0.5),
            expected_acceptance=0.9 if is_other else 0.5,
            seconds={"prefill": 0.5, "draft": 0.002, "large": 0.004, "other": self.clock.now - begun},
        )
        return EFTOutput(
            sequences=torch.cat([input_ids, torch.full((batch, self.tokens), 7)], dim=1), stats=stats
        )


@pytest.fixture
def log() -> list[tuple[str, int, int]]:
    return []


@pytest.fixture
def result(log: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch) -> comparison.Comparison:
    clock = Clock()
    monkeypatch.setattr(turns, "perf_counter", clock)
    decoders = {
        "slow": FakeDecoder("slow", log, clock, [100, 4, 2, 4, 2], tokens=4),
        "fast": FakeDecoder("fast", log, clock, [100, 1, 1, 2, 2], tokens=8),
    }
    return compare(decoders, PROMPTS * 2, reference="slow", seed=5, max_new_tokens=9)


def test_decoders_take_turns(result: comparison.Comparison, log: list[tuple[str, int, int]]) -> None:
    warm_up = [("slow", 1, 5), ("fast", 1, 5)]
    slow_first, fast_first = ("slow", "fast"), ("fast", "slow")
    turns = [
        (name, prompt, seed)
        for prompt, seed, order in (
            (1, 5, slow_first),
            (3, 6, fast_first),
            (1, 7, slow_first),
            (3, 8, fast_first),
        )
        for name in order
    ]
    assert log == warm_up + turns


def test_runs_pause_for_each_other(log: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("greenlet", reason="the extra [bench] is not installed")
    clock = Clock()
    monkeypatch.setattr(turns, "perf_counter", clock)
    decoders = {
        "reference": FakeDecoder("reference", log, clock, [4, 4, 8], tokens=4),
        "slow": FakeDecoder("slow", log, clock, [8, 8, 16], tokens=4),
        "fast": FakeDecoder("fast", log, clock, [1, 1, 2, 3, 1, 1, 1, 1], tokens=4),
    }
    on_run = Mock()
    result = compare(
        decoders, PROMPTS, reference="reference", turn_seconds=2, on_run=on_run, max_new_tokens=9
    )
    assert result.turn_seconds == 2
    # Who is fast answers until the reference has, and the time of others counts for nobody.
    assert result["reference"].run_seconds == (4, 8) and result["slow"].run_seconds == (8, 16)
    assert [name for name, *_ in log[3:7]] == ["reference", "slow", "fast", "fast"]
    assert result["fast"].run_seconds == pytest.approx((1.5, 1.4))
    assert [name for name, *_ in log].count("fast") == 8
    assert result["fast"].rounds == 4 and result["fast"].run_tokens == (4, 4)
    assert result["slow"].milliseconds_per_round["other"] == pytest.approx(1000 * (8 + 16) / 4)
    assert result["slow"].seconds_to_first_token.median == pytest.approx(3)
    assert on_run.call_count == 3 * len(decoders)


def test_copies_of_the_reference_count_as_its_own_runs(
    log: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("greenlet", reason="the extra [bench] is not installed")
    clock = Clock()
    monkeypatch.setattr(turns, "perf_counter", clock)
    decoders = {
        "reference": FakeDecoder("reference", log, clock, [4, 4, 4], tokens=4),
        "other": FakeDecoder("other", log, clock, [4] * 9, tokens=4),
        "fast": FakeDecoder("fast", log, clock, [2] * 30, tokens=4),
    }
    copies = [FakeDecoder(f"copy {index}", log, clock, [4, 6, 8], tokens=4) for index in range(2)]
    on_run = Mock()
    result = compare(
        decoders, PROMPTS, reference="reference", copies=copies, turn_seconds=2, on_run=on_run,
        max_new_tokens=9,
    )  # fmt: skip
    # Far from each other, and each turn begins with another.
    assert [name for name, *_ in log[:5]] == ["reference", "copy 0", "other", "copy 1", "fast"]
    assert result["reference"].run_seconds == pytest.approx([(4 + 6 + 6) / 3, (4 + 8 + 8) / 3])
    assert result["reference"].ratio == Spread(1, 1, 1, 1, 1) and result["reference"].run_tokens == (4, 4)
    assert result["other"].ratio.largest == pytest.approx(20 / 3 / 4)
    # Who is fast answers until the reference and its copies have.
    assert [name for name, *_ in log].count("fast") > 3
    assert on_run.call_count == 3 * len(decoders)


def test_ratios_are_taken_within_pairs(result: comparison.Comparison) -> None:
    assert result["slow"].tokens_per_second == Spread(1.5, 1.0, 2.0, 1.0, 2.0)
    assert result["slow"].ratio == Spread(1, 1, 1, 1, 1)
    # 8, 8, 4, 4 tokens a second against 1, 2, 1, 2.
    assert result["fast"].ratio == Spread(4.0, 3.5, 5.0, 2.0, 8.0)
    assert result.ratio("slow", "fast") == Spread.of([1 / 8, 1 / 4, 1 / 4, 1 / 2])


def test_counts_are_over_all_runs(result: comparison.Comparison) -> None:
    row = result["fast"]
    assert row.run_tokens == (8, 8, 8, 8) and row.run_seconds == (1, 1, 2, 2)
    assert row.tokens_per_round == 4.0 and row.large_calls_per_token == 0.25
    # Two runs of 3 of 4 tested tokens, two of 2 of 3.
    assert row.tested_tokens == 14 and row.acceptance_rate == pytest.approx(10 / 14)
    assert row.expected_acceptance == pytest.approx((8 * 0.5 + 6 * 0.9) / 14)
    assert tuple(row.milliseconds_per_round) == PHASES
    assert row.milliseconds_per_round["draft"] == pytest.approx(1.0)
    assert row.milliseconds_per_round["verify"] == 0.0 and row.prefill_milliseconds == 500
    assert row.same_output == 0 and result["slow"].same_output == 4
    assert row.rounds == 8 and row.drafted_per_round == 2
    assert row.accepted_by_position == pytest.approx((6 / 8, 4 / 6))
    # 2 ms of drafting in two rounds that make 8 tokens.
    assert row.phases_per_token["draft"] == pytest.approx(0.25)


def test_one_sequence_is_watched_token_by_token(result: comparison.Comparison) -> None:
    # Runs of 4, 2, 4, 2 seconds: the first of four tokens after a quarter, three in the rest.
    assert result["slow"].seconds_to_first_token.median == pytest.approx(0.75)
    assert result["slow"].milliseconds_per_token == Percentiles.of([1000.0] * 6 + [500.0] * 6)


def test_a_batch_is_watched_sequence_by_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(turns, "perf_counter", clock)
    decoder = FakeDecoder("slow", [], clock, [100.0, 4.0], tokens=4)
    batch = PromptBatch(torch.tensor([[1, 2], [3, 4]]))
    row = compare({"slow": decoder}, [batch], reference="slow", max_new_tokens=9)["slow"]
    assert row.seconds_to_first_token.median == 1.0
    assert row.milliseconds_per_token == Percentiles.of([1000.0] * 6)
    assert row.run_tokens == (8,) and row.tokens_per_round == 2 and row.drafted_per_round == 2


def test_what_is_not_streamed_comes_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(turns, "perf_counter", clock)

    class Whole(FakeDecoder):
        def generate(self, *arguments: Any, streamer: Any, **options: Any) -> EFTOutput:
            return super().generate(*arguments, streamer=lambda *_: None, **options)

    batch = PromptBatch(torch.tensor([[1, 2], [3, 4]]))
    decoder = Whole("slow", [], clock, [100.0, 4.0], tokens=4)
    row = compare({"slow": decoder}, [batch], reference="slow", max_new_tokens=9)["slow"]
    assert row.seconds_to_first_token.median == 4.0
    assert row.milliseconds_per_token == Percentiles.of([4000.0])


def test_json_has_it_all(result: comparison.Comparison) -> None:
    data = json.loads(json.dumps(result.to_dict()))
    assert data["reference"] == "slow" and data["generation_options"] == {"max_new_tokens": 9}
    assert data["measurements"][1]["ratio"]["median"] == 4.0
    assert Comparison.from_dict(data) == result


def test_one_value_is_its_own_spread() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"reference": "other"}, "reference"),
        ({"batches": []}, "batch"),
        ({"batches": [*PROMPTS, PromptBatch(torch.ones(2, 3))]}, "same number"),
    ],
)
def test_refusals(arguments: dict[str, Any], words: str) -> None:
    decoders = {"slow": FakeDecoder("slow", [], Clock(), [], 1)}
    with pytest.raises(ValueError, match=words):
        compare(decoders, **{"batches": PROMPTS, "reference": "slow", **arguments})


def test_environment_names_the_machine() -> None:
    found = environment()
    assert found.cpu and found.cores >= 1 and found.threads >= 1
    assert found.torch == torch.__version__ or torch.__version__.startswith(found.torch.split("+")[0])


def test_peak_memory_sees_what_is_held_for_a_while() -> None:
    def hold() -> None:
        torch.ones(2**25)

    idle, busy = (peak_memory(torch.device("cpu"), run) for run in (lambda: None, hold))
    if idle is None or busy is None:
        pytest.skip("this system does not tell")
    assert 100 * 2**20 < busy - idle < 160 * 2**20
