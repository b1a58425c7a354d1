"""The engine's benchmark runs on a CPU, and what its figures mean is what they say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from speculative_eft.bench import engine, readme
from speculative_eft.bench import script as script_module
from speculative_eft.bench.baselines import SingleModelDecoder
from speculative_eft.bench.comparison import Spread
from speculative_eft.bench.script import Script
from speculative_eft.bench.shapes import LLAMA, QWEN, TINY, StepBytes, random_trio, step_bytes, weight_bytes
from speculative_eft.bench.windows import (
    PlainLoop,
    Start,
    Window,
    forced_acceptance,
    run_window,
    warm_up_rounds,
)
from speculative_eft.decoding import EFTConfig, EFTDecoder, NaiveEFTDecoder
from speculative_eft.decoding.round import RoundPlan
from speculative_eft.models import EFTModels, StepCosts, memory

from ..uncaptured import as_with_graphs

CPU = torch.device("cpu")
DEMO = {"trio": "demo", "batch": 2}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Script:
    monkeypatch.setattr(script_module, "facts", lambda device: {"device": "cpu"})
    return script_module.start("engine", CPU, quick=True, path=tmp_path / "result.json", seconds=100)


@pytest.fixture(autouse=True)
def costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the costs of a busy machine it may be best to draft nothing."""
    monkeypatch.setattr(EFTModels, "step_costs", lambda *arguments: StepCosts(0.25, 0.02))


def tiny_start(batch: int, limit: int) -> Start:
    models = random_trio(TINY, torch.float32, CPU)
    for runner in models.runners().every:
        runner.reserve(batch, 40 + limit + 20)
        runner.prefill(torch.randint(3, 100, (batch, 39)), torch.full((batch,), 39))
    lengths = torch.full((batch,), 40)
    return Start(models, torch.full((batch,), 5), lengths, 40, limit)


def test_every_decoder_has_its_row_and_every_bar_its_figure(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.measure(script)
    engine.show(script)
    assert script.path is not None
    assert json.loads(script.path.read_text()) == script.content
    rows = {(row["trio"], row["decoder"]): row for row in script.content["rows"]}
    decoders = {engine._BY_COST_MODEL[0], "EFT, K=3", engine.NAIVE, engine.ALONE}
    assert {name for trio, name in rows if trio == "demo"} == decoders
    assert {name for trio, name in rows if trio == "tiny"} == decoders | {engine.PLAIN, "EFT, phases"}
    for (trio, name), row in rows.items():
        if name == "EFT, phases":
            assert list(row["phase_microseconds"]) == [
                "draft", "score, large", "score, small", "score, side by side", "verify", "commit"
            ]  # fmt: skip
            continue
        assert row["kind"] == ("measured" if trio == "demo" else "simulated")
        assert row["tokens_per_second"]["median"] > 0 and row["host_microseconds"] > 0
        assert row["roofline_milliseconds"] > 0 and row["graph_bytes"] is None
        if name.startswith("EFT"):
            assert set(row["times"]) >= {engine.NAIVE, engine.ALONE}
            assert 1 < row["tokens_per_round"] <= 17
        else:
            assert row["tokens_per_round"] == 1
    bars = [bar["bar"] for bar in script.content["bars"]]
    assert len(bars) == 6 and all(bar["measured"] is not None for bar in script.content["bars"])
    assert sum("simulated acceptance of 0.9" in bar for bar in bars) == 3
    assert "no measurements" in capsys.readouterr().out


def test_forced_acceptance_is_that_of_independent_tokens() -> None:
    start = tiny_start(64, 200)
    decoder = EFTDecoder(start.models, EFTConfig(draft_tokens=4))
    for chance in (0.0, 0.6, 1.0):
        with forced_acceptance(torch.full((1,), chance)):
            windows = [run_window(decoder, start, seed, 12) for seed in range(4)]
        accepted, tested = (sum(getattr(w, name) for w in windows) for name in ("accepted", "tested"))
        assert abs(accepted / tested - chance) < 5 * (chance * (1 - chance) / tested) ** 0.5 + 1e-9
        per_round = sum(window.tokens for window in windows) / (4 * 12 * 64)
        expected = sum(chance**i for i in range(5))
        assert abs(per_round - expected) < 0.15 if 0 < chance < 1 else per_round == expected
    # Afterwards acceptance is the models' own again.
    own = run_window(decoder, start, 0, 12)
    assert own.accepted == run_window(decoder, start, 0, 12).accepted
    assert 0 < own.accepted < own.tested


def test_windows_end_with_their_rounds_or_their_sequences() -> None:
    start = tiny_start(3, 10)
    naive = NaiveEFTDecoder(start.models)
    assert run_window(naive, start, 0, 4).tokens == 12
    whole = run_window(naive, start, 0, None)
    assert whole.tokens == 30 and len(whole.drafted) == 10
    with forced_acceptance(torch.ones(1)):
        window = run_window(EFTDecoder(start.models, EFTConfig(draft_tokens=4)), start, 0, None)
    assert window.tokens == 30 and window.drafted == (4, 4)


def test_a_round_reads_weights_and_caches_once_a_pass() -> None:
    models = random_trio(TINY, torch.bfloat16, CPU)
    large, small = step_bytes(models.large_base), step_bytes(models.small_base)
    embedding, layer = 100 * 32, 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    assert small.weights == 2 * (embedding + layer + 32)
    # Keys and values of two heads of 8 numbers.
    assert large.cache == 2 * small.cache == 2 * (2 * 2 * 8 * 2)
    assert weight_bytes(TINY, torch.bfloat16) == 2 * (3 * 2 * embedding + 4 * layer + 3 * 32)
    found = engine.roofline_bytes(models, drafted=4, tokens=50)
    assert found == large.of(50) + 6 * small.of(50)
    copied = StepBytes(small.weights // 2, small.cache).of(50)
    assert (
        engine.roofline_bytes(models, 4, 50, eight_bits=True) == large.of(50) + 2 * small.of(50) + 4 * copied
    )
    assert engine.roofline_bytes(models, 0, 50, alone=True) == large.weights + 50 * large.cache


def test_ratios_and_the_roofline_are_of_all_windows() -> None:
    start = tiny_start(1, 10)
    slow, fast = Window(2.0, 2.0, 0.0, (2, 2), 6, 0, 0), Window(2.0, 2.0, 0.0, (4, 4), 10, 0, 0)
    assert engine._ratio([fast, fast], [slow, fast]) == Spread.of([10 / 6, 1])
    contest: Any = SimpleNamespace(start=start, script=SimpleNamespace(bandwidth=1e9))
    # In the middle of a window a sequence has half the tokens that it gains there, 8 in the mean.
    needed = engine.roofline_bytes(start.models, 3, 40 + 8 / 2)
    assert engine._roofline_seconds(contest, "EFT, K=3", [slow, fast]) == needed / 1e9


def test_the_shapes_are_those_of_the_published_models() -> None:
    for shape, billions in ((LLAMA, 8.03 + 2 * 1.236), (QWEN, 32.76 + 2 * 1.544)):
        assert abs(weight_bytes(shape, torch.bfloat16) / 2e9 - billions) < 0.01


def test_the_plain_loop_draws_from_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    models = random_trio(TINY, torch.float32, CPU)
    plain, first, laws = PlainLoop(models), torch.tensor([3, 4]), []

    def draw(law: torch.Tensor, count: int) -> torch.Tensor:
        laws.append(law)
        return law.topk(count).indices

    monkeypatch.setattr(torch, "multinomial", draw)
    plain.start(2, 0)
    last = plain.run(first, 2)
    tokens = torch.stack([first, laws[0].argmax(-1)], dim=1)
    with torch.no_grad():
        large, tuned, base = (model(tokens).logits for model, _ in plain.networks)
    target = (large + tuned - base).softmax(-1)
    torch.testing.assert_close(torch.stack(laws, dim=1), target)
    assert torch.equal(last, laws[1].argmax(-1))
    plain.start(2, 10)
    plain.run(first, 3)
    assert [cache.get_seq_length() for cache in plain.caches] == [13, 13, 13]


def test_windows_of_captured_rounds_one_ahead_of_the_host() -> None:
    start = tiny_start(3, 40)
    plain, captured = (engine._decoders(start.models, [3], 3) for _ in range(2))
    for name, decoder in captured.items():
        assert isinstance(decoder, EFTDecoder | SingleModelDecoder)
        graphs = as_with_graphs(decoder)
        adaptive = name in engine._BY_COST_MODEL
        lengths = [1, 2] if adaptive else [decoder.longest_draft]
        warm_up_rounds(decoder, start, lengths, narrowing=True)
        # Of all rows, and of those that are left as sequences end.
        spans = {key[0]: key[-1] for key in graphs.keys}
        assert spans == {3: 1024, 2: 1024, 1: 1024}
        assert decoder.captured is not None
        (kind,) = decoder.captured.kinds
        for seed in range(2):
            window = run_window(decoder, start, seed, None)
            assert window.tokens == run_window(plain[name], start, seed, None).tokens == 120
            assert len(window.drafted) >= 2
        assert decoder.captured.kinds == [kind]


def test_fewer_rows_are_warmed_up_though_all_rounds_together_are_longer_than_the_sequences() -> None:
    start = tiny_start(8, 20)
    decoder = EFTDecoder(start.models, EFTConfig(cost_ratio=0.25, row_cost=0.02))
    graphs = as_with_graphs(decoder)
    warm_up_rounds(decoder, start, [1, 2, 3], narrowing=True)
    kinds = {(rows, drafted) for rows in (8, 4, 2, 1) for drafted in (1, 2, 3)}
    assert {key[:2] for key in graphs.keys} == kinds


def test_a_cost_model_that_never_drafts_warms_up_no_drafts() -> None:
    models = random_trio(TINY, torch.float32, CPU)
    for row_cost, lengths in ((0.02, list(range(16))), (1.5, [0])):
        decoder = EFTDecoder(models, EFTConfig(cost_ratio=0.25, row_cost=row_cost))
        assert engine._expected_lengths(decoder, ()) == lengths


def test_drafts_of_eight_bits_are_measured_for_one_sequence() -> None:
    start = tiny_start(1, 30)
    decoders = engine._decoders(start.models, [3], 1)
    assert [name for name in decoders if "8 bits" in name] == [
        engine._BY_COST_MODEL[1],
        "EFT, drafts of 8 bits, K=3",
    ]
    assert run_window(decoders["EFT, drafts of 8 bits, K=3"], start, 0, None).tokens == 30
    assert not any("8 bits" in name for name in engine._decoders(start.models, [3], 2))


def test_the_usual_sampling_is_measured_for_one_sequence(script: Script) -> None:
    start, chance = tiny_start(1, 60), torch.full((1,), 0.9)
    decoders = engine._decoders(start.models, [2, 3], 1)
    (name,) = (name for name in decoders if "top_k" in name)
    assert name == "EFT, top_k=50, K=3"
    assert not any("top_k" in other for other in engine._decoders(start.models, [3], 2))
    samplings = []

    def seen(plan: RoundPlan) -> RoundPlan:
        samplings.append((plan.sampling.top_k, plan.draft_sampling.top_k))
        return plan

    assert isinstance(decoders[name], EFTDecoder) and decoders[name].config.draft_weights == "own"
    for decoder in decoders.values():
        new_plan = decoder.new_plan
        decoder.new_plan = lambda *inputs, made=new_plan: seen(made(*inputs))  # type: ignore[method-assign]
    labels = {"trio": "tiny", "context": 40, "batch": 1}
    contest = engine._Contest(script, engine._SMOKE, start, labels, decoders, None, None)
    with forced_acceptance(chance):
        contest.turn(0, 0.9, 3)
    filtered = [name for name, found in zip(decoders, samplings, strict=True) if found != (None, None)]
    assert filtered == [name]
    top_k, of_drafts = samplings[list(decoders).index(name)]
    assert top_k is not None and top_k.tolist() == [50] and of_drafts is top_k
    for other in decoders:
        engine._add_row(contest, other, 0.9)
    # A row of its own kind, which no bar counts.
    for row in script.content["rows"]:
        if row["decoder"] == name:
            row["host_microseconds"] = row["times_roofline"] = 1e9
    engine._add_bars(contest, 0.9)
    assert max(bar["measured"] for bar in script.content["bars"] if bar["measured"]) < 1e9
    kinds = [row["decoder"].rpartition(", K=")[0] for row in readme._best(script.content)]
    assert kinds == ["EFT", "EFT, drafts of 8 bits", "EFT, top_k=50"]


def test_what_does_not_fit_fails_or_comes_too_late_is_a_row(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row_of(step: Any) -> dict[str, Any]:
        engine._guarded(script, DEMO, step)
        row: dict[str, Any] = script.content["rows"][-1]
        return row

    def raising(error: Exception) -> Any:
        def step() -> None:
            raise error

        return step

    assert row_of(raising(torch.OutOfMemoryError())) == {**DEMO, "left_out": "does not fit the memory"}
    assert row_of(raising(KeyError("x")))["failed"] == "KeyError: 'x'"
    sweep = dataclasses.replace(engine._SMOKE, trios=(QWEN,))
    monkeypatch.setattr(engine, "free_bytes", lambda device: 10 * 2**30)
    trio = row_of(lambda: engine._measure_trio(script, sweep, QWEN, 2))
    assert trio["left_out"] == "its weights of 66.8 GiB do not fit the 10.0 GiB free"
    monkeypatch.setattr(engine, "free_bytes", lambda device: None)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    engine._measure_trio(script, engine._SMOKE, TINY, 2)
    assert "2 sequences of" in script.content["rows"][-1]["left_out"]
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    models = random_trio(TINY, torch.bfloat16, CPU)
    at = {"trio": "tiny", "context": 40, "batch": 2}
    script.deadline = 0.0
    engine._measure_shape(script, engine._SMOKE, models, at)
    assert script.content["rows"][-2] == {**at, "acceptance": 0.9, "left_out": "no time left"}
    assert script.content["rows"][-1]["decoder"] == "EFT, phases"
    assert row_of(lambda: None)["left_out"] == "no time left"
