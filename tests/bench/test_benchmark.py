"""Plans, runs that go on where they ended, and the JSON between them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from speculative_eft.bench.benchmark import Report, check_contexts, run_benchmark, total_runs
from speculative_eft.bench.comparison import Decoder
from speculative_eft.bench.plan import (
    AGAIN,
    ASSISTED,
    BASELINES,
    LARGE,
    LOOP,
    NAIVE,
    build_decoders,
    decoder_names,
)
from speculative_eft.bench.prompts import PromptBatch, prompt_batches, read_prompt_file, with_context
from speculative_eft.bench.turns import Watch, take_turns

from .conftest import OPTIONS, PLAN, TinyTrio

CHOSEN = "EFT, block rule, K=auto"


def test_a_plan_crosses_temperatures_and_batches_and_varies_the_rest() -> None:
    settings = PLAN.settings()
    assert len({setting.label for setting in settings}) == len(settings) == 12
    assert [(s.temperature, s.batch) for s in settings[:4]] == [(1.0, 1), (0.0, 1), (1.0, 2), (0.0, 2)]
    assert [s.label for s in settings[4:] if s.temperature == 1] == [
        "T=1, batch 1, context 12",
        "T=1, batch 1, new_tokens 9",
        "T=1, batch 1, beta 1.5",
        "T=1, batch 1, conservative_top_p 0.9",
    ]
    for setting in settings:
        varied = [
            n for n in ("context", "new_tokens", "beta") if getattr(setting, n) != getattr(settings[0], n)
        ]
        assert varied == ([setting.varied] if setting.varied not in (None, "conservative_top_p") else [])


def test_the_decoders_of_each_setting() -> None:
    first, greedy, batch, *_ = PLAN.settings()
    swept = PLAN.settings()[4]
    rules = {name for name in decoder_names(PLAN, first, False) if name.startswith("EFT")}
    lengths = (1, 2, "auto")
    assert rules == {
        CHOSEN + AGAIN,
        *(f"EFT, {rule} rule, K={length}" for rule in ("block", "token") for length in lengths),
    }
    assert set(BASELINES) < set(decoder_names(PLAN, first, False))
    assert not any("token rule" in name for name in decoder_names(PLAN, greedy, False))
    assert ASSISTED not in decoder_names(PLAN, batch, False)
    assert ASSISTED not in decoder_names(PLAN, first, True)
    assert LOOP not in decoder_names(PLAN, replace(first, conservative_top_p=0.5), False)
    assert decoder_names(PLAN, swept, False) == [NAIVE, LARGE, CHOSEN]


def test_every_setting_and_decoder_is_measured(report: Report) -> None:
    assert [result.setting for result in report.results] == PLAN.settings()
    for result in report.results:
        comparison = result.comparison
        assert [row.name for row in comparison.measurements] == decoder_names(PLAN, result.setting, False)
        assert comparison.runs == (3 if result.setting.varied is None and result.setting.batch == 1 else 2)
        for row in comparison.measurements:
            # Ends of sequences are passed over: every decoder makes the same number of tokens.
            assert set(row.run_tokens) == {result.setting.batch * result.setting.new_tokens}


def test_runs_that_pause_give_what_whole_ones_give(tiny: TinyTrio) -> None:
    pytest.importorskip("greenlet", reason="the extra [bench] is not installed")
    (batch,) = prompt_batches(tiny.prompts, 1, 1)
    kept = tiny.models.large_base.generation_config
    tiny.models.large_base.generation_config = GenerationConfig(top_p=0.9, min_p=0.02)
    try:
        for setting in PLAN.settings()[:2]:
            options = {**OPTIONS, "do_sample": setting.temperature > 0}
            whole, paused = (
                run_alternately(build_decoders(PLAN, setting, tiny.models, None, own), batch, options, own)
                for own in (False, True)
            )
            assert len(whole) == len(decoder_names(PLAN, setting, False)) and paused == whole
    finally:
        tiny.models.large_base.generation_config = kept


@pytest.mark.parametrize("batch", [1, 2])
def test_simulations_draft_by_the_weights_that_would_draft(tiny: TinyTrio, batch: int) -> None:
    setting = replace(PLAN.settings()[0], batch=batch)
    decoders: dict[str, Any] = build_decoders(PLAN, setting, tiny.models, 0.9)
    wanted = tiny.models.drafts_faster_quantised(pair=False) and batch == 1
    assert [len(decoders[name].runners.drafters) for name in (PLAN.chosen, NAIVE)] == [wanted, 0]


def run_alternately(
    decoders: dict[str, Decoder], batch: PromptBatch, options: dict[str, Any], pausing: bool
) -> dict[str, list[int]]:
    """What each decoder gives for one prompt; where they pause, after every round."""
    outputs: dict[str, list[int]] = {}

    def job(name: str, decoder: Decoder) -> Iterator[None]:
        watch = Watch(0.0 if pausing else math.inf)

        class Streamer:
            def put(self, value: Any) -> None:
                watch.pause()

            def end(self) -> None:
                pass

        found = decoder.generate(batch.input_ids, seed=3, streamer=Streamer(), **options)
        outputs[name] = found[0].tolist()
        yield

    with torch.inference_mode():
        take_turns([job(*item) for item in decoders.items()], pausing)
    return outputs


def test_greedy_texts_are_those_of_naive_eft(report: Report) -> None:
    for result in report.results:
        if result.setting.temperature == 0 and result.setting.varied is None:
            for name in (LOOP, CHOSEN, CHOSEN + AGAIN):
                assert result.comparison[name].same_output == result.comparison.runs


def test_json_gives_the_report_back(report: Report, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    report.save(file, {"noise": {"a": [math.nan, math.inf]}})
    assert Report.load(file) == report
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert "NaN" not in file.read_text() and "Infinity" not in file.read_text()


@pytest.mark.parametrize("text", ["{}", "no JSON", '{"format": 99}', "[1]"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "report.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"report\.json"):
        Report.load(file)


def test_a_run_goes_on_where_it_ended(tiny: TinyTrio, report: Report) -> None:
    cut = replace(report, results=report.results[:-1])
    last = report.results[-1].setting
    assert total_runs(cut, len(tiny.prompts)) == len(decoder_names(PLAN, last, False)) * (2 + 1)
    seen, counted = [], []
    run_benchmark(tiny.models, tiny.prompts, cut, seen.append, lambda: counted.append(1), lambda: None)
    assert seen == [last] and len(counted) == 9
    assert [result.setting for result in cut.results] == PLAN.settings()
    assert total_runs(cut, len(tiny.prompts)) == 0


def test_contexts_are_checked_before_anything_runs(tiny: TinyTrio) -> None:
    check_contexts(tiny.models, PLAN, tiny.prompts)
    with pytest.raises(ValueError, match="context of 64 tokens"):
        check_contexts(tiny.models, replace(PLAN, contexts=(None, 60)), tiny.prompts)


def test_prompts_are_made_as_long_as_asked() -> None:
    assert with_context([[1, 2, 3], [4, 5]], 4) == [[5, 1, 2, 3], [2, 3, 4, 5]]
    assert with_context([[1, 2, 3]], 2) == [[2, 3]]


def test_batches_follow_each_other_and_are_padded_on_the_left() -> None:
    first, second = prompt_batches([[1, 2], [3], [4]], 2, 2)
    assert first.input_ids.tolist() == [[1, 2], [0, 3]]
    assert first.attention_mask is not None and first.attention_mask.tolist() == [[1, 1], [0, 1]]
    assert second.input_ids.tolist() == [[0, 4], [1, 2]]
    (plain,) = prompt_batches([[1, 2]], 1, 1)
    assert plain.attention_mask is None


def test_prompt_files(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("one\n\ntwo\\nlines\n")
    assert read_prompt_file(lines) == ["one", "two\nlines"]
    records = tmp_path / "prompts.jsonl"
    records.write_text('{"prompt": "one", "source": "x"}\n{"prompt": "two\\nlines"}\n')
    assert read_prompt_file(records) == ["one", "two\nlines"]
    for bad in ('{"text": "one"}', '"one"', "{", '{"prompt": ""}'):
        records.write_text(f'{{"prompt": "one"}}\n{bad}\n')
        with pytest.raises(ValueError, match="line 2"):
            read_prompt_file(records)
    lines.write_text("\n")
    with pytest.raises(ValueError, match="no prompt"):
        read_prompt_file(lines)
