"""docs/kernels.md says what the committed JSON says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from speculative_eft.bench.kernels.page import (
    compiled_markdown,
    measured_markdown,
    results_in,
    with_tables,
)

ROOT = Path(__file__).parent.parent.parent


def test_tables_are_those_of_the_committed_json() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert with_tables(page, *results_in(ROOT / "bench" / "results")) == page


def report(operation: str, variant: str, registers: int, load: int | None) -> dict[str, Any]:
    own = {"operation": operation, "variant": variant, "registers": registers, "load": load}
    return {**own, "target": "sm_90", "spills": 0, "shared": 32, "launches": 2}


def test_variants_of_a_kernel_share_a_row() -> None:
    kernels = [
        report("verify", "score token bf16", 60, 16),
        report("verify", "score token bf16 filtered", 80, None),
        report("verify", "score block bf16", 70, 16),
        report("recall", "vocabulary of 100", 30, None),
    ]
    *_, token, block, recall = compiled_markdown({"triton": "3", "kernels": kernels}).splitlines()
    assert token == "| verify score token | sm_90 | 2 | 60-80 | 0 | 32 | 16 | 2 |"
    assert block == "| verify score block | sm_90 | 1 | 70 | 0 | 32 | 16 | 2 |"
    assert recall == "| recall | sm_90 | 1 | 30 | 0 | 32 | - | 2 |"


def test_times_stand_against_the_floor_and_the_others() -> None:
    case = {"rule": "token", "statistics": False, "batch": 64, "drafted": 8, "vocabulary": 128_256}
    rows = [
        {"implementation": "triton", **case, "microseconds": 200.0, "bytes_moved": 450_000_000},
        {"implementation": "torch reference", **case, "microseconds": 3000.0},
        {"implementation": "torch.compile", **case, "left_out": "no time left"},
        {"implementation": "triton", **case, "batch": 16, "microseconds": 50.0, "bytes_moved": 1},
    ]
    bars = [{"bar": "fast", "measured": None, "met": False}]
    stage = {
        "rows": rows, "bars": bars, "copy_bytes_per_second": 3e12, "launch_floor_microseconds": 2.0,
    }  # fmt: skip
    environment = {"device": "A card", "torch": "2", "triton": "3", "cuda": "13"}
    stages = {
        "kernels.verify": {"result": stage},
        "compile": {"result": {}},
        "kernels.noise": {"result": None},
    }
    text = measured_markdown([{"environment": environment, "stages": stages}])
    assert text.startswith("**A card**, torch 2, Triton 3, CUDA 13;")
    (row,) = [line for line in text.splitlines() if line.startswith("| verify | token")]
    assert row == "| verify | token | 64 | 200.0 | 150.0 | 15.0 | - | - |"
    assert text.splitlines()[-1] == "| verify | fast | - | no |"
    assert "No GPU has measured" in measured_markdown([])
