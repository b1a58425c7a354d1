"""What a round spends outside the models' passes: the parts, and what is made of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from speculative_eft.bench.machine import environment
from speculative_eft.bench.prompts import prompt_batches
from speculative_eft.bench.round_time import PASSES, load, round_time, table
from speculative_eft.decoding import EFTConfig, EFTDecoder, EFTOutput
from speculative_eft.models import EFTModels

from ..tiny_models import tiny_trio


@pytest.mark.parametrize("batch", [1, 3])
def test_the_parts_of_a_round(batch: int, tmp_path: Path) -> None:
    pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    models = EFTModels.demo()
    prompts = prompt_batches([[5, 6, 7], [8, 9], [4]], batch, 2)
    times = [round_time(models, prompts, temperature, 2, 12) for temperature in (1.0, 0.0)]
    for time in times:
        assert set(PASSES) < set(time.milliseconds)
        assert all(time.milliseconds[part] > 0 for part in PASSES)
        # Below 0 where the steps that are made once more meet a busier machine than the round did.
        assert time.outside.median < 1
    # The passes that are made once more change nothing.
    gains = []
    for seed, prompt in enumerate(prompts, 1):
        output = EFTDecoder(models, EFTConfig(draft_tokens=2, expected_batch=batch)).generate(
            prompt.input_ids, prompt.attention_mask, max_new_tokens=12, do_sample=True, top_k=0,
            eos_token_id=[], seed=seed, return_dict_in_generate=True,
        )  # fmt: skip
        assert isinstance(output, EFTOutput) and output.stats is not None
        gains.append(output.stats.emitted_tokens / output.stats.sequence_rounds)
    assert times[0].tokens_per_round == pytest.approx(sum(gains) / len(gains))
    path = tmp_path / "times.json"
    rounds = [asdict(time) for time in times]
    path.write_text(
        json.dumps({"commit": "a1", "environment": asdict(environment()), "new_tokens": 12, "rounds": rounds})
    )
    line, loaded = load(path)
    assert loaded == times and "commit a1; 12 new tokens" in line
    heads, rows = table(loaded)
    assert {len(row) for row in rows} == {len(heads)} == {3}


def test_rounds_that_are_not_bound_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "torch")
    with pytest.raises(ValueError, match="are not bound"):
        round_time(tiny_trio("gpt2"), prompt_batches([[2, 3]], 1, 1), 1.0, 2, 6)
