"""What is derived from a benchmark's numbers: the cost model, noise, losses, regressions, pages."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from speculative_eft.bench.analysis import (
    break_evens,
    derived,
    losses,
    noise,
    noise_sentence,
    predictions,
    roofline_share,
)
from speculative_eft.bench.benchmark import Report
from speculative_eft.bench.comparison import PHASES, Comparison, Measurement, Percentiles, Spread
from speculative_eft.bench.cost_model import (
    break_even_batch,
    expected_tokens,
    project,
    speed_up_over_large,
    speed_up_over_naive,
)
from speculative_eft.bench.plan import AGAIN, ASSISTED, LARGE, NAIVE, SPECULATION, TUNED
from speculative_eft.bench.plots import figures, svg
from speculative_eft.bench.published import SHAPES
from speculative_eft.bench.regressions import changes
from speculative_eft.bench.report import html_page

from .conftest import PLAN

CHOSEN = "EFT, block rule, K=auto"


def measurement(name: str, speeds: list[float], reference: list[float], **values: Any) -> Measurement:
    """A decoder that made 100 tokens a run in 100 rounds at those speeds."""
    return Measurement(
        **{
            "name": name,
            "run_tokens": (100,) * len(speeds),
            "run_seconds": tuple(100 / speed for speed in speeds),
            "same_output": 0,
            "tokens_per_second": Spread.of(speeds),
            "ratio": Spread.of([own / other for own, other in zip(speeds, reference, strict=True)]),
            "seconds_to_first_token": Spread.of([0.01]),
            "milliseconds_per_token": Percentiles(1, 2, 3),
            "rounds": 100 * len(speeds),
            "tokens_per_round": 1.0,
            "drafted_per_round": 0.0,
            "tested_tokens": 0,
            "acceptance_rate": None,
            "expected_acceptance": None,
            "accepted_by_position": (),
            "large_calls_per_token": 1.0,
            "milliseconds_per_round": dict.fromkeys(PHASES, 0.0),
            "prefill_milliseconds": 1.0,
            "peak_memory_bytes": None,
            **values,
        }
    )


def with_speeds(report: Report, by_batch: dict[int, dict[str, list[float]]], **values: Any) -> Report:
    """The report with made-up speeds at temperature 1; `values` are of the chosen decoder."""
    results = []
    for result in report.grid():
        speeds = by_batch.get(result.setting.batch)
        if result.setting.temperature == 1 and speeds is not None:
            rows = [
                measurement(name, own, speeds[NAIVE], **(values if name == CHOSEN else {}))
                for name, own in speeds.items()
            ]
            comparison = Comparison(
                NAIVE, result.setting.batch, len(rows[0].run_tokens), 1, 0, {}, tuple(rows)
            )
            results.append(replace(result, comparison=comparison))
    return replace(report, results=results)


def test_published_table_of_the_cost_model() -> None:
    """Values of the model worked out by hand for a = 0.8, c = 0.1, K = 6 and two limits."""
    tokens = 1 + 0.8 + 0.8**2 + 0.8**3 + 0.8**4 + 0.8**5 + 0.8**6
    assert expected_tokens(0.8, 6) == pytest.approx(tokens)
    assert speed_up_over_large(0.8, 6, 0.1) == pytest.approx(tokens / (7 * 0.1 + 1 + 0.1))
    assert speed_up_over_naive(0.8, 6, 0.1) == pytest.approx(2.63, abs=0.005)
    assert expected_tokens(1.0, 4) == 5 and expected_tokens(0.0, 4) == 1


def test_projection_of_two_devices() -> None:
    one, two = (project("llama-2-70b", "llama-2-7b", devices, 1e12, 0.9) for devices in (1, 2))
    # 68.98e9 parameters, less the 0.26e9 of the embeddings.
    assert one.large_bytes == pytest.approx(2 * 68.71e9, rel=1e-3)
    assert one.small_bytes == pytest.approx(2 * 6.607e9, rel=1e-3)
    assert one.large_milliseconds == pytest.approx(137.4, rel=1e-3)
    assert two.cost_ratio == pytest.approx(2 * one.cost_ratio) == pytest.approx(0.1923, rel=1e-3)
    assert two.tokens_per_second == pytest.approx(two.over_large / 0.0687, rel=1e-3)
    others = [speed_up_over_large(0.9, count, two.cost_ratio) for count in range(1, 20)]
    assert two.over_large == max(others)
    with pytest.raises(ValueError, match="llama-2-70b"):
        project("llama-9", "llama-2-7b", 1, 1e12, 0.9)
    assert "llama-2-13b" in SHAPES


def test_break_even_lies_between_what_was_measured() -> None:
    assert break_even_batch([(1, 2.0), (4, 1.5), (16, 0.5)]) == pytest.approx(8)
    assert break_even_batch([(1, 0.9), (4, 0.5)]) == 1
    assert break_even_batch([(1, 2.0), (4, 1.5)]) is None


def test_predictions_come_from_naive_steps_and_expected_acceptance(report: Report) -> None:
    naive = {"draft": 1.0, "large": 4.0, "base": 3.0, "verify": 0.5, "other": 0.0}
    rows = (
        measurement(NAIVE, [10, 10], [10, 10], milliseconds_per_round=naive),
        measurement(LARGE, [20, 20], [10, 10]),
        measurement(
            CHOSEN, [25, 35], [10, 10], expected_acceptance=0.5, drafted_per_round=1.0, tokens_per_round=1.4
        ),
        measurement(CHOSEN + AGAIN, [30, 30], [10, 10], expected_acceptance=0.5),
    )
    (row,) = predictions(Comparison(NAIVE, 1, 2, 1, 0, {}, rows))
    assert (row.name, row.cost_ratio, row.tokens_per_round) == (CHOSEN, 0.5, 1.5)
    assert row.over_large == pytest.approx(1.5 / 2.5) and row.over_naive == pytest.approx(2 * 1.5 / 2.5)
    assert (row.measured_over_naive, row.measured_over_large) == (3.0, 1.5)


def test_noise_is_a_decoder_against_itself(report: Report) -> None:
    made = with_speeds(
        report, {1: {NAIVE: [10, 10, 10], CHOSEN: [20, 20, 20], CHOSEN + AGAIN: [20.4, 22, 19]}}
    )
    spread = noise(made)["T=1, batch 1"]
    assert (spread.smallest, spread.median, spread.largest) == pytest.approx((0.95, 1.02, 1.1))
    # The quartiles of 0.95, 1.02 and 1.1 are 0.985 and 1.06.
    assert "at most 2.0%" in noise_sentence(made) and "within 4% of each other" in noise_sentence(made)
    assert set(noise(report)) == {result.setting.label for result in report.grid()}


def test_a_loss_names_the_phase_that_grew(report: Report) -> None:
    speeds = {NAIVE: [10.0], LARGE: [30.0], TUNED: [15.0], CHOSEN: [20.0], CHOSEN + AGAIN: [20.0]}
    grown = {"draft": 7.0, "large": 9.0, "base": 1.0, "verify": 2.0, "other": 0.0}
    made = with_speeds(report, {1: speeds}, milliseconds_per_round=grown, rounds=50, tokens_per_round=2.0)
    large = made.results[0].comparison[LARGE]
    alone = replace(large, milliseconds_per_round={**large.milliseconds_per_round, "large": 6.0})
    rows = tuple(alone if row.name == LARGE else row for row in made.results[0].comparison.measurements)
    made.results[0] = replace(
        made.results[0], comparison=replace(made.results[0].comparison, measurements=rows)
    )
    (loss,) = losses(made)
    assert (loss.label, loss.baseline, loss.ratio.median) == ("T=1, batch 1", LARGE, pytest.approx(2 / 3))
    assert loss.milliseconds == {"draft": 3.5, "large": -1.5, "base": 0.5, "verify": 1.0, "other": 0.0}
    assert "drafting +3500, verification and sampling +1000, the small base +500" in loss.reason
    assert "saved: the large model -1500" in loss.reason
    assert "takes 9.00 ms where one over a token takes 6.00 ms, and gives 2.00 tokens" in loss.reason
    assert "places" not in loss.reason


def test_a_loss_names_the_places_of_sequences_that_are_done(report: Report) -> None:
    speeds = {NAIVE: [10.0], LARGE: [30.0], CHOSEN: [20.0], CHOSEN + AGAIN: [20.0]}
    # 100 tokens, two at a time, in 50 rounds of two places.
    (loss,) = losses(with_speeds(report, {2: speeds}, rounds=50, tokens_per_round=2.0))
    assert loss.label == "T=1, batch 2"
    assert "50% of the places in its rounds" in loss.reason


def test_break_even_of_a_report(report: Report) -> None:
    speeds = {
        1: {NAIVE: [10.0], LARGE: [15.0], CHOSEN: [30.0]},
        2: {NAIVE: [10.0], LARGE: [30.0], CHOSEN: [20.0]},
    }
    found = {
        row["baseline"]: row["batch"]
        for row in break_evens(with_speeds(report, speeds))
        if row["temperature"] == 1
    }
    assert found == {NAIVE: None, LARGE: pytest.approx(2 ** (1 / (1 + 1 / 3)))}


def test_the_roofline_counts_the_weights_of_a_round(report: Report) -> None:
    on_gpu = replace(
        report,
        bandwidth=1e9,
        models=[
            {"role": "large_base", "bytes": 4_000_000},
            {"role": "small_tuned[0]", "bytes": 500_000},
            {"role": "small_tuned[1]", "bytes": 500_000},
            {"role": "small_base", "bytes": 1_000_000},
        ],
    )
    split = {**dict.fromkeys(PHASES, 0.0), "large": 20.0}
    row = measurement(CHOSEN, [10], [10], drafted_per_round=4.0, milliseconds_per_round=split)
    assert roofline_share(on_gpu, row) == pytest.approx((4 + 5 * 1 + 1) / 20)
    assert roofline_share(on_gpu, replace(row, name=LARGE)) == pytest.approx(4 / 20)
    assert roofline_share(on_gpu, replace(row, name=SPECULATION)) == pytest.approx((4 + 5 * 1) / 20)
    assert roofline_share(on_gpu, replace(row, name=ASSISTED)) is None
    assert roofline_share(report, row) is None


def test_regressions_are_larger_than_the_noise(report: Report) -> None:
    def speeds(chosen: float, again: float = 1.0, spread: float = 0.0) -> Report:
        own = [chosen * (1 + spread), chosen, chosen * (1 - spread)]
        rows = {NAIVE: [10.0] * 3, CHOSEN: own, CHOSEN + AGAIN: [speed * again for speed in own]}
        return with_speeds(report, {1: rows})

    def verdicts(before: Report, after: Report) -> dict[str, str]:
        return {change.name: change.verdict for change in changes(before, after)}

    assert verdicts(speeds(20), speeds(20)) == {NAIVE: "same", CHOSEN: "same"}
    assert verdicts(speeds(20), speeds(18)) == {NAIVE: "same", CHOSEN: "slower"}
    assert verdicts(speeds(20), speeds(22)) == {NAIVE: "same", CHOSEN: "faster"}
    assert verdicts(speeds(20), speeds(19.2)) == {NAIVE: "same", CHOSEN: "same"}
    # A decoder that differs from itself by 15%, or by as much from pair to pair, tells nothing about 10%.
    assert verdicts(speeds(20, again=1.15), speeds(18)) == {NAIVE: "same", CHOSEN: "same"}
    assert verdicts(speeds(20), speeds(18, again=1.15)) == {NAIVE: "same", CHOSEN: "same"}
    assert verdicts(speeds(20, spread=0.3), speeds(18)) == {NAIVE: "same", CHOSEN: "same"}
    # What counts is the share by which pairs differ, of twenty times naive EFT's speed too.
    assert verdicts(speeds(200, spread=0.02), speeds(180)) == {NAIVE: "same", CHOSEN: "slower"}
    slower = replace(
        with_speeds(report, {1: {NAIVE: [5.0] * 3, CHOSEN: [10.0] * 3, CHOSEN + AGAIN: [10.0] * 3}})
    )
    assert verdicts(speeds(20), slower) == {NAIVE: "slower", CHOSEN: "same"}
    with pytest.raises(ValueError, match="no setting"):
        changes(speeds(20), replace(report, results=[]))
    with pytest.raises(ValueError, match="simulated"):
        changes(speeds(20), replace(speeds(20), simulated_acceptance=0.9))


def test_the_page_stands_alone_and_says_it_all(report: Report) -> None:
    drawn = figures(report)
    assert set(drawn) == {"draft-length", "acceptance", "phases", "batch", "sweeps"}
    drawings = {name: (caption, svg(figure, "x.json")) for name, (caption, figure) in drawn.items()}
    page = html_page(
        replace(report, projections=[project("llama-2-70b", "llama-2-7b", 2, 1e12, 0.9)]), drawings
    )
    assert page.count("<svg") == 5 and "<?xml" not in page
    assert not re.search(r'(src|href)="(http|/)', page)
    for result in report.results:
        assert result.setting.label in page
    for words in ("Projection (not measured)", "Noise", "Break-even", report.environment.torch, "--quick"):
        assert words in page
    assert "imulated" not in page and "Unfinished" not in page
    assert "Unfinished: 1 settings" in html_page(replace(report, results=report.results[:-1]), {})


def test_the_same_numbers_give_the_same_picture(report: Report) -> None:
    one, two = (svg(figures(report)["phases"][1], "x.json") for _ in range(2))
    assert one == two and "x.json" in one


def test_simulated_acceptance_is_the_one_asked_for_and_is_said_everywhere(simulated: Report) -> None:
    for result in simulated.results:
        row = result.comparison["EFT, block rule, K=2"]
        assert row.acceptance_rate is not None
        error = (0.9 * 0.1 / row.tested_tokens) ** 0.5
        assert abs(row.acceptance_rate - 0.9) < 5 * error and row.tested_tokens > 50
        assert row.expected_acceptance == pytest.approx(row.acceptance_rate, abs=1e-3)
        # Ordinary speculation meets the same chance.
        assert result.comparison["large, drafts by small base"].acceptance_rate == pytest.approx(
            0.9, abs=0.08
        )
    drawn = figures(simulated)
    assert drawn and all(
        "simulated acceptance" in [text.get_text() for text in figure.texts] for _, figure in drawn.values()
    )
    page = html_page(simulated, {})
    assert "Simulated:" in page and "(simulated acceptance)" in page


def test_what_is_derived_goes_to_json(report: Report) -> None:
    found = derived(report)
    assert set(found) == {"noise", "predictions", "losses", "break_even_batches", "roofline_shares"}
    assert {row["name"] for row in found["predictions"]["T=1, batch 1"]} == {
        f"EFT, {rule} rule, K={count}" for rule in PLAN.rules for count in PLAN.draft_tokens
    }
