"""The benchmark scripts of the kernels run, on tiny shapes; and what they compare with does the same work."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

from speculative_eft.bench import machine, timing
from speculative_eft.bench import script as script_module
from speculative_eft.bench.comparison import Spread
from speculative_eft.bench.kernels import verify as verify_script
from speculative_eft.bench.script import Script, start
from speculative_eft.bench.timing import Timing, reference_kernels, time_operation
from speculative_eft.kernels import noise as noise_module
from speculative_eft.kernels.verify import RULES

CPU = torch.device("cpu")
SCRIPTS = ("verify", "filters", "draft", "noise", "commit", "memory", "attention", "layers")


@pytest.fixture(scope="module", autouse=True)
def _facts_once() -> Iterator[None]:
    """Versions and hardware are asked for once."""
    found = script_module.facts(CPU)
    assert found["device"] == "cpu" and found["torch"] and len(found["sources_sha256"]) == 64
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script_module, "facts", lambda device: found)
        yield


def new_script(path: Path | None = None, seconds: float = 100) -> Script:
    return start("test", CPU, quick=True, path=path, seconds=seconds)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_measures_both_sides(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "verify":
        pytest.importorskip("triton", reason="triton is not installed")
    script = new_script(tmp_path / "result.json")
    import_module(f"speculative_eft.bench.kernels.{name}").measure(script)
    script.show()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == script.content
    assert all(row["microseconds"] > 0 and row["method"] == "wall clock" for row in result["rows"])
    implementations = {row["implementation"] for row in result["rows"]}
    assert ("torch sdpa" if name == "attention" else "torch reference") in implementations
    if name == "verify":
        assert "mix, softmax, probabilities" in implementations
    assert "no measurements" in capsys.readouterr().out


def test_what_fails_is_a_row_and_what_is_not_measured_meets_no_bar() -> None:
    def raising(error: Exception) -> Callable[[], object]:
        def operation() -> None:
            raise error

        return operation

    script = new_script()
    assert script.measure("a", raising(torch.OutOfMemoryError()), {}, cold=True) is None
    assert script.measure("b", raising(ValueError("broken\nbadly")), {}, cold=True) is None
    script.deadline = 0.0
    assert script.measure("c", lambda: None, {}, cold=True) is None
    script.bar("fast", None, True)
    script.bar("slow", 3.0, False)
    assert script.content["rows"] == [
        {"implementation": "a", "left_out": "does not fit the memory"},
        {"implementation": "b", "failed": "ValueError: broken"},
        {"implementation": "c", "left_out": "no time left"},
    ]
    assert [bar["met"] for bar in script.content["bars"]] == [False, False]


def test_a_share_is_of_the_copys_bandwidth() -> None:
    script = new_script()
    script.bandwidth = 1e9
    microseconds = script.measure("a", lambda: None, {}, cold=True, bytes_moved=500)
    (row,) = script.content["rows"]
    assert row["share_of_copy"] == pytest.approx(0.5 / microseconds)


def test_bars_of_verification() -> None:
    script = new_script()
    script.bandwidth = 1e12
    single = {}
    for rule in RULES:
        single |= {("ours", rule, False, False): 12.0, ("ours", rule, False, True): 20.0}
        single |= {("reference", rule, False, False): 130.0, ("compiled", rule, False, False): 30.0}
    verify_script.add_bars(script, single, None, None)
    by_bar = {bar["bar"]: bar for bar in script.content["bars"]}
    assert len(by_bar) == 5 * 3
    for rule in RULES:
        own = [bar["met"] for name, bar in by_bar.items() if name.startswith(rule)]
        # 12 of 15 microseconds, 10.8 of 10 times, 2.5 of 3 times, 0.67 of 0.5 added; no large batch.
        assert own == [True, True, False, False, False]


@pytest.mark.parametrize("with_filters", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_the_compiled_reference_is_one_graph(
    rule: str, with_filters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU, where noise is not numpy's.
    monkeypatch.setattr(noise_module, "_in_host_memory", lambda tensor: False)
    of = verify_script.inputs(2, 2, 30, CPU)
    with reference_kernels():
        arguments = (of, rule, False, of.sampling(with_filters))
        compiled = verify_script.compiled_reference("eager")(*arguments)
        for ours, wanted in zip(compiled, verify_script.call(*arguments), strict=True):
            assert torch.equal(ours, wanted)


def test_the_kernel_that_takes_probabilities_commits_the_same_tokens() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    of = verify_script.inputs(40, 3, 60, CPU)
    of.draft_lens.copy_(torch.arange(40) % 4)
    by_probabilities = verify_script.by_probabilities(of)
    assert by_probabilities is not None
    accepted, following = by_probabilities()
    with reference_kernels():
        wanted = verify_script.call(of, "token", False, of.sampling(False))
    assert 0 < accepted.sum() < of.draft_lens.sum()
    assert torch.equal(accepted, wanted[0])
    assert torch.equal(following, wanted[1])


def test_scripts_want_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["noise"])
    with pytest.raises(SystemExit) as stopped:
        import_module("speculative_eft.bench.kernels.noise").main()
    assert stopped.value.code == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err


def test_the_digest_is_of_every_folder_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / "a_package", tmp_path / "a_package" / "models", tmp_path / "a_package" / "decoding"]
    for folder in folders:
        folder.mkdir()
        (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(machine, "_SOURCES", ("a_package", "a_package.models", "a_package.decoding"))
    seen = {machine._sources_digest()}
    for folder in folders:
        (folder / "it.py").write_text("one")
        seen.add(machine._sources_digest())
        (folder / "it.py").write_text("two")
        seen.add(machine._sources_digest())
    assert len(seen) == 7
    (tmp_path / "a_package" / "notes.md").touch()
    assert machine._sources_digest() in seen


def test_a_copy_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    a_millisecond = Timing(Spread.of([1e6]), 1, True, "wall clock")
    monkeypatch.setattr(timing, "time_operation", lambda *arguments, **options: a_millisecond)
    assert timing.copy_bandwidth(CPU) == 2 * 2**24


def test_on_a_cpu_the_wall_clock_times() -> None:
    timed = time_operation(lambda: None, CPU, cold=True)
    assert timed.method == "wall clock" and not timed.cold
