"""The benchmark of bodies made by torch.compile: that it measures, and what it prints."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch

from speculative_eft.bench import compiled_bodies
from speculative_eft.bench.comparison import Spread
from speculative_eft.bench.compiled_bodies import FAMILIES, BodyTime, load, table, time_family
from speculative_eft.bench.machine import environment


# torch's own, when it first imports what compiles.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_passes_are_timed_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What compiles takes long, and is not what is tested here.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    settings = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2}
    times = time_family("gpt2", settings, torch.device("cpu"), torch.float32, 3)
    assert [time.rows for time in times] == [1, 5]
    for time in times:
        assert min(time.plain.median, time.compiled.median, time.compile_seconds) > 0
        assert time.times.lower_quartile <= time.times.median <= time.times.upper_quartile
    path = tmp_path / "times.json"
    passes = [asdict(time) for time in times]
    saved = {"commit": "a1", "environment": asdict(environment()), "dtype": "float32", "passes": passes}
    path.write_text(json.dumps(saved))
    line, loaded = load(path)
    assert loaded == times
    assert "a1" in line
    heads, rows = table(loaded)
    assert all(len(row) == len(heads) for row in rows)


def test_what_is_cut_off_has_saved_the_families_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "times.json"
    spread = Spread.of([1.0])

    def time(family: str, *others: object) -> list[BodyTime]:
        if family != next(iter(FAMILIES)):
            raise KeyboardInterrupt
        return [BodyTime(family, rows, spread, spread, spread, 1.0) for rows in (1, 5)]

    monkeypatch.setattr(compiled_bodies, "time_family", time)
    with pytest.raises(KeyboardInterrupt):
        compiled_bodies.main(path)
    _, times = load(path)
    assert times == time(next(iter(FAMILIES)))
